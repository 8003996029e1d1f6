"""A reader of the tail: every row once, in the order of ids, however late it is committed."""

import asyncio
import itertools
import logging
import threading
import time
from contextlib import closing

import psycopg
import pytest
from sqlalchemy import delete, insert

from lynkr_store import (
    AsyncStore,
    BadArgument,
    RoutingFilter,
    RoutingRow,
    Store,
    StoreClosed,
    StoreSettings,
    StoreUnavailable,
    UnsupportedDatabase,
    create_store_engine,
    upgrade,
    writing,
)
from lynkr_store.db.dialect import disposing
from lynkr_store.db.models import TELEMETRY
from lynkr_store.migrate.distribution import distribute
from lynkr_store.queries import following
from tests.conftest import ON_DISK, POSTGRES
from tests.support.pgbouncer import AS_IT_COMES, PROGRAM, pooled
from tests.support.stores import eventually

ROW = "INSERT INTO routing_telemetry (request_id, timestamp, provider) VALUES ('{}', 1, 'p')"


def recorded(store, count, **fields):
    for _ in range(count):
        assert store.record(provider="p", **fields)
    assert store.flush(60)


def first(rows, count):
    return list(itertools.islice(rows, count))


def ids(rows):
    return [row.id for row in rows]


class Reader:
    """Follows in a thread of its own, until it is left."""

    def __init__(self, store, **options):
        self.rows = []
        self._store = store
        self._following = store.follow(poll_s=0.05, **options)
        self._thread = threading.Thread(target=self._read)

    def _read(self):
        self.rows.extend(itertools.takewhile(lambda row: row.provider != "end", self._following))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self._store.record(provider="end")
        assert self._store.flush(60)
        self._thread.join(60)
        assert not self._thread.is_alive()


def test_rows_are_given_by_ascending_id_from_any_place(open_store):
    store = open_store()
    recorded(store, 5)
    assert ids(first(store.follow(after=0), 5)) == [1, 2, 3, 4, 5]
    assert ids(first(store.follow(after=3), 2)) == [4, 5]
    assert all(isinstance(row, RoutingRow) for row in first(store.follow(after=0), 5))
    [brief] = first(store.follow(after=4, include_text=False), 1)
    assert not hasattr(brief, "request_text")


def test_rows_are_given_as_they_are_stored(open_store):
    store = open_store()
    recorded(store, 2)
    rows = store.follow(after=2, poll_s=0.01)
    for number in (3, 4, 5):
        recorded(store, 1)
        assert next(rows).id == number


def test_without_a_place_it_begins_with_what_comes(url):
    with Store(url) as store:
        recorded(store, 3)
        rows = store.follow(poll_s=0.01)
        recorded(store, 1)
        assert next(rows).id == 4


def test_filters_apply(open_store):
    store = open_store()
    for tier, error in (("A", None), ("B", "e"), ("A", "e"), ("A", None)):
        recorded(store, 1, tier=tier, error_type=error, latency_ms=5)
    assert ids(first(store.follow(RoutingFilter(tier="A"), after=0), 3)) == [1, 3, 4]
    failed = RoutingFilter(has_error=True, tier=["A", "B"], min_latency_ms=1)
    assert ids(first(store.follow(failed, after=0), 2)) == [2, 3]


def test_more_rows_than_a_page_has(open_store, monkeypatch):
    monkeypatch.setattr(following, "PAGE_ROWS", 3)
    store = open_store()
    recorded(store, 10)
    assert ids(first(store.follow(after=0), 10)) == list(range(1, 11))


def test_rows_that_are_gone_are_passed_over(url):
    with Store(url) as store:
        recorded(store, 10)
        engine = create_store_engine(url)
        with writing(engine).begin() as connection:
            connection.execute(delete(TELEMETRY).where(TELEMETRY.c.id.in_([1, 4, 5, 9])))
        engine.dispose()
        rows = store.follow(after=0, poll_s=0.01)
        assert ids(first(rows, 6)) == [2, 3, 6, 7, 8, 10]


@pytest.mark.parametrize("backend", POSTGRES)
def test_a_row_that_is_committed_late_comes_in_its_place(new_url, backend):
    url = new_url(backend, at_head=True)
    with Store(url) as store, psycopg.connect(url) as late:
        recorded(store, 2)
        late.execute(ROW.format("late"))
        with Reader(store, after=0) as reader:
            recorded(store, 3)
            eventually(lambda: ids(reader.rows) == [1, 2])
            time.sleep(0.5)
            assert ids(reader.rows) == [1, 2], "a later row was given before"
            late.commit()
            eventually(lambda: len(reader.rows) == 6)
        assert ids(reader.rows) == [1, 2, 3, 4, 5, 6]
        assert reader.rows[2].request_id == "late"


@pytest.mark.parametrize("backend", POSTGRES)
def test_an_id_that_is_taken_before_anything_is_written_is_waited_for(new_url, backend):
    """Such a transaction has no number of its own yet, so a snapshot does not know it."""
    url = new_url(backend, at_head=True)
    with Store(url) as store, psycopg.connect(url) as late:
        taken = "SELECT nextval(pg_get_serial_sequence('routing_telemetry', 'id'))"
        [number] = late.execute(taken).fetchone()
        with Reader(store, after=0) as reader:
            recorded(store, 2)
            time.sleep(0.5)
            assert reader.rows == []
            late.execute(
                "INSERT INTO routing_telemetry (id, request_id, timestamp, provider) "
                "VALUES (%s, 'late', 1, 'p')",
                [number],
            )
            late.commit()
        assert ids(reader.rows) == [1, 2, 3]


@pytest.mark.parametrize("backend", POSTGRES)
@pytest.mark.parametrize("place", ["after the cursor", "at the end of a page", "several"])
def test_a_rolled_back_row_leaves_a_gap_that_is_passed(new_url, backend, place, monkeypatch):
    monkeypatch.setattr(following, "PAGE_ROWS", 4)
    url = new_url(backend, at_head=True)
    with Store(url) as store, psycopg.connect(url) as other:
        recorded(store, {"after the cursor": 0, "at the end of a page": 4, "several": 2}[place])
        for _ in range(3 if place == "several" else 1):
            other.execute(ROW.format("never"))
            other.rollback()
            recorded(store, 2)
        other.execute("SELECT 1")  # and an idle transaction that writes nothing
        there = ids(sorted(store.query(limit=100), key=lambda row: row.id))
        assert ids(first(store.follow(after=0, poll_s=0.01), len(there))) == there
        other.rollback()


@pytest.mark.parametrize("backend", POSTGRES)
def test_an_open_transaction_that_wrote_to_another_table_delays_nothing(new_url, backend):
    url = new_url(backend, at_head=True)
    with Store(url) as store, psycopg.connect(url) as other:
        other.execute("CREATE TABLE mine (a int)")
        other.commit()
        other.execute("INSERT INTO mine VALUES (1)")
        other.execute("SELECT pg_advisory_xact_lock(1)")
        with psycopg.connect(url) as gone:
            gone.execute(ROW.format("never"))
            gone.rollback()
        recorded(store, 2)
        assert ids(first(store.follow(after=0, poll_s=0.01), 2)) == [2, 3]
        other.rollback()


@pytest.mark.parametrize("backend", POSTGRES)
def test_a_long_wait_is_said_with_the_process_that_causes_it(new_url, backend, monkeypatch, caplog):
    monkeypatch.setattr(following, "_SAY_AFTER_S", 0.1)
    url = new_url(backend, at_head=True)
    with Store(url) as store, psycopg.connect(url) as late:
        late.execute(ROW.format("late"))
        pid = late.info.backend_pid
        with caplog.at_level(logging.WARNING, "lynkr_store"), Reader(store, after=0) as reader:
            recorded(store, 1)
            eventually(lambda: f"server processes: {pid}" in caplog.text)
            time.sleep(0.3)
            late.rollback()
        assert caplog.text.count("follow: rows after id 0 wait") == 1
        assert ids(reader.rows) == [2]


@pytest.mark.parametrize("backend", POSTGRES)
@pytest.mark.parametrize(
    ("change", "words"),
    [("CACHE 20", "gives each session a block of 20 numbers"), ("INCREMENT -1", "descends")],
)
def test_a_sequence_that_does_not_ascend_is_refused(new_url, backend, change, words):
    url = new_url(backend)
    upgrade(url)
    with psycopg.connect(url) as connection:
        connection.execute(f"ALTER TABLE routing_telemetry ALTER id SET {change}")
    if backend == "citus":  # which refuses the change afterwards
        with disposing(create_store_engine(url)) as engine:
            distribute(engine)
    with Store(url) as store, pytest.raises(UnsupportedDatabase, match=f"follow: .*{words}"):
        store.follow(after=0)


def test_ids_that_begin_again_are_refused(url):
    with Store(url) as store:
        recorded(store, 3)
        rows = store.follow(after=0, poll_s=0.01)
        assert ids(first(rows, 3)) == [1, 2, 3]
        engine = create_store_engine(url)
        with writing(engine).begin() as connection:
            if engine.dialect.name == "sqlite":
                connection.execute(delete(TELEMETRY))
                connection.exec_driver_sql("DELETE FROM sqlite_sequence")
            else:
                connection.exec_driver_sql("TRUNCATE routing_telemetry RESTART IDENTITY")
        engine.dispose()
        with pytest.raises(BadArgument, match="ids were reset, or this is another database"):
            next(rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"after": -(2**70)}, "after: give a row's id"),
        ({"after": 1.5}, "after: give a row's id"),
        ({"after": True}, "after: give a row's id"),
        ({"poll_s": 0}, "poll_s: give seconds, more than 0"),
        ({"poll_s": float("nan")}, "poll_s"),
    ],
)
def test_wrong_arguments_are_named(open_store, options, words):
    with pytest.raises(BadArgument, match=words):
        open_store().follow(**options)


def test_the_iteration_ends_when_the_store_is_closed(open_store):
    store = open_store()
    recorded(store, 2)
    rows = store.follow(after=0, poll_s=0.01)
    assert ids(first(rows, 2)) == [1, 2]
    store.close()
    assert list(rows) == []
    with pytest.raises(StoreClosed):
        store.follow(after=0)


def test_a_reader_that_waits_ends_when_the_store_is_closed(url):
    store = Store(url)
    rows = store.follow(after=0, poll_s=60)
    threading.Timer(0.3, store.close).start()
    began = time.monotonic()
    assert list(rows) == []
    assert time.monotonic() - began < 30


def test_two_threads_do_not_share_an_iterator(url):
    with Store(url) as store:
        rows = store.follow(after=0, poll_s=0.05)
        thread = threading.Thread(target=lambda: next(rows))
        thread.start()
        eventually(rows._in_use.locked)
        with pytest.raises(BadArgument, match="give each its own"):
            next(rows)
        recorded(store, 1)
        thread.join(60)


def test_a_file_that_is_opened_read_only_is_followed(new_url):
    url = new_url("sqlite-file", at_head=True)
    with Store(url) as writer:
        recorded(writer, 2)
        with Store(url, read_only=True) as reader:
            rows = reader.follow(after=0, poll_s=0.01)
            assert ids(first(rows, 2)) == [1, 2]
            recorded(writer, 1)
            assert next(rows).id == 3


@pytest.mark.parametrize("backend", POSTGRES)
def test_no_transaction_is_open_between_two_reads(new_url, backend):
    url = new_url(backend, at_head=True)
    with Store(url) as store, psycopg.connect(url, autocommit=True) as other:
        recorded(store, 5)
        rows = store.follow(after=0)
        next(rows)
        [[idle]] = other.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND state LIKE 'idle in transaction%'"
        )
        assert idle == 0


@pytest.mark.parametrize("backend", POSTGRES)
def test_after_an_outage_the_same_iterator_goes_on(new_url, backend):
    url = new_url(backend, at_head=True)
    with Store(url) as store, psycopg.connect(url, autocommit=True) as other:
        recorded(store, 1)
        rows = store.follow(after=0, poll_s=0.01)
        assert next(rows).id == 1
        database = other.info.dbname
        with psycopg.connect(url, dbname="postgres", autocommit=True) as admin:
            admin.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s",
                [database],
            )
            with pytest.raises(StoreUnavailable):
                next(rows)
            admin.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")
        recorded(store, 1)
        assert next(rows).id == 2


@pytest.mark.parametrize("backend", ON_DISK)
def test_cancelling_the_wait_loses_no_row(new_url, backend):
    url = new_url(backend, at_head=True)

    async def main():
        async with AsyncStore(url) as store:
            rows = store.follow(after=0, poll_s=0.01)
            got = []
            for number in range(20):
                task = asyncio.ensure_future(anext(rows))
                await asyncio.sleep(0.005)
                store.record(provider="p", request_id=f"r-{number}")
                if number % 2:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    if not task.cancelled():
                        got.append(task.result().id)
                else:
                    got.append((await task).id)
            async for row in rows:
                got.append(row.id)
                if row.id == 20:
                    break
            return got

    assert asyncio.run(main()) == list(range(1, 21))


@pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed")
@pytest.mark.parametrize("backend", POSTGRES)
def test_it_works_through_a_pooler(new_url, backend):
    url = new_url(backend, at_head=True)
    with pooled(url, AS_IT_COMES) as reached, Store(reached) as store, psycopg.connect(url) as late:
        late.execute(ROW.format("late"))
        with Reader(store, after=0) as reader:
            recorded(store, 3)
            time.sleep(0.3)
            late.commit()
        assert ids(reader.rows) == [1, 2, 3, 4]


def _write(url, number, rounds, committed):
    """Transactions of several rows, some slow, some rolled back."""
    engine = create_store_engine(url)
    for at in range(rounds):
        rows = [
            {"request_id": f"{number}-{at}-{n}", "timestamp": 1_750_000_000_000, "provider": "p"}
            for n in range(3)
        ]
        with writing(engine).connect() as connection:
            connection.begin()
            for row in rows:
                connection.execute(insert(TELEMETRY).inline(), row)
                if engine.dialect.name != "sqlite":
                    time.sleep((number * 7 + at) % 5 / 1_000)
            if (number + at) % 7:
                connection.commit()
                committed.extend(row["request_id"] for row in rows)
            else:
                connection.rollback()
    engine.dispose()


@pytest.mark.parametrize("backend", ON_DISK)
def test_every_row_of_many_writers_comes_once(new_url, backend, monkeypatch):
    monkeypatch.setattr(following, "PAGE_ROWS", 7)
    url = new_url(backend, at_head=True)
    committed = []
    writers = [
        threading.Thread(target=_write, args=(url, number, 25, committed)) for number in range(8)
    ]
    settings = StoreSettings(url=url)
    with closing(Store(settings=settings)) as store:
        with Reader(store, after=0) as reader:
            for writer in writers:
                writer.start()
            for writer in writers:
                writer.join()
        given = [row.request_id for row in reader.rows]
    assert ids(reader.rows) == sorted(ids(reader.rows))
    assert len(given) == len(set(given))
    assert set(given) == set(committed)
