"""Databases that somebody else made: each read ends soon with an answer or an error of ours."""

import gc
import os
import sqlite3
import time
from contextlib import closing, suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import text

from lynkr_store import (
    AdoptionRefused,
    LynkrStoreError,
    SchemaAhead,
    SchemaError,
    Store,
    StoreSettings,
    StoreUnavailable,
    Window,
    create_store_engine,
    upgrade,
    writing,
)
from lynkr_store.migrate import revisions
from lynkr_store.migrate.adoption import _words
from lynkr_store.schemas import Reading
from tests.cli.test_commands import run
from tests.support.recorded import gateway_file, gateway_table
from tests.support.stores import adds_up, looked

NOW = 1_750_000_000_000
SOON_S = 120  # on a busy machine; without a bound each would take longer, or for ever
ENDLESS = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
HUGE = (
    "WITH RECURSIVE n (i) AS (SELECT zeroblob(500000000) UNION ALL SELECT i FROM n) SELECT i FROM n"
)
VERSION = "lynkr_store_alembic_version"
DESCRIPTORS = Path("/proc/self/fd")


@pytest.fixture(autouse=True)
def _soon(request):
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SOON_S or request.node.get_closest_marker("slow")


@pytest.fixture
def engine(url):
    engine = create_store_engine(url)
    yield engine
    engine.dispose()


def execute(engine, *statements):
    with writing(engine).begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def made(path, *statements):
    """An SQLite file of these statements, and its URL."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("BEGIN")
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return f"sqlite:///{path}"


CALLS = {
    "query": lambda store: store.query(),
    "get_stats": lambda store: store.get_stats(),
    "get_provider_stats": lambda store: store.get_provider_stats("p"),
    "get_routing_accuracy": lambda store: store.get_routing_accuracy(),
    "iter_records": lambda store: list(store.iter_records()),
    "maintain": lambda store: store.maintain(),
    "cleanup": lambda store: store.cleanup(timedelta(days=1)),
    "add_many": lambda store: store.add_many([{"provider": "p"}]),
}


def check_that_every_call_says(url, kind, words):
    for call in CALLS.values():
        with Store(url) as store:
            with pytest.raises(kind, match=words):
                call(store)
            health = looked(store)
            assert adds_up(health)
    with pytest.raises(kind, match=words):
        upgrade(url)
    for command in ("check", "stats", "query", "upgrade", "maintain"):
        finished = run(command, "--url", url)
        assert finished.returncode == 1, (command, finished.stderr)
        assert "Traceback" not in finished.stderr
    assert run("health", "--url", url).returncode in (0, 1, 3)


# -- where it stands -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "notes", [[("9001", "9001")], [("9001", "9002"), ("9002", "9001")], [("9001", "nowhere")]]
)
def test_notes_that_form_a_cycle_end(url, engine, notes):
    execute(engine, f"UPDATE {VERSION} SET version_num = '9001'")
    for revision, after in notes:
        values = f"('{revision}', 1, '{after}', '9.9')"
        execute(engine, f"INSERT INTO lynkr_store_revisions VALUES {values}")
    check_that_every_call_says(url, SchemaAhead, r"install lynkr-store 9\.9 or newer")


def test_more_notes_than_any_release_writes_are_refused(url, engine):
    numbers = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) "
    note = "CAST(i AS TEXT) || 'x', 1, CAST(i + 1 AS TEXT) || 'x', '9.9'"
    execute(
        engine,
        f"UPDATE {VERSION} SET version_num = '1x'",
        f"INSERT INTO lynkr_store_revisions {numbers} SELECT {note} FROM n",
    )
    with Store(url) as store, pytest.raises(SchemaError, match="more than 10,000 rows"):
        store.query()


def test_several_heads_are_an_error_with_the_remedy(url, engine):
    execute(engine, f"INSERT INTO {VERSION} VALUES ('0003')")
    check_that_every_call_says(url, SchemaError, f"{VERSION} has more than one row.*delete all but")


@pytest.mark.sample(3)
@pytest.mark.parametrize("odd", ["''", "'" + "x" * 5_000 + "'", "x'ff00'", "NULL"])
def test_what_is_no_revision_s_name_is_refused(url, engine, odd):
    if engine.dialect.name == "sqlite":
        execute(engine, f"DROP TABLE {VERSION}", f"CREATE TABLE {VERSION} (version_num)")
    else:
        odd = odd.replace("x'ff00'", "''")
        execute(engine, f"DROP TABLE {VERSION}", f"CREATE TABLE {VERSION} (version_num text)")
    execute(engine, f"INSERT INTO {VERSION} VALUES ({odd})")
    check_that_every_call_says(
        url, SchemaError, f"{VERSION} does not contain the name of a revision: set it to"
    )


def test_odd_notes_do_not_end_health(url, engine):
    execute(
        engine,
        f"UPDATE {VERSION} SET version_num = '9001'",
        "INSERT INTO lynkr_store_revisions VALUES ('9001', 7, '', '')",
    )
    check_that_every_call_says(url, SchemaAhead, "install a newer lynkr-store")


def test_ids_at_the_ends_of_64_bits_do_not_end_health(url, engine):
    ends = (-(2**63), -(2**63) + 1, 2**63 - 1)
    for row_id in ends:
        values = f"({row_id}, 'r', {NOW}, 'p')"
        columns = "(id, request_id, timestamp, provider)"
        execute(engine, f"INSERT INTO routing_telemetry {columns} VALUES {values}")
    with Store(url) as store:
        health = looked(store)
        assert adds_up(health)
        assert (health.reachable, health.revision) == (True, revisions.head())
        assert health.rollup_lag is None or health.rollup_lag >= 0
        assert len(store.query()) == len(ends)


# -- what is in a file -----------------------------------------------------------------------------

IN_THE_PLACE = [
    f"CREATE VIEW {{}} AS {ENDLESS}",
    f"CREATE VIEW {{}} AS {HUGE}",
    "CREATE VIEW {} AS SELECT load_extension('/nowhere')",
    "CREATE VIRTUAL TABLE {} USING fts5(id, provider)",
]


@pytest.mark.sample(3)
@pytest.mark.parametrize("table", ["routing_telemetry", "ROUTING_Telemetry"])
@pytest.mark.parametrize("statement", IN_THE_PLACE)
def test_a_view_in_the_place_of_the_records_is_refused_before_it_is_read(
    tmp_path, statement, table
):
    url = made(tmp_path / "a.db", statement.format(table))
    with pytest.raises(SchemaError, match="not a table, and reading it could take unlimited time"):
        Store(url, read_only=True)
    with Store(url) as store, pytest.raises(AdoptionRefused):
        store.query()
    for command in ("stats", "query", "health", "check", "upgrade"):
        assert run(command, "--url", url).returncode == 1, command


@pytest.mark.sample(4)
@pytest.mark.parametrize("statement", IN_THE_PLACE)
@pytest.mark.parametrize("table", ["routing_rollups", "routing_dimensions", "lynkr_store_progress"])
def test_a_view_in_the_place_of_a_roll_up_is_refused_before_it_is_read(tmp_path, statement, table):
    url = made(tmp_path / "a.db", gateway_table(), statement.format(table))
    with pytest.raises(SchemaError, match=f"{table} is a"):
        Store(url, read_only=True)


@pytest.mark.sample(3)
@pytest.mark.parametrize("statement", IN_THE_PLACE)
@pytest.mark.parametrize("table", [VERSION, "lynkr_store_revisions"])
def test_a_view_in_the_place_of_the_version_is_refused_before_it_is_read(
    tmp_path, statement, table
):
    url = made(tmp_path / "a.db", gateway_table(), statement.format(table))
    for read_only in (True, False):
        with Store(url, read_only=read_only) as store:
            with pytest.raises(SchemaError, match=f"{table} is a"):
                store.query()
            assert adds_up(looked(store))
    with pytest.raises(SchemaError, match=f"{table} is a"):
        upgrade(url)


@pytest.mark.sample(3)
@pytest.mark.parametrize("column", ["latency_ms INTEGER", "provider TEXT NOT NULL"])
@pytest.mark.parametrize("kind", ["VIRTUAL", "STORED"])
def test_a_generated_column_is_refused_before_it_is_read(tmp_path, column, kind):
    name = column.split()[0]
    other = "cost_usd" if name != "cost_usd" else "tier"
    expression = f"{column} AS (length(zeroblob(900000000)) || {other}) {kind}"
    url = made(tmp_path / "a.db", gateway_table().replace(column, expression))
    with pytest.raises(SchemaError, match=f"{name} is a generated column"):
        Store(url, read_only=True)
    with Store(url) as store, pytest.raises(AdoptionRefused, match="generated"):
        store.query()


def test_a_file_of_many_tables_and_of_views_of_views_is_read(tmp_path):
    path = gateway_file(tmp_path / "a.db", rows=[_row()])
    doubled = [f"CREATE VIEW w{n} AS SELECT a.a FROM w{n - 1} a, w{n - 1} b" for n in range(1, 40)]
    made(path, "CREATE VIEW w0 AS SELECT 1 AS a", *doubled)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.executemany(
            "INSERT INTO sqlite_schema VALUES ('view', ?1, ?1, 0, ?2)",
            [(f"v{n}", f"CREATE VIEW v{n} AS SELECT 1") for n in range(5_000)],
        )
        connection.commit()
    with Store(f"sqlite:///{path}", read_only=True) as store:
        assert len(store.query()) == 1
    with Store(f"sqlite:///{path}") as store:  # it is adopted
        assert len(store.query()) == 1


def _row(**values):
    return {"request_id": "r", "provider": "p", "timestamp": NOW} | values


def test_a_schema_that_takes_too_long_to_load_is_refused(tmp_path, monkeypatch):
    url = made(tmp_path / "a.db", *(f"CREATE TABLE t{n} (a)" for n in range(200)))
    settings = StoreSettings(url=url, statement_timeout_s=0.5)
    monkeypatch.setattr("lynkr_store.db.sqlite._STEPS_OF_SCHEMA", 1)
    monkeypatch.setattr("lynkr_store.db.sqlite._SCHEMA_S", 0.5)
    each_look_a_second_later = SimpleNamespace(monotonic=count().__next__)
    monkeypatch.setattr("lynkr_store.db.sqlite.time", each_look_a_second_later)
    with pytest.raises(StoreUnavailable, match="STATEMENT_TIMEOUT_S"):
        Store(settings=settings, read_only=True)
    with Store(url) as store, pytest.raises(StoreUnavailable, match="interrupted"):
        store.query()


def test_a_statement_of_a_file_that_is_only_read_takes_a_bounded_time(tmp_path):
    """Where a view came into the table's place after the look, say."""
    url = made(tmp_path / "a.db", gateway_table())
    settings = StoreSettings(url=url, statement_timeout_s=0.2)
    with Store(settings=settings, read_only=True) as store:
        assert store.query() == []
        made(
            tmp_path / "a.db",
            "ALTER TABLE routing_telemetry RENAME TO other",
            f"CREATE VIEW routing_telemetry AS SELECT * FROM other WHERE id IN ({ENDLESS})",
        )
        for call in ("query", "get_stats"):
            with pytest.raises(StoreUnavailable):
                CALLS[call](store)


def test_a_value_of_a_file_that_is_only_read_takes_bounded_memory(tmp_path):
    path = gateway_file(tmp_path / "a.db", rows=[_row(), _row(model="x")])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE routing_telemetry SET tier = zeroblob(100000000) WHERE id = 1")
        connection.commit()
    with Store(f"sqlite:///{path}", read_only=True) as store:
        with pytest.raises(StoreUnavailable):
            store.query()
        assert len(store.query(limit=1)) == 1
        assert adds_up(looked(store))


NUMBERS = {
    "9" * 40_000 + "x": None,
    "9" * 40_000: None,
    "1." * 20_000: None,
    " " * 40_000 + "x": None,
    "1" + " " * 40_000 + "x": None,
    "1e" + "9" * 40_000: None,
    "1" * 300: int(float("1" * 300)),
    "1.": 1,
    ".5": 0.5,
    " +12.50e1 ": 125,
    "1.2.3": None,
    ".": None,
    "1e": None,
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("stored", NUMBERS, ids=lambda text: text[:12].strip())
def test_text_in_a_number_s_column_is_read_in_one_pass(tmp_path, stored):
    began = time.thread_time()
    assert Reading().number(stored) == NUMBERS[stored]
    assert time.thread_time() - began < 1
    path = gateway_file(tmp_path / "a.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "INSERT INTO routing_telemetry (request_id, provider, timestamp, tier, latency_ms) "
            "VALUES ('r', ?1, ?1, ?1, ?1)",
            (stored,),
        )
        connection.commit()
    with Store(f"sqlite:///{path}", read_only=True) as store:
        [row] = store.query()
        assert row.provider == stored
        assert store.get_stats(Window(since=0, until=NOW)) is None or row.timestamp
        assert adds_up(looked(store))


@pytest.mark.parametrize("part", ["/*", "'", '"', "[", "`", "--"])
def test_the_statement_that_made_a_table_is_read_in_one_pass(part):
    began = time.thread_time()
    assert "AUTOINCREMENT" in _words(f"id INTEGER AUTOINCREMENT {part * 500_000}")
    assert time.thread_time() - began < 5


BLOBS = ["x'ff'", "zeroblob(3)", "1e999", "-1e999", "9223372036854775807", "'\ufffe'", "NULL"]


@pytest.mark.parametrize("odd", BLOBS)
def test_any_value_in_any_column_is_read(tmp_path, odd):
    path = gateway_file(tmp_path / "a.db", 11)
    with closing(sqlite3.connect(path)) as connection:
        columns = [r[1] for r in connection.execute("PRAGMA table_info(routing_telemetry)")]
        free = [c for c in columns if c not in ("id", "request_id", "provider", "timestamp")]
        needed = "'r', 'p', 1750000000000" if odd == "NULL" else ", ".join([odd] * 3)
        connection.execute(
            f"INSERT INTO routing_telemetry (request_id, provider, timestamp, {', '.join(free)}) "
            f"VALUES ({needed}, {', '.join([odd] * len(free))})"
        )
        connection.commit()
    url = f"sqlite:///{path}"
    for read_only in (True, False):
        with Store(url, read_only=read_only) as store:
            [row] = store.query()
            assert row.to_gateway()
            store.get_stats(Window(since=0))
            assert adds_up(looked(store))


# -- what stands at the path -----------------------------------------------------------------------


def test_no_file_at_the_path_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    cases = {
        tmp_path: "is a directory; give",
        tmp_path / "pipe": "is a pipe, a device or a socket",
        tmp_path / "link": "is a pipe, a device or a socket",
        "/dev/zero": "is a pipe, a device or a socket",
        "/dev/null": "is a pipe, a device or a socket",
    }
    for path, words in cases.items():
        for url in (f"sqlite:///{path}", f"sqlite:///file:{path}?uri=true"):
            with Store(url) as store:
                with pytest.raises(StoreUnavailable, match=words):
                    store.query()
                assert words in looked(store).last_error
            with pytest.raises(StoreUnavailable, match=words):
                upgrade(url)
        url = f"sqlite:///{path}"
        with pytest.raises(StoreUnavailable, match=words):
            Store(url, read_only=True)
        for command in ("upgrade", "check", "stats", "maintain", "health"):
            finished = run(command, "--url", url)
            assert finished.returncode == 3, (command, finished.stderr)
            assert words in finished.stderr + finished.stdout.replace("\n", " ")


@pytest.mark.slow
def test_a_wal_of_another_file_is_survived(tmp_path):
    """SQLite takes it for the file's own where its checksums hold; then the file is damaged."""
    paths = [tmp_path / name for name in ("a.db", "b.db")]
    for number, path in enumerate(paths):
        with Store(f"sqlite:///{path}") as store:
            store.add_many(
                {"provider": "p", "request_text": "x" * 900} for _ in range(50 * number + 9)
            )
    with closing(sqlite3.connect(paths[1])) as other:
        other.execute("INSERT INTO lynkr_store_progress VALUES ('x', 1)")
        other.commit()
        (tmp_path / "a.db-wal").write_bytes((tmp_path / "b.db-wal").read_bytes())
    for read_only in (True, False):
        for call in CALLS.values():
            try:
                with Store(f"sqlite:///{paths[0]}", read_only=read_only) as store:
                    try:
                        call(store)
                    finally:
                        assert adds_up(looked(store))
            except LynkrStoreError:
                continue


# -- a damaged file --------------------------------------------------------------------------------

PAGE = 8_192
DAMAGES = {
    "zeros": bytes(PAGE),
    "ones": b"\xff" * PAGE,
    "cells": b"\x0d\x00\x00\xff\xff\x00\x01\x00" + b"\x7f\xff" * (PAGE // 2 - 4),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a file with rows, roll-ups and indexes, and no WAL."""
    path = tmp_path_factory.mktemp("whole") / "a.db"
    with Store(f"sqlite:///{path}", clock=lambda: NOW) as store:
        store.add_many(
            {"provider": f"p{n}", "timestamp": NOW - n * 3_600_000, "request_text": "x" * 500}
            for n in range(60)
        )
        store.maintain()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")
    return path.read_bytes()


def with_damage(whole, page, damage):
    damaged = bytearray(whole)
    start = page * PAGE + (100 if page == 0 else 0)  # the header is left: else it is no database
    damaged[start : (page + 1) * PAGE] = DAMAGES[damage][: (page + 1) * PAGE - start]
    return damaged


def check_damaged(tmp_path, whole, page, damage):
    """Each method answers, or raises an error of ours that says something."""
    path = tmp_path / f"{page}-{damage}.db"
    url = f"sqlite:///{path}"
    damaged = with_damage(whole, page, damage)
    settings = StoreSettings(url=url, retention_days=1, text_retention_days=0.5)
    raised = 0
    calls = CALLS | {
        "rebuild": lambda store: store.maintain(rebuild=True, trust_clock=True),
        "flush": lambda store: (store.record(provider="p"), store.flush(0.2)),
    }
    for read_only in (True, False):
        for call in calls.values():
            path.write_bytes(damaged)
            try:
                with Store(settings=settings, clock=lambda: NOW, read_only=read_only) as store:
                    try:
                        call(store)
                    finally:
                        assert adds_up(store.health())
                        store.close(0.1)
            except LynkrStoreError:
                raised += 1
    path.write_bytes(damaged)
    for way in (upgrade, lambda url: upgrade(url, backup=True)):
        try:
            way(url)
        except LynkrStoreError:
            raised += 1
    for leftover in tmp_path.glob(f"{path.name}*"):
        leftover.unlink()
    return raised


@pytest.mark.sample(9)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("page", [0, 1, 3])
def test_every_method_on_a_damaged_page_raises_an_error_of_ours(tmp_path, whole, page, damage):
    check_damaged(tmp_path, whole, page, damage)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_method_on_every_damaged_page_raises_an_error_of_ours(tmp_path, whole, damage):
    """Each page has one kind of damage."""
    kinds = [*DAMAGES]
    pages = range(kinds.index(damage), len(whole) // PAGE, len(kinds))
    assert sum(check_damaged(tmp_path, whole, page, damage) for page in pages) > len(pages)


def opened(path):
    """The names by which this process has the file, its WAL or its index open."""
    links = []
    for descriptor in DESCRIPTORS.iterdir():
        with suppress(OSError):  # the one that lists the directory
            links.append(str(descriptor.readlink()))
    return [link for link in links if link.startswith(str(path))]


@pytest.mark.sample(5)
@pytest.mark.skipif(not DESCRIPTORS.exists(), reason="only Linux lists them there")
@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_failed_leaves_no_connection_and_no_lock(tmp_path, whole, call, read_only):
    path = tmp_path / "a.db"
    path.write_bytes(with_damage(whole, 1, "zeros"))
    settings = StoreSettings(url=f"sqlite:///{path}", retention_days=1, text_retention_days=0.5)
    gc.disable()  # it closes sooner or later what an error's traceback keeps
    try:
        with (
            suppress(LynkrStoreError),
            Store(settings=settings, clock=lambda: NOW, read_only=read_only) as store,
        ):
            CALLS[call](store)
        assert not opened(path)
    finally:
        gc.enable()


def test_damage_is_named_with_a_remedy(tmp_path, whole):
    path = tmp_path / "a.db"
    damaged = bytearray(whole)
    damaged[PAGE : PAGE * 40] = b"\xff" * len(damaged[PAGE : PAGE * 40])
    path.write_bytes(damaged)
    url = f"sqlite:///{path}"
    for command in ("stats", "query", "maintain", "upgrade", "check"):
        finished = run(command, "--url", url)
        assert finished.returncode == 3, (command, finished.stdout, finished.stderr)
        assert "the file is damaged: restore a backup" in finished.stderr
