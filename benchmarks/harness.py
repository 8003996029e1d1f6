# ruff: noqa: INP001 - a folder of scripts
"""What a benchmark gives, how it is timed, and the one table of a run with its JSON."""

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
_HEADINGS: Final = {  # whether it is a number
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
    """Of several measurements, the least and the median."""

    least: float
    median: float

    @classmethod
    def of(cls, values: Sequence[float], scale: float = 1.0) -> Self:
        """The values' own, each times the scale."""
        return cls(min(values) * scale, statistics.median(values) * scale)


@dataclass(frozen=True)
class Ratio:
    """How the store compares, and how it should.

    Attributes:
        value: The median of the pairs' ratios.
        means: What follows the number: ``× faster``, ``× the size``.
        at_least: The target where more is better; None where nothing was promised.
        at_most: The target where less is better.
    """

    value: float
    means: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        """The target in words, and whether it was missed."""
        return _target(self.value, self.at_least, self.at_most)


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        name: What was measured.
        backend: ``sqlite``, or ``postgres`` and the major version.
        rows: Rows of the table that was asked or filled.
        sessions: How the sample's sessions lie.
        method: How often it was measured, and how.
        unit: Of ``ours`` and ``baseline``.
        ours: The store's figures.
        baseline: What it is compared with, measured in the same run, in turn; None: nothing.
        against: What the baseline is.
        ratio: Of the two.
        at_most: The target of the store's median, where that has one, and not the ratio.
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
        """The target in words, and whether it was missed."""
        if self.ratio and self.at_most is None:
            return self.ratio.target
        return _target(self.ours.median, None, self.at_most)


@dataclass(frozen=True)
class Pairs:
    """Times of the store and of its baseline, in milliseconds, and the baseline's over ours."""

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
    """Time pairs of calls, the store's and its baseline's, in turn.

    Args:
        questions: The pairs; whoever gives them has called both before.
        burst: How often the store's call, which is short, is timed for each call of the baseline.
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
    """What the figures depend on besides the code."""
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
    """Print the table; its title is the machine."""
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
    """Three digits that count."""
    if not value:
        return "0"
    for limit, digits in ((100, 0), (10, 1), (1, 2)):
        if abs(value) >= limit:
            return f"{value:,.{digits}f}"
    return f"{value:.3f}"
