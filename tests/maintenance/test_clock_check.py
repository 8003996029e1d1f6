"""A clock that is far ahead of all that the database has seen deletes nothing by its age."""

import logging
import sys
from datetime import timedelta

import pytest
from sqlalchemy import delete, event, func, insert, select, text

from lynkr_store import ClockAhead, LynkrStoreError, Store, StoreSettings, Window
from lynkr_store.cli import commands
from lynkr_store.db.models import LEDGER, ROLLUPS, SAVINGS, TELEMETRY
from lynkr_store.ingest.batch import RowBatch
from lynkr_store.ingest.spool import Spool
from lynkr_store.maintenance.clock_check import AHEAD_MS, Seen, doubt, must_save, newest, seen_upto
from tests.support.stores import adds_up, eventually, looked

NOW = 1_750_000_000_000
HOUR = 3_600_000
DAY = 86_400_000
YEAR = 365 * DAY


def record(age_ms, **fields):
    texts = {"request_text": "a question", "response_text": "an answer"}
    return {"provider": "p", "timestamp": NOW - int(age_ms), **texts, **fields}


class Clock:
    def __init__(self, now=NOW):
        self.now = now

    def __call__(self):
        return self.now


def with_texts(store):
    return sum(row.request_text is not None for row in store.iter_records())


# -- the decision ---------------------------------------------------------------------------------

AGO = [  # days since the last retention, the newest row, the newest batch; is the present doubted
    ((None, 365, None), True),
    ((365, 365, 365), True),
    ((None, 365, 365), True),
    ((365, None, None), True),
    ((0, 365, None), False),
    ((365, 2, None), False),
    ((None, 365, 0), False),
    ((500, 36, 40), True),
    ((500, 35, 40), False),
    ((35, 500, 40), False),
    ((None, None, None), False),
    ((-365, 0, 0), False),
    ((-365, 365, None), True),
    ((-365, None, None), False),
]


@pytest.mark.parametrize(("ago", "doubted"), AGO)
def test_the_present_is_doubted_where_it_is_far_ahead_of_all_that_was_seen(ago, doubted):
    last, row, batch = (None if days is None else NOW - days * DAY for days in ago)
    assert (doubt(NOW, last, Seen(row, batch)) is not None) == doubted


def test_the_words_say_how_far_and_what_to_do():
    assert doubt(NOW + AHEAD_MS, NOW, Seen(NOW, NOW)) is None
    words = doubt(NOW + AHEAD_MS + 1, None, Seen(NOW, None))
    assert "35 days ahead" in words
    for named in ("set the clock", "trust_clock=True", "--trust-clock"):
        assert named in words


def test_a_present_is_noted_once_an_hour_and_when_it_was_set_back():
    noted = {at: must_save(NOW, at) for at in (None, NOW - HOUR, NOW - 1, NOW, NOW + 1)}
    assert noted == {None: True, NOW - HOUR: True, NOW - 1: False, NOW: False, NOW + 1: True}


def test_what_is_younger_than_a_day_does_not_speak_against_the_last_retention():
    assert seen_upto(NOW, NOW - YEAR) == NOW - DAY
    assert seen_upto(NOW, None) == seen_upto(NOW, NOW + 1) == NOW


def test_the_newest_is_what_was_seen_up_to_an_instant(engine):
    def seen(upto):
        with engine.connect() as connection:
            return Seen(*connection.execute(newest(upto)).one())

    assert seen(NOW) == (None, None)
    with engine.begin() as connection:
        for age in (-YEAR, -1, HOUR, 1, 40 * DAY, 3 * DAY):
            row = {"request_id": "r", "provider": "p", "timestamp": NOW - age}
            batch = {"batch_id": str(age), "row_count": 1, "committed_at": NOW - age - 1}
            connection.execute(insert(TELEMETRY), row)
            connection.execute(insert(LEDGER), batch)
    assert seen(NOW) == (NOW - 1, NOW - 0)
    assert seen(NOW - DAY) == (NOW - 3 * DAY, NOW - 3 * DAY - 1)
    assert seen(NOW - YEAR) == (None, None)
    with engine.begin() as connection:
        connection.execute(delete(TELEMETRY))
    assert seen(NOW - DAY) == (None, NOW - 3 * DAY - 1)


def test_odd_timestamps_of_other_writers_say_nothing(tmp_path):
    with Store(f"sqlite:///{tmp_path}/telemetry.db", clock=lambda: NOW + YEAR) as store:
        store.add_many([record(0) for _ in range(6)])
        odd = ["soon", 9e300, float("inf"), -1e300, b"blob", NOW + 0.5]
        with store._database.writing.begin() as connection:
            for number, stamp in enumerate(odd, 1):
                statement = "UPDATE routing_telemetry SET timestamp = :stamp WHERE id = :id"
                connection.execute(text(statement), {"stamp": stamp, "id": number})
        with store.engine.connect() as connection:
            assert connection.execute(newest(NOW + YEAR)).one().row == NOW + 0.5
        with pytest.raises(ClockAhead):
            store.cleanup()


# -- stores ---------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("ran_before", [True, False])
def test_a_clock_a_year_ahead_deletes_nothing_until_a_person_insists(
    open_store, caplog, ran_before
):
    caplog.set_level(logging.WARNING, "lynkr_store")
    clock = Clock()
    store = open_store(clock=clock, retention_days=30, text_retention_days=20)
    store.add_many([record(n * DAY / 100) for n in range(1_000)])
    with store._database.writing.begin() as connection:
        saved = {"timestamp": NOW, "category": "c", "tokens_saved": 1}
        connection.execute(insert(SAVINGS), saved)
    if ran_before:
        assert store.maintain().retention_waits is None
    clock.now += YEAR
    for _ in range(2):  # the second is as wrong as the first
        caplog.clear()
        report = store.maintain()
        assert (report.rows_deleted, report.texts_removed) == (0, 0)
        assert (report.rows_remaining, report.texts_remaining) == (1_001, 1_000)
        assert "trust_clock=True" in report.retention_waits
        assert report.model_dump()["retention_waits"] == report.retention_waits
        assert [line.getMessage() for line in caplog.records] == [
            f"retention waits: {report.retention_waits}"
        ]
    assert with_texts(store) == 1_000
    caplog.clear()
    report = store.maintain(trust_clock=True)
    assert (report.rows_deleted, report.rows_remaining) == (1_001, 0)
    assert report.retention_waits is None
    assert "retention_waits" not in report.model_dump()
    assert not caplog.records


def test_cleanup_raises_instead(open_store):
    clock = Clock()
    store = open_store(clock=clock)
    store.add_many([record(0), record(DAY)])
    clock.now += YEAR
    for _ in range(2):
        with pytest.raises(ClockAhead, match="trust_clock=True") as refused:
            store.cleanup(timedelta(days=30))
        assert isinstance(refused.value, LynkrStoreError)
    assert with_texts(store) == 2
    assert store.cleanup(timedelta(days=400)) == 0, "nothing is so old"
    assert store.cleanup(timedelta(days=30), trust_clock=True) == 2


def test_rows_that_the_wrong_clock_stamped_do_not_speak_for_it(open_store):
    clock = Clock()
    store = open_store(clock=clock, retention_days=30)
    store.add_many([record(0), record(2 * DAY)])
    assert store.record(provider="p")
    assert store.flush(30)
    assert store.maintain().retention_waits is None
    clock.now += YEAR
    store.add_many([{"provider": "p"}])
    assert store.record(provider="p")
    assert store.flush(30)
    report = store.maintain()
    assert (report.rows_deleted, report.rows_remaining) == (0, 3)
    assert report.retention_waits
    with pytest.raises(ClockAhead):
        store.cleanup()
    clock.now = NOW + HOUR
    assert store.maintain().retention_waits is None, "it was set"
    assert len(store.query()) == 5


def test_retention_resumes_a_day_after_a_machine_was_off_for_a_year(open_store):
    clock = Clock()
    store = open_store(clock=clock, retention_days=30)
    store.add_many([record(0)])
    assert store.maintain().rows_deleted == 0
    clock.now += YEAR
    store.add_many([{"provider": "p"}])
    assert store.maintain().retention_waits
    clock.now += DAY
    report = store.maintain()
    assert (report.rows_deleted, report.retention_waits) == (1, None)


def test_an_idle_machine_is_not_kept_waiting(open_store, caplog):
    clock = Clock()
    store = open_store(clock=clock, retention_days=100)
    store.add_many([record(0)])
    deleted = []
    for days in (1, 30, 7, 35, 31):
        clock.now += days * DAY
        report = store.maintain()
        deleted.append(report.rows_deleted)
        assert report.retention_waits is None
    assert deleted == [0, 0, 0, 0, 1]
    assert not caplog.records


def test_a_clock_that_is_behind_does_no_harm(open_store):
    clock = Clock()
    store = open_store(clock=clock, retention_days=30)
    store.add_many([record(40 * DAY), record(2 * DAY)])
    clock.now -= YEAR
    for _ in range(2):
        report = store.maintain()
        assert (report.rows_deleted, report.retention_waits) == (0, None)
    assert store.cleanup() == 0
    clock.now = NOW
    assert store.maintain().rows_deleted == 1


def test_a_last_run_in_the_future_keeps_nobody_waiting_and_protects_nobody(open_store):
    clock = Clock(NOW + YEAR)
    store = open_store(clock=clock, retention_days=30)
    store.add_many([record(0)])
    assert store.maintain(trust_clock=True).rows_deleted == 1, "a person insisted, wrongly"
    clock.now = NOW
    store.add_many([record(40 * DAY), record(0)])
    report = store.maintain()
    assert (report.rows_deleted, report.retention_waits) == (1, None)
    clock.now = NOW + YEAR
    report = store.maintain()
    assert (report.rows_deleted, report.rows_remaining) == (0, 1)
    assert report.retention_waits


def test_imported_rows_do_not_speak_against_a_store_at_work(open_store):
    store = open_store(clock=lambda: NOW, retention_days=100)
    store.record(record(500 * DAY))
    assert store.flush(30)
    assert store.maintain().rows_deleted == 1
    store.add_many([record(400 * DAY)])
    assert store.cleanup() == 1


def test_rows_of_today_speak_for_the_present_where_retention_never_ran(open_store):
    store = open_store(clock=lambda: NOW)
    store.add_many([record(100 * DAY), record(0)])
    assert store.cleanup() == 1


def test_rows_from_the_future_do_not_speak_for_a_clock_nor_keep_one_waiting(open_store):
    clock = Clock()
    store = open_store(clock=clock, retention_days=30)
    store.add_many([record(31 * DAY), record(0), record(-YEAR - 1), record(-2 * YEAR)])
    report = store.maintain()
    assert (report.rows_deleted, report.retention_waits) == (1, None)
    clock.now += YEAR
    report = store.maintain()
    assert (report.rows_deleted, report.rows_remaining) == (0, 1)
    assert report.retention_waits


def test_nothing_old_enough_is_nothing_to_wait_for(open_store, caplog):
    clock = Clock()
    store = open_store(clock=clock)
    store.add_many([record(0)])
    clock.now += YEAR
    assert store.maintain().retention_waits is None
    store = open_store(clock=clock, retention_days=1000, text_retention_days=1000)
    assert store.maintain().retention_waits is None
    assert not caplog.records


def test_roll_ups_of_rows_that_are_gone_wait_too(open_store):
    def days():
        with store._database.engine.connect() as connection:
            return connection.scalar(select(func.count()).select_from(ROLLUPS))

    clock = Clock()
    store = open_store(clock=clock)
    store.add_many([record(40 * DAY), record(0)])
    assert store.cleanup() == 1
    known = days()
    clock.now += YEAR
    report = store.maintain()
    assert "trust_clock" in report.retention_waits, "400 days are over by this clock"
    assert days() == known
    assert store.get_stats(Window(since=0)).total_requests == 2
    assert store.maintain(trust_clock=True).retention_waits is None
    assert days() < known


def test_the_ledger_remembers_what_a_clock_a_year_ahead_calls_old(url):
    def ledger():
        with store.engine.connect() as connection:
            return set(connection.scalars(select(LEDGER.c.batch_id)))

    clock, rows = Clock(), RowBatch.of([record(0) | {"request_id": "r"}])
    settings = StoreSettings(url=url, maintenance_interval_s=3_600)
    with Store(settings=settings, clock=clock) as store:
        store._sink.write("first", rows)
        store.maintain()
        clock.now += YEAR
        for number in range(101):
            store._sink.write(f"later {number}", rows)
        store.maintain()
        assert "first" in ledger()
        store._sink.write("first", rows)
        assert len(store.query(limit=200)) == 102, "it was found in the ledger"
        store.maintain(trust_clock=True)
        assert "first" not in ledger()
        assert len(ledger()) == 101


def test_the_ledger_forgets_in_steps_by_a_clock_that_is_trusted(url):
    with Store(url, clock=lambda: NOW) as store:
        old = [
            {"batch_id": f"old {n}", "row_count": 1, "committed_at": NOW - 31 * DAY}
            for n in range(2_500)
        ]
        store.maintain()
        with store._database.writing.begin() as connection:
            connection.execute(insert(LEDGER), old)
        statements = []
        event.listen(
            store._database.engine,
            "before_cursor_execute",
            lambda *given: statements.append(given[2]),
        )
        store.maintain()
        assert sum("DELETE FROM ingest_batches" in each for each in statements) == 3
        statements.clear()
        store.maintain()
        assert not [each for each in statements if "DELETE FROM ingest_batches" in each]
        with store.engine.connect() as connection:
            assert connection.scalar(select(func.count()).select_from(LEDGER)) == 0


@pytest.mark.sample(2)
@pytest.mark.parametrize("stored", [False, True])
def test_a_spooled_batch_is_tried_again_as_long_as_the_ledger_remembers(url, tmp_path, stored):
    """One whose answer was lost; by a clock that is a year ahead the ledger would not know it."""
    clock, rows = Clock(), RowBatch.of([record(0) | {"request_id": f"r{n}"} for n in range(5)])
    settings = StoreSettings(url=url, spool_path=tmp_path / "spool.db")

    def spooled():
        spool = Spool(settings.spool_path, 2**30)
        spool.enter("b", rows, clock.now)
        spool.close()

    with Store(url, clock=clock) as store:
        if stored:
            store._sink.write("b", rows)
        assert store.maintain().retention_waits is None
        spooled()
        with Store(settings=settings, clock=lambda: NOW + YEAR) as replaying:
            eventually(lambda: replaying.health().written == 5)
            assert looked(replaying).dropped == 0
        assert len(store.query()) == 5, "once"
        with store._database.writing.begin() as connection:
            other = {"batch_id": "other", "row_count": 1, "committed_at": NOW}
            connection.execute(insert(LEDGER), other)
        clock.now += 32 * DAY
        store.maintain()  # now it has forgotten
        clock.now = NOW
        spooled()
        with Store(settings=settings, clock=lambda: NOW + 32 * DAY) as replaying:
            eventually(lambda: replaying.health().dropped_by == {"outcome_unknown": 5})
        assert len(store.query()) == 5


def test_a_ledger_that_is_away_keeps_an_old_batch_waiting(tmp_path):
    rows, away = RowBatch.of([record(0) | {"request_id": "r"}]), tmp_path / "away"
    spool = Spool(tmp_path / "spool.db", 2**30)
    spool.enter("b", rows, NOW)
    spool.close()
    away.write_text("where a folder should be")
    settings = StoreSettings(url=f"sqlite:///{away}/telemetry.db", spool_path=tmp_path / "spool.db")
    with Store(settings=settings, clock=lambda: NOW + YEAR) as store:
        eventually(lambda: store.health().faults_by)
        health = store.health()
        assert (health.recovered, health.spooled, health.dropped) == (1, 1, 0)
        assert adds_up(health)
        away.unlink()
        eventually(lambda: store.health().written == 1)
        assert adds_up(store.health())


def test_a_stores_own_retention_waits_too_and_says_so_once(url, caplog):
    caplog.set_level(logging.WARNING, "lynkr_store")
    with Store(url, clock=lambda: NOW) as store:
        store.add_many([record(n * DAY) for n in range(20)])
    settings = StoreSettings(url=url, retention_days=1, maintenance_interval_s=0.01)
    times = []
    with Store(settings=settings, clock=lambda: NOW + YEAR) as store:
        work = store._background._work
        store._background._work = lambda stop: (times.append(1), work(stop))
        assert len(store.query()) == 20  # starts it
        eventually(lambda: len(times) > 3)
        assert looked(store).rollup_lag == 0, "it folds"
    assert [line.getMessage()[:52] for line in caplog.records] == [
        "background maintenance will be retried: ClockAhead: "
    ]
    with Store(url, clock=lambda: NOW) as store:
        assert len(store.query()) == 20


# -- the command ----------------------------------------------------------------------------------


def test_the_command_says_so_and_takes_the_word_of_a_person(url, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lynkr-store", *arguments, "--url", url])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    monkeypatch.setenv("LYNKR_STORE_RETENTION_DAYS", "30")
    monkeypatch.setattr("lynkr_store.store.base.epoch_ms_now", lambda: NOW + YEAR)
    with Store(url, clock=lambda: NOW) as store:
        store.add_many([record(0), record(DAY), record(2 * DAY)])
    code, said, _ = run("maintain")
    assert code == commands.Exit.NO
    assert "rows deleted: 0; remaining: 3" in said
    assert "retention waits: the clock is 365 days ahead" in said
    assert "--trust-clock" in said
    code, said, _ = run("maintain", "--json")
    assert code == commands.Exit.NO
    assert '"retention_waits": "the clock is 365 days ahead' in said
    code, said, told = run("cleanup", "--older-than", "30d")
    assert (code, said) == (commands.Exit.NO, "")
    assert "--trust-clock" in told
    assert run("cleanup", "--older-than", "367d", "--trust-clock") == (0, "0 rows deleted\n", "")
    with Store(url, clock=lambda: NOW) as store:
        assert store.maintain().rows_deleted == 0
        assert len(store.query()) == 3
    assert run("cleanup", "--older-than", "366d", "--trust-clock")[1] == "1 rows deleted\n"
    code, said, _ = run("maintain", "--trust-clock")
    assert code == 0
    assert "rows deleted: 2; remaining: 0" in said
    assert "waits" not in said
