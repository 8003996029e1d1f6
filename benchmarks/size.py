# ruff: noqa: INP001 - a folder of scripts
"""Measures the size of a row on disk, against the original's file with the same rows.

Rows are inserted in the order of the requests, in transactions of 1,000, with every index in place.
Then the store's rows are folded, and each WAL is moved to its file.
"""

from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Final

from sqlalchemy import make_url

from benchmarks.databases import Driver, connect, insert, settle, sqlite_files
from benchmarks.harness import Ratio, Result, Spread
from benchmarks.original import Original
from benchmarks.sample import SESSIONS, Sample
from lynkr_store import Store, upgrade

_BATCH: Final = 1_000


def results(scale: float = 1.0) -> Iterator[Result]:
    """The one line.

    Args:
        scale: Multiplies the number of rows.
    """
    sample = Sample(int(200_000 * scale), timedelta(days=1))
    with sqlite_files() as files:
        with files.database() as url, Original(url) as original:
            original.create()
            theirs = _filled(url, original.connection, sample)
        with files.database() as url:
            upgrade(url)
            with closing(connect(url)) as connection:
                _filled(url, connection, sample)
                with Store(url) as store:
                    store.maintain()
                settle(connection)
            ours = _bytes_a_row(url, sample)
    yield Result(
        name="file size",
        backend="sqlite",
        rows=sample.count,
        sessions=SESSIONS,
        method="in batches of 1,000",
        unit="bytes per row",
        ours=Spread(ours, ours),
        baseline=Spread(theirs, theirs),
        against="the original's file",
        ratio=Ratio(ours / theirs, "× the size", at_most=0.72),
    )


def _filled(url: str, connection: Driver, sample: Sample) -> float:
    insert(connection, sample.rows(), _BATCH)
    settle(connection)
    return _bytes_a_row(url, sample)


def _bytes_a_row(url: str, sample: Sample) -> float:
    return Path(str(make_url(url).database)).stat().st_size / sample.count
