"""Engines: URLs, PRAGMAs, BEGIN, hosts' own engines."""

import asyncio
import builtins
import io
import os
import re
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, nullcontext, suppress

import pytest
from rich.console import Console
from sqlalchemy import (
    URL,
    Engine,
    QueuePool,
    StaticPool,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from lynkr_store import (
    AsyncStore,
    BadArgument,
    MissingDriver,
    RoutingRepository,
    RowRejected,
    SchemaAhead,
    SchemaBehind,
    Store,
    StoreSettings,
    StoreUnavailable,
    UnsupportedDatabase,
    create_store_engine,
    upgrade,
    writing,
)
from lynkr_store.cli import render
from lynkr_store.db import forking
from lynkr_store.db.dialect import parse_url, writing_at_once
from lynkr_store.db.engines import create_store_async_engine
from lynkr_store.db.models import RoutingTelemetry
from lynkr_store.migrate.comparison import drift
from lynkr_store.migrate.upgrade import downgrade, write_script
from lynkr_store.storage import write_lock
from lynkr_store.testing import RecordFactory
from tests.conftest import ON_DISK
from tests.support.stores import looked

NOW = 1_750_000_000_000


def test_a_file_has_the_pragmas_it_should(tmp_path):
    engine = create_store_engine(f"sqlite:///{tmp_path}/deep/down/t.db")
    wanted = {
        "journal_mode": "wal",
        "synchronous": 1,
        "cache_size": -16384,
        "temp_store": 2,
        "busy_timeout": 3000,
        "page_size": 8192,
        "auto_vacuum": 2,
        "secure_delete": 1,
    }
    with engine.connect() as connection:
        found = {n: connection.exec_driver_sql(f"PRAGMA {n}").scalar() for n in wanted}
    engine.dispose()
    assert found == wanted


@contextmanager
def under_umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder):
    return {place.name: oct(stat.S_IMODE(place.stat().st_mode)) for place in folder.iterdir()}


def make_by(way, url):
    """Have a file made, and what SQLite keeps beside it, which are there while it is open."""
    match way:
        case "store":
            store = Store(url)
            assert store.add_many([{"provider": "p"}]) == 1
            return store
        case "upgrade":
            upgrade(url)
            return Store(url)
        case _:

            async def body():
                engine = create_store_async_engine(url)
                async with engine.connect() as connection:
                    await connection.exec_driver_sql("CREATE TABLE t (a)")
                await engine.dispose()

            asyncio.run(body())
            return nullcontext()


@pytest.mark.parametrize("way", ["store", "upgrade", "async"])
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_file_that_is_made_is_its_owners_alone(tmp_path, mask, way):
    folder = tmp_path / "data"
    with under_umask(mask), make_by(way, f"sqlite:///{folder}/telemetry.db"):
        found = modes(folder)
        assert "telemetry.db" in found
        assert way != "store" or {"telemetry.db-wal", "telemetry.db-shm"} <= found.keys()
        assert set(found.values()) == {"0o600"}
        assert not folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o666])
def test_a_file_that_is_there_keeps_its_mode(tmp_path, mode):
    file = tmp_path / "telemetry.db"
    file.touch()
    file.chmod(mode)
    with under_umask(0), make_by("store", f"sqlite:///{file}"):
        assert set(modes(tmp_path).values()) == {oct(mode)}, "so a group may share it"


def test_a_file_that_is_made_again_is_its_owners_alone_too(tmp_path):
    file = tmp_path / "telemetry.db"
    file.touch(0o644)
    with Store(f"sqlite:///{file}") as store:
        assert store.add_many([{"provider": "p"}]) == 1
        for place in tmp_path.iterdir():
            place.unlink()
        assert store.record(provider="p")
        assert store.flush(30)
        assert modes(tmp_path)["telemetry.db"] == "0o600"


def test_the_file_that_a_link_leads_to_is_its_owners_alone(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "telemetry.db").symlink_to(folder / "telemetry.db")
    with under_umask(0), make_by("store", f"sqlite:///{tmp_path}/telemetry.db"):
        assert set(modes(folder).values()) == {"0o600"}


def test_where_a_file_cannot_be_made_without_a_descriptor_sqlite_makes_it(tmp_path, monkeypatch):
    def mknod(*_):
        raise PermissionError

    monkeypatch.setattr(os, "mknod", mknod)
    with make_by("store", f"sqlite:///{tmp_path}/telemetry.db"):
        assert (tmp_path / "telemetry.db").exists()


@pytest.mark.slow
def test_a_file_that_another_thread_makes_first_keeps_its_lock(tmp_path, monkeypatch):
    """A descriptor of the file that was closed would take away every lock of this process."""
    file, mknod, others = tmp_path / "telemetry.db", os.mknod, []

    def too_late(*args):
        others.append(sqlite3.connect(file, isolation_level=None))
        others[0].execute("BEGIN IMMEDIATE")
        mknod(*args)

    monkeypatch.setattr(os, "mknod", too_late)
    engine = create_store_engine(f"sqlite:///{file}")
    with suppress(OperationalError):  # locked, which it is
        engine.connect().close()
    monkeypatch.undo()
    code = (
        "import sqlite3, sys\n"
        "other = sqlite3.connect(sys.argv[1], timeout=0, isolation_level=None)\n"
        "other.execute('BEGIN IMMEDIATE')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, file], capture_output=True, text=True, check=False
    )
    assert "database is locked" in done.stderr
    others[0].close()
    engine.dispose()


def test_parameters_never_show(empty_engine):
    upgrade(empty_engine)
    statement = text("INSERT INTO routing_telemetry (nothing) VALUES (:p)")
    with pytest.raises(Exception, match="hidden") as failed, empty_engine.begin() as connection:
        connection.execute(statement, {"p": "secret"})
    assert "secret" not in str(failed.value)


def test_writers_take_the_lock_at_begin_and_readers_do_not(tmp_path):
    engine = create_store_engine(f"sqlite:///{tmp_path}/t.db")
    upgrade(engine)
    with closing(sqlite3.connect(tmp_path / "t.db", timeout=0)) as other:
        with engine.connect() as reader:
            reader.execute(text("SELECT 1 FROM routing_telemetry"))
            other.execute("BEGIN IMMEDIATE")
            other.rollback()
        with writing(engine).connect() as writer:
            writer.execute(text("SELECT 1 FROM routing_telemetry"))
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
    engine.dispose()


def busy_timeout(connection):
    return connection.exec_driver_sql("PRAGMA busy_timeout").scalar()


def test_writing_at_once_does_not_wait_and_the_next_transaction_does(tmp_path):
    engine = create_store_engine(f"sqlite:///{tmp_path}/t.db")
    upgrade(engine)
    with closing(sqlite3.connect(tmp_path / "t.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with (
            pytest.raises(OperationalError, match="locked"),
            writing_at_once(engine).connect() as connection,
        ):
            connection.begin()
        assert time.monotonic() - began < 2.5  # of the 3 s that others wait
        other.rollback()
        for _ in range(2):
            with writing_at_once(engine).connect() as connection:
                assert busy_timeout(connection) == 0
        with engine.connect() as connection:
            assert busy_timeout(connection) == 3000
    engine.dispose()


def test_without_a_wal_a_commit_waits_for_readers(tmp_path):
    with closing(sqlite3.connect(tmp_path / "t.db")) as other:
        other.execute("CREATE TABLE somebody_elses (x)")
        engine = create_store_engine(f"sqlite:///{tmp_path}/t.db")
        with writing_at_once(engine).connect() as connection:
            connection.execute(text("INSERT INTO somebody_elses VALUES (1)"))
            assert busy_timeout(connection) == 3000
        engine.dispose()


@pytest.mark.parametrize(
    "url",
    [
        "mysql://h/d",
        "postgresql+asyncpg://h/d",
        "postgresql+psycopg2://h/d",
        "sqlite+pysqlcipher:///x",
        "nonsense",
        "",
    ],
)
def test_unsupported_databases_are_named_with_what_to_use(url):
    for open_ in (create_store_engine, create_store_async_engine, Store, AsyncStore):
        with pytest.raises(UnsupportedDatabase, match=r"url: .*sqlite:///.*postgresql://"):
            open_(url)


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("sqlite:///a.db", "sqlite+pysqlite"),
        ("sqlite+aiosqlite:///a.db", "sqlite+pysqlite"),
        ("postgresql://h/d", "postgresql+psycopg"),
        ("postgresql+psycopg_async://h/d", "postgresql+psycopg"),
    ],
)
def test_urls_name_their_driver(url, driver):
    assert parse_url(url).drivername == driver


def test_passwords_with_special_characters_work_and_never_show():
    url = URL.create("postgresql", "user", "p%40@ss/w:rd %", "host", database="db")
    store = Store(url.render_as_string(hide_password=False))
    assert store.engine.url.password == "p%40@ss/w:rd %"  # noqa: S105
    assert "w:rd" not in repr(store)
    store.close()


OLD = {
    "sqlite": ((3, 31, 1), (3, 40), "sqlite 3.31.1 is too old: use version 3.40 or newer"),
    "postgresql": ((14, 9), (15,), "postgresql 14.9 is too old: use version 15 or newer"),
}


@pytest.mark.parametrize("read_only", [False, True])
def test_a_database_that_is_too_old_is_refused_with_the_version_to_use(url, read_only):
    with Store(url, read_only=read_only) as store:
        store.query()
    with Store(url, read_only=read_only) as store:
        dialect = store.engine.dialect
        with store.engine.connect():  # which asks for the version
            found, oldest, words = OLD[dialect.name]
        dialect.server_version_info = found
        for _ in range(2):
            with pytest.raises(UnsupportedDatabase, match=re.escape(words)):
                store.query()
        dialect.server_version_info = oldest
        assert store.query() == []


def test_a_database_that_is_too_old_is_not_upgraded(empty_engine):
    with empty_engine.connect():
        found, _, words = OLD[empty_engine.dialect.name]
    empty_engine.dialect.server_version_info = found
    with pytest.raises(UnsupportedDatabase, match=re.escape(words)):
        upgrade(empty_engine)
    with empty_engine.connect() as connection:
        assert inspect(connection).get_table_names() == []


@pytest.mark.parametrize("driver", ["psycopg", "aiosqlite"])
def test_a_missing_driver_names_the_extra(monkeypatch, driver):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == driver:
            raise ModuleNotFoundError(f"No module named '{driver}'", name=driver)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    if driver == "psycopg":
        with pytest.raises(MissingDriver, match=r"psycopg .*pip install 'lynkr-store\[postgres\]'"):
            Store("postgresql://h/d")
    else:
        with pytest.raises(MissingDriver, match=r"lynkr-store\[async\]"):
            create_store_async_engine("sqlite:///x.db")


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with Store(f"sqlite:///{tmp_path}/file/below/t.db") as store:
        with pytest.raises(StoreUnavailable, match=r"url: the directory .*below cannot be created"):
            store.query()
        store.record(provider="p")
        assert store.flush(0.2) is False
        assert "directory" in looked(store).last_error
        store.close(0)


def test_a_file_that_is_no_database_is_named(tmp_path):
    path = tmp_path / "t.db"
    path.write_bytes(b"not a database, and long enough to be told from an empty file" * 100)
    before = path.read_bytes()
    with Store(f"sqlite:///{path}") as store:
        with pytest.raises(StoreUnavailable, match="not an SQLite database; give another path"):
            store.query()
        assert looked(store).reachable is False
    assert path.read_bytes() == before


def test_a_server_out_of_reach_is_said_and_nothing_is_none(tmp_path):
    with Store(f"postgresql://u:secret@/d?host={tmp_path}") as store:
        for ask in (store.query, store.get_stats, store.get_routing_accuracy, store.cleanup):
            with pytest.raises(StoreUnavailable) as failed:
                ask()
            assert "secret" not in str(failed.value)
        store.record(provider="p")
        health = looked(store)
        assert (health.reachable, health.pending, health.revision) == (False, 1, None)
        store.close(0.1)
        health = store.health()
        assert (health.pending, health.dropped) == (0, 1)


def test_a_schema_that_is_behind_or_ahead_has_its_own_error(empty_url):
    settings = StoreSettings(url=empty_url, upgrade_on_open=False)
    with (
        Store(settings=settings) as store,
        pytest.raises(SchemaBehind, match="lynkr-store upgrade"),
    ):
        store.query()
    engine = create_store_engine(empty_url)
    upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE lynkr_store_alembic_version SET version_num = '9999'"))
    engine.dispose()
    with Store(empty_url) as store, pytest.raises(SchemaAhead, match="install a newer"):
        store.query()


def test_postgres_is_not_upgraded_unasked(postgres_url):
    with Store(postgres_url) as store:
        with pytest.raises(SchemaBehind):
            store.query()
        store.record(provider="waits")
        assert store.flush(0.1) is False
        engine = create_store_engine(postgres_url)
        upgrade(engine)
        engine.dispose()
        assert store.flush(10), "recovered without a restart"
        assert store.health().written == 1


def test_the_servers_options_are_kept_with_ours(postgres_url):
    separator = "&" if "?" in postgres_url else "?"
    engine = create_store_engine(
        f"{postgres_url}{separator}options=-c%20work_mem%3D5MB", statement_timeout_s=7
    )
    with engine.connect() as connection:
        names = ("work_mem", "statement_timeout", "jit")
        shown = [connection.scalar(text(f"SHOW {name}")) for name in names]
    engine.dispose()
    assert shown == ["5MB", "7s", "off"]


OWN = "lynkr-store"


@pytest.mark.parametrize(
    ("parameter", "variable", "shown"),
    [("", "", OWN), ("&application_name=host", "other", "host"), ("", "other", "other")],
)
def test_the_server_shows_whose_sessions_they_are(
    postgres_url, monkeypatch, parameter, variable, shown
):
    if variable:
        monkeypatch.setenv("PGAPPNAME", variable)
    url, seen = postgres_url + parameter, set()

    def name_of(connection):
        seen.add(connection.exec_driver_sql("SHOW application_name").scalar())

    with Store(url, settings=StoreSettings(upgrade_on_open=True)) as store:
        event.listen(Engine, "commit", name_of)  # of the migration, which has its own connection
        try:
            store.check()
        finally:
            event.remove(Engine, "commit", name_of)
        with store.engine.begin() as connection:
            name_of(connection)

    async def read():
        async with AsyncStore(url) as store:
            await store.query()
            engine = await store._engines.engine()
            async with engine.begin() as connection:
                await connection.run_sync(name_of)

    asyncio.run(read())
    assert seen == {shown}


def test_url_and_engine_exclude_each_other(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path}/t.db")
    for open_ in (Store, AsyncStore):
        with pytest.raises(BadArgument, match="one of the two"):
            open_("sqlite://", engine=engine)
    with pytest.raises(BadArgument, match="engine: give an sqlalchemy Engine"):
        Store(engine="sqlite://")
    engine.dispose()


def test_an_engine_that_threads_cannot_share_is_refused():
    for options in ({}, {"poolclass": StaticPool}):
        engine = create_engine("sqlite://", **options)
        with pytest.raises(BadArgument, match="engine: its pool"):
            Store(engine=engine)
        engine.dispose()


def test_read_only_takes_a_url_and_refuses_to_write(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path}/t.db")
    with pytest.raises(BadArgument, match="read_only"):
        Store(engine=engine, read_only=True)
    engine.dispose()
    url = f"sqlite:///{tmp_path}/t.db"
    with Store(url) as store:
        store.record(provider="p")
    with Store(url, read_only=True) as store:
        assert len(store.query()) == 1
        assert store.record(provider="p") is False
        for write in (store.cleanup, store.maintain, lambda: store.add_many([])):
            with pytest.raises(BadArgument, match="read-only"):
                write()
        assert store.health().dropped_by == {"closed": 1}
        with store.engine.connect() as connection, pytest.raises(Exception, match="readonly"):
            connection.execute(text("DELETE FROM routing_telemetry"))


@pytest.mark.parametrize("backend", ON_DISK)
def test_a_hosts_own_engine_is_used_and_left_open(backend, new_url):
    url = new_url(backend, at_head=True)
    host = create_engine(parse_url(url), poolclass=QueuePool)
    with Store(engine=host) as store:
        store.record(provider="p")
        assert store.flush(10)
        assert store.add_many([{"provider": "q"}]) == 1
        assert store.get_stats().total_requests == 2
        assert store.engine is host
    with host.connect() as connection:  # not disposed
        assert connection.scalar(text("SELECT count(*) FROM routing_telemetry")) == 2
    host.dispose()


def test_a_hosts_engine_upgrades_in_one_transaction(tmp_path):
    host = create_engine(f"sqlite:///{tmp_path}/t.db")
    with host.begin() as connection:
        connection.execute(text("CREATE TABLE routing_telemetry (id INTEGER)"))
    with pytest.raises(Exception, match="not adopted"):
        upgrade(host)
    with host.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM sqlite_master")) == 1
    host.dispose()


@pytest.mark.parametrize("own", [True, False], ids=["our engine", "a host's engine"])
def test_a_savepoint_begins_a_transaction_first(tmp_path, own):
    url = f"sqlite:///{tmp_path}/t.db"
    engine = create_store_engine(url) if own else create_engine(url)
    upgrade(engine)
    with Session(engine) as session:
        RoutingRepository(session).add_many([RecordFactory()])
        session.rollback()
    with Session(engine) as session:
        assert RoutingRepository(session).query() == [], "the caller's rollback takes it back"
        RoutingRepository(session).add_many([RecordFactory()])
        session.commit()
        assert len(RoutingRepository(session).query()) == 1
    engine.dispose()


def test_a_repository_works_in_the_callers_transaction(empty_engine):
    upgrade(empty_engine)
    with Session(writing(empty_engine)) as session, session.begin():
        repository = RoutingRepository(session, clock=lambda: NOW)
        repository.add_many([RecordFactory(timestamp=NOW)])
        assert repository.get_stats().total_requests == 1
        assert session.query(RoutingTelemetry).one().provider
        with Session(empty_engine) as other:
            assert RoutingRepository(other, clock=lambda: NOW).get_stats() is None


def test_a_row_that_the_database_refuses_costs_itself(empty_engine):
    upgrade(empty_engine)
    refuse = {
        "sqlite": "CREATE TRIGGER no BEFORE INSERT ON routing_telemetry WHEN NEW.provider = 'bad' "
        "BEGIN SELECT RAISE(ABORT, 'secret'); END",
        "postgresql": "ALTER TABLE routing_telemetry ADD CONSTRAINT no CHECK (provider <> 'bad')",
    }
    with empty_engine.begin() as connection:
        connection.execute(text(refuse[empty_engine.dialect.name]))
    with Store(engine=empty_engine) as store:
        for n in range(100):
            store.record(provider="bad" if n in (0, 41, 42, 99) else "good", attempt_index=n)
        assert store.flush(20)
        health = store.health()
        assert (health.written, dict(health.rejected_by)) == (96, {"constraint": 4})
        stored = sorted(store.query(), key=lambda row: row.id)
        assert [r.attempt_index for r in stored] == [
            n for n in range(100) if n not in (0, 41, 42, 99)
        ]
        with pytest.raises(RowRejected) as refused:
            store.add_many([{"provider": "good"}, {"provider": "bad"}])
        assert refused.value.__cause__ is None
        assert "secret" not in str(refused.value)
        assert len(store.query(limit=1000)) == 96


def test_a_file_that_another_writer_holds_is_waited_for(tmp_path):
    with Store(f"sqlite:///{tmp_path}/t.db") as store:
        store.record(provider="first")
        assert store.flush(10)
        with closing(sqlite3.connect(tmp_path / "t.db")) as other:
            other.execute("BEGIN IMMEDIATE")
            store.record(provider="second")
            assert store.flush(0.2) is False
            assert store.record(provider="third"), "the caller never waits"
            other.rollback()
        assert store.flush(20)
        assert store.health().written == 3


@pytest.mark.parametrize("own", [True, False])
def test_a_wal_that_batches_leave_moves_to_the_file_where_the_lock_is_left_alone(
    tmp_path, monkeypatch, own
):
    monkeypatch.setattr(write_lock, "pause_s", lambda *_: 0.001)
    path = tmp_path / "t.db"
    engine = None if own else create_engine(f"sqlite:///{path}")
    with Store(None if engine else f"sqlite:///{path}", engine=engine) as store:
        store.maintain()
        with closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        empty = path.stat().st_size
        for _ in range(3):
            for _ in range(100):  # 30 pages, and SQLite's own checkpoint comes after 1,000
                store.record(provider="p", request_text="x" * 2_000)
            assert store.flush(10)
        assert path.stat().st_size - empty > 200 * 2_000

        def pages():
            with store.engine.connect() as connection:
                return connection.exec_driver_sql("PRAGMA wal_autocheckpoint").scalar_one()

        assert pages() == (20_000 if own else 1_000), "a host's connections are its own"
        size = path.stat().st_size
        for _ in range(10):
            store.record(provider="p", request_text="x" * 2_000)
        assert store.flush(10)
        assert pages() == 1_000, "small batches write the same pages again and again"
        if own:  # a host's pages are half as large, and come to 1,000
            assert path.stat().st_size == size, "nobody is to feel a checkpoint for their sake"
    if engine:
        engine.dispose()


def test_a_fold_moves_the_wal_to_the_file(tmp_path):
    path = tmp_path / "t.db"
    with Store(f"sqlite:///{path}") as store:
        store.maintain()
        with closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        empty = path.stat().st_size
        for _ in range(100):
            store.record(provider="p", request_text="x" * 2_000)
        assert store.flush(10)
        assert path.stat().st_size == empty
        store.maintain()
        assert path.stat().st_size - empty > 100 * 2_000


@pytest.mark.parametrize(("pages", "ends"), [(9_999, [False]), (10_000, [False] * 3 + [True])])
def test_the_end_of_a_long_wal_is_moved_between_two_batches(tmp_path, monkeypatch, pages, ends):
    batches_wait = []
    with Store(f"sqlite:///{tmp_path}/t.db") as store:
        store.maintain()
        store.record(provider="p")
        assert store.flush(10)

        def checkpoint(_):
            batches_wait.append(store._database._write_lock._turn.locked())
            return pages

        monkeypatch.setattr(write_lock, "checkpoint", checkpoint)
        monkeypatch.setattr(write_lock, "pause_s", lambda *_: 0)
        store.maintain()
    assert batches_wait == ends


def test_a_store_that_is_forgotten_still_writes(tmp_path):
    url = f"sqlite:///{tmp_path}/t.db"
    store = Store(url)
    store.record(provider="p")
    del store
    with Store(url) as again:
        assert len(again.query()) == 1


def test_health_does_not_wait_for_a_database_that_hangs(tmp_path, monkeypatch):
    release = threading.Event()
    with Store(f"sqlite:///{tmp_path}/t.db") as store:
        store.query()
        monkeypatch.setattr("lynkr_store.store.health._look", lambda _: release.wait(20))
        began = time.monotonic()
        health = store.health()
        assert time.monotonic() - began < 15
        assert health.pending == 0
        release.set()


def test_a_relative_path_is_meant_from_where_the_store_was_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store("sqlite:///here.db") as store:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.record(provider="p")
        assert store.flush(10)
    assert (tmp_path / "here.db").exists()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_store_not_yet_used_makes_nothing(tmp_path):
    with Store(f"sqlite:///{tmp_path}/new/t.db") as store:
        assert "does not exist" in looked(store).last_error
    assert list(tmp_path.iterdir()) == []


def test_a_store_left_open_at_exit_still_writes(tmp_path):
    url = f"sqlite:///{tmp_path}/t.db"
    code = f"from lynkr_store import Store; store = Store({url!r}); store.record(provider='p')"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0
    with Store(url) as store:
        assert len(store.query()) == 1


@pytest.mark.slow
def test_processes_that_open_a_new_file_together_all_write(tmp_path):
    url = f"sqlite:///{tmp_path}/new/t.db"
    code = (
        "from lynkr_store import Store\n"
        f"with Store({url!r}) as store:\n"
        "    store.record(provider='p')\n"
        "    assert store.flush(30)\n"
    )
    started = [subprocess.Popen([sys.executable, "-W", "error", "-c", code]) for _ in range(4)]
    assert [process.wait(60) for process in started] == [0] * 4
    with Store(url) as store:
        assert len(store.query()) == 4
        with store.engine.connect() as connection:
            assert drift(connection) == []
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


@pytest.mark.parametrize("backend", ON_DISK)
def test_a_hosts_own_async_engine_is_used_and_left_open(backend, new_url):
    url = new_url(backend, at_head=True)
    sync = parse_url(url)
    driver = "sqlite+aiosqlite" if backend == "sqlite-file" else "postgresql+psycopg"

    async def main():
        host = create_async_engine(sync.set(drivername=driver))
        async with AsyncStore(engine=host) as store:
            store.record(provider="p")
            assert await store.flush(10)
            assert await store.add_many([{"provider": "q"}]) == 1
            assert (await store.get_stats()).total_requests == 2
        async with host.connect() as connection:  # not disposed
            assert await connection.scalar(text("SELECT count(*) FROM routing_telemetry")) == 2
        await host.dispose()

    asyncio.run(main())


def test_the_connections_of_a_hosts_aiosqlite_engine_end_before_a_fork(tmp_path):
    """Which the lowest version of aiosqlite must be able to do outside of an event loop."""

    async def main():
        host = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/t.db")
        async with AsyncStore(engine=host) as store:
            assert await store.query() == []
            guard = forking._guards[host.dialect]
            drivers = [record.driver_connection for record in guard._known]
            guard.before_fork()
            guard.after_fork_in_parent()
            assert drivers
            assert not [driver for driver in drivers if driver._thread.is_alive()]
            assert await store.query() == []
        await host.dispose()

    asyncio.run(main())


def test_an_async_engine_of_a_database_in_memory_is_refused():
    engine = create_async_engine("sqlite+aiosqlite://")
    with pytest.raises(BadArgument, match="give its url instead"):
        AsyncStore(engine=engine)
    with pytest.raises(UnsupportedDatabase, match="one connection"):
        create_store_async_engine("sqlite://")


UNKNOWN = "^unknown revision 'nonsense'; use base, head, or 0001 to 0010$"


def test_a_newer_releases_schema_is_not_upgraded_and_unknown_revisions_are_named(empty_engine):
    upgrade(empty_engine)
    for go in (upgrade, downgrade):
        with pytest.raises(BadArgument, match=UNKNOWN):
            go(empty_engine, "nonsense")
    with pytest.raises(BadArgument, match=UNKNOWN):
        write_script("sqlite://", "nonsense", io.StringIO())
    with empty_engine.begin() as connection:
        connection.execute(text("UPDATE lynkr_store_alembic_version SET version_num = '9999'"))
    for go in (upgrade, downgrade):
        with pytest.raises(SchemaAhead, match="install a newer"):
            go(empty_engine, "0001")


def test_a_read_only_store_of_postgres_cannot_write(postgres_url):
    engine = create_store_engine(postgres_url)
    upgrade(engine)
    engine.dispose()
    with Store(postgres_url, read_only=True) as store:
        assert store.query() == []
        with store.engine.connect() as connection, pytest.raises(Exception, match="read-only"):
            connection.execute(text("DELETE FROM routing_telemetry"))


def test_an_invalid_index_that_a_build_left_is_built_again(postgres_url):
    engine = create_store_engine(postgres_url)
    upgrade(engine)
    with engine.begin() as connection:
        connection.execute(text("DROP INDEX idx_telemetry_provider"))
        connection.execute(
            text(
                "UPDATE pg_index SET indisvalid = false "
                "WHERE indexrelid = 'idx_telemetry_tier'::regclass"
            )
        )
    engine.dispose()
    with Store(postgres_url) as store:
        assert sorted(store.maintain().indexes_built) == [
            "idx_telemetry_provider",
            "idx_telemetry_tier",
        ]
        assert store.maintain().indexes_built == ()
        with store.engine.connect() as connection:
            assert connection.scalar(text("SHOW statement_timeout")) == "30s"


def test_names_cannot_command_a_terminal():
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True)
    row = {"provider": "a\x1b]0;owned\x07[red]b", "tier": "\x1b[2J"}
    with Store("sqlite://") as store:
        store.record(row)
        assert store.flush(10)
        render.show(console, render.rows_table(store.query()))
        stats = store.get_provider_stats(row["provider"])
        render.show(console, render.provider_report(row["provider"], stats))
    said = out.getvalue()
    assert "owned" in said
    assert "\x1b]0" not in said
    assert "\x1b[2J" not in said
    assert "[red]b" in said
