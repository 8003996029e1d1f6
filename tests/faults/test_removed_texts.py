"""Removed texts are in no file any more: not in the database's, not in its WAL."""

import asyncio
import re
import sqlite3
from contextlib import closing
from datetime import timedelta

import pytest
from sqlalchemy import create_engine, event
from sqlalchemy.exc import OperationalError

from lynkr_store import AsyncStore, Store, StoreSettings, create_store_engine
from lynkr_store.db.sqlite import overwriting
from lynkr_store.migrate.upgrade import downgrade

NOW = 1_750_000_000_000
DAY = 86_400_000
MARK = "Vx3Prompt"
SIZES = (20, 600, 30_000)
"""Characters of a text: within a row's cell, most of a page, and in pages of its own."""


def records(count, age=10 * DAY):
    return [
        {
            "provider": "p",
            "request_id": str(n),
            "timestamp": NOW - age - n,
            "request_text": f"{MARK}-{n:05} ".ljust(SIZES[n % 3], "q"),
            "response_text": f"{MARK}-{n:05} ".ljust(SIZES[(n + 1) % 3], "a"),
        }
        for n in range(count)
    ]


def places(path):
    """Where the mark stands, of the database and what SQLite keeps beside it."""
    return {
        place.name: found
        for place in path.parent.iterdir()
        if (found := place.read_bytes().count(MARK.encode()))
    }


@pytest.fixture(autouse=True)
def _as_sqlite_comes(monkeypatch):
    """Some systems build SQLite so that every connection begins with ``secure_delete``."""
    connect = sqlite3.connect

    def connect_as_it_comes(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.execute("PRAGMA secure_delete = OFF").close()
        return connection

    for module in (sqlite3, sqlite3.dbapi2):
        monkeypatch.setattr(module, "connect", connect_as_it_comes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "telemetry.db"


@pytest.fixture(params=["our engine", "a host's engine"])
def open_(request, path):
    """Open a store on the path, at head."""
    opened, hosts = [], []

    def open_(**options):
        url = f"sqlite:///{path}"
        settings = StoreSettings(url=url, upgrade_on_open=True, **options)
        if request.param == "our engine":
            opened.append(Store(settings=settings, clock=lambda: NOW))
        else:
            hosts.append(create_engine(url))
            opened.append(Store(engine=hosts[-1], settings=settings, clock=lambda: NOW))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()
    for host in hosts:
        host.dispose()


def by_text_retention(open_):
    store = open_(text_retention_days=1)
    store.add_many(records(500))
    yield store
    assert store.maintain().texts_removed == 500
    assert len(store.query(limit=1_000)) == 500


def by_retention(open_):
    store = open_(retention_days=1)
    store.add_many(records(500))
    yield store
    assert store.maintain().rows_deleted == 500


def by_cleanup(open_):
    store = open_()
    store.add_many(records(500))
    yield store
    assert store.cleanup(timedelta(days=1)) == 500


WAYS = (by_text_retention, by_retention, by_cleanup)


@pytest.mark.sample(3)
@pytest.mark.parametrize("remove", WAYS)
def test_removed_texts_are_in_no_file(open_, path, remove):
    way = remove(open_)
    next(way)
    assert places(path), "they were there"
    next(way, None)
    assert places(path) == {}


def test_the_async_store_leaves_none_behind_either(path):
    async def body():
        settings = StoreSettings(url=f"sqlite:///{path}", text_retention_days=1)
        async with AsyncStore(settings=settings, clock=lambda: NOW) as store:
            await store.add_many(records(50))
            assert places(path)
            assert (await store.maintain()).texts_removed == 50
            assert places(path) == {}

    asyncio.run(body())


def test_texts_of_rows_that_stay_are_whole(open_, path):
    store = open_(text_retention_days=1)
    store.add_many(records(300) + records(300, age=0))
    assert store.maintain().texts_removed == 300
    kept = {row.request_id: row.request_text for row in store.query(limit=300)}
    assert kept == {record["request_id"]: record["request_text"] for record in records(300)}
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_texts_stay_in_the_wal_until_readers_end(open_, path):
    with closing(sqlite3.connect(path)) as other:
        other.isolation_level = None
        assert other.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
        store = open_(text_retention_days=1)
        store.add_many(records(50))
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM routing_telemetry").fetchone()
        assert store.maintain().texts_removed == 50, "nobody waits for a reader"
        assert set(places(path)) >= {"telemetry.db-wal"}
        other.execute("COMMIT")
    assert store.maintain().texts_removed == 0
    assert places(path) == {}


@pytest.mark.parametrize(("mode", "number"), [("OFF", 0), ("FAST", 2), ("ON", 1)])
def test_a_hosts_connection_is_left_as_it_was(path, mode, number):
    engine = create_engine(f"sqlite:///{path}")
    seen = []

    @event.listens_for(engine, "connect")
    def on_connect(connection, record):
        connection.execute(f"PRAGMA secure_delete = {mode}").close()

    @event.listens_for(engine, "before_cursor_execute")
    def on_execute(connection, cursor, statement, *_):
        if re.match(r"(INSERT.* INTO|UPDATE|DELETE FROM) routing_telemetry\b", statement):
            [(now,)] = cursor.connection.execute("PRAGMA secure_delete")
            seen.append(now)

    @event.listens_for(engine, "checkin")
    def on_checkin(connection, record):
        assert connection is None or connection.execute("PRAGMA secure_delete").fetchone() == (
            number,
        )

    settings = StoreSettings(upgrade_on_open=True, text_retention_days=1)
    with Store(engine=engine, settings=settings, clock=lambda: NOW) as store:
        store.add_many(records(10))
        store.maintain()
        store.cleanup(timedelta(days=1))
    assert len(seen) > 2, "rows inserted, emptied, deleted"
    assert set(seen) == {1}
    engine.dispose()


def test_a_fault_in_a_removal_is_the_one_that_is_reported(path):
    engine = create_engine(f"sqlite:///{path}")
    with (
        engine.connect() as connection,
        pytest.raises(OperationalError, match="no such table"),
        overwriting(connection),
    ):
        connection.exec_driver_sql("DELETE FROM elsewhere")
    engine.dispose()


@pytest.mark.parametrize("own", [True, False], ids=["our engine", "a host's engine"])
def test_texts_of_columns_that_a_downgrade_drops_are_gone(path, own):
    url = f"sqlite:///{path}"
    with Store(url, clock=lambda: NOW) as store:
        store.add_many(records(100))
    assert places(path)
    engine = create_store_engine(url) if own else create_engine(url)
    downgrade(engine, "0001", drop_data=True)
    engine.dispose()  # the last connection empties the WAL
    assert places(path) == {}
