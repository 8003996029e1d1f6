"""A role that has no right to the store's tables cannot stop its work."""

import secrets
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import make_url

from lynkr_store import Store, StoreSettings, UpgradeTimeout, create_store_engine, upgrade
from lynkr_store.migrate.lock import ADVISORY_LOCK
from tests.support import pgbouncer
from tests.support.stores import eventually

NOW = 1_750_000_000_000
DAY_MS = 86_400_000
BUDGET_S = 1.0
BACK_S = 15.0  # within which maintain() is back, on a busy machine
INDEX = "idx_telemetry_tier"


@pytest.fixture
def stranger(postgres_url):
    """The database's URL for a role that may connect and nothing else."""
    role = f"stranger_{secrets.token_hex(4)}"
    with psycopg.connect(postgres_url, autocommit=True) as owner:
        owner.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
        yield make_url(postgres_url).set(username=role).render_as_string(hide_password=False)
        owner.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def without_an_index(url):
    upgrade(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"DROP INDEX {INDEX}")


def maintained(url):
    """What `maintain` reports of a store with one row to retain and one to fold."""
    settings = StoreSettings(url=url, retention_days=1)
    with Store(settings=settings, clock=lambda: NOW) as store, ThreadPoolExecutor(1) as threads:
        store.add_many({"provider": "p", "timestamp": NOW - n * 2 * DAY_MS} for n in range(2))
        began = time.monotonic()
        report = threads.submit(store.maintain, budget_s=BUDGET_S).result(BACK_S)
        assert time.monotonic() - began < BACK_S
        assert (report.rows_folded, report.rows_deleted) == (2, 1), "the rest goes on"
        return report


def test_advisory_locks_of_a_stranger_do_not_hold_up_maintenance(postgres_url, stranger):
    without_an_index(postgres_url)
    with psycopg.connect(stranger, autocommit=True) as holder:
        for key in range(ADVISORY_LOCK - 1, ADVISORY_LOCK + 4):
            holder.execute("SELECT pg_advisory_lock(%s)", [key])
        report = maintained(postgres_url)
    assert (report.indexes_built, report.indexes_left, report.waited_for) == ((INDEX,), (), None)


@pytest.mark.slow
@pytest.mark.parametrize("over", ["directly", "over a pooler"])
def test_a_snapshot_of_a_stranger_holds_up_an_index_for_the_budget(postgres_url, stranger, over):
    """CREATE INDEX CONCURRENTLY waits for every transaction that has one, whoever's it is."""
    without_an_index(postgres_url)
    if over == "directly":
        _check_snapshot(
            postgres_url, stranger, "an index waits for a transaction of another session"
        )
    elif pgbouncer.PROGRAM is None:
        pytest.skip("pgbouncer is not installed: apt-get install pgbouncer")
    else:
        with pgbouncer.pooled(postgres_url, pgbouncer.AS_IT_COMES) as pooled:
            _check_snapshot(pooled, stranger, "the build was cancelled")


def _check_snapshot(url, stranger, said):
    with psycopg.connect(stranger) as holder:
        holder.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        holder.execute("SELECT 1")
        report = maintained(url)
        assert (report.indexes_built, report.indexes_left) == ((), (INDEX,))
        assert said in report.waited_for
    with Store(url) as store:
        assert store.maintain(budget_s=BUDGET_S).indexes_built == (INDEX,)
        assert store.maintain(budget_s=BUDGET_S).indexes_left == ()


@pytest.mark.slow
def test_another_session_that_builds_is_waited_for_until_the_budget_is_spent(postgres_url):
    without_an_index(postgres_url)
    with (
        psycopg.connect(postgres_url, autocommit=True) as looking,
        psycopg.connect(postgres_url) as writer,
        Store(postgres_url) as other,
        Store(postgres_url) as store,
        ThreadPoolExecutor(1) as threads,
    ):
        writer.execute("LOCK TABLE routing_telemetry IN ROW EXCLUSIVE MODE")
        builds = threads.submit(other.maintain, budget_s=30)
        waits = "SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'virtualxid'"
        eventually(lambda: looking.execute(waits).fetchone())
        report = store.maintain(budget_s=BUDGET_S)
        assert (report.indexes_built, report.indexes_left) == ((), (INDEX,))
        assert report.waited_for == "another session builds indexes"
        writer.rollback()
        assert builds.result(30).indexes_built == (INDEX,)
    with Store(postgres_url) as store:
        report = store.maintain()
        assert (report.indexes_built, report.indexes_left, report.waited_for) == ((), (), None)


@pytest.mark.slow
def test_an_upgrade_says_which_role_it_waited_for(postgres_url, stranger):
    role = make_url(stranger).username
    with psycopg.connect(stranger, autocommit=True) as holder:
        holder.execute("SELECT pg_advisory_lock(%s)", [ADVISORY_LOCK + 1])
        upgrade(postgres_url, "0001")  # of no meaning any more
        holder.execute("SELECT pg_advisory_lock(%s)", [ADVISORY_LOCK])
        engine = create_store_engine(postgres_url)
        began = time.monotonic()
        with pytest.raises(UpgradeTimeout, match=f"the role {role}; its backend's pid is [0-9]+"):
            upgrade(engine, wait_s=BUDGET_S)
        assert time.monotonic() - began < BACK_S
        settings = StoreSettings(url=postgres_url, upgrade_on_open=True)
        with Store(settings=settings) as store, pytest.raises(UpgradeTimeout, match=role):
            store.query()
        engine.dispose()
    upgrade(postgres_url)


IDLE = """
SELECT 1 FROM pg_stat_activity
 WHERE datname = current_database() AND state = 'idle in transaction' AND backend_xmin IS NULL
   AND query LIKE 'LOCK TABLE lynkr_store_progress%%' AND pid <> %s
   AND state_change < now() - %s::interval
"""


@pytest.mark.slow
def test_the_lock_of_a_build_is_kept_without_a_snapshot_for_as_long_as_it_takes(postgres_url):
    """Also where the server ends transactions that are idle."""
    without_an_index(postgres_url)
    database = sql.Identifier(make_url(postgres_url).database)
    with psycopg.connect(postgres_url, autocommit=True) as owner:
        statement = "ALTER DATABASE {} SET idle_in_transaction_session_timeout = 1000"
        owner.execute(sql.SQL(statement).format(database))
    with (
        psycopg.connect(postgres_url, autocommit=True) as looking,
        psycopg.connect(postgres_url) as writer,
        Store(postgres_url) as store,
        ThreadPoolExecutor(1) as threads,
    ):
        writer.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        writer.execute("LOCK TABLE routing_telemetry IN ROW EXCLUSIVE MODE")
        builds = threads.submit(store.maintain)
        given = [writer.info.backend_pid, "1500 ms"]
        eventually(lambda: looking.execute(IDLE, given).fetchone())
        writer.rollback()
        assert builds.result(30).indexes_built == (INDEX,)
