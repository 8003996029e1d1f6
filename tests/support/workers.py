"""A server's worker process: threads, or tasks, that record and read until they are told to stop.

``python -m tests.support.workers KIND OPTIONS`` says when it works and what became of its records.
"""

import asyncio
import json
import sys
import threading
from collections.abc import Callable
from typing import Any

from lynkr_store import AsyncStore, Store, StoreSettings
from lynkr_store.process.waiting import Event
from tests.support import programs
from tests.support.stores import Asynchronous, adds_up

WAIT_S = 60.0

Say = Callable[..., None]


def launch(kind: str, options: dict[str, Any]) -> programs.Child:
    """Start a worker; leaving its block kills it."""
    return programs.Child(programs.command(__name__, kind, options))


def threads(options: dict[str, Any], say: Say) -> None:
    """A `Store` that some threads use."""
    _work(Store(settings=_settings(options)), options["threads"], say)


def tasks(options: dict[str, Any], say: Say) -> None:
    """An `AsyncStore` that as many tasks of one loop use, and those of another loop beside it."""
    store, runners = AsyncStore(settings=_settings(options)), (asyncio.Runner(), asyncio.Runner())
    stop, end, reads = threading.Event(), Event(), 0

    async def read() -> None:
        nonlocal reads
        while not stop.is_set():
            store.record(provider="p")
            await store.get_stats()
            await store.query(limit=10)
            reads += 1

    async def all_read() -> None:
        await asyncio.gather(*(read() for _ in range(options["threads"])))

    def run(body: Callable[[asyncio.Runner], object]) -> list[threading.Thread]:
        running = [threading.Thread(target=body, args=(runner,)) for runner in runners]
        for thread in running:
            thread.start()
        return running

    _until_told(run(lambda runner: runner.run(all_read())), stop, say)
    _report(Asynchronous(store, runners[0]), reads, say)
    idle = run(lambda runner: runner.run(end.wait()))  # a loop that stands still closes nothing
    sys.stdin.readline()
    end.set()
    for thread in idle:
        thread.join()
    runners[0].run(store.close(WAIT_S))


def _work(store: Store, number: int, say: Say) -> None:
    stop, reads = threading.Event(), [0] * number

    def use(thread: int) -> None:
        while not stop.is_set():
            store.record(provider="p")
            store.get_stats()
            store.query(limit=10)
            reads[thread] += 1
            if reads[thread] % 10 == 0:
                store.add_many([{"provider": "p"}])
                store.health()

    running = [threading.Thread(target=use, args=(each,)) for each in range(number)]
    for thread in running:
        thread.start()
    _until_told(running, stop, say)
    _report(store, sum(reads), say)
    sys.stdin.readline()
    store.close(WAIT_S)


def _until_told(running: list[threading.Thread], stop: threading.Event, say: Say) -> None:
    say(ready=True)
    sys.stdin.readline()
    stop.set()
    for thread in running:
        thread.join()


def _report(store: Any, reads: int, say: Say) -> None:
    """Say what became of the records; the store stays open and idle until it is told to close."""
    flushed, health = store.flush(WAIT_S), store.health()
    good = flushed and adds_up(health) and health.written == health.submitted
    say(reads=reads, written=health.written, good=good, last_error=health.last_error)


def _settings(options: dict[str, Any]) -> StoreSettings:
    return StoreSettings(
        cache_ttl_s=0,
        flush_interval_s=0.01,
        maintenance_interval_s=0.05,
        **{name: value for name, value in options.items() if name != "threads"},
    )


PROGRAMS = {"threads": threads, "tasks": tasks}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](
        json.loads(sys.argv[2]), lambda **said: print(json.dumps(said), flush=True)
    )
