"""How many connections a process has, direct and over a pooler, and when idle ones are closed."""

import asyncio
import os
import threading
import time
from contextlib import ExitStack, contextmanager

import psycopg
import pytest
from sqlalchemy import create_engine, event, make_url

from lynkr_store import (
    AsyncStore,
    BadArgument,
    Store,
    StoreSettings,
    StoreUnavailable,
    create_store_engine,
)
from lynkr_store.db import engines
from tests.conftest import POSTGRES
from tests.support import pgbouncer, workers
from tests.support.children import MortalServer
from tests.support.postgres import available_servers
from tests.support.stores import adds_up, eventually, looked

LONG_S = 600.0
OURS = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND application_name = 'lynkr-store'"
)


@pytest.fixture
def pg_url(new_url):
    return new_url(POSTGRES[-1], at_head=True)


def new_store(url, **options):
    return Store(settings=StoreSettings(url=url, cache_ttl_s=0, **options))


def sessions(url):
    with psycopg.connect(url, autocommit=True) as other:
        return other.execute(OURS).fetchone()[0]


class Peak:
    """The greatest number of sessions that were ever seen, by looking all the time."""

    def __init__(self, url, statement=OURS):
        self.most = self.now = 0
        self._url, self._statement = url, statement
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self):
        with psycopg.connect(self._url, autocommit=True) as other:
            while not self._stop.wait(0.005):
                self.now = len(other.execute(self._statement).fetchall())
                self.most = max(self.most, self.now)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


ALL_OURS = OURS.replace("count(*)", "pid")


@contextmanager
def readers(store, number):
    """As many connections of the store's readers are in use until the block ends."""
    with ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(store.engine.connect())
        yield


# -- the number ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [2, 0, -1])
def test_fewer_than_three_connections_are_refused(given):
    with pytest.raises(BadArgument, match="read_connections"):
        StoreSettings(read_connections=given)


@pytest.mark.slow
def test_forty_threads_use_no_more_connections_than_stated(pg_url):
    with new_store(pg_url, read_connections=3) as store, Peak(pg_url, ALL_OURS) as peak:

        def use():
            for _ in range(5):
                store.record(provider="p")
                store.add_many([{"provider": "p"}])
                store.query(limit=1)
                store.health()

        threads = [threading.Thread(target=use) for _ in range(40)]
        for thread in threads:
            thread.start()
        store.maintain(rebuild=True)
        for thread in threads:
            thread.join()
        assert store.flush(60)
        assert adds_up(store.health())
        assert len(store.query(limit=1_000)) == 400
    assert 3 <= peak.most <= 3 + 1
    assert sessions(pg_url) == 0


@pytest.mark.slow
def test_tasks_of_two_loops_use_no_more_connections_than_stated(pg_url):
    settings = StoreSettings(url=pg_url, cache_ttl_s=0, read_connections=5)
    store = AsyncStore(settings=settings)

    async def use():
        for _ in range(3):
            store.record(provider="p")
            await store.add_many([{"provider": "p"}])
            await store.query(limit=1)
            await store.health()

    async def use_all():
        await asyncio.gather(*(use() for _ in range(20)))

    with Peak(pg_url, ALL_OURS) as peak:
        other = threading.Thread(target=lambda: asyncio.run(use_all()))
        other.start()
        asyncio.run(use_all())
        other.join()

        async def end():
            await store.maintain(rebuild=True)
            assert await store.flush(60)
            assert len(await store.query(limit=1_000)) == 2 * 20 * 3 * 2
            await store.close()

        asyncio.run(end())
    assert 3 <= peak.most <= 5 + 1
    assert sessions(pg_url) == 0


def test_an_index_is_built_within_the_number(pg_url):
    with psycopg.connect(pg_url, autocommit=True) as other:
        other.execute("DROP INDEX idx_telemetry_tier")
    held, built = psycopg.connect(pg_url), []
    with new_store(pg_url, read_connections=3) as store, Peak(pg_url, ALL_OURS) as peak:
        store.check()
        held.execute("LOCK TABLE routing_telemetry IN ROW EXCLUSIVE MODE")  # the build waits for it
        building = threading.Thread(target=lambda: built.append(store.maintain()))
        building.start()
        eventually(lambda: store.engine.pool.checkedout() == 2)

        def read():
            for _ in range(50):
                store.query()

        reading = [threading.Thread(target=read) for _ in range(6)]
        for thread in reading:
            thread.start()
        store.record(provider="p")
        assert store.flush(60)
        for thread in reading:
            thread.join()
        held.rollback()
        held.close()
        building.join()
    assert [each.indexes_built for each in built] == [("idx_telemetry_tier",)]
    assert peak.most == 3 + 1


def test_a_hosts_engine_keeps_the_hosts_pool(pg_url):
    url = pg_url.replace("postgresql:", "postgresql+psycopg:")
    engine = create_engine(url, pool_size=2, max_overflow=1)
    with Store(engine=engine) as store:
        store.record(provider="p")
        assert store.flush(60)
        assert len(store.query()) == 1
        assert (engine.pool.size(), type(engine.pool).__name__) == (2, "QueuePool")
        assert sessions(pg_url) == 0, "the host's connections have the host's name"
    engine.dispose()


# -- when all are in use ---------------------------------------------------------------------------


def test_a_read_that_finds_no_connection_free_names_the_setting(pg_url, monkeypatch):
    monkeypatch.setattr(engines, "WAIT_S", 0.1)
    with new_store(pg_url, read_connections=3) as store:
        store.check()
        with readers(store, 3), pytest.raises(StoreUnavailable, match="READ_CONNECTIONS"):
            store.query()
        assert store.query() == []


def test_busy_readers_hold_up_no_record_and_are_no_outage(pg_url):
    with new_store(pg_url, read_connections=3) as store:
        with readers(store, 3):
            store.record(provider="p")
            assert store.flush(60)
            health = looked(store)
        assert (health.reachable, health.written, health.last_error) == (True, 1, None)


@pytest.mark.slow
def test_a_frozen_server_is_an_outage_also_when_all_connections_are_in_use():
    with MortalServer(available_servers()[-1]) as server:
        url = server.create_database("frozen")
        with new_store(url, read_connections=3, upgrade_on_open=True) as store:
            store.record(provider="p")
            assert store.flush(60)
            with readers(store, 3):
                assert looked(store).reachable
                server.freeze()
                try:
                    eventually(lambda: not store.health().reachable)
                    assert "no answer" in store.health().last_error
                finally:
                    server.thaw()
            eventually(lambda: store.health().reachable)


# -- idle ones -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Store", "read_only"])
def test_idle_connections_are_closed_and_opened_again(pg_url, kind):
    options = {"read_connections": 5, "idle_connection_s": 0.5}
    settings = StoreSettings(url=pg_url, cache_ttl_s=0, **options)
    with Store(settings=settings, read_only=kind == "read_only") as store:
        for _ in range(2):
            with readers(store, 5):
                store.record(provider="p")
                store.flush(60)
                assert sessions(pg_url) >= 5
            eventually(lambda: sessions(pg_url) == 0)
            assert isinstance(store.query(), list)
        assert store.engine.pool.checkedout() == 0
    eventually(lambda: not any("idle" in each.name for each in threading.enumerate()))


@pytest.mark.slow
def test_a_connection_in_steady_use_stays_open(pg_url):
    closed = []
    with new_store(pg_url, idle_connection_s=3) as store:
        store.check()
        with readers(store, 4):
            pass
        with store.engine.connect() as connection:
            kept = connection.connection.dbapi_connection
        event.listen(store.engine, "close", lambda connection, _: closed.append(connection))
        end = time.monotonic() + 10
        while time.monotonic() < end:
            store.query(limit=1)
            time.sleep(0.05)
        assert len(closed) == 3
        assert kept not in closed


def test_a_connection_in_use_is_not_closed_however_long(pg_url):
    with new_store(pg_url, idle_connection_s=0.1) as store, store.engine.connect() as connection:
        time.sleep(0.5)
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
        assert sessions(pg_url) == 1


def test_idle_connections_of_a_loop_are_closed_and_opened_again(pg_url):
    options = {"read_connections": 5, "idle_connection_s": 0.5}
    settings = StoreSettings(url=pg_url, cache_ttl_s=0, **options)

    async def body():
        async with AsyncStore(settings=settings) as store:
            for _ in range(2):
                store.record(provider="p")
                await asyncio.gather(*(store.query() for _ in range(9)), store.flush(60))
                for _ in range(6_000):
                    if (open_ := sessions(pg_url)) == 0:
                        break
                    await asyncio.sleep(0.01)
                assert open_ == 0

    asyncio.run(body())


def test_an_engine_that_is_forgotten_ends_its_thread(pg_url):
    before = threading.active_count()
    engine = create_store_engine(pg_url, idle_connection_s=LONG_S)
    engine.connect().close()
    assert threading.active_count() == before + 1
    engine.dispose()
    eventually(lambda: threading.active_count() == before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_of_a_fork_closes_its_own(pg_url):
    with new_store(pg_url, idle_connection_s=0.5) as store:
        assert store.query() == []
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                store.query()
                eventually(lambda: sessions(pg_url) <= 1)  # the parent's, if it has one
                eventually(lambda: store.engine.pool.checkedin() == 0 or _closed(store))
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert store.query() == []


def _closed(store):
    return all(entry.dbapi_connection is None for entry in store.engine.pool._pool.queue)


# -- eight processes -------------------------------------------------------------------------------

PROCESSES, THREADS, CONNECTIONS, IDLE_S = 8, 4, 4, 2.0


@pytest.mark.slow
@pytest.mark.parametrize("way", ["direct", "pgbouncer"])
@pytest.mark.parametrize("kind", ["threads", "tasks"])
def test_eight_workers_of_four_threads_stay_within_the_number(pg_url, way, kind):
    if way == "pgbouncer" and pgbouncer.PROGRAM is None:
        pytest.skip("pgbouncer is not installed: apt-get install pgbouncer")
    most = PROCESSES * (CONNECTIONS + 1)
    options = {"read_connections": CONNECTIONS, "idle_connection_s": IDLE_S, "threads": THREADS}
    with ExitStack() as stack:
        peak = stack.enter_context(Peak(pg_url, ALL_OURS))
        url = clients = None
        if way == "pgbouncer":
            settings = {"default_pool_size": "50", "admin_users": "pooled"}
            url = stack.enter_context(pgbouncer.pooled(pg_url, settings))
            admin = make_url(url).set(database="pgbouncer").render_as_string()
            clients = stack.enter_context(Clients(admin))
        options["url"] = url or pg_url
        children = [stack.enter_context(workers.launch(kind, options)) for _ in range(PROCESSES)]
        for child in children:
            assert child.heard()["ready"]
        time.sleep(4)
        for child in children:
            child.tell("stop")
        said = [child.heard() for child in children]
        print(f"{way}, {kind}: at most {peak.most} of {most}", clients and clients.most, said)
        assert all(each["good"] and each["reads"] for each in said), said
        assert not any("in use" in (each["last_error"] or "") for each in said), said
        assert PROCESSES < peak.most <= most
        if clients:
            assert PROCESSES < clients.most <= most
        else:
            clients = peak
        eventually(lambda: clients.now <= PROCESSES)  # maintenance goes on, with one each
        for child in children:
            child.tell("close")
            child.end()


class Clients(Peak):
    """The clients that pgbouncer has of the stores, by its own words."""

    def _look(self):
        with (
            psycopg.connect(self._url, autocommit=True) as connection,
            psycopg.ClientCursor(connection) as cursor,  # pgbouncer's own database knows no other
        ):
            while not self._stop.wait(0.01):
                found = cursor.execute("SHOW CLIENTS").fetchall()
                at = [each.name for each in cursor.description].index("application_name")
                self.now = sum(row[at] == "lynkr-store" for row in found)
                self.most = max(self.most, self.now)
