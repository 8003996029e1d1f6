# ruff: noqa: INP001 - a folder of scripts
"""Another process that inserts into the same SQLite file, as a gateway does, and times itself."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Final, NamedTuple

from benchmarks.databases import connect, insert
from benchmarks.sample import Sample

ROWS: Final = 3
"""Rows of each transaction."""

_BUSY_MS: Final = 3_000  # as long as the gateway waits
_PAUSE_S: Final = 0.005
_SAMPLE: Final = Sample(10_000_000, timedelta(days=1))


class Told(NamedTuple):
    """What the process reports at the end.

    Attributes:
        longest_s: Seconds of the longest transaction, including failed ones.
        failures: Transactions that failed because the file stayed locked for too long.
    """

    longest_s: float
    failures: int


@contextmanager
def neighbour(url: str) -> Iterator[list[Told]]:
    """Run the process during the body; afterwards the list contains its report."""
    spawn = get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_insert_until_told, args=(url, there), daemon=True)
    process.start()
    there.close()  # so that reading ends when the process ends
    here.recv()
    told: list[Told] = []
    try:
        yield told
        here.send(None)
        told.append(here.recv())
    finally:
        here.close()
        process.join()


def _insert_until_told(url: str, parent: Connection) -> None:
    rows, longest_s, failures = _SAMPLE.rows(), 0.0, 0
    with closing(connect(url)) as connection:
        assert isinstance(connection, sqlite3.Connection)  # noqa: S101 - by its URL
        connection.execute(f"PRAGMA busy_timeout = {_BUSY_MS}")
        parent.send(None)
        while True:
            began = time.perf_counter()
            try:
                insert(connection, islice(rows, ROWS))
            except sqlite3.OperationalError:
                failures += 1
                connection.rollback()
            longest_s = max(longest_s, time.perf_counter() - began)
            if parent.poll(_PAUSE_S):
                break
    parent.send(Told(longest_s, failures))
