"""A Citus cluster: its tables are distributed at any time, and every answer is exact.

With ``LYNKR_STORE_TEST_CITUS_URL`` the whole suite takes the cluster for its PostgreSQL server.
"""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice

import psycopg
import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from lynkr_store import (
    RoutingFilter,
    RoutingRepository,
    Store,
    StoreSettings,
    StoreUnavailable,
    Window,
    copy,
    create_store_engine,
)
from lynkr_store.db.citus import FIRST_ID_OF_WORKERS, managed_tables
from lynkr_store.db.dialect import disposing
from lynkr_store.db.models import LEDGER, TELEMETRY, Base
from lynkr_store.exceptions import (
    BadArgument,
    RollupsRefused,
    SchemaBehind,
    SchemaError,
    UnsupportedDatabase,
)
from lynkr_store.migrate.comparison import missing_triggers
from lynkr_store.migrate.distribution import distribute
from lynkr_store.migrate.revisions import REVISIONS
from lynkr_store.migrate.upgrade import downgrade, upgrade
from lynkr_store.rollups import fold, repair
from tests.conftest import CITUS
from tests.support.copies import all_rows, answers, filled
from tests.support.stores import eventually, looked

NOW = 1_750_000_000_000
ALL = Window(since=0, until=NOW + 86_400_000)
EVERY_TABLE = {*Base.metadata.tables}
DISTRIBUTED = {TELEMETRY.name, LEDGER.name}
OTHERS = EVERY_TABLE - DISTRIBUTED

pytestmark = pytest.mark.skipif(not CITUS, reason="LYNKR_STORE_TEST_CITUS_URL is not set")


def rows(count, provider="a"):
    return [
        {
            "timestamp": NOW - number * 61_000,
            "provider": provider,
            "latency_ms": number,
            "error_type": "e" if number % 7 == 0 else None,
            "tier": ("SIMPLE", "COMPLEX")[number % 2],
        }
        for number in range(count)
    ]


def opened(url, **options):
    settings = StoreSettings(url=url, cache_ttl_s=0, maintenance_interval_s=86_400, **options)
    return Store(settings=settings, clock=lambda: NOW)


LAYOUTS = {
    "by id": "SELECT create_distributed_table('routing_telemetry', 'id')",
    "on one server": "SELECT create_distributed_table('routing_telemetry', NULL)",
    "on each server": "SELECT create_reference_table('routing_telemetry')",
}
"""How somebody may have Citus manage the one table."""


def by_hand(url, layout="by id"):
    with psycopg.connect(url, autocommit=True) as connection:
        for name in ("delete", "truncate", "update"):
            connection.execute(
                f"DROP TRIGGER IF EXISTS lynkr_store_note_{name} ON routing_telemetry"
            )
        connection.execute(LAYOUTS[layout])


@pytest.fixture
def empty(new_url):
    return new_url("citus")


@pytest.fixture
def undistributed(empty):
    with disposing(create_store_engine(empty)) as engine:
        upgrade(engine)
    return empty


@pytest.fixture
def distributed(new_url):
    return new_url("citus", at_head=True)


@pytest.fixture
def undistributed_twin(new_url):
    url = new_url("citus")
    upgrade(url)
    return url


@contextmanager
def left_open(url, by):
    """A transaction that inserted a row, and so was given the next id, and does not commit."""
    columns = "routing_telemetry (request_id, timestamp, provider)"
    with psycopg.connect(url) as connection:
        if by == "INSERT":
            connection.execute(f"INSERT INTO {columns} VALUES ('r', %s, 'b')", [NOW])
        else:
            with connection.cursor().copy(f"COPY {columns} FROM STDIN") as copying:
                copying.write_row(("r", NOW, "b"))
        yield connection


def agrees(store):
    """Whether the statistics count the rows that there are."""
    with store.engine.connect() as connection:
        there = connection.scalar(select(func.count()).select_from(TELEMETRY))
    stats = store.get_stats(ALL)
    return (stats.total_requests if stats else 0) == there


# -- distributing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 3_000])
def test_a_database_is_distributed_with_its_rows(undistributed, count):
    with opened(undistributed) as store:
        store.add_many(rows(count))
        store.maintain()
        store.add_many(rows(count // 3))
        before = store.get_stats(ALL), store.query(limit=50)
    with disposing(create_store_engine(undistributed)) as engine:
        done = distribute(engine)
        assert [{*names} for names in done] == [DISTRIBUTED, OTHERS]
        assert distribute(engine) == ((), ())
        with engine.connect() as connection:
            assert managed_tables(connection) == EVERY_TABLE
            left = connection.scalar(text("SELECT pg_relation_size('routing_telemetry')"))
            assert left == 0, "the coordinator keeps no second copy"
    with opened(undistributed) as store:
        assert (store.get_stats(ALL), store.query(limit=50)) == before
        assert store.maintain().rows_folded == count // 3
        assert store.get_stats(ALL) == before[0]


@pytest.mark.slow
@pytest.mark.parametrize("revision", REVISIONS)
def test_a_table_that_somebody_distributed_is_upgraded_and_served(empty, revision):
    with disposing(create_store_engine(empty)) as engine:
        upgrade(engine, revision)
        by_hand(empty)
        upgrade(engine)
        for others in ((), OTHERS):
            with opened(empty) as store:
                store.add_many(rows(300))
                assert agrees(store)
                store.maintain()
                assert agrees(store)
                assert len(store.query(RoutingFilter(has_error=True), limit=500)) % 43 == 0
            if not others:
                assert {*distribute(engine).copied} == OTHERS
        downgrade(engine, "0009", drop_data=True)
        upgrade(engine)
        assert distribute(engine) == ((), ("routing_changes",))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_is_served_in_each_layout(undistributed, layout):
    with disposing(create_store_engine(undistributed)) as engine:
        by_hand(undistributed, layout)
        with opened(undistributed) as store:
            store.add_many(rows(300))
            store.maintain()
            assert agrees(store)
            assert len(store.query(RoutingFilter(has_error=True, provider=["a", "b"]))) == 43
            assert store.cleanup(timedelta(hours=2)) > 0
            assert store.get_stats(ALL).total_requests == 300
        downgrade(engine, "0009", drop_data=True)
        upgrade(engine)


def test_a_table_whose_one_shard_is_on_the_coordinator_keeps_its_triggers(undistributed):
    with disposing(create_store_engine(undistributed)) as engine:
        with psycopg.connect(undistributed) as connection:
            connection.execute("SELECT citus_add_local_table_to_metadata('routing_telemetry')")
        for revision in ("head", "0009", "head"):
            if revision == "head":
                upgrade(engine)
            else:
                downgrade(engine, revision, drop_data=True)
            with engine.connect() as connection:
                assert bool(missing_triggers(connection)) == (revision == "0009")
        with opened(undistributed) as store:
            store.add_many(rows(100))
            store.maintain()
            with psycopg.connect(undistributed) as connection:
                connection.execute("UPDATE routing_telemetry SET provider = 'b' WHERE id = 50")
            assert store.get_provider_stats("b", ALL).total == 1
            assert looked(store).database_bytes > 100_000
        with pytest.raises(SchemaError, match="nothing was changed: Citus refused"):
            distribute(engine)


def test_no_record_is_lost_while_the_tables_are_distributed(undistributed):
    with opened(undistributed) as store:
        over, sent = threading.Event(), []

        def keep_recording():
            while not over.is_set():
                sent.append(store.record(provider="a", timestamp=NOW))
                time.sleep(0.001)

        with (
            ThreadPoolExecutor() as pool,
            disposing(create_store_engine(undistributed)) as engine,
        ):
            recording = pool.submit(keep_recording)
            eventually(lambda: store.health().written)
            distribute(engine)
            written = store.health().written
            eventually(lambda: store.health().written > written)
            over.set()
            recording.result(60)
        assert all(sent)
        assert store.flush(60)
        health = store.health()
        assert (health.written, health.rejected) == (len(sent), 0)
        assert agrees(store)


def test_what_cannot_be_distributed_is_refused_in_words(empty, new_url, server_of):
    with disposing(create_store_engine(empty)) as engine:
        with pytest.raises(SchemaBehind, match="lynkr-store upgrade"):
            distribute(engine)
        upgrade(engine)
        with psycopg.connect(empty) as connection:
            connection.execute(
                "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
                "CREATE TRIGGER own BEFORE INSERT ON routing_telemetry "
                "FOR EACH ROW EXECUTE FUNCTION f()"
            )
        with pytest.raises(SchemaError, match=r"nothing was changed: Citus refused \(.*trigger"):
            distribute(engine)
        with engine.connect() as connection:
            assert managed_tables(connection) == set()
    with (
        disposing(create_store_engine(server_of("citus").worker_url(empty))) as engine,
        pytest.raises(UnsupportedDatabase, match="worker"),
    ):
        distribute(engine)
    with (
        disposing(create_store_engine(new_url("sqlite-file", at_head=True))) as engine,
        pytest.raises(BadArgument, match="PostgreSQL"),
    ):
        distribute(engine)


def test_without_the_extension_nothing_is_distributed(empty):
    with disposing(create_store_engine(empty)) as engine:
        upgrade(engine)
        with psycopg.connect(empty, autocommit=True) as connection:
            connection.execute("DROP EXTENSION citus")
        with pytest.raises(SchemaError, match="CREATE EXTENSION citus"):
            distribute(engine)


def test_a_store_that_was_open_meanwhile_notices(undistributed):
    with opened(undistributed) as store:
        store.add_many(rows(300))
        store.maintain()
        assert agrees(store)
        with disposing(create_store_engine(undistributed)) as engine:
            distribute(engine)
        for _ in range(20):  # each failed statement closes its connection
            try:
                assert store.get_stats(ALL).total_requests == 300
                assert len(store.query(RoutingFilter(has_error=True))) == 43
                break
            except StoreUnavailable:
                continue
        else:
            pytest.fail("it never noticed")
        assert store.record(provider="a", timestamp=NOW)
        assert store.flush(30)
        store.maintain()
        assert agrees(store)
        assert store.get_stats(ALL).total_requests == 301


# -- answers --------------------------------------------------------------------------------------


def test_each_statement_is_right_however_often_it_is_prepared(distributed):
    with opened(distributed) as store:
        for number in range(12):
            store.add_many(rows(50))
            store.maintain()
            assert store.get_stats(ALL).total_requests == 50 * (number + 1)
            since = NOW - 1_000_000 - number
            part = store.get_stats(Window(since=since, until=NOW + 1))
            assert part.total_requests == 17 * (number + 1)
            assert store.get_provider_stats("a", ALL).total == 50 * (number + 1)
            assert len(store.query(RoutingFilter(has_error=True, provider="a"), limit=8)) == 8
            assert len(store.query(RoutingFilter(tier=["SIMPLE", "COMPLEX"]), limit=9)) == 9
            assert len([*store.iter_records(page_rows=100)]) == 50 * (number + 1)


def test_a_hosts_session_reads_and_adds(distributed):
    with disposing(create_store_engine(distributed)) as engine, Session(engine) as session:
        repository = RoutingRepository(session, clock=lambda: NOW)
        assert repository.add_many(rows(100)) == 100
        assert repository.get_stats(ALL).total_requests == 100
        assert len(repository.query(limit=7)) == 7
        session.rollback()
        assert repository.get_stats(ALL) is None


def test_old_rows_and_texts_are_deleted_and_history_kept(distributed):
    day = timedelta(days=1)
    with opened(distributed, text_retention_days=0.5) as store:
        store.add_many([each | {"request_text": "q"} for each in rows(3_000)])
        report = store.maintain()
        assert report.texts_removed > 0
        assert report.texts_remaining == 0
        deleted = store.cleanup(day)
        assert deleted == 3_000 - 1_417
        stats = store.get_stats(ALL)
        assert (stats.total_requests, stats.source) == (3_000, "buckets")
        kept = store.query(limit=5_000)
        assert len(kept) == 1_417
        assert all(
            (row.request_text is None) == (row.timestamp < kept[0].timestamp - day / 2)
            for row in kept
        )
        assert store.cleanup(day) == 0


def test_two_processes_that_delete_at_once_delete_each_row_once(distributed):
    with opened(distributed) as one, opened(distributed) as other:
        one.add_many(rows(3_000))
        one.maintain()
        with ThreadPoolExecutor() as pool:
            done = [*pool.map(lambda store: store.cleanup(timedelta(days=1)), (one, other))]
        assert sum(done) == 3_000 - 1_417


# -- what is folded -------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["INSERT", "COPY"])
def test_a_row_that_commits_late_with_a_lower_id_is_counted(distributed, by):
    with opened(distributed) as store:
        with left_open(distributed, by) as late:
            store.add_many(rows(100))
            assert store.maintain().rows_folded == 0, "it waits for the open transaction"
            assert store.get_stats(ALL).total_requests == 100
            late.commit()
        assert agrees(store)
        assert store.maintain().rows_folded == 101
        assert agrees(store)


@contextmanager
def yet_to_commit(worker):
    """A server that has a transaction of the cluster's prepared, as after a lost connection."""
    with psycopg.connect(worker, autocommit=True) as connection:
        for statement in (
            "BEGIN",
            "SELECT pg_current_xact_id()",
            "PREPARE TRANSACTION 'citus_0_1_2_3'",
        ):
            connection.execute(statement)
        try:
            yield
        finally:
            connection.execute("ROLLBACK PREPARED 'citus_0_1_2_3'")


def test_a_transaction_that_a_server_has_yet_to_commit_is_waited_for(distributed, server_of):
    """As after the coordinator lost a worker between its own commit and the worker's."""
    worker = server_of("citus").worker_url(distributed)
    with opened(distributed) as store:
        store.add_many(rows(100))
        with yet_to_commit(worker):
            assert store.maintain().rows_folded == 0
        assert store.maintain().rows_folded == 100


def test_no_row_is_lost_or_counted_twice_while_many_write_and_one_folds(distributed):
    with disposing(create_store_engine(distributed)) as engine, opened(distributed) as store:
        over, wrong = threading.Event(), []

        def write(number):
            with opened(distributed) as own:
                for _ in range(12):
                    own.add_many(rows(40, provider=f"p{number}"))

        def keep_folding():
            while not over.is_set():
                fold.fold(engine.begin)

        def keep_asking():
            seen = 0
            while not over.is_set():
                stats = store.get_stats(ALL)
                now = stats.total_requests if stats else 0
                if now < seen:
                    wrong.append((seen, now))
                seen = now

        with ThreadPoolExecutor(12) as pool:
            others = [pool.submit(keep_folding), pool.submit(keep_asking)]
            for written in [pool.submit(write, number) for number in range(6)]:
                written.result()
            over.set()
            for each in others:
                each.result()
        fold.fold(engine.begin)
        assert not wrong
        assert agrees(store)
        assert store.get_stats(ALL).total_requests == 6 * 12 * 40
        mended = repair.compare_counts(engine.begin, read=engine.connect, stop=lambda: False)
        assert mended.quarters == 0, "the roll-ups missed a row"


def test_rows_that_are_stored_while_quarters_are_counted_are_no_difference(distributed):
    with disposing(create_store_engine(distributed)) as engine:

        def write(number):
            with opened(distributed) as own:
                for _ in range(12):
                    own.add_many(rows(40, provider=f"p{number}"))

        with ThreadPoolExecutor() as pool:
            writing = [pool.submit(write, number) for number in range(4)]
            while not all(each.done() for each in writing):
                fold.fold(engine.begin)
                compared = repair.compare_counts(
                    engine.begin, read=engine.connect, stop=lambda: False
                )
                assert compared.quarters == 0


def test_a_batch_waits_for_no_other_batch(distributed):
    """The ledger is distributed, because Citus locks a reference table for each batch."""
    with psycopg.connect(distributed) as connection, opened(distributed) as store:
        connection.execute(
            "INSERT INTO ingest_batches (batch_id, row_count, committed_at) VALUES ('b', 1, 1)"
        )
        assert store.record(provider="a", timestamp=NOW)
        assert store.flush(60)
        assert len(store.query()) == 1


def test_a_process_leaves_folding_to_the_one_that_folds(distributed):
    with disposing(create_store_engine(distributed)) as engine, opened(distributed) as store:
        store.add_many(rows(10))
        with engine.begin() as connection, ThreadPoolExecutor() as pool:
            fold.held_watermark(connection)
            left = pool.submit(fold.fold, engine.begin, alone=True)
            assert left.result(60) == (0, False)
        assert fold.fold(engine.begin, alone=True) == (10, True)


def test_two_processes_that_fold_at_once_count_each_row_once(distributed):
    with disposing(create_store_engine(distributed)) as engine, opened(distributed) as store:
        for _ in range(5):
            store.add_many(rows(500))
            with ThreadPoolExecutor() as pool:
                done = [pool.submit(fold.fold, engine.begin) for _ in range(3)]
            assert sum(each.result().rows for each in done) == 500
        assert agrees(store)
        assert store.recount(ALL) > 0
        assert agrees(store)


# -- followed and copied --------------------------------------------------------------------------


def test_a_follower_gets_a_row_that_a_server_commits_late(distributed, server_of):
    """It has seen a row of one server, and the row below it is only prepared on another one."""
    worker = server_of("citus").worker_url(distributed)
    with opened(distributed) as store:
        store.add_many(rows(50))
        with psycopg.connect(distributed) as connection:
            connection.execute("SELECT nextval('routing_telemetry_id_seq')")
            connection.rollback()
        store.add_many(rows(50))
        following = store.follow(after=0, poll_s=0.01)
        with ThreadPoolExecutor() as pool:
            with yet_to_commit(worker):
                assert [row.id for row in islice(following, 50)] == [*range(1, 51)]
                later = pool.submit(next, following)
                with pytest.raises(TimeoutError):
                    later.result(1)
            assert later.result(60).id == 52


@pytest.mark.slow
def test_a_follower_gets_every_row_of_many_that_write_to_all_servers(distributed):
    """The last row of each transaction is the first that a reader sees of it."""
    with opened(distributed) as store:
        writers, batches, size = 6, 15, 20

        def write(number):
            with psycopg.connect(distributed) as connection:
                for batch in range(batches):
                    for row in range(size):
                        connection.execute(
                            "INSERT INTO routing_telemetry (request_id, timestamp, provider) "
                            "VALUES (%s, %s, 'p')",
                            [f"{number}.{batch}.{row}", NOW],
                        )
                    if batch % 5 == 4:
                        connection.rollback()
                    else:
                        connection.commit()

        kept = writers * batches * size * 4 // 5
        with ThreadPoolExecutor(writers + 1) as pool:
            read = pool.submit(lambda: [*islice(store.follow(after=0, poll_s=0.01), kept)])
            for written in [pool.submit(write, number) for number in range(writers)]:
                written.result()
            found = read.result(120)
        assert [row.id for row in found] == sorted({row.id for row in found})
        assert len({row.request_id for row in found}) == kept


def test_rows_are_copied_to_and_from_a_cluster(distributed, undistributed_twin, tmp_path):
    file = f"sqlite:///{tmp_path}/telemetry.db"
    back = f"sqlite:///{tmp_path}/back.db"
    upgrade(file)
    filled(file, 2_500, savings=20)
    with Store(file) as store:
        store.cleanup(timedelta(days=1), trust_clock=True)
    for source, target in ((file, distributed), (distributed, undistributed_twin)):
        report = copy(source, target)
        assert (report.rows_copied, report.savings_copied) == (report.rows_verified, 20)
        assert copy(source, target).rows_copied == 0
    upgrade(back)
    copy(distributed, back)
    expected = all_rows(file), answers(file)
    for place in (distributed, undistributed_twin, back):
        assert (all_rows(place), answers(place)) == expected


def test_rows_that_a_client_stored_by_a_worker_are_refused_and_counted(distributed, server_of):
    worker = server_of("citus").worker_url(distributed)
    with pytest.raises(UnsupportedDatabase, match="worker"):
        opened(worker).query()
    with opened(distributed) as store:
        store.add_many(rows(10))
        with psycopg.connect(worker) as connection:
            connection.execute(
                "INSERT INTO routing_telemetry (request_id, timestamp, provider) "
                "SELECT 'r', %s, 'w' FROM generate_series(1, 3)",
                [NOW],
            )
        assert store.query(RoutingFilter(provider="w"))[0].id >= FIRST_ID_OF_WORKERS
        with pytest.raises(RollupsRefused, match="worker of the Citus cluster"):
            store.maintain()
        with pytest.raises(UnsupportedDatabase, match="worker of the Citus cluster"):
            next(store.follow(after=0))
        assert agrees(store)
        store.add_many(rows(10))
        assert store.query(limit=100)[-1].id < FIRST_ID_OF_WORKERS
        assert agrees(store)
        assert store.get_stats(ALL).total_requests == 23
        with psycopg.connect(distributed) as connection:
            connection.execute(
                "DELETE FROM routing_telemetry WHERE id >= %s", [FIRST_ID_OF_WORKERS]
            )
        assert store.maintain().rows_folded == 20
        assert agrees(store)


def test_rows_that_sql_changed_are_noticed_by_maintenance(distributed):
    """Citus runs no triggers, so not before."""
    with opened(distributed) as store:
        store.add_many(rows(100))
        store.maintain()
        with psycopg.connect(distributed) as connection:
            connection.execute("DELETE FROM routing_telemetry WHERE id % 10 = 3")
            connection.execute("UPDATE routing_telemetry SET provider = 'b' WHERE id % 10 = 4")
        store.maintain()
        assert agrees(store)
        assert store.get_provider_stats("b", ALL).total == 10
