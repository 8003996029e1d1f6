"""What a caller can do wrong raises one of the library's errors, which names the remedy."""

import asyncio
import copy
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from lynkr_store import (
    AsyncStore,
    BadArgument,
    Cursor,
    LynkrStoreError,
    RoutingRepository,
    SchemaBehind,
    SchemaError,
    Store,
    StoreClosed,
    StoreSettings,
    StoreUnavailable,
    UnsupportedDatabase,
    Window,
    create_store_engine,
    exceptions,
    upgrade,
)
from lynkr_store.db.engines import create_store_async_engine
from tests.support.recorded import ROOT

# -- urls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("sqlite://x.db", "sqlite:///path/to/file.db"),
        ("sqlite://user@/x.db", "sqlite:///path/to/file.db"),
        ("sqlite:///a.db?mode=ro", "uri=true"),
        ("sqlite:///a.db?timeout=x", "timeout=5"),
        ("postgres://host/db", "write postgresql://"),
        ("postgresql://host:port/db", "the port is not a number"),
        ("postgresql://host:99999/db", "1 to 65535"),
        ("postgresql://host:0/db", "1 to 65535"),
        ("", "use sqlite:///path/to/file.db"),
        (5, "use sqlite:///path/to/file.db"),
    ],
)
@pytest.mark.parametrize(
    "use", [Store, AsyncStore, create_store_engine, create_store_async_engine, upgrade]
)
def test_a_url_that_cannot_work_is_refused_with_the_right_one(use, url, remedy):
    if use is upgrade and url == 5:
        remedy = "give a URL"
    with pytest.raises(BadArgument, match=remedy):
        use(url)


@pytest.mark.parametrize("name", ["telemetry.db", "a b?c=d%20#é@:.db"])
def test_a_path_is_the_file_of_a_database(tmp_path, name):
    path = tmp_path / name
    with Store(path) as store:
        assert store.add_many([{"provider": "p"}]) == 1
    assert path.stat().st_size
    upgrade(path)
    engine = create_store_engine(path)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM routing_telemetry")) == 1
    engine.dispose()

    async def read():
        async with AsyncStore(Path(path)) as store:
            return len(await store.query())

    assert asyncio.run(read()) == 1


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "clock",
    [time.time, lambda: int(time.time()), lambda: None, lambda: True, lambda: 1 / 0, 5],
    ids=["seconds", "whole seconds", "none", "bool", "raises", "no function"],
)
@pytest.mark.parametrize("kind", [Store, AsyncStore])
def test_a_clock_that_tells_no_milliseconds_is_refused(tmp_path, kind, clock):
    with pytest.raises(BadArgument, match=r"clock: .*milliseconds"):
        kind(tmp_path / "a.db", clock=clock)


@pytest.mark.parametrize("settings", [{"url": "sqlite://"}, "sqlite://", StoreSettings])
def test_settings_of_another_type_are_refused(settings):
    with pytest.raises(BadArgument, match="settings: give a StoreSettings"):
        Store(settings=settings)


def test_a_wrong_argument_of_a_statistic_names_the_statistic():
    with pytest.raises(TypeError, match=r"^Store\.get_stats\(\) .*'hours'"):
        Store("sqlite://").get_stats(hours=2)
    with pytest.raises(TypeError, match=r"^AsyncStore\.get_stats\(\) .*'hours'"):
        asyncio.run(AsyncStore("sqlite://").get_stats(hours=2))


def test_a_repository_takes_a_session():
    engine = create_engine("sqlite://")
    for session in (engine, AsyncSession(), engine.connect(), None, Session):
        with pytest.raises(BadArgument, match=r"session: give a Session.*run_sync"):
            RoutingRepository(session)
    engine.dispose()


def test_a_repository_takes_a_scoped_session(new_url):
    engine = create_store_engine(new_url("sqlite-file", at_head=True))
    session = scoped_session(sessionmaker(engine))
    assert RoutingRepository(session).add_many([{"provider": "p"}]) == 1
    assert len(RoutingRepository(session).query()) == 1
    session.remove()
    engine.dispose()


@pytest.mark.parametrize(
    ("records", "words"),
    [
        (5, "records: give several records"),
        ({"provider": "p"}, "records: give several records"),
        ([{"provider": "p"}, 5], "record 1: Input should be a valid dictionary"),
        ([{"provider": "p"}, {}], r"record 1: provider: give a value \(no_provider"),
        ([{"provider": "p", "modle": "s3cret"}], "record 0: modle: .*did you mean model"),
    ],
)
def test_the_place_of_an_invalid_record_is_named(records, words):
    with Store("sqlite://") as store:
        with pytest.raises(BadArgument, match=words) as refused:
            store.add_many(records)
        assert "s3cret" not in str(refused.value)
        assert refused.value.__cause__ is refused.value.__context__ is None
        assert store.query() == []


@pytest.mark.parametrize("timeout_s", [None, "x", -1, float("nan")])
def test_a_timeout_that_is_none_is_refused(timeout_s):
    with Store("sqlite://") as store:
        for wait in (store.flush, store.close):
            with pytest.raises(BadArgument, match="timeout_s: give seconds"):
                wait(timeout_s)


def test_a_cursor_of_another_form_is_refused():
    with pytest.raises(BadArgument, match="its text is"):
        Cursor.parse("x")


def test_a_closed_store_cannot_be_entered(tmp_path):
    store = Store("sqlite://")
    store.close()
    with pytest.raises(StoreClosed, match="open a new one"), store:
        pass

    async def enter():
        store = AsyncStore(tmp_path / "a.db")
        await store.close()
        async with store:
            pass

    with pytest.raises(StoreClosed, match="open a new one"):
        asyncio.run(enter())


# -- what waiting cannot mend ----------------------------------------------------------------------


def reads(repository):
    yield repository.query
    yield repository.get_stats
    yield lambda: repository.get_provider_stats("p", Window(since=0))
    yield repository.get_routing_accuracy


@pytest.mark.parametrize("backend", ["sqlite-memory", "sqlite-file", "postgres18"])
def test_without_tables_the_command_is_named(new_url, backend):
    engine = create_store_engine(new_url(backend))
    for number in range(4):
        with Session(engine) as session:
            read = [*reads(RoutingRepository(session))][number]
            with pytest.raises(SchemaError, match="run lynkr-store upgrade") as refused:
                read()
            assert refused.value.__context__ is None
    with Session(engine) as session, pytest.raises(LynkrStoreError, match="upgrade"):
        RoutingRepository(session).add_many([{"provider": "p"}])
    engine.dispose()


def test_a_schema_that_the_hosts_engine_does_not_see_is_no_outage(new_url):
    url = new_url("postgres18")
    there = create_store_engine(url, schema="telemetry")
    upgrade(there)
    there.dispose()
    settings = StoreSettings(url=url, upgrade_on_open=False)
    host = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with (
        Store(engine=host, settings=settings) as store,
        pytest.raises(SchemaBehind, match="lynkr-store upgrade"),
    ):
        store.query()
    host.dispose()

    async def ask():
        host = create_store_async_engine(url)
        try:
            async with AsyncStore(engine=host, settings=settings) as store:
                await store.query()
        finally:
            await host.dispose()

    with pytest.raises(SchemaBehind, match="lynkr-store upgrade"):
        asyncio.run(ask())


@pytest.mark.parametrize("backend", ["sqlite-file", "postgres18"])
def test_a_table_that_a_hosts_trigger_misses_is_no_table_of_the_stores(new_url, backend):
    engine = create_store_engine(new_url(backend, at_head=True))
    with engine.begin() as connection:
        for statement in TRIGGER[backend]:
            connection.exec_driver_sql(statement)
    with Session(engine) as session, pytest.raises(StoreUnavailable) as refused:
        RoutingRepository(session).add_many([{"provider": "p"}])
    assert "upgrade" not in str(refused.value)
    engine.dispose()


TRIGGER = {
    "sqlite-file": [
        (
            "CREATE TRIGGER hosts AFTER INSERT ON routing_telemetry "
            "BEGIN INSERT INTO elsewhere VALUES (1); END"
        )
    ],
    "postgres18": [
        (
            "CREATE FUNCTION hosts() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN INSERT INTO elsewhere VALUES (1); RETURN NEW; END$$"
        ),
        (
            "CREATE TRIGGER hosts AFTER INSERT ON routing_telemetry "
            "FOR EACH ROW EXECUTE FUNCTION hosts()"
        ),
    ],
}


# -- libraries that are not installed --------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("absent", "call", "words"),
    [
        ("greenlet", "AsyncStore('postgresql://h/d')", "greenlet.*lynkr-store.postgres,async."),
        ("psycopg", "Store('postgresql://h/d')", "psycopg is not installed.*postgres"),
        ("psycopg", "AsyncStore('postgresql://h/d')", "psycopg is not installed.*postgres"),
        (
            "aiosqlite",
            "create_store_async_engine('sqlite:///x.db')",
            "aiosqlite is not installed.*async",
        ),
    ],
)
def test_a_library_that_is_not_installed_is_named(absent, call, words):
    program = f"""
import sys
sys.modules[{absent!r}] = None
from lynkr_store import *
from lynkr_store.db.engines import create_store_async_engine
try:
    {call}
except MissingDriver as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "None is not" not in done.stdout
    assert re.search(words, done.stdout), (done.stdout, done.stderr)


# -- options ---------------------------------------------------------------------------------------


def test_an_unknown_option_is_named_with_a_similar_one():
    with pytest.raises(
        BadArgument, match="retention_day: unknown option; did you mean retention_days"
    ):
        StoreSettings(retention_day=3)


def test_a_variable_that_names_no_option_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr("lynkr_store.settings._unknown_said", set())
    monkeypatch.setenv("LYNKR_STORE_RETENTION_DAY", "secret")
    monkeypatch.setenv("LYNKR_STORE_SCHEMA_NAME", "secret")
    monkeypatch.setenv("LYNKR_STORE_QUEUE_MAX_ROWS", "5")
    for name in ("SERVICE_HOST", "PORT", "PORT_5432_TCP_ADDR"):  # Kubernetes sets these
        monkeypatch.setenv(f"LYNKR_STORE_{name}", "secret")
    for _ in range(2):
        assert StoreSettings().queue_max_rows == 5
    assert sorted(record.getMessage() for record in caplog.records) == [
        "LYNKR_STORE_RETENTION_DAY: unknown option; did you mean LYNKR_STORE_RETENTION_DAYS?",
        "LYNKR_STORE_SCHEMA_NAME: unknown option; did you mean LYNKR_STORE_SCHEMA?",
    ]


def test_an_argument_wins_over_its_variable(monkeypatch):
    monkeypatch.setenv("LYNKR_STORE_SCHEMA", "of_the_environment")
    assert StoreSettings(schema_name="given").schema_name == "given"
    assert StoreSettings(schema_name="").schema_name is None
    assert StoreSettings().schema_name == "of_the_environment"


def test_a_wrong_window_or_filter_is_answered_by_an_example():
    with Store("sqlite://") as store:
        with pytest.raises(BadArgument, match=r"window: .*Window.last\(timedelta\(hours=6\)\)"):
            store.get_stats("6h")
        with pytest.raises(BadArgument, match=r"criteria: .*RoutingFilter\(provider="):
            store.query({"provider": "p"})
        with pytest.raises(BadArgument, match=r"Cursor.parse\(text\)"):
            store.query(before="1:1")


def test_a_record_that_is_none_is_rejected_by_its_type():
    with Store("sqlite://") as store:
        for wrong in ("text", 5):
            assert store.record(wrong)
        store.flush()
        assert {str(each) for each in store.health().rejections} == {
            "wrong_type (str)",
            "wrong_type (int)",
        }


# -- pickles ---------------------------------------------------------------------------------------

ERRORS = [
    found
    for found in vars(exceptions).values()
    if isinstance(found, type) and issubclass(found, LynkrStoreError)
]


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize(
    "again",
    [copy.copy, lambda error: pickle.loads(pickle.dumps(error))],  # noqa: S301 - its own
)
def test_an_error_is_the_same_after_pickling(kind, again):
    error = kind("a \x1b message")
    error.add_note("a note")
    other = again(error)
    assert type(other) is kind
    assert str(other) == str(error)
    assert vars(other) == vars(error)


def test_every_error_of_a_caller_is_of_one_family():
    assert issubclass(UnsupportedDatabase, BadArgument)
    assert all(issubclass(kind, LynkrStoreError) for kind in ERRORS)
