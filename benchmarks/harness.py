# ruff: noqa: INP001 - a folder of scripts
"""The result of a benchmark, how it is timed, and the table and JSON of a run."""

import json
import os
import platform
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self

from rich import box
from rich.console import Console
from rich.table import Table

from tests.support.postgres import available_servers

_WIDTH: Final = 220
_HEADINGS: Final = {  # whether the column contains numbers
    "what": False,
    "backend": False,
    "rows": True,
    "sessions": False,
    "method": False,
    "unit": False,
    "min": True,
    "median": True,
    "baseline": False,
    "its min": True,
    "its median": True,
    "ratio": True,
    "target": True,
}
_LIBRARIES: Final = ("sqlalchemy", "psycopg", "pydantic")


@dataclass(frozen=True)
class Spread:
    """The least and the median of several measurements."""

    least: float
    median: float

    @classmethod
    def of(cls, values: Sequence[float], scale: float = 1.0) -> Self:
        """The least and the median of the values, multiplied by the scale."""
        return cls(min(values) * scale, statistics.median(values) * scale)


@dataclass(frozen=True)
class Ratio:
    """How the store compares with the baseline, and the target.

    Attributes:
        value: The median of the pairs' ratios.
        means: The words after the number: ``× faster``, ``× the size``.
        at_least: The target if more is better; None if there is none.
        at_most: The target if less is better; None if there is none.
    """

    value: float
    means: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        """The target as text, with a remark if it was missed."""
        return _target(self.value, self.at_least, self.at_most)


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        name: What was measured.
        backend: ``sqlite``, or ``postgres`` and the major version.
        rows: The number of rows in the table that was queried or filled.
        sessions: How the sample's rows are distributed over sessions.
        method: How often it was measured, and how.
        unit: The unit of ``ours`` and ``baseline``.
        ours: The store's figures.
        baseline: The baseline's figures, measured in the same run, in turn; None without one.
        against: What the baseline is.
        ratio: The ratio of the two.
        at_most: The target for the store's median, if the target is not a ratio.
    """

    name: str
    backend: str
    rows: int
    sessions: str
    method: str
    unit: str
    ours: Spread
    baseline: Spread | None = None
    against: str = ""
    ratio: Ratio | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        """The target as text, with a remark if it was missed."""
        if self.ratio and self.at_most is None:
            return self.ratio.target
        return _target(self.ours.median, None, self.at_most)


@dataclass(frozen=True)
class Pairs:
    """Milliseconds of the store and its baseline, and how many times faster the store is."""

    ours: Spread
    baseline: Spread
    times_faster: float


def timed(call: Callable[[], object]) -> float:
    """Milliseconds that a call takes."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1_000


def paired(
    questions: Iterable[tuple[Callable[[], object], Callable[[], object]]], burst: int = 5
) -> Pairs:
    """Time pairs of calls, the store's and the baseline's, in turn.

    Args:
        questions: The pairs; the caller has called both once before.
        burst: How often the store's short call is timed for each call of the baseline.
    """
    ours: list[float] = []
    baseline: list[float] = []
    ratios: list[float] = []
    for ask, ask_baseline in questions:
        baseline.append(timed(ask_baseline))
        several = [timed(ask) for _ in range(burst)]
        ours += several
        ratios.append(baseline[-1] / statistics.median(several))
    return Pairs(Spread.of(ours), Spread.of(baseline), statistics.median(ratios))


def machine() -> dict[str, Any]:
    """Facts about the machine and the installed versions, on which the figures depend."""
    return {
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "postgresql": [installation.name for installation in available_servers()],
        **{name: version(name) for name in _LIBRARIES},
    }


def show(results: Sequence[Result], console: Console | None = None) -> None:
    """Print the table, with the facts about the machine as its title."""
    facts = ", ".join(
        f"{name} {' '.join(value) if isinstance(value, list) else value}"
        for name, value in machine().items()
    )
    table = Table(title=facts, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading, number in _HEADINGS.items():
        table.add_column(heading, justify="right" if number else "left")
    for result in results:
        table.add_row(
            result.name,
            result.backend,
            f"{result.rows:,}",
            result.sessions,
            result.method,
            result.unit,
            *_spread(result.ours),
            result.against,
            *_spread(result.baseline),
            f"{_figure(result.ratio.value)} {result.ratio.means}" if result.ratio else "",
            result.target,
        )
    console = console or Console(width=max(Console().width, _WIDTH))
    console.print(table)


def save(results: Sequence[Result], path: Path) -> None:
    """Write the machine and the results as JSON."""
    found = {"machine": machine(), "results": [asdict(result) for result in results]}
    path.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _target(value: float, at_least: float | None, at_most: float | None) -> str:
    if at_least is not None:
        said, met = f"≥ {at_least:g}", value >= at_least
    elif at_most is not None:
        said, met = f"≤ {at_most:g}", value <= at_most
    else:
        return ""
    return said if met else f"{said} missed"


def _spread(spread: Spread | None) -> tuple[str, str]:
    return (_figure(spread.least), _figure(spread.median)) if spread else ("", "")


def _figure(value: float) -> str:
    """The number with three significant digits."""
    if not value:
        return "0"
    for limit, digits in ((100, 0), (10, 1), (1, 2)):
        if abs(value) >= limit:
            return f"{value:,.{digits}f}"
    return f"{value:.3f}"
