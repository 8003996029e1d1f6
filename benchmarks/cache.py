# ruff: noqa: INP001 - a folder of scripts
"""Measures a cached answer: a statistic that is asked for again within the cache's time to live."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from datetime import timedelta
from typing import Any, Final

from benchmarks.databases import connect, insert, sqlite_files
from benchmarks.harness import Result, Spread
from benchmarks.sample import END_MS, SESSIONS, Sample
from lynkr_store import AsyncStore, Store, StoreSettings, Window, upgrade

CALLS: Final = 20_000
RUNS: Final = 7
TARGET_US: Final = 5

_SAMPLE: Final = Sample(1_000, timedelta(days=1))


def results(scale: float = 1.0) -> Iterator[Result]:
    """One line for each question to `Store`, and one for each to `AsyncStore`.

    Args:
        scale: Multiplies the number of calls; the number of rows does not matter here.
    """
    calls = int(CALLS * scale)
    with sqlite_files() as files, files.database() as url:
        upgrade(url)
        with closing(connect(url)) as connection:
            insert(connection, _SAMPLE.rows())
        settings = StoreSettings(url=url, cache_ttl_s=3_600)
        with Store(settings=settings, clock=lambda: END_MS + 1) as store:
            for name, ask in _questions(store).items():
                yield _line(name, calls, [_each(ask, calls) for _ in range(RUNS)])
        yield from asyncio.run(_awaited(settings, calls))


async def _awaited(settings: StoreSettings, calls: int) -> list[Result]:
    async with AsyncStore(settings=settings, clock=lambda: END_MS + 1) as store:
        return [
            _line(f"await {name}", calls, [await _each_awaited(ask, calls) for _ in range(RUNS)])
            for name, ask in _questions(store).items()
        ]


def _questions(store: Store | AsyncStore) -> dict[str, Callable[[], Any]]:
    window = Window(since=0)
    return {
        "get_stats, cached": store.get_stats,
        "get_stats of a window, cached": lambda: store.get_stats(window),
        "get_provider_stats, cached": lambda: store.get_provider_stats("ollama"),
    }


def _each(ask: Callable[[], object], calls: int) -> float:
    ask()
    began = time.perf_counter()
    for _ in range(calls):
        ask()
    return (time.perf_counter() - began) / calls


async def _each_awaited(ask: Callable[[], Awaitable[object]], calls: int) -> float:
    await ask()
    began = time.perf_counter()
    for _ in range(calls):
        await ask()
    return (time.perf_counter() - began) / calls


def _line(name: str, calls: int, seconds: list[float]) -> Result:
    return Result(
        name=name,
        backend="sqlite",
        rows=_SAMPLE.count,
        sessions=SESSIONS,
        method=f"{RUNS} times {calls:,} calls",
        unit="µs per call",
        ours=Spread.of(seconds, 1e6),
        at_most=TARGET_US,
    )
