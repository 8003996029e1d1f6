"""Several servers in one URL: one is killed, another promoted, or one takes no writes any more."""

import asyncio
import itertools
import logging
import threading
import time
from contextlib import contextmanager

import psycopg
import pytest
from sqlalchemy import make_url

from lynkr_store import AsyncStore, Store, StoreSettings, StoreUnavailable, upgrade
from lynkr_store.cli import commands
from lynkr_store.ingest import deliverer
from lynkr_store.migrate import revisions
from tests.support.children import adds_up, stored
from tests.support.postgres import available_servers
from tests.support.replication import Primary, Standby
from tests.support.stores import Asynchronous, eventually, looked

_numbers = itertools.count()
WAIT_S = 60


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(deliverer, "_LAST_RETRY_S", 0.3)


@pytest.fixture(scope="module", params=available_servers(), ids=lambda i: i.name)
def single(request):
    with Primary(request.param) as started:
        yield started


@pytest.fixture
def alone(single):
    """A server, and the URL of a database of its own at head, over TCP."""
    name = f"alone_{next(_numbers)}"
    url = single.create_database(name)
    upgrade(url)
    yield single, f"postgresql://postgres@127.0.0.1:{single.port}/{name}"
    single.take_writes()
    single.drop_database(name)


@pytest.fixture(params=available_servers(), ids=lambda i: i.name)
def pair(request):
    """A primary, its standby, and the URL of a database of theirs at head."""
    with Primary(request.param) as primary:
        upgrade(primary.create_database("pair"))
        with Standby(request.param, primary) as standby:
            primary.wait_for_standby()
            yield primary, standby, both(primary, standby)


def both(*servers, attrs="read-write", database="pair"):
    hosts = "&".join(f"host={server.host}" for server in servers)
    return f"postgresql://postgres@/{database}?{hosts}&target_session_attrs={attrs}"


@contextmanager
def opened(kind, url, **options):
    settings = StoreSettings(url=url, cache_ttl_s=0, connect_timeout_s=2, **options)
    with asyncio.Runner() as runner:
        store = (
            Store(settings=settings)
            if kind == "sync"
            else Asynchronous(AsyncStore(settings=settings), runner)
        )
        with store:
            yield store


each_kind = pytest.mark.parametrize("kind", ["sync", "async"])


class Recording:
    """A thread that records all the time, until the block ends."""

    def __init__(self, store):
        self.count = 0
        self._store = store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        while not self._stop.wait(0.005):
            assert self._store.record(provider="p", request_id=str(self.count))
            self.count += 1

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def assert_nothing_lost(store, count, url):
    assert store.flush(WAIT_S)
    health = store.health()
    assert adds_up(health)
    assert (health.written, health.rejected, health.dropped) == (count, 0, 0)
    assert stored(url) == [str(number) for number in range(count)]


# -- a primary and a standby -----------------------------------------------------------------------


@pytest.mark.slow
@each_kind
def test_a_promoted_standby_takes_over(pair, kind):
    primary, standby, url = pair
    with opened(kind, url) as store:
        with Recording(store) as recording:
            eventually(lambda: store.health().written > 20)
            assert store.query(limit=1)
            assert (looked(store).server, looked(store).writable) == (primary.host, True)
            primary.kill()
            # while no server takes writes, reads go on, and health says so
            eventually(lambda: answers(store))
            health = looked(store)
            assert health.reachable
            assert (health.server, health.writable) == (standby.host, False)
            with pytest.raises(StoreUnavailable, match="takes no writes"):
                store.add_many([{"provider": "p"}])
            eventually(lambda: "read-only" in (store.health().last_error or ""))
            said = store.health().last_error  # of the writer, about each of the hosts
            for words in ("refused", str(primary.port), "read-only", str(standby.port), "promote"):
                assert words in said
            standby.promote()
            before = recording.count
            eventually(lambda: recording.count > before + 50)
        assert_nothing_lost(store, recording.count, standby.url("pair"))
        assert (looked(store).server, looked(store).writable) == (standby.host, True)
        assert store.add_many([{"provider": "p"}]) == 1
        store.maintain()


def answers(store):
    try:
        return isinstance(store.query(limit=1), list)
    except StoreUnavailable:
        return False


@pytest.mark.slow
@each_kind
def test_an_old_primary_that_comes_back_gets_no_writes(pair, kind):
    primary, standby, url = pair
    with opened(kind, url) as store:
        with Recording(store) as recording:
            eventually(lambda: store.health().written > 20)
            primary.kill()
            standby.promote()
            primary.return_as_standby()
            before = recording.count
            eventually(lambda: recording.count > before + 50)
        assert_nothing_lost(store, recording.count, standby.url("pair"))
        health = looked(store)
        assert (health.server, health.writable) == (standby.host, True)
        assert len(store.query(limit=1)) == 1


@pytest.mark.slow
@each_kind
def test_a_primary_that_turns_read_only_is_left_for_one_that_takes_writes(pair, kind):
    """All its connections stay open and answer: nothing but the refused write tells."""
    primary, standby, url = pair
    with opened(kind, url) as store:
        with Recording(store) as recording:
            eventually(lambda: store.health().written > 20)
            assert store.query(limit=1)
            primary.make_read_only()
            # the refused write says it first, and then each attempt to find another server
            for _ in range(2):
                eventually(lambda: "takes no writes" in (store.health().last_error or ""))
                time.sleep(0.5)
            assert answers(store)
            standby.promote()
            before = recording.count
            eventually(lambda: recording.count > before + 50)
        assert_nothing_lost(store, recording.count, standby.url("pair"))
        # what was open to the old primary is not read from for longer than it takes to look
        eventually(lambda: looked(store).server == standby.host)
        assert store.add_many([{"provider": "p"}]) == 1
        assert len(store.query(limit=10_000)) == recording.count + 1


@pytest.mark.slow
def test_an_upgrade_finds_the_server_that_takes_writes(pair, monkeypatch):
    primary, standby, _ = pair
    url = both(standby, primary)
    monkeypatch.setenv("LYNKR_STORE_MIGRATE_URL", url)
    monkeypatch.setattr("sys.argv", ["lynkr-store", "downgrade", "0008"])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert not ended.value.code
    with Store(settings=StoreSettings(url=url, upgrade_on_open=True)) as store:
        store.record(provider="p")
        assert store.flush(WAIT_S)
        assert looked(store).revision == revisions.head()
    primary.kill()
    standby.promote()
    upgrade(url)


# -- a standby alone -------------------------------------------------------------------------------


@pytest.mark.slow
@each_kind
@pytest.mark.parametrize("read_only", [True, False])
def test_a_standby_alone_answers_reads(pair, kind, read_only, caplog):
    primary, standby, _ = pair
    with Store(primary.url("pair")) as store:
        store.record(provider="p")
        assert store.flush(WAIT_S)
    standby._await("SELECT pg_last_wal_replay_lsn() IS NOT NULL")
    caplog.set_level(logging.INFO, "lynkr_store")
    url = f"postgresql://postgres@{standby.host}/pair"
    settings = StoreSettings(url=url, cache_ttl_s=0, maintenance_interval_s=0.01)
    with asyncio.Runner() as runner:
        store = (
            Store(settings=settings, read_only=read_only)
            if kind == "sync"
            else Asynchronous(AsyncStore(settings=settings, read_only=read_only), runner)
        )
        with store:
            eventually(lambda: len(store.query()) == 1)
            assert store.get_stats().total_requests == 1
            health = looked(store)
            assert (health.reachable, health.server, health.writable) == (True, standby.host, False)
            time.sleep(1)  # a hundred intervals
            assert answers(store)
    said = [record.message for record in caplog.records]
    assert len(said) <= (0 if read_only else 1), said
    assert all("takes no writes" in each for each in said)


# -- one server that turns read-only ---------------------------------------------------------------


@pytest.mark.slow
@each_kind
def test_a_server_that_turns_read_only_keeps_records_waiting(alone, kind, caplog):
    server, url = alone
    with opened(kind, url) as store:
        store.record(provider="p", request_id="0")
        assert store.flush(WAIT_S)
        server.make_read_only()
        store.record(provider="p", request_id="1")
        assert not store.flush(0.5)
        health = looked(store)
        assert adds_up(health)
        assert (health.pending, health.rejected, health.dropped) == (1, 0, 0)
        assert (health.reachable, health.server, health.writable) == (True, server.host, False)
        assert "takes no writes" in health.last_error
        assert "target_session_attrs=read-write" in health.last_error
        assert len(store.query()) == 1
        assert store.get_stats().total_requests == 1
        with pytest.raises(StoreUnavailable, match="takes no writes"):
            store.add_many([{"provider": "p"}])
        with pytest.raises(StoreUnavailable, match="takes no writes"):
            store.maintain()
        server.take_writes()
        assert_nothing_lost(store, 2, url)
        assert looked(store).writable
        assert store.add_many([{"provider": "p"}]) == 1
    assert len([each for each in caplog.records if "records wait" in each.message]) == 1


@each_kind
def test_a_refused_write_closes_the_connections_that_are_open(alone, kind):
    """Behind a name, or a proxy, another server may be the one that takes writes now."""
    server, url = alone
    with opened(kind, url) as store:
        assert store.add_many([{"provider": "p"}]) == 1
        before = pids(url)
        server.make_read_only()
        with pytest.raises(StoreUnavailable, match="takes no writes"):
            store.add_many([{"provider": "p"}])
        server.take_writes()
        assert store.add_many([{"provider": "p"}]) == 1
        assert len(before & pids(url)) <= (kind == "async"), "that of another engine"


def pids(url):
    with psycopg.connect(url, autocommit=True) as other:
        return {
            pid
            for (pid,) in other.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'lynkr-store'"
            )
        }


def test_health_shows_no_password_and_the_command_shows_the_server(alone, monkeypatch, capsys):
    server, url = alone
    secret = make_url(url).set(password="s3cret")  # noqa: S106 - trusted whatever it is
    monkeypatch.setenv("LYNKR_STORE_URL", secret.render_as_string(hide_password=False))
    monkeypatch.setattr("sys.argv", ["lynkr-store", "health"])
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "s3cret" not in said
    assert server.host in said
    assert "takes writes" in said
