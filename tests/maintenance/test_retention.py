"""Old rows and old texts go, in steps that others can write between."""

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from datetime import timedelta

import pytest
from sqlalchemy import event, func, insert, select, text

from lynkr_store import BadArgument, Store, StoreSettings
from lynkr_store.db.models import SAVINGS, TELEMETRY
from lynkr_store.maintenance import retention, run
from tests.conftest import POSTGRES
from tests.support.stores import eventually, looked

NOW = 1_750_000_000_000
DAY = 86_400_000
COLUMN = TELEMETRY.c


def record(age_ms, **fields):
    texts = {"request_text": "a question", "response_text": "an answer"}
    return {"provider": "p", "timestamp": NOW - int(age_ms), **texts, **fields}


def rows_of(store):
    return list(store.iter_records())


def texts_of(store):
    """Age in days to whether the row has its two texts, as stored."""
    found = {}
    for row in rows_of(store):
        texts = {row.request_text, row.response_text}
        assert texts in ({None}, {"a question", "an answer"})
        found[(NOW - row.cursor.timestamp) / DAY] = texts != {None}
    return found


@pytest.fixture(params=POSTGRES[-1:])
def postgres_head(request, new_url):
    return new_url(request.param, at_head=True)


@pytest.fixture(params=["sqlite-file", *POSTGRES[-1:]])
def open_sync(request, new_url):
    """Open a store on the same database; the stores differ in how they wait alone."""
    url, opened = new_url(request.param, at_head=True), []

    def open_(**options):
        opened.append(Store(settings=StoreSettings(url=url, **options), clock=lambda: NOW))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


@contextmanager
def transactions(store):
    """What each committed transaction said to the database."""
    engine, said, all_said = store._database.engine, [], []

    def note(connection, cursor, statement, *_):
        said.append(statement.split()[0])

    def done(connection):
        all_said.append(said[:])
        said.clear()

    event.listen(engine, "before_cursor_execute", note)
    event.listen(engine, "commit", done)
    yield all_said
    event.remove(engine, "before_cursor_execute", note)
    event.remove(engine, "commit", done)


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(retention, "_ROWS_FIRST", 3)
    monkeypatch.setattr(retention, "_ROWS_LEAST", 3)
    monkeypatch.setattr(retention, "_ROWS_MOST", 3)
    monkeypatch.setattr(retention, "PAUSE_S", 0)


@pytest.fixture
def stop_after(monkeypatch):
    """Have the time be over after so many steps."""

    class Clock:
        steps = math.inf

        def monotonic(self):
            if self.steps <= 0:
                return math.inf
            return 0.0

        def sleep(self, _):
            self.steps -= 1

    clock = Clock()
    monkeypatch.setattr(retention, "time", clock)
    monkeypatch.setattr(run, "time", clock)

    def stop(steps):
        clock.steps = steps

    return stop


# -- rows -----------------------------------------------------------------------------------------


def test_rows_go_in_steps_that_are_transactions(open_store, small_steps):
    store = open_store(clock=lambda: NOW)
    store.add_many([record(1_000) for _ in range(10)] + [record(0)])
    with transactions(store) as done:
        assert store.cleanup(timedelta(seconds=1)) == 0, "the moment itself stays"
        assert store.cleanup(timedelta(milliseconds=999)) == 10
    assert sum("DELETE" in said for said in done) == 4
    assert max(said.count("DELETE") for said in done) == 1
    assert len(rows_of(store)) == 1


def test_maintain_deletes_rows_and_savings_that_are_older(open_sync):
    store = open_sync(retention_days=1.5)
    store.add_many([record(days * DAY) for days in (0, 1, 2, 3)])
    with store._database.writing.begin() as connection:
        for age in (DAY, 2 * DAY):
            saved = {"timestamp": NOW - age, "category": "c", "tokens_saved": 1}
            connection.execute(insert(SAVINGS), saved)
    report = store.maintain()
    assert (report.rows_deleted, report.rows_remaining) == (3, 0)
    assert set(texts_of(store)) == {0, 1}
    with store._database.engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(SAVINGS)) == 1
    again = store.maintain()
    assert (again.rows_deleted, again.rows_remaining, again.texts_removed) == (0, 0, 0)


def test_nothing_goes_that_nobody_asked_for(open_sync):
    store = open_sync()
    store.add_many([record(1000 * DAY)])
    report = store.maintain()
    assert report.model_dump(exclude={"indexes_built", "bytes_freed"}) == {
        "indexes_left": (),
        "waited_for": None,
        "sequences_set": (),
        "rows_folded": 1,
        "rollup_lag": 0,
        "rows_deleted": 0,
        "rows_remaining": 0,
        "texts_removed": 0,
        "texts_remaining": 0,
    }
    assert texts_of(store) == {1000: True}


def test_a_budget_ends_it_and_the_report_says_what_remains(open_sync, small_steps, stop_after):
    store = open_sync(retention_days=1)
    store.add_many([record(2 * DAY) for _ in range(10)])
    stop_after(2)
    report = store.maintain(budget_s=5)
    assert (report.rows_deleted, report.rows_remaining) == (6, 4)
    stop_after(0)
    report = store.maintain(budget_s=5)
    assert (report.rows_deleted, report.rows_remaining) == (0, 4)
    stop_after(math.inf)
    report = store.maintain(budget_s=5)
    assert (report.rows_deleted, report.rows_remaining) == (4, 0)


def test_a_store_that_closes_ends_its_own_retention(url, small_steps, monkeypatch):
    monkeypatch.setattr(retention, "PAUSE_S", 0.05)
    options = {"retention_days": 1, "maintenance_interval_s": 0.01}
    store = Store(settings=StoreSettings(url=url, **options), clock=lambda: NOW)
    store.add_many([record(2 * DAY) for _ in range(3_000)])
    with transactions(store) as done:
        store.record(record(0))  # starts it
        assert store.flush(30)
        eventually(lambda: sum("DELETE" in said for said in done) > 2)
        store.close()
        before = sum("DELETE" in said for said in done)
        eventually(lambda: not any("maintenance" in t.name for t in threading.enumerate()))
        assert sum("DELETE" in said for said in done) <= before + 1


def test_what_remains_is_counted_up_to_a_bound(open_sync, monkeypatch):
    monkeypatch.setattr(retention, "_COUNTED", 5)
    store = open_sync(retention_days=1, text_retention_days=1)
    store.add_many([record(2 * DAY) for _ in range(10)])
    report = store.maintain(budget_s=0)
    assert (report.rows_remaining, report.texts_remaining) == (5, 5)


@pytest.mark.parametrize("budget_s", [-1, float("nan")])
def test_a_bad_budget_is_named(budget_s):
    with Store("sqlite://") as store, pytest.raises(BadArgument, match="budget_s"):
        store.maintain(budget_s=budget_s)


def test_rows_above_an_id_stay(open_sync):
    store = open_sync(retention_days=1)
    store.add_many([record(2 * DAY) for _ in range(10)])
    ids = sorted(row.id for row in rows_of(store))
    left = {"stop": lambda: False, "upto_id": ids[6], "texts_before_ms": None}
    kept = retention.retain(store._database, rows_before_ms=NOW - DAY, **left)
    assert (kept.rows_deleted, kept.rows_remaining) == (7, 3)
    assert sorted(row.id for row in rows_of(store)) == ids[7:]


def test_a_step_takes_about_as_long_as_it_should():
    rows = retention._ROWS_FIRST
    for _ in range(20):
        rows = retention._next_rows(rows, rows * 0.0001, 0.02)
    assert rows * 0.0001 == pytest.approx(0.02, rel=0.1)
    assert retention._next_rows(100, 0.0, 0.02) == 200, "it grows at most twofold"
    assert retention._next_rows(400, 0.0, 0.02) == retention._ROWS_MOST
    assert retention._next_rows(100, 10.0, 0.02) == retention._ROWS_LEAST


def test_a_row_that_another_transaction_holds_stays(postgres_head):
    with (
        Store(settings=StoreSettings(url=postgres_head, retention_days=1), clock=lambda: NOW) as s,
        s.engine.connect() as other,
    ):
        s.add_many([record(2 * DAY) for _ in range(5)])
        held = other.scalar(select(func.min(COLUMN.id)))
        other.execute(select(COLUMN.id).where(COLUMN.id == held).with_for_update())
        report = s.maintain()
        assert (report.rows_deleted, report.rows_remaining) == (4, 1)
        other.rollback()
        assert s.maintain().rows_deleted == 1


def test_two_at_once_share_the_work(url, small_steps):
    settings = StoreSettings(url=url, retention_days=2, text_retention_days=1)
    stores = [Store(settings=settings, clock=lambda: NOW) for _ in range(2)]
    stores[0].add_many([record(3 * DAY) for _ in range(100)])
    stores[0].add_many([record(1.5 * DAY) for _ in range(100)])
    barrier, reports, faults = threading.Barrier(2), [], []

    def maintain(store):
        barrier.wait(10)
        try:
            reports.append(store.maintain())
        except Exception as fault:  # noqa: BLE001 - the test tells it
            faults.append(fault)

    threads = [threading.Thread(target=maintain, args=[store]) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert faults == []
    assert sum(report.rows_deleted for report in reports) == 100
    assert sum(report.texts_removed for report in reports) == 100
    assert texts_of(stores[0]) == {1.5: False}
    for store in stores:
        store.close()


# -- texts ----------------------------------------------------------------------------------------


def test_texts_go_and_the_rest_stays(open_store, small_steps):
    now = [NOW]
    store = open_store(clock=lambda: now[0], text_retention_days=10)
    attributes = {"region": "eu"}
    ages = (5, 9, 10, 11, 15, 20, 21, 22)
    store.add_many([record(days * DAY, attributes=attributes, tier="T") for days in ages])
    report = store.maintain()
    assert (report.texts_removed, report.texts_remaining, report.rows_deleted) == (5, 0, 0)
    assert texts_of(store) == {days: days <= 10 for days in ages}
    assert {row.attributes for row in rows_of(store)} == {'{"region":"eu"}'}
    assert {row.tier for row in rows_of(store)} == {"T"}
    assert store.maintain().texts_removed == 0
    now[0] += DAY
    assert store.maintain().texts_removed == 1, "the one of 10 days is of 11 now"
    now[0] += 20 * DAY
    assert store.maintain().texts_removed == 2


def test_rows_whose_texts_are_gone_are_not_read_again(open_sync, small_steps):
    store = open_sync(text_retention_days=1)
    store.add_many([record(2 * DAY) for _ in range(30)])
    with transactions(store) as first:
        assert store.maintain().texts_removed == 30
    with transactions(store) as second:
        assert store.maintain().texts_removed == 0
    assert sum("UPDATE" in said for said in first) > 10
    assert sum("UPDATE" in said for said in second) == 1


def test_late_rows_lose_their_texts_too(open_sync, small_steps):
    store = open_sync(text_retention_days=1)
    store.add_many([record(2 * DAY) for _ in range(4)])
    assert store.maintain().texts_removed == 4
    store.add_many([record(0) for _ in range(5)])
    store.add_many([record(5 * DAY), record(0), record(2 * DAY), record(1.5 * DAY)])
    report = store.maintain(budget_s=0)
    assert report.texts_remaining == 3
    report = store.maintain()
    assert (report.texts_removed, report.texts_remaining) == (3, 0)
    assert texts_of(store) == {0: True, 2: False, 5: False, 1.5: False}


def test_many_rows_of_one_moment_are_no_obstacle(open_sync, small_steps):
    store = open_sync(text_retention_days=1)
    store.add_many([record(2 * DAY) for _ in range(20)])
    assert store.maintain().texts_removed == 20


def test_text_retention_resumes_where_the_budget_ended_it(open_sync, small_steps, stop_after):
    store = open_sync(text_retention_days=1)
    store.add_many([record((20 - n) * DAY) for n in range(10)])
    removed = []
    for _ in range(5):
        stop_after(1)
        report = store.maintain(budget_s=5)
        removed.append((report.texts_removed, report.texts_remaining))
    assert removed == [(3, 7), (3, 4), (3, 1), (1, 0), (0, 0)]


def test_a_longer_retention_forgets_no_row(open_sync):
    short = open_sync(text_retention_days=1)
    short.add_many([record(5 * DAY)])
    assert short.maintain().texts_removed == 1
    short.add_many([record(3 * DAY), record(20 * DAY)])
    long = open_sync(text_retention_days=10)
    assert long.maintain().texts_removed == 1
    assert texts_of(long) == {5: False, 3: True, 20: False}
    assert short.maintain().texts_removed == 1, "the one of 3 days, which came late"


def test_a_text_alone_is_removed_too(open_sync):
    store = open_sync(text_retention_days=1)
    store.add_many([record(2 * DAY, request_text=None), record(2 * DAY, response_text=None)])
    assert store.maintain().texts_removed == 2
    assert texts_of(store) == {2: False}


def test_odd_timestamps_of_other_writers(tmp_path, small_steps):
    url = f"sqlite:///{tmp_path}/telemetry.db"
    settings = StoreSettings(url=url, text_retention_days=1)
    old = NOW - 2 * DAY
    odd = [*[old + 0.25] * 7, old + 0.5, old + 0.75, float("-inf"), -1e300, "soon", 9e300]
    with Store(settings=settings, clock=lambda: NOW) as store:
        store.add_many([record(2 * DAY) for _ in odd])
        with store._database.writing.begin() as connection:
            for number, stamp in enumerate(odd, 1):
                statement = "UPDATE routing_telemetry SET timestamp = :stamp WHERE id = :id"
                connection.execute(text(statement), {"stamp": stamp, "id": number})
        assert store.maintain().texts_removed == 11
        assert store.maintain().texts_removed == 0
        assert store.cleanup(timedelta(days=1)) == 11


def test_an_open_insert_with_a_lower_id_is_waited_for(postgres_head, monkeypatch):
    """A row that is committed after rows with greater ids, and is old already."""
    monkeypatch.setattr("lynkr_store.rollups.fold._PATIENCE_S", 0.05)
    settings = StoreSettings(url=postgres_head, text_retention_days=1)
    with (
        Store(settings=settings, clock=lambda: NOW) as store,
        store.engine.connect() as other,
    ):
        values = record(3 * DAY) | {"request_id": "held"}
        other.execute(insert(TELEMETRY), values)
        store.add_many([record(2 * DAY)])
        store.maintain()
        other.commit()
        store.maintain()
        assert texts_of(store) == {2: False, 3: False}


# -- pages ----------------------------------------------------------------------------------------


def file_bytes(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path.stat().st_size


def filled(store):
    store.add_many([record(2 * DAY, request_text="x" * 5_000) for _ in range(400)])
    store.add_many([record(0)])


def test_a_fresh_file_gets_smaller(tmp_path):
    path = tmp_path / "telemetry.db"
    settings = StoreSettings(url=f"sqlite:///{path}", retention_days=1)
    with Store(settings=settings, clock=lambda: NOW) as store:
        filled(store)
        before = file_bytes(path)
        report = store.maintain()
        after = file_bytes(path)
        assert report.bytes_freed == before - after > 400 * 5_000
        assert looked(store).reclaimable_bytes == 0
        filled(store)
        assert store.cleanup(timedelta(days=1)) == 400
        assert file_bytes(path) == after, "cleanup gives them back too"


def test_pages_go_back_within_the_budget(tmp_path, small_steps, stop_after):
    settings = StoreSettings(url=f"sqlite:///{tmp_path}/telemetry.db")
    with Store(settings=settings, clock=lambda: NOW) as store:
        filled(store)
        with store._database.writing.begin() as connection:
            connection.execute(text("DELETE FROM routing_telemetry"))
        stop_after(2)
        assert store.maintain().bytes_freed == 2 * 3 * 8_192
        stop_after(0)
        assert store.maintain().bytes_freed == 0


def test_an_adopted_file_keeps_its_pages_for_new_rows(tmp_path):
    path = tmp_path / "telemetry.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE foreign_one (a)")  # the first page is another's
    settings = StoreSettings(url=f"sqlite:///{path}", retention_days=1)
    with Store(settings=settings, clock=lambda: NOW) as store:
        filled(store)
        before = file_bytes(path)
        report = store.maintain()
        assert (report.rows_deleted, report.bytes_freed) == (400, 0)
        assert looked(store).reclaimable_bytes > 400 * 5_000
        filled(store)
        assert file_bytes(path) <= before, "they were used again"


# -- beside others --------------------------------------------------------------------------------

KILLED = """
import sys
from datetime import timedelta
from lynkr_store import Store, StoreSettings
from lynkr_store.maintenance import retention
retention.PAUSE_S = 0.001
store = Store(settings=StoreSettings(url=sys.argv[1], retention_days=2, text_retention_days=1),
              clock=lambda: int(sys.argv[2]))
print("ready", flush=True)
store.maintain()
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_loses_nothing(url):
    settings = StoreSettings(url=url, retention_days=2, text_retention_days=1)
    with Store(settings=settings, clock=lambda: NOW) as store:
        store.add_many([record(3 * DAY) for _ in range(20_000)])
        store.add_many([record(1.5 * DAY) for _ in range(20_000)])
        store.add_many([record(0) for _ in range(1_000)])
    ends = []
    for after_s in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 60):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, url, str(NOW)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == "ready\n"
            timer = threading.Timer(after_s, lambda p=process: os.kill(p.pid, signal.SIGKILL))
            timer.start()
            ends.append(process.stdout.read())
            timer.cancel()
    assert ends[0] == ""
    assert ends[-1] == "done\n"
    with Store(settings=settings, clock=lambda: NOW) as store:
        report = store.maintain()
        assert (report.rows_deleted, report.rows_remaining, report.texts_removed) == (0, 0, 0)
        rows = rows_of(store)
        assert len(rows) == 21_000
        assert sum(row.request_text is not None for row in rows) == 1_000


WRITER = """
import json, sqlite3, sys, threading, time
done = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
connection = sqlite3.connect(sys.argv[1], timeout=3, isolation_level=None)
taken, failed = [], 0
print("ready", flush=True)
while not done.wait(0.002):
    began = time.perf_counter()
    try:
        connection.execute(
            "INSERT INTO routing_telemetry (request_id, timestamp, provider, request_text) "
            "VALUES ('w', ?, 'w', ?)", (int(sys.argv[2]), "x" * 2_000))
    except sqlite3.OperationalError:
        failed += 1
    taken.append(time.perf_counter() - began)
print(json.dumps({"written": len(taken) - failed, "failed": failed, "longest_s": max(taken)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["retention_days", "text_retention_days"])
def test_a_plain_writer_keeps_writing_meanwhile(tmp_path, what):
    path = tmp_path / "telemetry.db"
    settings = StoreSettings(url=f"sqlite:///{path}", **{what: 1})
    with Store(settings=settings, clock=lambda: NOW) as store:
        for _ in range(50):
            texts = {"request_text": "q" * 1_200, "response_text": "a" * 800}
            store.add_many([record(2 * DAY, **texts) for _ in range(1_000)])
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(NOW)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as writer:
            assert writer.stdout.readline() == "ready\n"
            began = time.monotonic()
            report = store.maintain(budget_s=300)
            took_s = time.monotonic() - began
            told = json.loads(writer.communicate()[0])
        print(
            f"\n{what}: {took_s:.1f} s beside {told['written']} transactions of another process, "
            f"whose longest stall was {told['longest_s'] * 1e3:.0f} ms"
        )
        assert report.rows_deleted + report.texts_removed == 50_000
        assert report.rows_remaining == report.texts_remaining == 0
        assert told["failed"] == 0
        assert told["written"] > 100
