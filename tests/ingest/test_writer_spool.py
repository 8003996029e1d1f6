"""The writer with a spool, against sinks that are away, hang or come back; no database."""

import itertools
import threading

import pytest

from lynkr_store.exceptions import OutcomeUnknown, StoreUnavailable
from lynkr_store.ingest.spool import Spool
from lynkr_store.ingest.validation import TextPolicy
from lynkr_store.ingest.writer import Writer
from tests.ingest.test_writer import adds_up, eventually, has_ended


class Ledger:
    """A sink that stores each batch once; it can be away, hang, or lose its answer."""

    def __init__(self):
        self.stored = {}
        self.away = False
        self.mute = 0
        self.open = threading.Event()
        self.open.set()
        self.asked = 0

    def write(self, batch_id, rows):
        self.asked += 1
        assert self.open.wait(30)
        if self.away:
            raise StoreUnavailable("away")
        self.stored.setdefault(batch_id, [row["provider"] for row in rows])
        if self.mute:
            self.mute -= 1
            raise OutcomeUnknown("no answer")
        return {}

    @property
    def providers(self):
        return list(itertools.chain.from_iterable(self.stored.values()))


@pytest.fixture
def ledger():
    return Ledger()


@pytest.fixture
def make(ledger, tmp_path):
    made = []

    def make(spool_bytes=2**30, **options):
        settings = {
            "policy": TextPolicy(),
            "clock": itertools.count(1_750_000_000_000).__next__,
            "max_rows": 1000,
            "max_bytes": 10**7,
            "batch_rows": 10,
            "interval_s": 0.01,
            "spool": lambda: Spool(tmp_path / "spool.db", spool_bytes),
            "spool_after_s": 0.0,
        }
        writer = Writer(ledger, **settings | options)
        made.append(writer)
        return writer

    yield make
    ledger.away = False
    ledger.open.set()
    for writer in made:
        writer.close(5)


def submit(writer, numbers):
    for number in numbers:
        assert writer.submit({"provider": str(number)})


def texts(numbers):
    return [str(number) for number in numbers]


def test_batches_wait_in_the_spool_while_the_sink_is_away(make, ledger):
    ledger.away = True
    writer = make()
    submit(writer, range(95))
    assert writer.flush(30), "safely spooled"
    account = writer.counters()
    assert (account.spooled, account.pending) == (95, 0)
    assert adds_up(account)
    ledger.away = False
    eventually(lambda: writer.counters().spooled == 0)
    assert ledger.providers == texts(range(95)), "in order"
    assert writer.counters().written == 95


def test_nothing_is_spooled_before_its_time(make, ledger):
    ledger.away = True
    writer = make(spool_after_s=3600)
    submit(writer, range(20))
    eventually(lambda: ledger.asked >= 3)
    account = writer.counters()
    assert (account.spooled, account.pending) == (0, 20)


def test_a_queue_half_full_is_relieved_before_that_time(make, ledger):
    ledger.away = True
    writer = make(spool_after_s=3600, max_rows=40)
    submit(writer, range(10))
    eventually(lambda: writer._handoff.delivery is not None and writer._handoff.delivery.failures)
    for number in range(10, 400):
        eventually(lambda n=number: writer.submit({"provider": str(n)}))
    account = writer.counters()
    assert account.spooled > 300
    assert adds_up(account)
    ledger.away = False
    assert writer.flush(30)
    eventually(lambda: writer.counters().spooled == 0)
    assert ledger.providers == texts(range(400))


def test_a_sink_that_hangs_does_not_hold_up_the_spool(make, ledger):
    ledger.open.clear()
    writer = make()
    submit(writer, range(30))
    assert writer.flush(30), "the batch that hangs is spooled as well"
    account = writer.counters()
    assert (account.spooled, account.pending) == (30, 0)
    ledger.open.set()
    eventually(lambda: writer.counters().written == 30)
    assert ledger.providers == texts(range(30))
    assert writer._handoff.spool.first() is None


def test_a_batch_without_an_answer_is_asked_about_again_and_stored_once(make, ledger):
    ledger.mute = 2
    writer = make(spool_after_s=3600)
    submit(writer, range(5))
    assert writer.flush(30)
    assert ledger.providers == texts(range(5))
    assert ledger.asked == 3
    assert writer.counters().faults_by == {"OutcomeUnknown": 2}
    assert writer.counters().written == 5


def test_close_spools_what_the_sink_does_not_take(make, ledger):
    ledger.open.clear()
    writer = make(spool_after_s=3600)
    submit(writer, range(95))
    eventually(lambda: ledger.asked)
    writer.close(0.2)
    account = writer.counters()
    assert (account.spooled, account.pending, account.dropped_by.total()) == (95, 0, 0)
    later = make()
    later.start()
    eventually(lambda: later.counters().recovered == 95)
    ledger.open.set()
    eventually(lambda: later.counters().written == 95)
    assert adds_up(later.counters())
    assert has_ended(writer)
    assert ledger.providers == texts(range(95)), "the batch that hung, too, once and in order"


def test_what_the_spool_has_no_room_for_stays_in_hand(make, ledger, caplog):
    ledger.away = True
    writer = make(spool_bytes=30_000, max_rows=200)
    submit(writer, range(200))
    eventually(lambda: "SpoolError" in writer.counters().faults_by)
    account = writer.counters()
    assert 0 < account.spooled < 200
    assert account.pending == 200 - account.spooled
    ledger.away = False
    assert writer.flush(30)
    eventually(lambda: writer.counters().spooled == 0)
    assert ledger.providers == texts(range(200))
    assert len([line for line in caplog.messages if "the spool is full" in line]) == 1


def test_a_close_short_of_room_counts_what_is_lost(make, ledger):
    ledger.away = True
    writer = make(spool_bytes=30_000, spool_after_s=3600)
    submit(writer, range(300))
    writer.close(0.2)
    account = writer.counters()
    assert account.spooled > 0
    assert account.dropped_by == {"deadline": 300 - account.spooled}
    assert adds_up(account)


def test_a_close_soon_after_few_records_spools_them(make, ledger):
    """The batches are ready before the first of them is on its way."""
    ledger.away = True
    writer = make(spool_after_s=3600)
    submit(writer, range(35))
    writer.close(0.5)
    assert writer.counters().spooled == 35


def test_a_batch_of_bad_records_alone_is_not_spooled(make, ledger):
    ledger.away = True
    writer = make(batch_rows=2)
    submit(writer, range(2))
    for _ in range(2):
        writer.submit({"tier": "no provider"})
    submit(writer, range(2, 4))
    assert writer.flush(30)
    account = writer.counters()
    assert (account.spooled, dict(account.rejected_by)) == (4, {"no_provider": 2})
    ledger.away = False
    eventually(lambda: writer.counters().written == 4)


def test_a_batch_whose_answer_was_lost_long_ago_is_not_tried_again(make, ledger):
    ledger.mute = 10**6
    writer = make()
    submit(writer, range(5))
    assert writer.flush(30)
    writer.close(0.1)
    ledger.mute = 0
    ledger.stored.clear()
    later = make(clock=lambda: 1_760_000_000_000, forget_after_ms=86_400_000)
    later.start()
    eventually(lambda: later.counters().dropped_by == {"outcome_unknown": 5})
    assert adds_up(later.counters())
    assert ledger.providers == []


def test_a_child_starts_with_a_file_of_its_own(make, ledger, tmp_path):
    ledger.away = True
    writer = make()
    submit(writer, range(10))
    assert writer.flush(30)
    spool = writer._handoff.spool
    writer.before_fork()
    writer.after_fork_in_parent()
    with writer._handoff.lock:  # the threads of a parent are not in its child
        writer._queue.closed = True
        writer._handoff.give_up()
    assert has_ended(writer)
    writer._queue.closed = False
    writer.after_fork_in_child()
    assert writer.counters().submitted == 0
    submit(writer, range(10, 20))
    assert writer.flush(30)
    assert writer.counters().spooled == 10
    assert (tmp_path / "spool.db.2").exists()
    spool.close()


def test_a_child_of_a_fork_while_the_spool_is_written_has_none(make, ledger, monkeypatch):
    monkeypatch.setattr("lynkr_store.ingest.writer.FORK_WAIT_S", 0.05)
    writer = make()
    spool, held, over = writer._handoff.spool, threading.Event(), threading.Event()

    def write():
        with spool._lock:
            held.set()
            over.wait(30)

    thread = threading.Thread(target=write)
    thread.start()
    held.wait(30)
    writer.before_fork()
    over.set()
    thread.join()
    assert spool._lock.acquire(blocking=False)  # nothing is held
    spool._lock.release()
    writer.after_fork_in_child()
    assert "forked while a batch was on its way" in writer.counters().last_error
    submit(writer, range(10))
    assert writer.flush(30)
    assert writer.counters().written == 10
    assert len(ledger.providers) == 10
    writer.close(1)
    writer.after_fork_in_parent()  # which would raise, if it let go of what is not held
    spool.close()
