"""`segue router` and `segue worker`: one process of a cluster that something else puts together, such as Kubernetes."""

from __future__ import annotations

import os
import socket
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli.console import errors_reported, progress_shown
from segue.config import DEFAULT_MODEL, RouterSettings, WorkerSettings

_Model = Annotated[
    str,
    typer.Option(
        envvar="SEGUE_MODEL", help="Model directory, .gguf file, Hub id or name of a stored model; fetched if missing."
    ),
]
_ModelName = Annotated[
    str | None,
    typer.Option(
        envvar="SEGUE_MODEL_NAME",
        help="Name that clients give for it, the same for all processes of a cluster; made from --model if not given.",
        show_default=False,
    ),
]


def router(model: _Model = DEFAULT_MODEL, model_name: _ModelName = None) -> None:
    """Run one router until it gets SIGTERM; running requests may then finish.

    Its settings come from the environment: SEGUE_REDIS and SEGUE_CLUSTER_ID say which cluster it is part of, SEGUE_HOST,
    SEGUE_HTTP_PORT and SEGUE_GRPC_PORT where it listens. Any number of routers may serve one cluster. On one machine, segue up
    does all of this.
    """
    with errors_reported():
        settings = RouterSettings.load(flags=_resolved(model, model_name))
        from router.app import run_router
        from segue.runtime import run_process

        raise typer.Exit(run_process(partial(run_router, settings), settings.log_format, router_id=settings.router_id))


def worker(model: _Model = DEFAULT_MODEL, model_name: _ModelName = None) -> None:
    """Run one worker, with all its tensor-parallel ranks, until it gets SIGTERM; it then drains.

    Its settings come from the environment: SEGUE_REDIS and SEGUE_CLUSTER_ID say which cluster it is part of, SEGUE_ROLES
    whether it does prefill, decode or both ("prefill,decode"), SEGUE_HOST is the address at which routers and other workers
    reach it; SEGUE_QUANTIZATION, SEGUE_KV_MEMORY and so on are those of segue up. SEGUE_WORKER_ID is the host's name if not
    given.
    """
    with errors_reported():
        from deploy.processes import limit_threads, usable_cores

        env = {"SEGUE_WORKER_ID": socket.gethostname()} | os.environ
        settings = WorkerSettings.load(flags=_resolved(model, model_name), env=env)
        threads = settings.threads or max(1, usable_cores() // settings.num_ranks)
        limit_threads(threads)
        from deploy.worker_process import run_all_ranks
        from segue.runtime import run_process

        settings = settings.model_copy(update={"threads": threads})
        raise typer.Exit(run_process(partial(run_all_ranks, settings), settings.log_format, worker_id=settings.worker_id))


def _resolved(model: str, model_name: str | None) -> dict[str, str | Path]:
    from segue.models.store import resolve

    with progress_shown() as progress:
        handle = resolve(model, progress)
    return {"model_dir": handle.path, "model_name": model_name or handle.name}
