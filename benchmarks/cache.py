# ruff: noqa: INP001, T201 - a script
"""What a cached answer costs: `get_stats` and its like, asked again within the time to live."""

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from lynkr_store import AsyncStore, Store, StoreSettings, Window

CALLS = 20_000
_HOUR_S = 3_600


def results(runs: int = 7) -> list[dict[str, Any]]:
    """One row for each question: its name, and the least and the median cost of a call."""
    with tempfile.TemporaryDirectory() as directory:
        settings = StoreSettings(url=f"sqlite:///{directory}/telemetry.db", cache_ttl_s=_HOUR_S)
        with Store(settings=settings) as store:
            store.add_many([{"provider": "ollama"}])
            rows = [
                _row(f"cached {name}", [_each(ask) for _ in range(runs)])
                for name, ask in _questions(store).items()
            ]
        return rows + asyncio.run(_awaited(settings, runs))


async def _awaited(settings: StoreSettings, runs: int) -> list[dict[str, Any]]:
    async with AsyncStore(settings=settings) as store:
        return [
            _row(f"cached await {name}", [await _each_awaited(ask) for _ in range(runs)])
            for name, ask in _questions(store).items()
        ]


def _questions(store: Any) -> dict[str, Callable[[], Any]]:
    window = Window(since=0)
    return {
        "get_stats()": store.get_stats,
        "get_stats(window)": lambda: store.get_stats(window),
        "get_provider_stats()": lambda: store.get_provider_stats("ollama"),
    }


def _each(ask: Callable[[], object]) -> float:
    ask()
    began = time.perf_counter()
    for _ in range(CALLS):
        ask()
    return (time.perf_counter() - began) / CALLS


async def _each_awaited(ask: Callable[[], Awaitable[object]]) -> float:
    await ask()
    began = time.perf_counter()
    for _ in range(CALLS):
        await ask()
    return (time.perf_counter() - began) / CALLS


def _row(name: str, seconds: list[float]) -> dict[str, Any]:
    return {
        "name": name,
        "min": min(seconds) * 1e6,
        "median": statistics.median(seconds) * 1e6,
        "unit": "µs",
    }


def main() -> None:
    """Print the rows."""
    for row in results():
        print(f"{row['name']:32} {row['min']:6.2f} {row['median']:6.2f} {row['unit']}")


if __name__ == "__main__":
    main()
