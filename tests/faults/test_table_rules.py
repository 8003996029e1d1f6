"""Rules that a table has of its own: what the account says is what the table holds."""

import asyncio

import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from lynkr_store import (
    AsyncStore,
    RoutingRepository,
    RowRejected,
    Store,
    StoreSettings,
    StoreUnavailable,
    create_store_engine,
    writing,
)
from lynkr_store.ingest.validation import TextPolicy, row_of
from lynkr_store.storage.inserts import insert_once
from tests.conftest import BACKENDS, EXTERNAL, POSTGRES
from tests.support.stores import adds_up, eventually

NOW = 1_750_000_000_000


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr("lynkr_store.ingest.deliverer._FIRST_RETRY_S", 0.01)
    monkeypatch.setattr("lynkr_store.ingest.deliverer._LAST_RETRY_S", 0.1)


def execute(engine, *statements):
    with writing(engine).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def names(engine):
    with engine.connect() as connection:
        asked = "SELECT request_id FROM routing_telemetry ORDER BY id"
        return list(connection.exec_driver_sql(asked).scalars())


def ledger(engine):
    with engine.connect() as connection:
        asked = "SELECT row_count FROM ingest_batches"
        return sorted(connection.exec_driver_sql(asked).scalars())


# -- a trigger that skips rows -----------------------------------------------------------------


def skip(engine, condition):
    """Have a trigger skip the rows of a condition, without a word."""
    if engine.dialect.name == "sqlite":
        execute(
            engine,
            f"CREATE TRIGGER skips BEFORE INSERT ON routing_telemetry WHEN {condition} "
            "BEGIN SELECT RAISE(IGNORE); END",
        )
    else:
        execute(
            engine,
            "CREATE FUNCTION skips() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"IF {condition} THEN RETURN NULL; END IF; RETURN NEW; END $$",
            "CREATE TRIGGER skips BEFORE INSERT ON routing_telemetry "
            "FOR EACH ROW EXECUTE FUNCTION skips()",
        )


ODD = "NEW.model = 'odd'"


def mixed(count):
    """Records of which every third is skipped, and the names of those that are stored."""
    records = [
        {"provider": "p", "request_id": str(n), "model": "fine" if n % 3 else "odd"}
        for n in range(count)
    ]
    return records, [record["request_id"] for record in records if record["model"] == "fine"]


@pytest.mark.parametrize("count", [1, 3, 99, 250])
def test_rows_that_a_trigger_skips_are_counted_as_skipped(open_store, count):
    store = open_store()
    assert store.get_stats() is None  # also where the database is made on first use
    engine = store._database.engine
    skip(engine, ODD)
    records, stored = mixed(count)
    for record in records:
        assert store.record(record)
    assert store.flush(60)
    health = store.health()
    assert adds_up(health)
    assert health.written == len(stored)
    assert dict(health.rejected_by) == {"skipped": count - len(stored)}
    assert not health.faults_by
    assert names(engine) == stored
    assert sum(ledger(engine)) == len(stored)


def test_add_many_says_how_many_were_stored(open_store):
    store = open_store()
    assert store.get_stats() is None  # also where the database is made on first use
    engine = store._database.engine
    skip(engine, ODD)
    records, stored = mixed(10)
    assert store.add_many(records) == len(stored) == 6
    assert store.add_many(records[:1]) == 0
    assert names(engine) == stored


@pytest.fixture(params=BACKENDS)
def engine(request, new_url):
    url = new_url(request.param, at_head=request.param != "sqlite-memory")
    if request.param == "sqlite-memory":
        with Store(url) as store:
            store.get_stats()
            yield store.engine
    else:
        engine = create_store_engine(url)
        yield engine
        engine.dispose()


@pytest.mark.parametrize("count", [9, 200])
def test_a_second_try_of_a_batch_gives_the_same_numbers(engine, count):
    skip(engine, ODD)
    records, stored = mixed(count)
    rows = [row_of(record, NOW, TextPolicy())[0] for record in records]
    skipped = {"skipped": count - len(stored)}
    with writing(engine).begin() as connection:
        assert insert_once(connection, "b", rows, NOW) == (len(stored), skipped)
    for _ in range(2):  # what the ledger tells
        with writing(engine).begin() as connection:
            assert insert_once(connection, "b", rows, NOW) == (len(stored), {})
    assert names(engine) == stored
    assert ledger(engine) == [len(stored)]


def test_skipped_and_refused_rows_of_one_batch_are_counted_apart(open_store):
    store = open_store()
    assert store.get_stats() is None  # also where the database is made on first use
    engine = store._database.engine
    skip(engine, ODD)
    execute(engine, "CREATE UNIQUE INDEX once ON routing_telemetry (request_id)")
    records, stored = mixed(250)
    for record in [*records, *records]:
        assert store.record(record)
    assert store.flush(60)
    health = store.health()
    assert adds_up(health)
    assert health.written == len(stored)
    odd = 250 - len(stored)
    assert dict(health.rejected_by) == {"skipped": 2 * odd, "constraint": len(stored)}
    assert names(engine) == stored


def test_a_batch_of_which_all_rows_are_skipped_holds_nothing_up(open_store):
    store = open_store()
    assert store.get_stats() is None  # also where the database is made on first use
    engine = store._database.engine
    skip(engine, ODD)
    for n in range(250):
        assert store.record(provider="p", model="odd", request_id=str(n))
    assert store.flush(60)
    assert store.record(provider="p", request_id="fine")
    assert store.flush(60)
    assert (store.health().written, dict(store.health().rejected_by)) == (1, {"skipped": 250})
    assert names(engine) == ["fine"]


@pytest.fixture(params=POSTGRES)
def postgres(request, new_url):
    url = new_url(request.param, at_head=True)
    engine = create_store_engine(url)
    yield url, engine
    engine.dispose()


VIEW = ("ALTER TABLE routing_telemetry RENAME TO base",)


def count_three(url):
    with Store(url) as store:
        for n in range(3):
            assert store.record(provider="p", request_id=str(n))
        assert store.flush(30)
        return store.health().written, dict(store.health().rejected_by)


def test_what_a_view_stores_is_counted(postgres):
    """By the command's own count, which for a view is of the table below it."""
    url, engine = postgres
    execute(engine, *VIEW, "CREATE VIEW routing_telemetry AS SELECT * FROM base")
    assert count_three(url) == (3, {})
    assert names(engine) == ["0", "1", "2"]


def test_what_a_views_trigger_stores_is_counted(postgres):
    url, engine = postgres
    execute(
        engine,
        *VIEW,
        "CREATE VIEW routing_telemetry AS SELECT * FROM base",
        "CREATE FUNCTION stores() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "INSERT INTO base (request_id, timestamp, provider) "
        "VALUES (NEW.request_id, NEW.timestamp, NEW.provider); RETURN NEW; END $$",
        "CREATE TRIGGER stores INSTEAD OF INSERT ON routing_telemetry "
        "FOR EACH ROW EXECUTE FUNCTION stores()",
    )
    assert count_three(url) == (3, {})
    assert names(engine) == ["0", "1", "2"]


def test_what_a_views_trigger_of_sqlites_stores_is_not_called_skipped(new_url):
    """SQLite counts nothing of it."""
    url = new_url("sqlite-file", at_head=True)
    engine = create_store_engine(url)
    execute(
        engine,
        *VIEW,
        "CREATE VIEW routing_telemetry AS SELECT * FROM base",
        "CREATE TRIGGER stores INSTEAD OF INSERT ON routing_telemetry BEGIN "
        "INSERT INTO base (request_id, timestamp, provider) "
        "VALUES (NEW.request_id, NEW.timestamp, NEW.provider); END",
    )
    assert count_three(url) == (3, {})
    assert names(engine) == ["0", "1", "2"]
    engine.dispose()


def test_what_goes_into_partitions_is_counted(postgres):
    url, engine = postgres
    execute(
        engine,
        *VIEW,
        "CREATE TABLE routing_telemetry (LIKE base INCLUDING DEFAULTS, PRIMARY KEY (id)) "
        "PARTITION BY RANGE (id)",
        "CREATE TABLE low PARTITION OF routing_telemetry FOR VALUES FROM (1) TO (3)",
        "CREATE TABLE high PARTITION OF routing_telemetry FOR VALUES FROM (3) TO (100)",
        "CREATE SEQUENCE own OWNED BY routing_telemetry.id",
        "ALTER TABLE routing_telemetry ALTER COLUMN id SET DEFAULT nextval('own')",
    )
    skip(engine, "NEW.request_id = '1'")
    assert count_three(url) == (2, {"skipped": 1})
    assert names(engine) == ["0", "2"]


def test_a_rule_that_does_nothing_instead_is_counted_as_skipping(postgres, monkeypatch):
    """COPY asks no rule; an INSERT does, as under asyncio."""
    url, engine = postgres
    execute(engine, "CREATE RULE drops AS ON INSERT TO routing_telemetry DO INSTEAD NOTHING")
    assert count_three(url) == (3, {}), "by COPY"

    async def add():
        async with AsyncStore(url) as store:
            return await store.add_many([{"provider": "p"}] * 3)

    assert asyncio.run(add()) == 0
    assert names(engine) == ["0", "1", "2"]


# -- rights, and rules of rows -----------------------------------------------------------------


@pytest.fixture
def tenant(postgres):
    """The database's owner, and the URL of a role that writes into it."""
    if EXTERNAL:
        pytest.skip("needs a role of its own")
    url, engine = postgres
    execute(
        engine,
        "CREATE ROLE tenant LOGIN",
        "GRANT ALL ON ALL TABLES IN SCHEMA public TO tenant",
    )
    yield url.replace("postgres@", "tenant@"), engine
    execute(engine, "DROP OWNED BY tenant", "DROP ROLE tenant")


def forbid(engine, policy, *, seen="true"):
    execute(
        engine,
        "ALTER TABLE routing_telemetry ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY seen ON routing_telemetry FOR SELECT USING ({seen})",
        f"CREATE POLICY own ON routing_telemetry FOR INSERT WITH CHECK ({policy})",
    )


@pytest.mark.slow
@pytest.mark.parametrize("seen", ["true", "false"])
def test_rows_that_a_policy_forbids_block_no_others(tenant, seen):
    """Neither a part of a batch in which all are forbidden, nor a fresh process that knows none."""
    url, engine = tenant
    forbid(engine, "provider = 'mine'", seen=seen)
    forbidden = set(range(100, 320))  # two parts of the batch and more
    with Store(url) as store:
        for n in range(400):
            provider = "theirs" if n in forbidden else "mine"
            assert store.record(provider=provider, request_id=str(n))
        assert store.flush(60)
        health = store.health()
        assert adds_up(health)
        assert (health.written, dict(health.rejected_by)) == (180, {"constraint": 220})
        assert not health.faults_by
    assert names(engine) == [str(n) for n in range(400) if n not in forbidden]
    with Store(url) as store:
        for _ in range(150):
            assert store.record(provider="theirs")
        assert store.flush(60)
        assert dict(store.health().rejected_by) == {"constraint": 150}
        with pytest.raises(RowRejected):
            store.add_many([{"provider": "theirs"}])
        assert store.add_many([{"provider": "mine"}]) == 1


def test_without_the_right_rows_wait_and_the_grant_is_named(tenant):
    url, engine = tenant
    forbid(engine, "provider = 'mine'")
    execute(engine, "REVOKE INSERT ON routing_telemetry FROM tenant")
    with Store(url) as store:
        for n in range(3):
            assert store.record(provider="mine", request_id=str(n))
        eventually(lambda: store.health().faults_by.get("StoreUnavailable", 0) >= 3)
        health = store.health()
        assert (health.pending, health.rejected) == (3, 0)
        assert health.last_error == (
            "StoreUnavailable: tenant has no right to INSERT on routing_telemetry: "
            "run GRANT INSERT ON routing_telemetry TO tenant"
        )
        for session in (None, Session(writing(store.engine))):
            with pytest.raises(StoreUnavailable, match="run GRANT INSERT ON routing_telemetry"):
                (RoutingRepository(session) if session else store).add_many([{"provider": "mine"}])
            if session:
                session.close()
        execute(engine, health.last_error.rpartition(": run ")[2])
        assert store.flush(60)
    assert names(engine) == ["0", "1", "2"]


@pytest.mark.parametrize("right", ["INSERT", "SELECT", "UPDATE"])
def test_a_missing_right_on_the_ledger_is_reported_too(tenant, right):
    url, engine = tenant
    execute(
        engine,
        f"REVOKE {right} ON ingest_batches FROM tenant",
        "CREATE UNIQUE INDEX once ON routing_telemetry (request_id)",
    )
    with Store(url) as store:
        assert store.record(provider="p", request_id="a")
        assert store.record(provider="p", request_id="a")  # which the ledger is corrected by
        eventually(lambda: "GRANT" in (store.health().last_error or ""))
        assert f"tenant has no right to {right} on ingest_batches" in store.health().last_error
        execute(engine, store.health().last_error.rpartition(": run ")[2])
        assert store.flush(60)
        assert (store.health().written, dict(store.health().rejected_by)) == (1, {"constraint": 1})


def test_a_trigger_that_lacks_a_right_is_the_databases_fault(tenant):
    """Every row meets it, which is found out by trying others."""
    url, engine = tenant
    execute(
        engine,
        "CREATE TABLE audit (provider text)",
        "CREATE FUNCTION audits() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "INSERT INTO audit VALUES (NEW.provider); RETURN NEW; END $$",
        "CREATE TRIGGER audits AFTER INSERT ON routing_telemetry "
        "FOR EACH ROW EXECUTE FUNCTION audits()",
    )
    with Store(settings=StoreSettings(url=url)) as store:
        for n in range(3):
            assert store.record(provider="p", request_id=str(n))
        eventually(lambda: store.health().faults_by.get("StoreUnavailable", 0) >= 2)
        assert (store.health().pending, store.health().rejected) == (3, 0)
        assert "InsufficientPrivilege (42501)" in store.health().last_error
        execute(engine, "GRANT INSERT ON audit TO tenant")
        assert store.flush(60)
    assert names(engine) == ["0", "1", "2"]


def test_a_table_that_returns_during_the_diagnosis_costs_no_row(postgres):
    """The insert fails, the table comes back, and a row that is tried is taken."""
    url, engine = postgres
    with Store(url) as store:
        assert store.record(provider="p")
        assert store.flush(30)
        execute(engine, *VIEW)

        @event.listens_for(store._database.of_writer, "handle_error")
        def back(context):
            if context.original_exception.sqlstate == "42P01":
                event.remove(store._database.of_writer, "handle_error", back)
                execute(engine, "ALTER TABLE base RENAME TO routing_telemetry")

        assert store.record(provider="p", tier="T")
        assert store.flush(60)
        assert (store.health().written, store.health().rejected, store.health().dropped) == (
            2,
            0,
            0,
        )


def test_a_table_that_is_away_is_named(postgres):
    url, engine = postgres
    with Store(url) as store:
        assert store.record(provider="p")
        assert store.flush(30)
        execute(engine, *VIEW)
        assert store.record(provider="p", tier="T")
        eventually(lambda: store.health().last_error)
        said = "StoreUnavailable: the table routing_telemetry does not exist: "
        eventually(lambda: store.health().last_error.startswith(said))
        with engine.begin() as connection:  # else the record may be written in between
            connection.execute(text("ALTER TABLE base RENAME TO routing_telemetry"))
            connection.execute(text("ALTER TABLE routing_telemetry RENAME COLUMN tier TO rank"))
        said = "StoreUnavailable: routing_telemetry has no column tier: "
        eventually(lambda: store.health().last_error.startswith(said))
        with pytest.raises(StoreUnavailable, match="routing_telemetry has no column tier"):
            store.add_many([{"provider": "p", "tier": "T"}])
        execute(engine, "ALTER TABLE routing_telemetry RENAME COLUMN rank TO tier")
        assert store.flush(60)
        assert store.health().written == 2
