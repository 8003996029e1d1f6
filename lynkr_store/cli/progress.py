"""Show how far a copy has come: a bar on a terminal, else a line from time to time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lynkr_store.cli import render
from lynkr_store.schemas import CopyStep

_INTERVAL_S: Final = 10.0  # between two lines


class _Rate(ProgressColumn):
    """Rows per second, since the stage began."""

    def render(self, task: Task) -> Text:
        """Draw the rate."""
        return Text(f"{task.completed / task.elapsed:,.0f} rows/s" if task.elapsed else "")


@contextmanager
def shown() -> Iterator[Callable[[CopyStep], None]]:
    """A function for a copy's steps, which are shown on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {}

        def show(step: CopyStep) -> None:
            if step.stage not in tasks:
                tasks[step.stage] = progress.add_task(step.stage, total=step.total)
            progress.update(tasks[step.stage], completed=step.done, total=step.total)

        yield show


def _lines() -> Callable[[CopyStep], None]:
    last = time.monotonic()

    def show(step: CopyStep) -> None:
        nonlocal last
        if time.monotonic() - last >= _INTERVAL_S:
            last = time.monotonic()
            total = "" if step.total is None else f" of about {step.total:,}"
            render.warn(f"{step.stage}: {step.done:,}{total}")

    return show
