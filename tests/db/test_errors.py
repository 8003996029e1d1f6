"""Whose fault a database's error is, by errors that databases really raise."""

import contextlib
import os
import signal
import sqlite3
import threading
import time

import psycopg
import pytest
from sqlalchemy import create_engine, insert, make_url, text
from sqlalchemy.exc import CompileError, DBAPIError, StatementError

from lynkr_store import create_store_engine
from lynkr_store.db.errors import Fault, fault_of
from lynkr_store.db.models import TELEMETRY
from tests.conftest import EXTERNAL, POSTGRES
from tests.support.postgres import PgServer, available_servers

ROW, DATABASE, UNCLEAR = Fault.ROW, Fault.DATABASE, Fault.UNCLEAR


def error_of(engine, *statements):
    """What the last statement raises; those before it must work."""
    *before, last = statements
    with engine.connect() as connection:
        for statement in before:
            connection.exec_driver_sql(statement)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever it is, it is looked at
            connection.exec_driver_sql(last)
    return caught.value


# -- PostgreSQL ------------------------------------------------------------------------------


@pytest.fixture(params=POSTGRES, scope="module")
def server(request, server_of):
    return server_of(request.param)


@pytest.fixture
def postgres(server):
    url = server.create_database("faults", "template_head")
    engine = create_store_engine(url)
    yield engine
    engine.dispose()
    server.drop_database("faults")


_INSERT = "INSERT INTO routing_telemetry (request_id, timestamp, provider) VALUES ('r', 1, 'p')"

_LENGTHEN = (
    "UPDATE routing_telemetry SET request_text = "
    "(SELECT string_agg(md5(n::text), '') FROM generate_series(1, 3000) n)"
)


@pytest.mark.parametrize(
    ("state", "fault", "statements"),
    [
        ("22012", ROW, ["SELECT 1 / 0"]),
        ("22P02", ROW, ["SELECT CAST('x' AS bigint)"]),
        ("22003", ROW, ["SELECT CAST(1e30 AS bigint)"]),
        ("23502", ROW, ["INSERT INTO routing_telemetry (provider) VALUES ('p')"]),
        (
            "23505",
            ROW,
            ["CREATE UNIQUE INDEX one ON routing_telemetry (request_id)", _INSERT, _INSERT],
        ),
        (
            "23514",
            ROW,
            ["ALTER TABLE routing_telemetry ADD CHECK (provider <> 'p')", _INSERT],
        ),
        (
            "54000",
            ROW,
            [
                "CREATE INDEX narrow ON routing_telemetry (request_text)",
                _INSERT,
                _LENGTHEN,
            ],
        ),
        ("P0001", ROW, ["DO $$ BEGIN RAISE EXCEPTION 'no'; END $$"]),
        ("25006", DATABASE, ["SET TRANSACTION READ ONLY", _INSERT]),
        ("28000", DATABASE, ["DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE='28000'; END $$"]),
        ("53100", DATABASE, ["DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE='53100'; END $$"]),
        ("55P03", DATABASE, ["DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE='55P03'; END $$"]),
        ("40001", DATABASE, ["DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE='40001'; END $$"]),
        ("58030", DATABASE, ["DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE='58030'; END $$"]),
        ("57014", DATABASE, ["SET LOCAL statement_timeout = 20", "SELECT pg_sleep(30)"]),
        ("42P01", UNCLEAR, ["SELECT * FROM not_there"]),
        ("42703", UNCLEAR, ["SELECT not_there FROM routing_telemetry"]),
        ("42501", UNCLEAR, ["CREATE ROLE mere", "SET LOCAL ROLE mere", _INSERT]),
        ("XX000", UNCLEAR, ["DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE='XX000'; END $$"]),
        ("0A000", UNCLEAR, ["DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE='0A000'; END $$"]),
        ("P9999", UNCLEAR, ["DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE='P9999'; END $$"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_postgresql_says_whose_fault_it_is_by_its_state(postgres, state, fault, statements):
    error = error_of(postgres, *statements)
    assert isinstance(error, DBAPIError)
    assert error.driver_exception.sqlstate == state
    assert fault_of(error) is fault


def test_a_deadlock_is_the_databases_fault(postgres):
    with postgres.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE a (n int); CREATE TABLE b (n int)")
    errors = []

    def lock(first, second, meet):
        try:
            with postgres.begin() as connection:
                connection.exec_driver_sql(f"LOCK TABLE {first}")
                meet.wait(30)
                connection.exec_driver_sql(f"LOCK TABLE {second}")
        except DBAPIError as error:
            errors.append(error)

    meet = threading.Barrier(2)
    threads = [
        threading.Thread(target=lock, args=(*names, meet)) for names in (("a", "b"), ("b", "a"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [error.driver_exception.sqlstate for error in errors] == ["40P01"]
    assert fault_of(errors[0]) is DATABASE


def test_a_connection_that_is_cut_is_the_databases_fault(postgres):
    with postgres.connect() as connection:
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        with postgres.connect() as other:
            other.exec_driver_sql(f"SELECT pg_terminate_backend({pid})")
        with pytest.raises(DBAPIError) as caught:
            connection.exec_driver_sql("SELECT 1")
    assert caught.value.connection_invalidated
    assert fault_of(caught.value) is DATABASE


def test_a_database_that_is_not_there_is_the_databases_fault(server):
    engine = create_store_engine(make_url(server.url("postgres")).set(database="not_there"))
    with pytest.raises(DBAPIError) as caught:
        engine.connect()
    assert fault_of(caught.value) is DATABASE
    engine.dispose()


def test_a_server_that_is_not_there_is_the_databases_fault(tmp_path):
    engine = create_store_engine(f"postgresql://nobody@/x?host={tmp_path}")
    with pytest.raises(DBAPIError) as caught:
        engine.connect()
    assert fault_of(caught.value) is DATABASE
    engine.dispose()


@pytest.mark.slow
@pytest.mark.skipif(bool(EXTERNAL), reason="a server of the tests' own is killed")
def test_a_server_that_dies_in_mid_statement_is_the_databases_fault():
    with PgServer(available_servers()[-1]) as server:
        engine = create_store_engine(server.url("postgres"))
        caught = []

        def ask():
            try:
                with engine.connect() as connection:
                    connection.exec_driver_sql("SELECT pg_sleep(60)")
            except DBAPIError as error:
                caught.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        with psycopg.connect(server.url("postgres"), autocommit=True) as watching:
            deadline = time.monotonic() + 30
            query = "SELECT 1 FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'"
            while not watching.execute(query).fetchone():
                assert time.monotonic() < deadline
        os.kill(server.pid, signal.SIGQUIT)
        thread.join(30)
        [error] = caught
        assert fault_of(error) is DATABASE
        engine.dispose()


@pytest.mark.parametrize("value", ["a\0b", object()], ids=["nul", "object"])
def test_a_value_that_cannot_be_sent_is_the_rows_fault(postgres, value):
    row = {"request_id": value, "timestamp": 1_750_000_000_000, "provider": "p"}
    with postgres.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.execute(insert(TELEMETRY), row)
    assert fault_of(caught.value) is ROW


def test_an_error_of_a_lone_surrogate_is_unclear_until_a_plain_row_is_tried(postgres):
    row = {"request_id": "\ud800", "timestamp": 1_750_000_000_000, "provider": "p"}
    with postgres.connect() as connection, pytest.raises(UnicodeEncodeError) as caught:
        connection.execute(insert(TELEMETRY), row)
    assert fault_of(caught.value) is UNCLEAR


# -- SQLite ----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "t.db"


@pytest.fixture
def sqlite(path):
    engine = create_store_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TABLE t (n INTEGER PRIMARY KEY, x TEXT CHECK (x <> 'no'))"
        )
        connection.exec_driver_sql("INSERT INTO t VALUES (1, 'first')")
    yield engine
    engine.dispose()


@pytest.mark.parametrize(
    ("code", "fault", "statements"),
    [
        ("SQLITE_CONSTRAINT_PRIMARYKEY", ROW, ["INSERT INTO t VALUES (1, 'again')"]),
        ("SQLITE_CONSTRAINT_CHECK", ROW, ["INSERT INTO t VALUES (2, 'no')"]),
        (
            "SQLITE_CONSTRAINT_UNIQUE",
            ROW,
            ["CREATE UNIQUE INDEX one ON t (x)", "INSERT INTO t VALUES (2, 'first')"],
        ),
        (
            "SQLITE_CONSTRAINT_NOTNULL",
            ROW,
            ["CREATE TABLE u (x NOT NULL)", "INSERT INTO u VALUES (NULL)"],
        ),
        (
            "SQLITE_CONSTRAINT_TRIGGER",
            ROW,
            [
                "CREATE TRIGGER no BEFORE INSERT ON t BEGIN SELECT RAISE(ABORT, 'no'); END",
                "INSERT INTO t VALUES (2, 'x')",
            ],
        ),
        ("SQLITE_MISMATCH", ROW, ["INSERT INTO t VALUES ('one', 'x')"]),
        ("SQLITE_TOOBIG", ROW, ["INSERT INTO t VALUES (2, zeroblob(2000000000))"]),
        ("SQLITE_READONLY", DATABASE, ["PRAGMA query_only = 1", "INSERT INTO t VALUES (2, 'x')"]),
        (
            "SQLITE_FULL",
            DATABASE,
            ["PRAGMA max_page_count = 3", "INSERT INTO t VALUES (2, zeroblob(100000))"],
        ),
        ("SQLITE_ERROR", UNCLEAR, ["SELECT * FROM not_there"]),
        ("SQLITE_ERROR", UNCLEAR, ["SELECT not_there FROM t"]),
        ("SQLITE_ERROR", UNCLEAR, ["SELECT json('no JSON')"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sqlite_says_whose_fault_it_is_by_its_code(sqlite, code, fault, statements):
    error = error_of(sqlite, *statements)
    assert isinstance(error, DBAPIError)
    assert error.driver_exception.sqlite_errorname == code
    assert fault_of(error) is fault


def test_a_locked_file_is_the_databases_fault(sqlite, path):
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as foreign:
        foreign.execute("BEGIN IMMEDIATE")
        error = error_of(sqlite, "PRAGMA busy_timeout = 1", "INSERT INTO t VALUES (2, 'x')")
    assert error.driver_exception.sqlite_errorname == "SQLITE_BUSY"
    assert fault_of(error) is DATABASE


def test_a_stale_snapshot_is_the_databases_fault(sqlite, path):
    with sqlite.connect() as connection, connection.begin():
        connection.exec_driver_sql("SELECT * FROM t").all()
        with contextlib.closing(sqlite3.connect(path)) as foreign, foreign:
            foreign.execute("INSERT INTO t VALUES (5, 'x')")
        with pytest.raises(DBAPIError) as caught:
            connection.exec_driver_sql("INSERT INTO t VALUES (2, 'x')")
    assert caught.value.driver_exception.sqlite_errorname == "SQLITE_BUSY_SNAPSHOT"
    assert fault_of(caught.value) is DATABASE


def test_a_file_that_is_no_database_is_the_databases_fault(tmp_path):
    (tmp_path / "letter").write_bytes(b"Dear reader, " * 1000)
    engine = create_engine(f"sqlite:///{tmp_path}/letter")
    error = error_of(engine, "SELECT * FROM t")
    assert error.driver_exception.sqlite_errorname == "SQLITE_NOTADB"
    assert fault_of(error) is DATABASE
    engine.dispose()


def test_a_damaged_file_is_the_databases_fault(sqlite, path):
    with sqlite.connect() as connection:
        size = connection.exec_driver_sql("PRAGMA page_size").scalar_one()
        connection.rollback()
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    sqlite.dispose()
    content = bytearray(path.read_bytes())
    content[size:] = b"\xff" * (len(content) - size)
    path.write_bytes(content)
    error = error_of(sqlite, "SELECT * FROM t")
    assert error.driver_exception.sqlite_errorname.startswith("SQLITE_CORRUPT")
    assert fault_of(error) is DATABASE


def test_a_folder_that_is_not_there_is_the_databases_fault(tmp_path):
    engine = create_engine(f"sqlite:///{tmp_path}/no/t.db")
    with pytest.raises(DBAPIError) as caught:
        engine.connect()
    assert caught.value.driver_exception.sqlite_errorname == "SQLITE_CANTOPEN"
    assert fault_of(caught.value) is DATABASE
    engine.dispose()


def test_an_interrupted_statement_is_the_databases_fault(sqlite):
    with sqlite.connect() as connection:
        driver = connection.connection.driver_connection
        driver.set_progress_handler(lambda: 1, 1)
        with pytest.raises(DBAPIError) as caught:
            connection.exec_driver_sql("SELECT count(*) FROM t, t AS u")
        driver.set_progress_handler(None, 0)
    assert caught.value.driver_exception.sqlite_errorname == "SQLITE_INTERRUPT"
    assert fault_of(caught.value) is DATABASE


@pytest.mark.parametrize("value", [object(), 2**70], ids=["object", "too large"])
def test_a_value_that_cannot_be_bound_is_the_rows_fault(sqlite, value):
    with sqlite.connect() as connection, pytest.raises((DBAPIError, OverflowError)) as caught:
        connection.exec_driver_sql("INSERT INTO t VALUES (2, ?)", (value,))
    assert fault_of(caught.value) in (ROW, UNCLEAR)
    if isinstance(caught.value, DBAPIError):
        assert fault_of(caught.value) is ROW


# -- neither ---------------------------------------------------------------------------------


def test_a_value_that_its_column_refuses_is_the_rows_fault(sqlite):
    with sqlite.begin() as connection:
        TELEMETRY.create(connection)
        with pytest.raises(StatementError) as caught:
            connection.execute(
                insert(TELEMETRY), [{"request_id": "r", "timestamp": 1, "provider": "p"}, {}]
            )
    assert not isinstance(caught.value, DBAPIError)
    assert fault_of(caught.value) is ROW


@pytest.mark.parametrize(
    "error", [CompileError("unknown column"), RuntimeError("no driver should"), MemoryError()]
)
def test_what_no_driver_should_raise_is_unclear(error):
    assert fault_of(error) is UNCLEAR


def test_the_words_of_an_error_say_nothing_about_whose_fault_it_is(sqlite):
    sure = error_of(sqlite, "INSERT INTO t VALUES (1, 'database is locked')")
    assert fault_of(sure) is ROW
    with sqlite.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.execute(text('SELECT "UNIQUE constraint failed" FROM not_there'))
    assert fault_of(caught.value) is UNCLEAR
