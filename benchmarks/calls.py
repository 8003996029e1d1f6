# ruff: noqa: INP001 - a folder of scripts
"""Measures what a call of `record` costs the caller while the writer runs.

The baseline is a function that keeps its keywords and does nothing else, called in the same way.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Final

from benchmarks.databases import sqlite_files
from benchmarks.harness import Ratio, Result, Spread
from benchmarks.sample import SESSIONS, Record
from lynkr_store import Store, StoreSettings

RUNS: Final = 3
BURST: Final = 5_000
THREADS: Final = 8
KEYWORDS: Final = 27
AT_MOST: Final = 3.5

MANY_ROWS: Final = 1_000_000
"""Limits of the queue that no sample reaches, so that nothing is dropped."""
MANY_BYTES: Final = 4 * 2**30

_LONG_S: Final = 600


def results(records: list[Record]) -> Iterator[Result]:
    """The mean of one thread's calls and of the baseline's; percentiles of several threads."""
    ours, baseline = zip(*(pair for _ in range(RUNS) for pair in _means(records)), strict=True)
    ratio = Spread.of([mine / bare for mine, bare in zip(ours, baseline, strict=True)]).median
    mean = _line("record(), mean", len(records), f"CPU, in turn, {BURST:,} calls each", ours)
    yield replace(
        mean,
        baseline=Spread.of(baseline),
        against=f"a function that keeps {KEYWORDS} keywords",
        ratio=Ratio(ratio, "× the CPU time", at_most=AT_MOST),
    )
    taken = [_by_threads(records) for _ in range(RUNS)]
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        found = [times[int(len(times) * share)] for times in taken]
        yield _line(f"record(), {name}", len(records), f"{THREADS} threads, {RUNS} times", found)


def _line(name: str, count: int, method: str, microseconds: Sequence[float]) -> Result:
    return Result(
        name=name,
        backend="sqlite",
        rows=count,
        sessions=SESSIONS,
        method=method,
        unit="µs per call",
        ours=Spread.of(microseconds),
    )


def _means(records: list[Record]) -> Iterator[tuple[float, float]]:
    """Microseconds of CPU per call in one thread, for each burst: the store's and the baseline's.

    The writer has no work left when a burst begins.
    """
    kept: list[Record] = []

    def keep(**fields: object) -> None:
        kept.append(fields)

    with _opened(len(records)) as store:
        for at in range(0, len(records), BURST):
            burst = [dict(islice(each.items(), KEYWORDS)) for each in records[at : at + BURST]]
            yield _mean(store.record, burst), _mean(keep, burst)
            kept.clear()
            store.flush(_LONG_S)


def _mean(call: Callable[..., object], burst: list[Record]) -> float:
    began = time.thread_time()
    for record in burst:
        call(**record)
    return (time.thread_time() - began) / len(burst) * 1e6


def _by_threads(records: list[Record]) -> list[float]:
    """Microseconds of each call, shortest first; the threads call at the same time."""
    taken: list[float] = []

    def caller(part: list[Record]) -> None:
        now, mine = time.perf_counter_ns, []
        for record in part:
            began = now()
            store.record(record)
            mine.append((now() - began) / 1_000)
        taken.extend(mine)

    with _opened(len(records)) as store:
        threads = [
            threading.Thread(target=caller, args=(records[number::THREADS],))
            for number in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return sorted(taken)


@contextmanager
def _opened(count: int) -> Iterator[Store]:
    """A store that has written before, and whose queue has room for so many records.

    Raises:
        RuntimeError: It did not store all records, so the times mean nothing.
    """
    with sqlite_files() as files, files.database() as url:
        settings = StoreSettings(url=url, queue_max_rows=MANY_ROWS, queue_max_bytes=MANY_BYTES)
        with Store(settings=settings) as store:
            store.record(provider="first")
            store.flush(_LONG_S)
            yield store
            store.flush(_LONG_S)
            if store.health().written != count + 1:
                raise RuntimeError("records were lost")
