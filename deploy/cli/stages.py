"""Shows how far a start has come: a line with a clock for each stage on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from deploy.progress import Stage, StageName


class StageDisplay:
    """`report` may be called from within the block only, on one thread."""

    def __init__(self, console: Console) -> None:
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.fields[stage]:8}"),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )
        self._console = console
        self._bars = Progress(*columns, console=console) if console.is_terminal else None
        self._tasks: dict[StageName, TaskID] = {}
        self._started_s = time.monotonic()
        self._last_line = ""

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def report(self, stage: Stage) -> None:
        detail = stage.detail if stage.share is None else f"{stage.detail} ({stage.share:.0%})"
        if self._bars is None:
            self._print_line(f"{stage.name}: {detail}")
            return
        if stage.name not in self._tasks:
            self._tasks[stage.name] = self._bars.add_task(detail, stage=stage.name, total=1.0)
        is_done = stage.state == "done"
        self._bars.update(self._tasks[stage.name], description=detail, completed=1.0 if is_done else 0.0)

    def _print_line(self, line: str) -> None:
        if line != self._last_line:
            self._last_line = line
            self._console.print(f"[{time.monotonic() - self._started_s:5.1f} s] {line}", markup=False)
