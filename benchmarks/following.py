# ruff: noqa: INP001 - a folder of scripts
"""Measures a reader of the tail: how fast it reads what is there, and what waiting costs.

`iter_records` reads the same rows by timestamp and knows no gaps: it is the baseline.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import timedelta
from itertools import islice
from typing import Final

from benchmarks.databases import Place, connect, every_place, insert, settle
from benchmarks.harness import Ratio, Result, Spread, timed
from benchmarks.sample import SESSIONS, Sample
from lynkr_store import Store, StoreSettings, upgrade

_ROUNDS: Final = 3
_LATE: Final = 50
_POLL_S: Final = 0.05


def results(scale: float = 1.0) -> Iterator[Result]:
    """Rows per second, the milliseconds of a read without news, and those until a row is given.

    Args:
        scale: Multiplies the number of rows.
    """
    sample = Sample(int(100_000 * scale), timedelta(days=1))
    with every_place() as places:
        for place in places:
            yield from _followed(place, sample)


def _followed(place: Place, sample: Sample) -> Iterator[Result]:
    with ExitStack() as stack:
        url = stack.enter_context(place.database())
        upgrade(url)
        with closing(connect(url)) as connection:
            insert(connection, sample.rows())
            settle(connection)
        given = StoreSettings(url=url, maintenance_interval_s=86_400, flush_interval_s=0.01)
        store = stack.enter_context(Store(settings=given))
        ours: list[float] = []
        theirs: list[float] = []
        for _ in range(_ROUNDS):
            theirs.append(timed(lambda: list(store.iter_records())))
            ours.append(timed(lambda: list(islice(store.follow(after=0), sample.count))))
        ratios = [its / mine for mine, its in zip(ours, theirs, strict=True)]
        yield Result(
            name="follow: rows that are there",
            backend=place.name,
            rows=sample.count,
            sessions=SESSIONS,
            method=f"in turn, {_ROUNDS} times",
            unit="rows/s",
            ours=Spread.of([sample.count / each * 1_000 for each in ours]),
            baseline=Spread.of([sample.count / each * 1_000 for each in theirs]),
            against="iter_records",
            ratio=Ratio(Spread.of(ratios).median, "× the speed"),
        )
        waits = _waits(store)
        yield Result(
            name=f"follow: record() to given, poll_s={_POLL_S:g}",
            backend=place.name,
            rows=sample.count,
            sessions=SESSIONS,
            method=f"{_LATE} times",
            unit="ms",
            ours=Spread.of(waits),
        )


def _waits(store: Store) -> list[float]:
    """Milliseconds from each `record` until its row is given."""
    recorded: list[float] = []
    rows = store.follow(poll_s=_POLL_S)

    def record() -> None:
        for _ in range(_LATE):
            recorded.append(time.perf_counter())
            store.record(provider="p")
            time.sleep(2 * _POLL_S)

    thread = threading.Thread(target=record)
    thread.start()
    given = [time.perf_counter() for _ in islice(rows, _LATE)]
    thread.join()
    return [(late - early) * 1_000 for early, late in zip(recorded, given, strict=True)]
