"""What people wrote stands in the table, where it may, and nowhere else, whatever goes wrong."""

import asyncio
import contextlib
import logging
import sqlite3
import threading
import traceback
from datetime import timedelta

import pytest
from sqlalchemy import create_engine, event, inspect, text
from sqlalchemy.orm import Session

from lynkr_store import (
    AsyncStore,
    BadArgument,
    LynkrStoreError,
    RoutingEvent,
    RoutingRepository,
    Store,
    StoreSettings,
    create_store_engine,
    writing,
)
from lynkr_store.db.dialect import parse_url
from lynkr_store.migrate.upgrade import upgrade
from lynkr_store.schemas import LONG_FIELDS, TEXT_FIELDS
from tests.conftest import EXTERNAL, ON_DISK, POSTGRES
from tests.support.stores import adds_up, eventually, looked

pytestmark = pytest.mark.sample(2)

AT = 1_750_000_000_000
MARK = "Zq7Secret"
"""Stands in every text and name of the records here."""

NAMES = (
    "request_id",
    "session_id",
    "tier",
    "agentic_type",
    "request_type",
    "provider",
    "model",
    "routing_method",
    "error_type",
    "circuit_breaker_state",
    "base_tier",
    "escalation_source",
    "switch_reason",
    "trace_id",
    "requested_model",
    "finish_reason",
)


def secret(**fields):
    """A record with the mark in every text and name."""
    record = {name: f"{MARK} {name}" for name in (*NAMES, *LONG_FIELDS)}
    return {**record, "timestamp": AT, "latency_ms": 5.0, **fields}


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr("lynkr_store.ingest.deliverer._FIRST_RETRY_S", 0.01)
    monkeypatch.setattr("lynkr_store.ingest.deliverer._LAST_RETRY_S", 0.1)
    monkeypatch.setattr("lynkr_store.ingest.counters._LOG_EVERY_S", 0.0)


@pytest.fixture
def overheard(request, caplog):
    """Whatever any logger says in which the mark is.

    A host's own engine may log values if the host has its statements logged.
    """
    caplog.set_level(logging.DEBUG)
    names = [*logging.root.manager.loggerDict, "sqlalchemy.engine", "sqlalchemy.pool", "psycopg"]
    for name in names:
        if not isinstance(logging.root.manager.loggerDict.get(name), logging.PlaceHolder):
            caplog.set_level(logging.DEBUG, name)
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("of_the_host"):
        caplog.set_level(logging.WARNING, "sqlalchemy.engine")
        caplog.set_level(logging.WARNING, "sqlalchemy.engine.Engine")

    def overheard():
        formatter = logging.Formatter("%(message)s")  # with the exceptions' chains
        return [
            line for line in map(formatter.format, caplog.records) if MARK.lower() in line.lower()
        ]

    return overheard


def check_silent(store, overheard, *errors):
    """The mark is in no log line, no field of the health, no error nor what it is chained to."""
    health = looked(store)
    assert adds_up(health)
    assert MARK not in repr(health)
    check_silent_errors(overheard, *errors)
    return health


def check_silent_errors(overheard, *errors):
    assert overheard() == []
    for error in errors:
        assert MARK not in "".join(traceback.format_exception(error))
        for part in chain(error):
            assert MARK not in repr(part)
            assert MARK not in str(part)


def chain(error):
    """An error and all that it is chained to, suppressed or not."""
    seen, left = [], [error]
    while left:
        error = left.pop()
        if error is not None and not any(error is other for other in seen):
            seen.append(error)
            left += [error.__cause__, None if error.__suppress_context__ else error.__context__]
    return seen


def files_with(folder, mark):
    return {
        place.name
        for place in folder.rglob("*")
        if place.is_file() and mark.encode() in place.read_bytes()
    }


def execute(engine, *statements):
    with writing(engine).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def column(engine, name):
    with engine.connect() as connection:
        return list(connection.scalars(text(f"SELECT {name} FROM routing_telemetry ORDER BY id")))


@pytest.fixture
def open_(url):
    opened = []

    def open_(**options):
        store = Store(settings=StoreSettings(url=url, **options))
        opened.append(store)
        return store

    yield open_
    for store in opened:
        store.close()


@pytest.fixture
def host_engine(url):
    """A host's, which shows values in its errors and logs them."""
    engine = create_engine(parse_url(url), hide_parameters=False)
    yield engine
    engine.dispose()


# -- with capture_text off ---------------------------------------------------------------------

TEXT = "Yk4Prompt"


def texts():
    return {name: f"{TEXT} in {name} " * 20 for name in TEXT_FIELDS}


def rename(engine, old, new):
    execute(engine, f"ALTER TABLE {old} RENAME TO {new}")


@pytest.mark.parametrize("backend", ON_DISK)
def test_texts_that_are_not_captured_are_in_no_file_and_no_line(
    backend, new_url, tmp_path, caplog, overheard
):
    url = new_url(backend, at_head=True)
    engine = create_store_engine(url)
    settings = StoreSettings(
        url=url,
        capture_text=False,
        spool_path=tmp_path / "spool.db",
        spool_after_s=0,
        echo=True,
    )
    places = set()

    def look():
        for place in tmp_path.rglob("*"):
            with contextlib.suppress(OSError):
                if place.is_file():
                    places.add(place.name)
                    assert TEXT.encode() not in place.read_bytes(), place

    with Store(settings=settings) as store:

        @event.listens_for(store._database.of_writer, "before_cursor_execute")
        def on_execute(connection, cursor, statement, parameters, context, executemany):
            assert TEXT not in repr(parameters)
            look()  # while a transaction is under way

        for n in range(50):
            assert store.record(secret(request_id=str(n), **texts()))
        assert store.record(RoutingEvent(provider="p", **texts()))
        assert store.record(secret(input_tokens="wrong type", **texts()))
        assert store.flush(30)
        look()
        rename(engine, "routing_telemetry", "elsewhere")
        for n in range(50):
            assert store.record(secret(request_id=f"away {n}", **texts()))
        assert store.flush(30)
        assert store.health().spooled == 50
        look()
        assert TEXT not in repr(store.health())
        rename(engine, "elsewhere", "routing_telemetry")
        eventually(lambda: store.health().spooled == 0)
        look()
        assert store.add_many([secret(request_id="added", **texts())]) == 1
        with pytest.raises(BadArgument) as caught:
            store.add_many([secret(input_tokens="wrong type", **texts())])
        assert all(TEXT not in str(part) + repr(part) for part in chain(caught.value))
        health = store.health()
        assert adds_up(health)
        assert (health.written, health.rejected) == (101, 1)
        for name in TEXT_FIELDS:
            assert column(engine, name) == [None] * 102
    look()
    print(f"\n{sorted(places)}")
    assert {"spool.db"} <= places
    if backend == "sqlite-file":
        assert {"telemetry.db", "telemetry.db-wal", "telemetry.db-shm"} <= places
    assert TEXT not in caplog.text
    assert overheard() == []
    engine.dispose()


# -- with capture on ---------------------------------------------------------------------------


def test_rejected_records_are_not_repeated(open_, overheard):
    store = open_(echo=True)
    for wrong in (
        {"input_tokens": MARK},
        {"provider": [MARK]},
        {f"{MARK} in a text": 1},  # a name in the form of an identifier is the program's own
        {"timestamp": MARK},
        {"attributes": {MARK: {MARK}}},
        {"attributes": {MARK: object()}},
        {"cost_usd": 1e300},
        {"was_fallback": MARK},
    ):
        assert store.record(secret(**wrong))
    assert store.flush(30)
    assert check_silent(store, overheard).rejected == 8
    store.close()
    assert overheard() == []


def test_errors_of_add_many_repeat_no_record(open_, overheard):
    store, errors = open_(echo=True), []
    for wrong in (
        {"input_tokens": MARK},
        {"provider": [MARK]},
        {"timestamp": MARK},
        {"attributes": {MARK: {MARK}}},
    ):
        with pytest.raises(BadArgument) as caught:
            store.add_many([secret(), secret(**wrong)])
        errors.append(caught.value)
    check_silent(store, overheard, *errors)


def refuse(engine, how):
    """Have the database refuse rows, with words that carry the row where they can."""
    sqlite = engine.dialect.name == "sqlite"
    if how == "unique":
        execute(engine, "CREATE UNIQUE INDEX once ON routing_telemetry (request_id)")
    elif how == "check" and not sqlite:
        execute(engine, "ALTER TABLE routing_telemetry ADD CHECK (tier IS NULL)")
    elif sqlite:
        raised = {
            "check": "SELECT RAISE(ABORT, 'no')",
            "choke": "SELECT json(NEW.request_text)",
            "expression": "SELECT json_extract('{}', NEW.request_text)",
        }[how]
        execute(
            engine,
            "CREATE TRIGGER refuses BEFORE INSERT ON routing_telemetry "
            f"WHEN NEW.tier IS NOT NULL BEGIN {raised}; END",
        )
    else:
        raised = {
            "choke": "PERFORM NEW.request_text::json",
            "expression": "PERFORM NEW.request_text::bigint",
        }.get(how) or f"RAISE EXCEPTION '%%', NEW.request_text USING ERRCODE = '{how}'"
        execute(
            engine,
            "CREATE FUNCTION refuses() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF NEW.tier IS NOT NULL THEN {raised}; END IF; RETURN NEW; END $$",
            "CREATE TRIGGER refuses BEFORE INSERT ON routing_telemetry "
            "FOR EACH ROW EXECUTE FUNCTION refuses()",
        )


EVERYWHERE = ["unique", "check", "choke", "expression"]
STATES = ["P0001", "23514", "22023", "54000", "42501", "XX000", "0A000", "P9999"]
"""Of which the writer takes a row's fault, or finds out that it is one."""


def fill(store, count=10):
    """Two rows are fine; the others are to be refused."""
    for n in range(count):
        fine = {"tier": None} if n in (2, 5) else {}
        assert store.record(secret(**fine))


@pytest.mark.sample(5)
@pytest.mark.parametrize("how", [*EVERYWHERE, *STATES])
@pytest.mark.parametrize("of_the_host", [True, False])
def test_rows_that_the_database_refuses_are_not_repeated(
    engine, url, host_engine, overheard, how, of_the_host
):
    if how in STATES and engine.dialect.name == "sqlite":
        pytest.skip("SQLite's triggers raise no words of a row")
    refuse(engine, how)
    settings = StoreSettings(url=url, echo=True)
    options = {"engine": host_engine} if of_the_host else {}
    store = Store(settings=settings, **options)
    try:
        fill(store)
        assert store.flush(30)
        assert store.health().written == (1 if how == "unique" else 2)
        assert store.health().rejected == (9 if how == "unique" else 8)
        errors = []
        with pytest.raises(LynkrStoreError) as caught:
            store.add_many([secret(), secret()])
        errors.append(caught.value)
        with Session(store.engine) as session, pytest.raises(LynkrStoreError) as caught:
            RoutingRepository(session).add_many([secret(), secret()])
        errors.append(caught.value)
        check_silent(store, overheard, *errors)
    finally:
        store.close()
    assert overheard() == [], "what is said at the end"


@pytest.mark.parametrize("how", ["unique", "check", "choke", "expression"])
def test_the_async_store_repeats_no_refused_row(engine, url, overheard, how):
    refuse(engine, how)

    async def add():
        async with AsyncStore(url) as store:
            with pytest.raises(LynkrStoreError) as caught:
                await store.add_many([secret(), secret()])
            check_silent_errors(overheard, caught.value)
            assert MARK not in repr(await store.health())

    asyncio.run(add())
    assert overheard() == []


# -- what a table's own rules say of a row, whatever the error's class ---------------------------

SPEAKING = ["to_tsquery", "set_config", "nextval", "pg_read_file", "has_database_privilege"]
"""Functions of PostgreSQL that repeat what they are given, with no context: 42601, 42704, 42P01,
58P01, 3D000."""
CALLS = {
    "to_tsquery": "to_tsquery({} || ' (') IS NOT NULL",
    "set_config": "set_config({}, '1', true) IS NOT NULL",
    "nextval": "nextval({}::regclass) > 0",
    "pg_read_file": "pg_read_file({}) IS NOT NULL",
    "has_database_privilege": "has_database_privilege({}, 'CREATE')",
}


def whole_chain(error):
    """As `chain`, with what was raised `from None`, which a tool that collects errors finds."""
    seen, left = [], [error]
    while left:
        error = left.pop()
        if error is not None and not any(error is other for other in seen):
            seen.append(error)
            left += [error.__cause__, error.__context__]
    return seen


def check_alone(error):
    for part in whole_chain(error):
        assert MARK not in repr(part) + str(part) + repr(vars(part))


def add_in_every_way(url, engine):
    """The errors of each way of adding a record now."""
    errors = []
    with Store(url) as store:
        with pytest.raises(LynkrStoreError) as caught:
            store.add_many([secret(), secret()])
        errors.append(caught.value)
    for of in (engine, create_engine(parse_url(url), hide_parameters=False)):
        with Session(of) as session, pytest.raises(LynkrStoreError) as caught:
            RoutingRepository(session).add_many([secret(), secret()])
        errors.append(caught.value)
        of.dispose()

    async def add():
        async with AsyncStore(url) as store:
            with pytest.raises(LynkrStoreError) as caught:
                await store.add_many([secret(), secret()])
            errors.append(caught.value)

    asyncio.run(add())
    return errors


@pytest.mark.slow
@pytest.mark.parametrize("backend", POSTGRES)
@pytest.mark.parametrize("function", SPEAKING)
def test_a_check_that_speaks_is_not_repeated_in_any_way(backend, new_url, overheard, function):
    url = new_url(backend, at_head=True)
    engine = create_store_engine(url)
    call = CALLS[function].format("request_text")
    execute(engine, f"ALTER TABLE routing_telemetry ADD CHECK (request_text IS NULL OR {call})")
    errors = add_in_every_way(url, engine)
    for error in errors:
        check_alone(error)
    with Store(settings=StoreSettings(url=url, echo=True)) as store:
        assert store.record(secret(request_text=None))
        assert store.flush(30)
        for _ in range(3):
            assert store.record(secret())
        assert store.record(secret(request_text=None))
        eventually(lambda: store.health().rejected + len(store.health().faults_by) > 0)
        check_silent(store, overheard, *errors)
        store.close(0.5)
    check_silent_errors(overheard)
    engine.dispose()


@pytest.mark.parametrize("backend", POSTGRES)
@pytest.mark.parametrize("function", SPEAKING[:3])
def test_a_replayed_row_is_not_repeated_either(backend, new_url, overheard, function, tmp_path):
    url = new_url(backend, at_head=True)
    engine = create_store_engine(url)
    settings = StoreSettings(url=url, spool_path=tmp_path / "spool.db", spool_after_s=0)
    rename(engine, "routing_telemetry", "elsewhere")
    with Store(settings=settings) as store:
        fill(store)
        assert store.flush(30)
        assert store.health().spooled == 10
    rename(engine, "elsewhere", "routing_telemetry")
    call = CALLS[function].format("request_text")
    execute(engine, f"ALTER TABLE routing_telemetry ADD CHECK (tier IS NULL OR {call})")
    with Store(settings=settings) as store:
        eventually(lambda: store.health().written == 2)
        assert store.health().rejected == 8
        check_silent(store, overheard)
    engine.dispose()


@pytest.mark.parametrize("how", ["match", "raise"])
@pytest.mark.parametrize("of_the_host", [True])
def test_a_trigger_of_sqlites_that_speaks_is_not_repeated_in_any_way(
    new_url, overheard, how, of_the_host
):
    """A full-text search says "no such column" of a word of the row's own."""
    url = new_url("sqlite-file", at_head=True)
    engine = create_store_engine(url)
    if how == "raise" and sqlite3.sqlite_version_info < (3, 47):
        pytest.skip("RAISE takes a text alone")
    says = {
        "match": "SELECT * FROM words "
        "WHERE words MATCH (replace(NEW.request_text, ' ', '') || ':x')",
        "raise": "SELECT RAISE(ABORT, NEW.request_text)",
    }[how]
    execute(
        engine,
        "CREATE VIRTUAL TABLE words USING fts5 (word)",
        f"CREATE TRIGGER speaks BEFORE INSERT ON routing_telemetry BEGIN {says}; END",
    )
    driver = contextlib.closing(sqlite3.connect(parse_url(url).database))
    with driver as connection, pytest.raises(sqlite3.Error, match=MARK):
        connection.execute(
            "INSERT INTO routing_telemetry (request_id, timestamp, provider, request_text) "
            f"VALUES ('r', 1, 'p', '{MARK}')"
        )
    errors = add_in_every_way(url, engine)
    for error in errors:
        check_alone(error)
    with Store(settings=StoreSettings(url=url, echo=True)) as store:
        assert store.record(secret())
        eventually(lambda: store.health().rejected + len(store.health().faults_by) > 0)
        check_silent(store, overheard, *errors)
        store.close(0.1)
    engine.dispose()


@pytest.mark.parametrize("backend", POSTGRES)
@pytest.mark.parametrize("of_the_host", [True])
def test_reads_folds_and_retention_repeat_no_row_either(backend, new_url, overheard, of_the_host):
    url = new_url(backend, at_head=True)
    engine = create_store_engine(url)
    errors = []

    def fails(call):
        with pytest.raises(LynkrStoreError) as caught:
            call()
        errors.append(caught.value)

    with Store(settings=StoreSettings(url=url, maintenance_interval_s=1e6)) as store:
        assert store.add_many([secret(), secret(request_text=None)]) == 2
        spoken = CALLS["to_tsquery"].format("provider")
        execute(
            engine,
            f"ALTER TABLE routing_dimensions ADD CONSTRAINT speaks CHECK ({spoken})",
        )
        fails(store.maintain)
        fails(lambda: store.cleanup(timedelta(0), trust_clock=True))
        execute(engine, "ALTER TABLE routing_dimensions DROP CONSTRAINT speaks")
        store.maintain()
        execute(
            engine,
            "CREATE FUNCTION speaks() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE EXCEPTION '%%', OLD.request_text USING ERRCODE = '53100'; END $$",
            "CREATE TRIGGER speaks BEFORE DELETE ON routing_telemetry "
            "FOR EACH ROW EXECUTE FUNCTION speaks()",
        )
        fails(lambda: store.cleanup(timedelta(0), trust_clock=True))
    spoken = CALLS["to_tsquery"].format("provider")
    execute(
        engine,
        f"ALTER TABLE routing_telemetry ADD CHECK (request_text IS NOT NULL OR {spoken}) NOT VALID",
    )
    with Store(settings=StoreSettings(url=url, text_retention_days=1)) as store:
        fails(lambda: store.maintain(trust_clock=True))
    rename(engine, "routing_telemetry", "base")
    columns = [name for name in column_names(engine, "base") if name != "model"]
    execute(
        engine,
        f"CREATE VIEW routing_telemetry AS SELECT {', '.join(columns)}, "
        "to_tsquery(request_text || ' (')::text AS model FROM base",
    )
    with Store(url) as store:
        fails(store.query)
    host = create_engine(parse_url(url), hide_parameters=False)
    with Session(host) as session:
        fails(RoutingRepository(session).query)

    async def read():
        async with AsyncStore(url) as store:
            with pytest.raises(LynkrStoreError) as caught:
                await store.query()
            errors.append(caught.value)

    asyncio.run(read())
    assert len(errors) == 7
    for error in errors:
        check_alone(error)
    check_silent_errors(overheard, *errors)
    host.dispose()
    engine.dispose()


def column_names(engine, table):
    return [column["name"] for column in inspect(engine).get_columns(table)]


def test_a_text_that_a_hosts_engine_cannot_decode_is_not_repeated(new_url, overheard):
    """Python's driver repeats it."""
    url = new_url("sqlite-file", at_head=True)
    with contextlib.closing(sqlite3.connect(parse_url(url).database)) as connection, connection:
        connection.execute(
            "INSERT INTO routing_telemetry (request_id, timestamp, provider, model) "
            f"VALUES ('r', {AT}, 'p', CAST('{MARK}' || x'ff' AS TEXT))"
        )
    host = create_engine(parse_url(url), hide_parameters=False)
    with Session(host) as session, pytest.raises(LynkrStoreError) as caught:
        RoutingRepository(session).query()
    check_alone(caught.value)
    check_silent_errors(overheard, caught.value)
    host.dispose()


@pytest.mark.parametrize("state", ["40001", "53100", "55P03", "57014", "58030", "08006", "25006"])
@pytest.mark.parametrize("backend", POSTGRES)
def test_a_fault_of_the_databases_with_the_rows_words_is_not_repeated(
    backend, new_url, overheard, state
):
    """A trigger that raises the row's text as if the disk were full, say."""
    url = new_url(backend, at_head=True)
    engine = create_store_engine(url)
    refuse(engine, state)
    with Store(settings=StoreSettings(url=url, echo=True)) as store:
        assert store.record(secret())
        eventually(lambda: store.health().faults_by.get("StoreUnavailable", 0) >= 2)
        assert store.health().pending == 1
        with pytest.raises(LynkrStoreError) as caught:
            store.add_many([secret()])
        check_silent(store, overheard, caught.value)
        execute(engine, "DROP TRIGGER refuses ON routing_telemetry")
        assert store.flush(60)
        assert adds_up(store.health())
    assert column(engine, "provider") == [f"{MARK} provider"]
    engine.dispose()


@pytest.mark.skipif(bool(EXTERNAL), reason="ends the store's connections as superuser")
@pytest.mark.parametrize("backend", POSTGRES)
@pytest.mark.parametrize("of_the_host", [True, False])
def test_a_connection_that_breaks_in_mid_batch_repeats_no_row(
    backend, new_url, overheard, of_the_host
):
    url = new_url(backend, at_head=True)
    engine = create_store_engine(url)
    host_engine = create_engine(parse_url(url), hide_parameters=False)
    # the row's own text ends the connection, once
    execute(
        engine,
        "CREATE TABLE once (n int)",
        "INSERT INTO once VALUES (1)",
        "CREATE FUNCTION cuts() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF EXISTS (SELECT FROM once) THEN PERFORM pg_terminate_backend(pg_backend_pid()); "
        "PERFORM pg_sleep(30); END IF; RETURN NEW; END $$",
        "CREATE TRIGGER cuts BEFORE INSERT ON routing_telemetry "
        "FOR EACH ROW EXECUTE FUNCTION cuts()",
    )
    options = {"engine": host_engine} if of_the_host else {}
    store = Store(settings=StoreSettings(url=url, echo=True), **options)
    for _ in range(5):
        assert store.record(secret())
    eventually(lambda: sum(store.health().faults_by.values()) >= 2)
    with pytest.raises(LynkrStoreError) as caught:
        store.add_many([secret()])
    check_silent(store, overheard, caught.value)
    # in the order in which a batch takes their locks
    execute(engine, "DROP TRIGGER cuts ON routing_telemetry", "DROP TABLE once")
    assert store.flush(60)
    assert check_silent(store, overheard).written == 5
    store.close()
    host_engine.dispose()
    engine.dispose()


@pytest.mark.parametrize("of_the_host", [True, False])
def test_a_full_disk_repeats_no_row(tmp_path, overheard, of_the_host):
    url = f"sqlite:///{tmp_path}/telemetry.db"
    engine = create_store_engine(url)
    upgrade(engine)
    host_engine = create_engine(parse_url(url), hide_parameters=False)
    options = {"engine": host_engine} if of_the_host else {}
    store = Store(settings=StoreSettings(url=url, echo=True), **options)
    full = threading.Event()
    full.set()

    @event.listens_for(store.engine, "begin")
    def limit(connection):
        pages = 10 if full.is_set() else 10**6
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    for n in range(100):
        assert store.record(secret(request_text=f"{MARK} " * 2_000, request_id=str(n)))
    eventually(lambda: store.health().faults_by.get("StoreUnavailable", 0) >= 2)
    assert "full" in store.health().last_error
    with pytest.raises(LynkrStoreError) as caught:
        store.add_many([secret(request_text=f"{MARK} " * 20_000)])
    assert check_silent(store, overheard, caught.value).pending == 100
    full.clear()
    assert store.flush(60)
    check_silent(store, overheard)
    store.close()
    assert column(engine, "request_id") == [str(n) for n in range(100)]
    host_engine.dispose()
    engine.dispose()


def test_a_schema_that_changes_repeats_no_row(engine, open_, overheard):
    store = open_(echo=True)
    assert store.record(secret())
    assert store.flush(30)
    rename(engine, "routing_telemetry", "elsewhere")
    fill(store)
    eventually(lambda: store.health().faults_by.get("StoreUnavailable", 0) >= 2)
    with pytest.raises(LynkrStoreError) as caught:
        store.add_many([secret()])
    check_silent(store, overheard, caught.value)
    rename(engine, "elsewhere", "routing_telemetry")
    assert store.flush(60)
    check_silent(store, overheard)


def test_a_spool_is_its_owners_alone_and_empty_when_it_was_replayed(
    engine, url, tmp_path, overheard
):
    folder = tmp_path / "spools"
    settings = StoreSettings(url=url, spool_path=folder / "spool.db", spool_after_s=0)
    with Store(settings=settings) as store:
        assert store.flush(30)
        rename(engine, "routing_telemetry", "elsewhere")
        fill(store)
        assert store.flush(30)
        assert store.health().spooled == 10
        assert files_with(folder, MARK) == {"spool.db"}
        for place in folder.iterdir():
            assert place.stat().st_mode & 0o077 == 0
            assert MARK not in place.name
        rename(engine, "elsewhere", "routing_telemetry")
        eventually(lambda: store.health().spooled == 0)
        check_silent(store, overheard)
    assert files_with(folder, MARK) == set(), "what people wrote does not stay behind"
    assert len(column(engine, "id")) == 10


# -- redaction ---------------------------------------------------------------------------------


def masked(said):
    return said.replace(MARK, "***")


def test_redaction_runs_over_every_free_text_before_it_is_cut_in_the_writers_thread(engine, open_):
    calls, here = [], threading.get_ident()

    def redact(said):
        calls.append((threading.get_ident(), said))
        return masked(said)

    store = open_(redact=redact, text_max_chars=12)
    record = {
        "provider": "p",
        "request_text": "0123456789" + MARK,
        "response_text": MARK + "0123456789",
        "candidates": [{"model": MARK}],
        "cache_decision": f'{{"reason":"{MARK}"}}',
        "attributes": {MARK: [MARK, {"deep": MARK}]},
    }
    assert store.record(record)
    assert store.record(provider="p", request_text=None, attributes={"n": 1})
    assert store.flush(30)
    assert all(thread != here for thread, _ in calls)
    assert [said for _, said in calls] == [
        "0123456789" + MARK,
        MARK + "0123456789",
        f'[{{"model":"{MARK}"}}]',
        f'{{"reason":"{MARK}"}}',
        f'{{"{MARK}":["{MARK}",{{"deep":"{MARK}"}}]}}',
        '{"n":1}',
    ]
    assert [column(engine, name)[0] for name in LONG_FIELDS] == [
        "0123456789**",
        "***012345678",
        '[{"model":"***"}]',
        '{"reason":"***"}',
        '{"***":["***",{"deep":"***"}]}',
    ]
    health = store.health()
    assert adds_up(health)
    assert dict(health.mended_by) == {"cut": 2}
    assert health.written == 2


@pytest.mark.parametrize(
    "answer", [None, 5, b"bytes", ["list"], ValueError, KeyError, RecursionError, LookupError]
)
def test_where_redaction_fails_the_row_is_stored_without_its_free_texts(
    engine, open_, overheard, answer
):
    def redact(said):
        if "fine" in said:
            return masked(said)
        if isinstance(answer, type):
            raise answer(said)
        return answer

    store = open_(redact=redact)
    assert store.record({**secret(), "request_text": "fine"})  # the others fail
    assert store.record(provider="p", attributes={"k": "fine"})
    assert store.record(provider="p")
    assert store.flush(30)
    for name in LONG_FIELDS:
        expected = '{"k":"fine"}' if name == "attributes" else None
        assert column(engine, name) == [None, expected, None]
    health = check_silent(store, overheard)
    assert (health.written, dict(health.mended_by)) == (3, {"redact_failed": 1})
    assert column(engine, "provider") == [f"{MARK} provider", "p", "p"]


def test_what_redaction_returns_is_sanitized_like_any_text(engine, open_):
    store = open_(redact=lambda said: said + "\0\ud800")
    assert store.record(provider="p", request_text="t", attributes={})
    assert store.flush(30)
    assert column(engine, "request_text") == ["t\ufffd\ufffd"]
    assert column(engine, "attributes") == ["{}\ufffd\ufffd"]
    assert adds_up(store.health())


def test_redacted_values_are_in_no_spool_and_no_database(engine, url, tmp_path):
    folder = tmp_path / "spools"
    settings = StoreSettings(
        url=url, redact=masked, spool_path=folder / "spool.db", spool_after_s=0
    )
    record = {"provider": "p"} | {name: f"{MARK} {name}" for name in LONG_FIELDS}
    with Store(settings=settings) as store:
        assert store.record(record)
        assert store.flush(30)
        rename(engine, "routing_telemetry", "elsewhere")
        for _ in range(20):
            assert store.record(record)
        assert store.flush(30)
        assert store.health().spooled == 20
        assert files_with(tmp_path, MARK) == set()
        rename(engine, "elsewhere", "routing_telemetry")
        eventually(lambda: store.health().spooled == 0)
        assert adds_up(store.health())
        assert files_with(tmp_path, MARK) == set()
        for name in LONG_FIELDS:
            assert column(engine, name) == [f"*** {name}"] * 21
    assert files_with(tmp_path, MARK) == set()


def test_add_many_redacts_and_leaves_texts_out_too(engine, url):
    with Store(settings=StoreSettings(url=url, redact=masked, capture_text=False)) as store:
        assert store.add_many([secret(), RoutingEvent(**secret())]) == 2
    for name in LONG_FIELDS:
        expected = None if name in TEXT_FIELDS else f"*** {name}"
        assert column(engine, name) == [expected] * 2


@pytest.mark.parametrize("character", ["x", "é", "\U0001f600", "e\u0301"])
def test_texts_are_cut_between_characters_and_counted(engine, open_, character):
    store = open_(text_max_chars=101)
    long = (character * 200)[:150]
    assert store.record(provider="p", request_text=long, response_text=long[:101])
    assert store.flush(30)
    assert column(engine, "request_text") == [long[:101]]
    assert column(engine, "response_text") == [long[:101]]
    assert dict(store.health().mended_by) == {"cut": 1}
    assert adds_up(store.health())


def test_records_left_in_memory_at_the_end_are_shown_nowhere(engine, url, overheard):
    rename(engine, "routing_telemetry", "elsewhere")
    store = Store(url)
    fill(store)
    eventually(lambda: {*store.health().faults_by} & {"SchemaBehind", "SchemaError"})
    store.close(0.1)
    health = store.health()
    assert health.dropped == 10
    assert set(health.dropped_by) <= {"deadline", "outcome_unknown"}, "a try may be under way"
    assert adds_up(health)
    assert MARK not in repr(health)
    assert MARK not in repr(store)
    assert overheard() == []
    rename(engine, "elsewhere", "routing_telemetry")


def test_a_damaged_spool_is_reported_without_a_row(url, tmp_path, overheard):
    place = tmp_path / "spool.db"
    engine = create_store_engine(url)
    rename(engine, "routing_telemetry", "elsewhere")
    settings = StoreSettings(url=url, spool_path=place, spool_after_s=0)
    with Store(settings=settings) as store:
        fill(store)
        assert store.flush(30)
        assert store.health().spooled == 10
    with contextlib.closing(sqlite3.connect(place)) as connection, connection:
        connection.execute("UPDATE batches SET payload = payload || x'20'")
    rename(engine, "elsewhere", "routing_telemetry")
    with Store(settings=settings) as store:
        eventually(lambda: store.health().dropped_by.get("spool_damaged") == 10)
        check_silent(store, overheard)
    engine.dispose()
