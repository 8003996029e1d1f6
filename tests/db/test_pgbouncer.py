"""A pooler in transaction mode between the stores and PostgreSQL: the real pgbouncer.

It hands four connections of the server's to whoever begins a transaction. As it comes it refuses
clients that send startup options; many are told to drop them.
"""

import asyncio
import contextlib
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta

import psycopg
import pytest
from alembic.config import main as alembic_main
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from lynkr_store import (
    AsyncStore,
    Base,
    RoutingRepository,
    Store,
    StoreSettings,
    copy,
    create_store_engine,
    upgrade,
    writing,
)
from lynkr_store.cli import commands
from lynkr_store.db.engines import create_store_async_engine
from lynkr_store.migrate import revisions
from lynkr_store.migrate.comparison import drift, missing_indexes
from lynkr_store.migrate.upgrade import downgrade
from tests.conftest import POSTGRES
from tests.migrations.host import application
from tests.support import pgbouncer
from tests.support.copies import all_rows, answers, filled
from tests.support.recorded import ROOT
from tests.support.stores import Asynchronous, adds_up, eventually

pytestmark = pytest.mark.skipif(
    pgbouncer.PROGRAM is None, reason="pgbouncer is not installed: apt-get install pgbouncer"
)

SCHEMA = "tenant_a"
TABLES = len(Base.metadata.tables) + 1  # with Alembic's own
NOW = 1_750_000_000_000
STORES = 8
CALLS = 60

SET_UPS = {"as it comes": pgbouncer.AS_IT_COMES, "ignoring options": pgbouncer.IGNORING}


@pytest.fixture(params=[(b, s) for b in POSTGRES for s in SET_UPS], ids=", ".join)
def place(request, new_url):
    """An empty database: its URL, and that by which it is reached over the pooler."""
    backend, set_up = request.param
    url = new_url(backend)
    with pgbouncer.pooled(url, SET_UPS[set_up]) as pooled:
        yield url, pooled


@pytest.fixture
def pooled_at_head(place):
    url, pooled = place
    with engine_on(pooled) as engine:
        upgrade(engine)
    return url, pooled


@contextmanager
def engine_on(url, schema=SCHEMA):
    engine = create_store_engine(url, schema=schema)
    try:
        yield engine
    finally:
        engine.dispose()


def schemas_with_tables(url):
    with psycopg.connect(url) as connection:
        found = connection.execute(
            "SELECT schemaname, count(*) FROM pg_tables "
            "WHERE schemaname NOT IN ('pg_catalog', 'information_schema') GROUP BY 1"
        )
        return dict(found.fetchall())


# pgbouncer itself sets each client's application_name
LEFT_BY_OTHERS = """
SELECT name, setting FROM pg_settings
 WHERE (source = 'session' AND name <> 'application_name') OR name IN ('search_path',
    'client_encoding', 'TimeZone', 'statement_timeout', 'lock_timeout',
    'idle_in_transaction_session_timeout', 'jit')
UNION ALL SELECT 'prepared', name FROM pg_prepared_statements
UNION ALL SELECT 'locked', locktype FROM pg_locks WHERE locktype = 'advisory' ORDER BY 1, 2
"""


def what_is_left(pooled):
    """What sessions of the server's have kept, of each that the pooler has."""
    with contextlib.ExitStack() as stack:
        found = {}
        for _ in range(pgbouncer.SERVER_CONNECTIONS):
            connection = stack.enter_context(psycopg.connect(pooled))  # each in a transaction
            [pid] = connection.execute("SELECT pg_backend_pid()").fetchone()
            found[pid] = connection.execute(LEFT_BY_OTHERS).fetchall()
        assert len(found) == pgbouncer.SERVER_CONNECTIONS
        return list(found.values())


# -- reading and writing ---------------------------------------------------------------------------


def settings_for(pooled, **options):
    return StoreSettings(url=pooled, schema_name=SCHEMA, cache_ttl_s=0, **options)


def work(store, number):
    """Sixty calls, mixed; the number of rows that they wrote, and the store's health then."""
    written = 0
    calls = [
        lambda: store.record(provider=f"p{number}", timestamp=NOW - 1, request_text="é 🙂"),
        lambda: store.query(limit=5),
        store.get_stats,
        lambda: store.add_many([{"provider": f"p{number}", "timestamp": NOW - 2, "tier": "T"}]),
        lambda: store.get_provider_stats(f"p{number}"),
        lambda: [row.id for row in store.iter_records(page_rows=100)],
        store.get_routing_accuracy,
        lambda: store.flush(30),
        lambda: store.record(provider=f"p{number}", timestamp=NOW - 3),
        lambda: eventually(lambda: store.health().reachable),  # a probe may be late
    ]
    for call in range(CALLS):
        which = (call + number) % len(calls)
        answer = calls[which]()
        assert answer is not False
        written += which in (0, 3, 8)
    assert store.flush(30)
    eventually(lambda: store.health().reachable)
    return written, store.health()


@pytest.mark.slow
def test_eight_stores_share_four_connections(pooled_at_head):
    url, pooled = pooled_at_head

    def one(number):
        settings = settings_for(pooled, maintenance_interval_s=0.05)
        if number % 2:
            with Store(settings=settings, clock=lambda: NOW) as store:
                return work(store, number)
        with asyncio.Runner() as runner:
            async_store = AsyncStore(settings=settings, clock=lambda: NOW)
            with Asynchronous(async_store, runner) as store:
                return work(store, number)

    with ThreadPoolExecutor(STORES) as threads:
        done = list(threads.map(one, range(STORES)))
    for _, health in done:
        assert adds_up(health)
        assert (health.last_error, health.rejected, health.dropped, health.faults_by) == (
            None,
            0,
            0,
            {},
        )
    with Store(settings=settings_for(url), clock=lambda: NOW) as store:
        assert store.get_stats().total_requests == sum(written for written, _ in done)
        assert store.query(limit=1)[0].request_text == "é 🙂"
    assert schemas_with_tables(url) == {SCHEMA: TABLES}
    with psycopg.connect(url) as fresh:
        as_started = fresh.execute(LEFT_BY_OTHERS).fetchall()
    for left in what_is_left(pooled):
        assert left == as_started


IN_FORCE = {
    "search_path": f'"{SCHEMA}", pg_temp',
    "statement_timeout": "7s",
    "TimeZone": "UTC",
    "client_encoding": "UTF8",
    "jit": "off",
    "extra_float_digits": "1",
}


def in_force(connection):
    return {name: connection.scalar(text(f"SHOW {name}")) for name in IN_FORCE}


@pytest.mark.slow
def test_rows_are_copied_in_and_out_over_the_pooler(pooled_at_head, new_url):
    _, pooled = pooled_at_head
    source = filled(new_url("sqlite-file", at_head=True), 1_500, savings=2)
    back = new_url("sqlite-file", at_head=True)
    for _ in range(2):
        assert copy(source, pooled, target_schema=SCHEMA).rows_verified == 1_500
        assert copy(pooled, back, source_schema=SCHEMA).rows_verified == 1_500
    assert answers(back) == answers(source)
    assert all_rows(back) == all_rows(source)


def test_rows_are_followed_in_order_over_the_pooler(pooled_at_head):
    """Six readers share what the two open transactions of writers leave of four connections."""
    _, pooled = pooled_at_head
    insert = text(
        "INSERT INTO routing_telemetry (request_id, provider, timestamp) VALUES (:name, 'p', 0)"
    )
    with contextlib.ExitStack() as stack:
        others = stack.enter_context(engine_on(pooled))
        threads = stack.enter_context(ThreadPoolExecutor(6))
        stores = [stack.enter_context(Store(settings=settings_for(pooled))) for _ in range(6)]
        with others.connect() as early, others.connect() as late:
            for connection in (early, late):
                connection.execute(insert, {"name": "early" if connection is early else "late"})
            late.commit()
            waiting = [
                threads.submit(
                    lambda rows: [next(rows), next(rows)], store.follow(after=0, poll_s=0.01)
                )
                for store in stores
            ]
            done, _ = wait(waiting, timeout=0.3)
            early.commit()
        assert not done
        for each in waiting:
            assert [row.request_id for row in each.result(60)] == ["early", "late"]


def test_what_transactions_rest_on_is_set_in_each(pooled_at_head):
    _, pooled = pooled_at_head
    clients = [psycopg.connect(pooled) for _ in range(pgbouncer.SERVER_CONNECTIONS)]
    for client in clients:  # what other clients leave in the server's connections
        client.execute("SET search_path = public")
        client.execute("SET statement_timeout = 1234")
        client.execute("SET jit = on")
        client.execute("SET extra_float_digits = 0")
    for client in clients:
        client.commit()
        client.close()
    engine = create_store_engine(pooled, schema=SCHEMA, statement_timeout_s=7)
    for used in (engine, writing(engine)):
        for _ in range(3):
            with used.connect() as connection:
                assert in_force(connection) == IN_FORCE
                connection.rollback()
                assert in_force(connection) == IN_FORCE, "in the next transaction as well"
    engine.dispose()

    async def asynchronously():
        engine = create_store_async_engine(pooled, schema=SCHEMA, statement_timeout_s=7)
        async with engine.connect() as connection:
            assert await connection.run_sync(in_force) == IN_FORCE
        await engine.dispose()

    asyncio.run(asynchronously())


def test_a_hosts_engine_works_in_the_schema(pooled_at_head):
    url, pooled = pooled_at_head
    host = create_engine(
        application.driven(pooled), connect_args={"prepare_threshold": None}, pool_size=2
    )
    with Store(engine=host, settings=settings_for(pooled), clock=lambda: NOW) as store:
        store.record(provider="a", timestamp=NOW - 1)
        assert store.flush(30)
        with Session(writing(store.engine)) as session, session.begin():
            repository = RoutingRepository(session, clock=lambda: NOW)
            assert repository.add_many([{"provider": "b", "timestamp": NOW - 2}]) == 1
            assert repository.get_stats().total_requests == 2
        assert store.maintain().rows_folded == 2
        assert store.get_stats().total_requests == 2
    with host.connect() as connection:
        assert connection.scalar(text("SELECT current_schema()")) == "public", "as it was"
    host.dispose()
    assert schemas_with_tables(url) == {SCHEMA: TABLES}


def test_a_session_on_the_stores_engine_works_in_the_schema(pooled_at_head):
    _, pooled = pooled_at_head
    with Store(settings=settings_for(pooled), clock=lambda: NOW) as store:
        with Session(writing(store.engine)) as session, session.begin():
            RoutingRepository(session, clock=lambda: NOW).add_many([{"provider": "p"}] * 3)
        assert len(store.query()) == 3


def test_a_hosts_async_engine_works_in_the_schema(pooled_at_head):
    _, pooled = pooled_at_head

    async def main():
        host = create_async_engine(
            application.driven(pooled), connect_args={"prepare_threshold": None}
        )
        settings = settings_for(pooled)
        async with AsyncStore(engine=host, settings=settings, clock=lambda: NOW) as store:
            store.record(provider="a", timestamp=NOW - 1)
            assert await store.flush(30)
            assert await store.add_many([{"provider": "b", "timestamp": NOW - 2}]) == 1
            assert (await store.get_stats()).total_requests == 2
        await host.dispose()

    asyncio.run(main())


def test_maintenance_works_in_the_schema_and_leaves_nothing_in_the_pooler(pooled_at_head):
    url, pooled = pooled_at_head
    with psycopg.connect(url, autocommit=True) as connection:
        for index in ("idx_telemetry_tier", "ix_ingest_batches_committed_at"):
            connection.execute(f"DROP INDEX {SCHEMA}.{index}")
    before = what_is_left(pooled)
    day_ms = 86_400_000
    options = {"retention_days": 2, "text_retention_days": 1, "rollup_retention_days": 3}
    with Store(settings=settings_for(pooled, **options), clock=lambda: NOW) as store:
        for days in range(5):
            row = {"provider": "p", "timestamp": NOW - days * day_ms - 1, "request_text": "text"}
            store.add_many([row] * 100)
        report = store.maintain()
        assert set(report.indexes_built) == {"idx_telemetry_tier", "ix_ingest_batches_committed_at"}
        assert (report.rows_folded, report.rows_deleted, report.texts_removed) == (500, 300, 100)
        assert store.maintain(rebuild=True).indexes_built == ()
        assert len(list(store.iter_records(page_rows=70))) == 200
        assert store.cleanup(timedelta(hours=1)) == 100
    assert what_is_left(pooled) == before
    with engine_on(url) as engine, engine.connect() as connection:
        assert missing_indexes(connection) == []
        assert drift(connection) == []
    assert schemas_with_tables(url) == {SCHEMA: TABLES}


# -- which connections are direct ------------------------------------------------------------------


def prepared(connection):
    for _ in range(8):
        connection.execute(text("SELECT 1 AS one_of_many"))
    statements = connection.scalars(text("SELECT statement FROM pg_prepared_statements")).all()
    return "SELECT 1 AS one_of_many" in statements


THRESHOLDS = {"": True, "0": True, "1": True, "20": False, "none": False, "None": False}


def test_statements_are_prepared_on_a_direct_connection_alone(place):
    """And there when the URL says so."""

    async def asynchronously(url):
        engine = create_store_async_engine(url)
        async with engine.connect() as connection:
            found = await connection.run_sync(prepared)
        await engine.dispose()
        return found

    direct, pooled = place
    for threshold, expected in THRESHOLDS.items():
        named = f"&prepare_threshold={threshold}" if threshold else ""
        with engine_on(direct + named, None) as engine, engine.connect() as connection:
            assert prepared(connection) is expected, threshold
        with engine_on(pooled + named, None) as engine, engine.connect() as connection:
            assert prepared(connection) is False, threshold
        assert asyncio.run(asynchronously(direct + named)) is expected, threshold
        assert asyncio.run(asynchronously(pooled + named)) is False, threshold


# -- upgrades --------------------------------------------------------------------------------------


@pytest.mark.sample(3)
@pytest.mark.parametrize("way", ["lynkr-store", "alembic", "code", "store"])
def test_every_way_of_upgrading_works_in_the_schema(place, monkeypatch, way):
    url, pooled = place
    monkeypatch.setenv("LYNKR_STORE_SCHEMA", SCHEMA)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["lynkr-store", "upgrade", "--url", pooled])
    if way == "lynkr-store":
        with pytest.raises(SystemExit) as ended:
            commands.main()
        assert not ended.value.code
    elif way == "alembic":
        alembic_main(["-c", str(ROOT / "alembic.ini"), "-x", f"url={pooled}", "upgrade", "head"])
    elif way == "code":
        upgrade(pooled)
    else:
        with Store(settings=StoreSettings(url=pooled, upgrade_on_open=True)) as store:
            assert store.query() == []
    assert schemas_with_tables(url) == {SCHEMA: TABLES}
    with engine_on(url) as engine, engine.connect() as connection:
        assert revisions.current(connection) == revisions.head()
        assert drift(connection) == []
    with engine_on(pooled) as engine:
        downgrade(engine, "base")
    assert schemas_with_tables(url) == {SCHEMA: 1}
    assert not [line for left in what_is_left(pooled) for line in left if line[0] == "locked"]
