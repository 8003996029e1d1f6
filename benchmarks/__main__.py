# ruff: noqa: INP001, T201 - a script
"""Run the benchmarks, print one table and write one JSON file: ``python -m benchmarks``.

Each part is a module of this folder with a function ``results(scale)``, which yields each line when
it is measured. A full run takes about half an hour and 10 GB of temporary files.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

from benchmarks.harness import Result, save, show

PARTS: Final = (
    "ingest",
    "size",
    "stats",
    "lists",
    "retention",
    "changes",
    "copying",
    "following",
    "capacity",
    "cache",
    "importing",
)
QUICK: Final = 0.02


def run(parts: Sequence[str], scale: float) -> list[Result]:
    """Every line of the parts; progress is printed on standard error."""
    found: list[Result] = []
    for part in parts:
        began = time.perf_counter()
        for result in import_module(f"benchmarks.{part}").results(scale):
            found.append(result)
            took = time.perf_counter() - began  # includes preparing the databases
            print(f"{took:6.0f} s  {result.name}, {result.backend}", file=sys.stderr, flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="run these parts")
    parser.add_argument("--quick", action="store_true", help="use a fiftieth of the rows")
    parser.add_argument(
        "--json",
        type=Path,
        default=Path(__file__).with_name("results.json"),
        help="write the JSON to this file",
    )
    chosen = parser.parse_args(arguments)
    found = run(chosen.only, QUICK if chosen.quick else 1.0)
    show(found)
    save(found, chosen.json)


if __name__ == "__main__":
    main()
