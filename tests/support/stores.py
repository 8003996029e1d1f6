"""An AsyncStore that is called like a Store, so that one suite serves both."""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any, Self

from lynkr_store import AsyncStore, Health


def adds_up(health: Health) -> bool:
    """Whether every record is in exactly one place."""
    return health.submitted + health.recovered == (
        health.written + health.rejected + health.dropped + health.spooled + health.pending
    )


def eventually(holds: Callable[[], object], timeout_s: float = 60) -> None:
    """Wait until something holds, however busy the machine."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def looked(store: Any) -> Health:
    """The store's health after a look at the database has ended, however busy the machine."""
    deadline = time.monotonic() + 60
    for _ in range(2):  # the second look began after this call
        asked = time.monotonic()
        health = store.health()
        while health.probe_age_s is None or health.probe_age_s > time.monotonic() - asked:
            assert time.monotonic() < deadline, "no look at the database ended"
            health = store.health()
    return health


class Asynchronous:
    """Runs each call on one event loop and waits for it."""

    def __init__(self, store: AsyncStore, runner: asyncio.Runner) -> None:
        self._store = store
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._store, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            answer = attribute(*args, **kwargs)
            if inspect.isasyncgen(answer):
                return iter(self._runner.run(_listed(answer)))
            if isinstance(answer, AsyncIterator):
                return self._each(answer)
            return self._runner.run(answer) if inspect.isawaitable(answer) else answer

        return call

    def _each(self, rows: AsyncIterator[Any]) -> Iterator[Any]:
        """One after the other, since they have no end."""
        with suppress(StopAsyncIteration):
            while True:
                yield self._runner.run(_next(rows))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


async def _next(rows: AsyncIterator[Any]) -> Any:
    return await anext(rows)


async def _listed(generator: Any) -> list[Any]:
    return [item async for item in generator]
