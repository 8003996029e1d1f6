"""An AsyncStore among a host's event loops, executors and blocking calls, on every backend."""

import asyncio
import gc
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import NullPool, event, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from lynkr_store import (
    AsyncStore,
    BadArgument,
    LynkrStoreError,
    RoutingRepository,
    StoreSettings,
    Window,
)
from lynkr_store.db.dialect import driver_of
from lynkr_store.db.engines import create_store_async_engine
from tests.conftest import BACKENDS, POSTGRES
from tests.support.proxy import Proxy
from tests.support.stores import adds_up, eventually

NOW = 1_750_000_000_000
ALL = Window(since=0)
pytestmark = pytest.mark.sample(2)

WAIT_S = 60


@pytest.fixture(params=BACKENDS)
def any_url(request, new_url):
    """A database at head, also one in memory."""
    return new_url(request.param, at_head=True)


@pytest.fixture(params=["url", "engine"])
def make(request, any_url):
    """Make a store of a URL, or of a host's engine; call it in an event loop."""
    if request.param == "engine" and any_url == "sqlite://":
        pytest.skip("a host's engine of SQLite in memory is refused")

    def make(**options):
        settings = StoreSettings(url=any_url, cache_ttl_s=0, **options)
        if request.param == "url":
            return AsyncStore(settings=settings, clock=lambda: NOW)
        host = create_async_engine(create_store_async_engine(any_url).url)
        return AsyncStore(engine=host, settings=settings, clock=lambda: NOW)

    yield make
    gc.collect()


async def close(store):
    """Close a store, and the engine of its host."""
    await store.close()
    engine = getattr(store._engines, "_engine", None)
    if engine is not None:
        await engine.dispose()


def new_store(url, **options):
    settings = StoreSettings(url=url, **{"cache_ttl_s": 0, **options})
    return AsyncStore(settings=settings, clock=lambda: NOW)


async def comes(holds):
    """Wait until something holds, however busy the machine, while the loop goes on."""
    for _ in range(100 * WAIT_S):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came")


@contextmanager
def locked(url):
    """The table is locked by another connection, so that no batch and no read ends."""
    if url.startswith("sqlite"):
        other = sqlite3.connect(make_url(url).database, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
    else:
        other = psycopg.connect(url)
        other.execute("LOCK TABLE routing_telemetry IN ACCESS EXCLUSIVE MODE")
    try:
        yield
    finally:
        other.rollback()
        other.close()


@contextmanager
def reads_held_up(store, url):
    """No read of the store ends; a writer's lock holds up none on SQLite."""
    if not url.startswith("sqlite"):
        with locked(url):
            yield
        return
    release = threading.Event()
    engine = store._database.engine

    def wait(_):
        release.wait(WAIT_S)

    event.listen(engine, "begin", wait)
    try:
        yield
    finally:
        event.remove(engine, "begin", wait)
        release.set()


def sessions(url):
    """How many connections the server, or this process, has open to the database."""
    if url.startswith("sqlite"):
        found = []
        for number in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # the directory's own is gone by now
                found.append(str(number.readlink()))
        return found.count(str(make_url(url).database))
    with psycopg.connect(url) as other:
        return other.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            " AND backend_type = 'client backend' AND application_name NOT LIKE 'citus%'"
        ).fetchone()[0]


# -- the loop's default executor -----------------------------------------------------------------


class Refusing(ThreadPoolExecutor):
    """What a loop would ask in."""

    def submit(self, *_, **__):
        raise AssertionError("the loop's default executor was asked")


async def use_everything(store):
    assert store.record(provider="p", timestamp=NOW)
    assert await store.flush(WAIT_S)
    assert await store.add_many([{"provider": "p", "timestamp": NOW}] * 2) == 2
    assert len(await store.query()) == 3
    assert len([row async for row in store.iter_records(page_rows=2)]) == 3
    assert (await store.get_stats(ALL)).total_requests == 3
    assert (await store.get_provider_stats("p", ALL)).total == 3
    assert (await store.get_routing_accuracy(ALL)).total_requests == 3
    await store.maintain()
    assert await store.cleanup(timedelta(days=1)) == 0
    health = await store.health()
    assert health.written == 1
    assert adds_up(health)


@pytest.mark.slow
def test_nothing_asks_the_loops_default_executor(make):
    async def main():
        asyncio.get_running_loop().set_default_executor(Refusing())
        store = make()
        await use_everything(store)
        await close(store)

    asyncio.run(main())


@pytest.mark.slow
def test_a_hosts_blocking_jobs_delay_nothing(make):
    """Ten of them held up a read for as long as they took."""

    async def main():
        release = threading.Event()
        jobs = [asyncio.get_running_loop().run_in_executor(None, release.wait) for _ in range(70)]
        store = make()
        try:
            async with asyncio.timeout(WAIT_S):
                await use_everything(store)
                await close(store)
        finally:
            release.set()
        await asyncio.gather(*jobs)

    asyncio.run(main())


@pytest.mark.parametrize("backend", POSTGRES)
def test_a_servers_name_is_looked_up_elsewhere(backend, new_url):
    url = make_url(new_url(backend, at_head=True))
    if "host" not in url.query:
        pytest.skip("the server is not on a socket")

    async def main(url):
        asyncio.get_running_loop().set_default_executor(Refusing())
        async with new_store(url) as store:
            await use_everything(store)

    with Proxy(f"{url.query['host']}/.s.PGSQL.{url.query['port']}") as proxy:
        asyncio.run(main(proxy.url(url.database).replace("127.0.0.1", "localhost")))


@pytest.mark.parametrize("libpq", ["new", "old"])
@pytest.mark.parametrize("backend", POSTGRES)
def test_a_cancelled_read_is_cancelled_at_the_server(backend, new_url, monkeypatch, libpq):
    """Before version 17 libpq cancels in a call that waits, for which psycopg takes a thread."""
    url = new_url(backend, at_head=True)
    if libpq == "old":
        monkeypatch.setattr(type(psycopg.capabilities), "has_cancel_safe", lambda *_: False)

    async def main():
        asyncio.get_running_loop().set_default_executor(Refusing())
        async with new_store(url) as store:
            await store.query()
            with locked(url):
                read = asyncio.create_task(store.query())
                await asyncio.sleep(0.2)
                read.cancel()
                began = time.monotonic()
                with pytest.raises(asyncio.CancelledError):
                    await read
                assert time.monotonic() - began < 4, "psycopg waits 5 s for one that does not end"
            assert await store.query() == []

    asyncio.run(main())


@pytest.mark.slow
def test_forty_flushes_end_when_they_say_and_health_answers_at_once(url):
    """They stood in a queue: 11.8 s for the health, 14 s for the last flush."""

    async def main():
        store = new_store(url)
        store.record(provider="p")
        assert await store.flush(WAIT_S)
        await store.query()
        with locked(url):
            store.record(provider="p")
            threads, began = threading.active_count(), time.monotonic()
            flushes = [asyncio.create_task(store.flush(2)) for _ in range(40)]
            took = []
            for _ in range(10):
                asked = time.monotonic()
                assert adds_up(await store.health())
                took.append(time.monotonic() - asked)
                await asyncio.sleep(0.01)
            assert threading.active_count() <= threads + 2, "a flush takes no thread"
            assert await asyncio.gather(*flushes) == [False] * 40
            ended = time.monotonic() - began
        assert sorted(took)[5] < 0.05, took
        assert max(took) < 1, took
        assert 2 <= ended < 4, ended
        assert await store.flush(WAIT_S)
        await store.close()

    asyncio.run(main())


def test_a_flush_ends_as_soon_as_the_rows_are_there(url):
    async def main():
        async with new_store(url, flush_interval_s=3600) as store:
            store.record(provider="p")
            assert await store.flush(WAIT_S)
            with locked(url):
                store.record(provider="p")
                assert await store.flush(0) is False
                waiting = [asyncio.create_task(store.flush(s)) for s in (WAIT_S, 1e9, float("inf"))]
                await asyncio.sleep(0)
            assert await asyncio.gather(*waiting) == [True] * 3
            assert await store.flush(0) is True
            assert not store._writer._handoff.flushes

    asyncio.run(main())


def test_close_ends_the_flushes_that_wait(url):
    async def main():
        store = new_store(url)
        store.record(provider="p")
        assert await store.flush(WAIT_S)
        with locked(url):
            store.record(provider="p")
            waiting = asyncio.create_task(store.flush(WAIT_S))
            await asyncio.sleep(0)
            await store.close(0.1)
            assert await waiting is True, "what was recorded is dropped, and counted"
        assert (await store.health()).dropped == 1

    asyncio.run(main())


def test_a_long_computation_delays_no_other(make):
    async def main():
        store = make()
        store.record(provider="p")
        assert await store.flush(WAIT_S)
        inside, release = threading.Semaphore(0), threading.Event()

        def on_step(_):
            inside.release()
            release.wait(WAIT_S)

        try:
            maintenance = [
                asyncio.create_task(store.maintain(rebuild=True, on_step=on_step))
                for _ in range(10)
            ]
            await comes(lambda: inside.acquire(blocking=False))
            async with asyncio.timeout(WAIT_S / 2):
                assert len(await store.query()) == 1
                assert (await store.health()).written == 1
                store.record(provider="p")
                await store.flush(0)
        finally:
            release.set()
        await asyncio.gather(*maintenance, return_exceptions=True)
        await close(store)

    asyncio.run(main())


def test_a_host_that_is_away_costs_each_read_one_wait(monkeypatch):
    """Reads that come while the database is being opened share that one try."""
    tries = []

    async def main():
        store = new_store("postgresql://localhost:1/none")
        open_ = store._database.open

        def slow(**options):
            tries.append(options)
            time.sleep(0.3)
            open_(**options)

        monkeypatch.setattr(store._database, "open", slow)
        began = time.monotonic()
        found = await asyncio.gather(*(store.query() for _ in range(20)), return_exceptions=True)
        assert {type(error).__name__ for error in found} == {"StoreUnavailable"}
        assert len(tries) == 1
        assert time.monotonic() - began < 4
        await store.close()

    asyncio.run(main())


# -- cancellation --------------------------------------------------------------------------------


CALLS = {
    "query": lambda store: store.query(),
    "stats": lambda store: store.get_stats(ALL),
    "add_many": lambda store: store.add_many([{"provider": "added"}]),
    "flush": lambda store: store.flush(WAIT_S),
    "health": lambda store: store.health(),
    "cleanup": lambda store: store.cleanup(),
    "maintain": lambda store: store.maintain(),
}


def test_a_cancelled_call_leaves_nothing_stuck(make):
    async def main():
        store = make(flush_interval_s=3600)
        store.record(provider="p")
        assert await store.flush(WAIT_S)
        for name, call in CALLS.items():
            for turns in (0, 1, 2, 5, 20, 60):
                tasks = [asyncio.create_task(call(store)) for _ in range(12)]
                for _ in range(turns):
                    await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                    accepted = (asyncio.CancelledError, LynkrStoreError)
                    assert not isinstance(outcome, BaseException) or isinstance(outcome, accepted)
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(*(store.query() for _ in range(20)))
                store.record(provider="p")
                assert await store.flush(WAIT_S), name
        assert not store._writer._handoff.flushes
        assert not store._reading._calls
        if store._engines:
            pool = (await store._engines.engine()).sync_engine.pool
            assert pool.checkedout() == 0
        await close(store)
        eventually(lambda: store._database.engine.pool.checkedout() == 0)

    asyncio.run(main())


def test_a_cancelled_close_closes(make):
    async def main():
        store = make(flush_interval_s=3600)
        await store.query()
        store.record(provider="p")
        closing = asyncio.create_task(store.close(WAIT_S))
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        await comes(lambda: not store._writer.counters().pending)
        await close(store)
        health = await store.health()
        assert (health.written, health.dropped) == (1, 0)

    asyncio.run(main())


# -- several loops -------------------------------------------------------------------------------


@pytest.mark.slow
def test_loops_in_six_threads_use_one_store(any_url):
    store = new_store(any_url)
    failures = []

    async def body():
        for _ in range(3):
            store.record(provider="p", timestamp=NOW)
            assert await store.flush(WAIT_S)
            await asyncio.gather(store.get_stats(ALL), *(store.query(limit=2) for _ in range(8)))
            assert await store.add_many([{"provider": "p", "timestamp": NOW}]) == 1
            assert adds_up(await store.health())

    def run():
        try:
            for _ in range(3):
                asyncio.run(body())
        except BaseException as error:  # noqa: BLE001 - a thread's own would be lost
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert asyncio.run(store.get_stats(ALL)).total_requests == 6 * 3 * 3 * 2
    asyncio.run(store.close())


@pytest.mark.slow
@pytest.mark.parametrize("ends", ["asyncio.run", "loop.close"])
@pytest.mark.parametrize("count", [20, 300], ids=["few", "many"])
def test_loops_that_are_over_leave_nothing_open(url, ends, count):
    """As where each test, or each request, has a loop of its own."""
    store = new_store(url)

    async def body():
        await asyncio.gather(*(store.query(limit=1) for _ in range(3)), store.health())

    def run():
        if ends == "asyncio.run":
            asyncio.run(body())
        else:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(body())
            loop.close()  # its generators are not ended before, as asyncio.run does

    run()
    gc.collect()
    threads = threading.active_count()
    for _ in range(count):
        run()
    assert sessions(url) <= StoreSettings().read_connections
    assert threading.active_count() <= threads + 4
    asyncio.run(store.close())
    if store._engines:
        assert not store._engines._held
        assert len(store._engines._spare) == 1
    gc.collect()
    eventually(lambda: sessions(url) == 0)


def test_a_loop_that_runs_again_keeps_its_connections(make):
    loop = asyncio.new_event_loop()

    async def opened():
        store = make()
        await store.query()
        return store

    store = loop.run_until_complete(opened())
    for _ in range(3):
        loop.run_until_complete(store.query())
    loop.run_until_complete(close(store))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.mark.slow
@pytest.mark.parametrize("state", ["running", "at rest", "closed"])
def test_another_loop_than_that_of_the_reads_closes(url, state):
    store = new_store(url)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(store.query())
    thread = None
    if state == "running":
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        eventually(loop.is_running)
    elif state == "closed":
        loop.close()
    asyncio.run(store.close())
    gc.collect()
    eventually(lambda: sessions(url) == 0)
    if thread:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
    if state != "closed":
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def test_a_read_that_ends_after_close_leaves_no_connection(url):
    """Its pool is gone when it gives the connection back."""

    async def main():
        store = new_store(url)
        await store.query()
        with reads_held_up(store, url):
            read = asyncio.create_task(store.query())
            await asyncio.sleep(0.2)
            await store.close(0.1)
        await asyncio.gather(read, return_exceptions=True)

    asyncio.run(main())
    gc.collect()
    eventually(lambda: sessions(url) == 0)


def test_a_loop_ends_while_it_reads(url):
    """What it was waiting for is given up; other loops go on."""
    store = new_store(url)

    async def leave():
        reads = [asyncio.create_task(store.query()) for _ in range(3)]
        stats = asyncio.create_task(store.get_stats(ALL))
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in (*reads, stats))

    asyncio.run(store.query())
    with reads_held_up(store, url):
        asyncio.run(leave())
    assert asyncio.run(store.query()) == []
    assert asyncio.run(store.get_stats(ALL)) is None
    asyncio.run(store.close())
    gc.collect()
    eventually(lambda: sessions(url) == 0)


def test_a_hosts_engine_belongs_to_one_loop(url):
    host = create_async_engine(create_store_async_engine(url).url)
    store = AsyncStore(engine=host, settings=StoreSettings(cache_ttl_s=0))

    async def read(*, dispose):
        await store.query()
        if dispose:
            await host.dispose()

    asyncio.run(read(dispose=False))
    with pytest.raises(BadArgument, match=r"engine: it was used in another event loop.*dispose"):
        asyncio.run(read(dispose=False))

    async def dispose():  # as SQLAlchemy asks of an engine that changes its loop
        await host.dispose()

    asyncio.run(dispose())
    asyncio.run(read(dispose=True))
    asyncio.run(read(dispose=True))
    asyncio.run(store.close())


def test_a_hosts_engine_without_a_pool_may_be_used_in_any_loop(url):
    host = create_async_engine(create_store_async_engine(url).url, poolclass=NullPool)
    store = AsyncStore(engine=host, settings=StoreSettings(cache_ttl_s=0))
    for _ in range(3):
        asyncio.run(store.query())
    asyncio.run(store.close())


def test_the_host_of_an_engine_keeps_using_it(url):
    async def main():
        host = create_async_engine(create_store_async_engine(url).url)
        store = AsyncStore(engine=host, settings=StoreSettings(cache_ttl_s=0))
        await store.query()
        await store.close()
        async with host.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1
        await host.dispose()

    asyncio.run(main())


# -- without threads -----------------------------------------------------------------------------


def test_where_the_system_gives_no_threads_reads_are_answered(any_url, monkeypatch):
    async def main():
        store = new_store(any_url)
        store.record(provider="p")
        assert await store.flush(WAIT_S)
        await asyncio.sleep(0)

        def start(_):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as without:
            without.setattr(threading.Thread, "start", start)
            assert len(await store.query()) == 1
            assert (await store.health()).written == 1
            await store.close()

    asyncio.run(main())


def test_a_connection_in_use_when_its_host_disposes_the_engine_is_closed(url):
    async def main():
        host = create_async_engine(create_store_async_engine(url).url)
        closed, used = [], []
        event.listen(host.sync_engine, "close", lambda connection, _: closed.append(connection))

        def task(session):
            used.append(driver_of(session.connection()))
            host.sync_engine.dispose()
            return RoutingRepository(session).query()

        store = AsyncStore(engine=host)
        assert await store._run(host, task) == []
        assert [connection.driver_connection for connection in closed] == used
        assert await store.query() == []
        await close(store)

    asyncio.run(main())


def test_a_flush_whose_caller_gave_up_is_not_answered(url):
    store = new_store(url, flush_interval_s=3600)
    told = []
    writer = store._writer
    store.record(provider="p")
    tell = lambda: told.append(1)  # noqa: E731 - the same object both times
    writer.when_flushed(tell)
    writer.forget_flush(tell)
    writer.forget_flush(tell)
    assert writer.flush(WAIT_S)
    assert told == []
    writer.when_flushed(tell)
    assert told == [1], "there is nothing to wait for"
    asyncio.run(store.close())
