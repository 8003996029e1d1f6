# ruff: noqa: INP001 - a folder of scripts
"""Measures how retention of half of the rows delays another process that inserts meanwhile.

The store's `cleanup`, in short steps, is compared with the original's single DELETE on its own
file. The other process inserts 3 rows in each transaction, 5 ms apart, and waits 3 s for a lock.
All rows are folded before.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.databases import sqlite_files
from benchmarks.filled import filled_original, filled_store
from benchmarks.harness import Ratio, Result, Spread, timed
from benchmarks.neighbour import neighbour
from benchmarks.sample import END_MS, SESSIONS, Sample

SPAN: Final = timedelta(days=30)

_CUTOFF_MS: Final = END_MS + 1 - SPAN // 2 // timedelta(milliseconds=1)
_LIBC: Final = ctypes.CDLL(None)
_PROCESS: Final = Path("/proc/self")


class _Cost(NamedTuple):
    seconds: float
    stall_ms: float
    failures: int
    memory_mb: float


def results(scale: float = 1.0) -> Iterator[Result]:
    """The delays of the other process, and the time and memory of the retention.

    Args:
        scale: Multiplies the number of rows.
    """
    sample = Sample(int(1_000_000 * scale), SPAN)
    with sqlite_files() as files:
        with ExitStack() as stack:
            store, now = filled_store(stack, files, sample)
            store.maintain()
            now[0] = _CUTOFF_MS
            ours = _cost(store.settings.url, lambda: store.cleanup(timedelta(0)), sample)
        with ExitStack() as stack:
            original = filled_original(stack, files, sample)
            theirs = _cost(original.url, lambda: original.cleanup(_CUTOFF_MS), sample)

    def line(
        name: str, unit: str, mine: float, its: float, at_most: float | None, means: str = ""
    ) -> Result:
        return Result(
            name=f"retention: {name}",
            backend="sqlite",
            rows=sample.count,
            sessions=SESSIONS,
            method="once, with inserts",
            unit=unit,
            ours=Spread(mine, mine),
            baseline=Spread(its, its),
            against="the original's DELETE",
            ratio=Ratio(its / mine, means) if means else None,
            at_most=at_most,
        )

    yield line("longest stall", "ms", ours.stall_ms, theirs.stall_ms, 150, "× shorter")
    yield line("failed inserts", "transactions", ours.failures, theirs.failures, 0)
    yield line("memory growth", "MB", ours.memory_mb, theirs.memory_mb, 64)
    yield line("total time", "s", ours.seconds, theirs.seconds, None, "× faster")


def _cost(url: str, remove: Callable[[], int], sample: Sample) -> _Cost:
    """Remove half of the rows while the other process inserts.

    Raises:
        RuntimeError: Other rows were removed, so the figures cannot be compared.
    """
    removed: list[int] = []
    with neighbour(url) as told:
        _LIBC.malloc_trim(0)  # otherwise memory freed after filling would hide the growth
        (_PROCESS / "clear_refs").write_text("5")  # resets the peak
        before = _memory_mb("VmRSS")
        seconds = timed(lambda: removed.append(remove())) / 1_000
        growth = _memory_mb("VmHWM") - before
    if removed != [sample.count // 2]:
        raise RuntimeError("the removed rows are not the older half")
    return _Cost(seconds, told[0].longest_s * 1_000, told[0].failures, growth)


def _memory_mb(name: str) -> float:
    status = (_PROCESS / "status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1_024 / 1e6
