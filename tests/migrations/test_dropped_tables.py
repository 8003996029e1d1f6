"""Tables of the store's that somebody dropped: named by `check`, made again by an upgrade.

Of a database whose revision is still the newest. Records that waited come through, and statistics
count every row that is there.
"""

import asyncio
import json
import os
import re
from argparse import Namespace

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import select, text

from lynkr_store import (
    AsyncStore,
    SchemaBehind,
    SchemaError,
    Store,
    StoreSettings,
    StoreUnavailable,
    Window,
    create_store_engine,
    upgrade,
    writing,
)
from lynkr_store.db.models import NOTES, TELEMETRY, Base
from lynkr_store.migrate import revisions
from lynkr_store.testing import RecordFactory
from tests.cli.test_commands import done, run
from tests.conftest import ON_DISK, POSTGRES
from tests.support.recorded import ROOT
from tests.support.snapshot import schema_of
from tests.support.stores import Asynchronous, adds_up, eventually

pytestmark = pytest.mark.sample(8)

NOW = 1_750_000_000_000
DAY_MS = 86_400_000
TABLES = [table.name for table in Base.metadata.sorted_tables]
ALL_TIME = Window(since=0)
ROWS = 60
WORD = re.compile(r"[^\s,()]+")


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr("lynkr_store.ingest.deliverer._FIRST_RETRY_S", 0.01)
    monkeypatch.setattr("lynkr_store.ingest.deliverer._LAST_RETRY_S", 0.1)


PLACES = [*((b, None) for b in ON_DISK), (POSTGRES[-1], "telemetry")]


@pytest.fixture(params=PLACES, ids=lambda place: "-".join(filter(None, place)))
def url(request, new_url, monkeypatch):
    """A database at head with rows of three days, all of them folded."""
    backend, schema = request.param
    url = new_url(backend)
    if schema:
        monkeypatch.setenv("LYNKR_STORE_SCHEMA", schema)
    upgrade(url)
    with Store(url, clock=lambda: NOW) as store:
        store.add_many(
            RecordFactory(timestamp=NOW - n * DAY_MS // 20, session_id="s") for n in range(ROWS)
        )
        store.maintain()
    return url


@pytest.fixture
def engine(url):
    engine = create_store_engine(url, schema=os.environ.get("LYNKR_STORE_SCHEMA"))
    yield engine
    engine.dispose()


def opened(url, **options):
    settings = StoreSettings(url=url, cache_ttl_s=0, flush_interval_s=0.01, **options)
    return Store(settings=settings, clock=lambda: NOW)


def drop(engine, *tables):
    with writing(engine).begin() as connection:
        for table in tables:
            connection.execute(text(f"DROP TABLE {table}"))


def notes(engine):
    with engine.connect() as connection:
        return connection.execute(select(NOTES).order_by(NOTES.c.revision)).all()


def statistics(url):
    with opened(url) as store:
        return store.get_stats(ALL_TIME), store.get_provider_stats("ollama", ALL_TIME)


def by_code(url):
    upgrade(url)


def by_alembic(url):
    config = Config(str(ROOT / "alembic.ini"), cmd_opts=Namespace(x=[f"url={url}"]))
    command.upgrade(config, "head")


def by_the_command(url):
    assert "created again, empty: " in done("upgrade", "--url", url)


@pytest.mark.sample(8)
@pytest.mark.parametrize("lost", [*TABLES, "all"])
def test_check_names_what_is_missing_and_an_upgrade_makes_it_again(url, engine, lost):
    lost = TABLES if lost == "all" else [lost]
    ways = [by_code, by_alembic, by_the_command]
    way = ways[(len(lost[0]) + len(lost)) % len(ways)]
    before, noted, rows_before = schema_of(engine), notes(engine), statistics(url)
    drop(engine, *lost)
    checked = run("check", "--url", url, "--json")
    assert checked.returncode == 1, checked.stderr
    answer = json.loads(checked.stdout)
    assert (answer["ok"], sorted(answer["missing_tables"])) == (False, sorted(lost))
    said = run("check", "--url", url).stdout
    assert all(f"missing: the table {table}\n" in said for table in lost)
    assert "run lynkr-store upgrade" in said
    way(url)
    # ADD COLUMN puts the last words and commas elsewhere than CREATE TABLE
    assert sorted(WORD.findall(schema_of(engine))) == sorted(WORD.findall(before)), "with indexes"
    assert notes(engine) == noted
    assert json.loads(done("check", "--url", url, "--json"))["missing_tables"] == []
    if "routing_telemetry" in lost:
        with opened(url) as store:
            assert store.query() == []
        return
    assert statistics(url) == rows_before, "not folded"
    with opened(url) as store:
        store.maintain()
    assert statistics(url) == rows_before, "folded"


@pytest.mark.parametrize("lost", ["routing_telemetry", "ingest_batches", "all"])
def test_records_that_waited_come_through(url, engine, lost):
    with opened(url, upgrade_on_open=False) as store:
        assert store.add_many([{"provider": "before"}]) == 1
        drop(engine, *(TABLES if lost == "all" else [lost]))
        for n in range(30):
            assert store.record(provider="waited", request_id=f"r{n}")
        remedy = "run lynkr-store upgrade, which creates it again, empty"
        eventually(lambda: remedy in (store.health().last_error or ""))
        assert not store.flush(0.1)
        assert (store.health().pending, store.health().rejected) == (30, 0)
        upgrade(url)
        assert store.flush(60)
        assert adds_up(store.health())
        assert store.health().written == 30
        found = store.get_provider_stats("waited", ALL_TIME)
        assert found.total == 30
        store.maintain()
        assert store.get_provider_stats("waited", ALL_TIME).total == 30


READS = {
    "get_stats": (lambda store: store.get_stats(), "routing_rollups"),
    "maintain": (lambda store: store.maintain(), "lynkr_store_progress"),
    "cleanup": (lambda store: store.cleanup(), "lynkr_store_progress"),
    "query": (lambda store: store.query(), "routing_telemetry"),
    "add_many": (lambda store: store.add_many([{"provider": "p"}]), "routing_telemetry"),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", READS)
def test_each_call_of_a_running_store_names_the_remedy(url, engine, name):
    call, lost = READS[name]
    with opened(url, upgrade_on_open=False) as store:
        call(store)
        drop(engine, lost)
        with pytest.raises((SchemaBehind, StoreUnavailable)) as said:
            call(store)
        assert lost in str(said.value)
        assert "run lynkr-store upgrade, which creates" in str(said.value)
        upgrade(url)
        call(store)


def test_each_call_of_a_running_asynchronous_store_names_the_remedy(url, engine):
    settings = StoreSettings(url=url, cache_ttl_s=0, upgrade_on_open=False)
    with (
        asyncio.Runner() as runner,
        Asynchronous(AsyncStore(settings=settings, clock=lambda: NOW), runner) as store,
    ):
        expected = store.get_stats(ALL_TIME)
        drop(engine, "routing_rollups", "lynkr_store_progress")
        for call in (lambda: store.get_stats(ALL_TIME), store.maintain):
            with pytest.raises(SchemaBehind, match=r"routing_rollups, .*; run lynkr-store upgrade"):
                call()
        assert store.record(provider="p", timestamp=NOW - 10 * DAY_MS)
        assert store.flush(30), "records need neither"
        upgrade(url)
        assert store.get_stats(ALL_TIME).total_requests == expected.total_requests + 1
        store.maintain()
        assert store.get_stats(ALL_TIME).total_requests == expected.total_requests + 1


def test_a_store_that_upgrades_makes_them_again_when_it_is_opened(url, engine):
    expected = statistics(url)
    drop(engine, "routing_rollups", "lynkr_store_progress", "lynkr_store_revisions")
    with opened(url, upgrade_on_open=True) as store:
        assert store.get_stats(ALL_TIME) == expected[0]
        store.maintain()
        assert store.get_stats(ALL_TIME) == expected[0]
    with engine.connect() as connection:
        assert revisions.missing_tables(connection) == []


def test_without_the_ledger_or_the_records_table_a_store_does_not_open(url, engine):
    drop(engine, "ingest_batches")
    with opened(url, upgrade_on_open=False) as store:
        with pytest.raises(SchemaBehind, match="ingest_batches; run lynkr-store upgrade"):
            store.query()
        upgrade(url)
        assert len(store.query(limit=100)) == ROWS
        drop(engine, "savings_events", "lynkr_store_revisions")
    with opened(url, upgrade_on_open=False) as store:  # no record needs these
        assert store.record(provider="p")
        assert store.flush(30)


def removed_below(url, cutoff_ms):
    with opened(url, retention_days=(NOW - cutoff_ms) / DAY_MS) as store:
        assert store.maintain().rows_deleted > 0


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["lynkr_store_progress", "routing_telemetry", "ingest_batches"])
def test_what_is_known_of_removed_rows_stays(url, engine, lost):
    """As after retention: whole quarters of an hour, and the answer says so.

    Where all rows are lost, the quarter in which rows begin again is counted from those alone.
    """
    afterwards = ROWS + (lost != "routing_telemetry")
    removed_below(url, NOW - DAY_MS)
    assert statistics(url)[0].total_requests == ROWS
    drop(engine, lost)
    upgrade(url)
    with opened(url) as store:
        for _ in range(2):
            stats = store.get_stats(ALL_TIME)
            assert (stats.total_requests, stats.source) == (ROWS, "buckets")
            store.maintain()
        store.record(provider="new", timestamp=NOW)
        assert store.flush(30)
        store.maintain()
        for rebuild in (False, True):
            assert store.get_stats(ALL_TIME).total_requests == afterwards
            store.maintain(rebuild=rebuild)
        assert store.get_stats(ALL_TIME).total_requests == afterwards


def test_rows_removed_of_the_oldest_quarter_are_not_called_there(url, engine):
    with opened(url) as store:
        store.add_many({"provider": "old", "timestamp": NOW - 10 * DAY_MS + n} for n in range(4))
        store.maintain()
    with writing(engine).begin() as connection:
        oldest = "SELECT min(id) FROM routing_telemetry WHERE provider = 'old'"
        connection.execute(text(f"DELETE FROM routing_telemetry WHERE id = ({oldest})"))
    drop(engine, "lynkr_store_progress")
    upgrade(url)
    with opened(url) as store:
        store.maintain()
        stats = store.get_stats(ALL_TIME)
        assert (stats.total_requests, stats.source) == (ROWS + 3, "buckets")
        assert stats.raw_from is not None


def test_a_copy_is_made_before_tables_are_made_again(tmp_path):
    url = f"sqlite:///{tmp_path}/telemetry.db"
    upgrade(url)
    engine = create_store_engine(url)
    assert upgrade(url, backup=True) is None, "there is nothing to do"
    drop(engine, "routing_rollups")
    assert upgrade(url, backup=True) is not None
    engine.dispose()


def test_an_upgrade_that_fails_makes_none_of_them(url, engine, monkeypatch):
    drop(engine, *TABLES)
    before = schema_of(engine)

    def fail(*_):
        raise RuntimeError("half-way")

    with monkeypatch.context() as patched:
        patched.setattr("lynkr_store.maintenance.restoration._restart_rollups", fail)
        with pytest.raises(RuntimeError, match="half-way"):
            upgrade(url)
    assert schema_of(engine) == before
    with engine.connect() as connection:
        assert revisions.current(connection) == revisions.head()
    upgrade(url)
    with engine.connect() as connection:
        assert revisions.missing_tables(connection) == []


@pytest.mark.parametrize("renamed", ["routing_telemetry", "routing_changes"])
def test_a_table_that_was_renamed_is_named_and_a_name_that_is_taken(url, engine, renamed):
    with writing(engine).begin() as connection:
        connection.execute(text(f"ALTER TABLE {renamed} RENAME TO elsewhere"))
    before = schema_of(engine)
    with pytest.raises(SchemaError, match=f"{renamed}: missing, .*the table elsewhere already has"):
        upgrade(url)
    assert schema_of(engine) == before
    with writing(engine).begin() as connection:
        connection.execute(text(f"ALTER TABLE elsewhere RENAME TO {renamed}"))
    upgrade(url)
    assert statistics(url)[0].total_requests == ROWS


def test_triggers_of_a_renamed_table_are_named_too(new_url):
    url = new_url("sqlite-file", at_head=True)
    engine = create_store_engine(url)
    names = [str(index.name) for index in TELEMETRY.indexes]
    with writing(engine).begin() as connection:
        connection.execute(text("ALTER TABLE routing_telemetry RENAME TO elsewhere"))
        for name in names:
            connection.execute(text(f"DROP INDEX IF EXISTS {name}"))
    with pytest.raises(SchemaError, match=r"the table elsewhere already has lynkr_store_note_"):
        upgrade(url)
    engine.dispose()


def test_an_upgrade_to_an_older_revision_makes_nothing(url, engine):
    drop(engine, "savings_events")
    before = schema_of(engine)
    upgrade(engine, "0003")
    assert schema_of(engine) == before
