# ruff: noqa: INP001 - a folder of scripts
"""How long importing the library takes, against importing what it is built upon.

Each import is a process of its own, which reads compiled modules, as an installed package's are.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final

import lynkr_store
from benchmarks.harness import Ratio, Result, Spread, timed

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
            base.append(timed(partial(_run, BASE, compiled)))
            ours.append(timed(partial(_run, OURS, compiled)))
    medians = Spread.of(ours), Spread.of(base)
    yield Result(
        name=OURS,
        backend="none",
        rows=0,
        sessions="none",
        method=f"processes in turn, {rounds} times",
        unit="ms",
        ours=medians[0],
        baseline=medians[1],
        against=BASE,
        ratio=Ratio(medians[0].median / medians[1].median, "× the time", at_most=AT_MOST),
    )


def _run(statement: str, environment: Mapping[str, str]) -> None:
    command = [sys.executable, "-c", statement]
    subprocess.run(command, check=True, cwd=_CHECKOUT, env=environment)  # noqa: S603
