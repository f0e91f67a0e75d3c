"""How the `segue` command talks to a person: results on stdout, everything else on stderr, errors in one red line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from segue.errors import ConfigError, SegueError


def new_console(*, stderr: bool = False) -> Console:
    """A console that neither breaks lines for a width that nobody reads nor colours words by itself."""
    return Console(stderr=stderr, soft_wrap=True, highlight=False)


def fail(error: SegueError) -> NoReturn:
    """Prints the error, which says what to do next, and ends the command with exit code 1."""
    new_console(stderr=True).print(f"error: {error.message}", style="red", markup=False)
    raise typer.Exit(1)


@contextmanager
def errors_reported() -> Iterator[None]:
    """Ends the command with one line, not with a traceback, where something known is wrong."""
    try:
        yield
    except SegueError as error:
        fail(error)
    except ModuleNotFoundError as error:
        fail(ConfigError(f"this command needs the package {error.name}: run pip install 'segue[cluster]'"))


@contextmanager
def progress_shown() -> Iterator[Callable[[str, float], None]]:
    """A function that shows what is being done and which share of it, 0 to 1: a bar on a terminal, plain lines elsewhere."""
    console = new_console(stderr=True)
    if not console.is_terminal:
        yield _line_printer(console)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)

        def show(message: str, share: float) -> None:
            # An unknown share moves the bar to and fro instead of leaving it empty.
            bars.update(task, description=message, total=1.0 if share else None, completed=share)

        yield show


def _line_printer(console: Console) -> Callable[[str, float], None]:
    printed: list[str] = []

    def show(message: str, _share: float) -> None:
        if printed[-1:] != [message]:
            printed.append(message)
            console.print(message, markup=False)

    return show
