# ruff: noqa: INP001 - a folder of scripts
"""Measures importing the library against importing the libraries that it is built on.

Each import is a process of its own, which reads compiled modules, as those of an installed package
are. Its CPU time is measured: on a busy machine the time that passes measures the others.
"""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import lynkr_store
from benchmarks.harness import Ratio, Result, Spread

ROUNDS: Final = 10
BASE: Final = "import sqlalchemy.orm, pydantic_settings"
OURS: Final = "import lynkr_store"
AT_MOST: Final = 1.3
_CHECKOUT: Final = Path(lynkr_store.__file__).parents[1]


def results(scale: float = 1.0) -> Iterator[Result]:
    """The one line: medians of pairs of processes.

    Args:
        scale: Of the rounds; one round at least.
    """
    rounds = max(1, round(ROUNDS * scale))
    with tempfile.TemporaryDirectory() as folder:
        compiled = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        compiled["PYTHONPYCACHEPREFIX"] = folder
        for statement in (BASE, OURS):
            _run(statement, compiled)  # compiles
        base, ours = [], []
        for _ in range(rounds):
            base.append(_run(BASE, compiled))
            ours.append(_run(OURS, compiled))
    medians = Spread.of(ours), Spread.of(base)
    yield Result(
        name=OURS,
        backend="none",
        rows=0,
        sessions="none",
        method=f"processes in turn, {rounds} times",
        unit="CPU ms",
        ours=medians[0],
        baseline=medians[1],
        against=BASE,
        ratio=Ratio(medians[0].median / medians[1].median, "× the time", at_most=AT_MOST),
    )


def _run(statement: str, environment: Mapping[str, str]) -> float:
    """CPU milliseconds of a process that runs the statement."""
    before = _of_children()
    command = [sys.executable, "-c", statement]
    subprocess.run(command, check=True, cwd=_CHECKOUT, env=environment)  # noqa: S603
    return (_of_children() - before) * 1_000


def _of_children() -> float:
    """CPU seconds of the processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
