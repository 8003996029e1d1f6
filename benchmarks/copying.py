# ruff: noqa: INP001 - a folder of scripts
"""Measures a copy of a gateway's file against the bare drivers, which only insert finished tuples.

The copy's time is the whole of it: reading, converting, writing, folding, and the comparison of
both ends. The bare driver reads nothing; it gets the values from memory, in transactions of the
same size, and neither folds nor compares.
"""

from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from itertools import islice
from typing import Any, Final

from benchmarks.databases import Place, connect, every_place, insert
from benchmarks.harness import Ratio, Result, Spread, timed
from benchmarks.sample import COLUMNS, SESSIONS, Row, Sample
from lynkr_store import copy, upgrade

_PART: Final = 50_000  # finished tuples in memory at a time
_BATCH: Final = 1_000
_AT_LEAST: Final = 0.5


def results(scale: float = 1.0) -> Iterator[Result]:
    """Rows per second of a copy into each backend.

    Args:
        scale: Multiplies the number of rows.
    """
    sample = Sample(int(1_000_000 * scale), timedelta(days=30))
    with every_place() as places, places[0].database() as source:
        upgrade(source)
        with closing(connect(source)) as connection:
            insert(connection, sample.rows())
        for place in places:
            ours, theirs = _by_copy(place, source), _by_driver(place, sample)
            yield Result(
                name="copy, fold, compare",
                backend=place.name,
                rows=sample.count,
                sessions=SESSIONS,
                method="once",
                unit="rows/s",
                ours=Spread.of([sample.count / ours * 1_000]),
                baseline=Spread.of([sample.count / theirs * 1_000]),
                against="bare COPY" if place.name != "sqlite" else "bare executemany",
                ratio=Ratio(theirs / ours, "× the speed", at_least=_AT_LEAST),
            )


def _by_copy(place: Place, source: str) -> float:
    with place.database() as url:
        upgrade(url)
        return timed(lambda: copy(source, url))


def _by_driver(place: Place, sample: Sample) -> float:
    """Milliseconds of inserting alone, without the time in which the rows are generated."""
    rows, milliseconds = sample.rows(), 0.0
    with place.database() as url:
        upgrade(url)
        with closing(connect(url)) as connection:
            while part := list(islice(rows, _PART)):
                milliseconds += _inserted(connection, part)
    return milliseconds


def _inserted(connection: Any, rows: list[Row]) -> float:
    return timed(lambda: insert(connection, rows, _BATCH, COLUMNS))
