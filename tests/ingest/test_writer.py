"""The writer against sinks that are slow, broken or picky; no database."""

import itertools
import logging
import threading
import time

import pytest

from lynkr_store import BadArgument, RoutingEvent
from lynkr_store.exceptions import StoreUnavailable
from lynkr_store.ingest.validation import TextPolicy
from lynkr_store.ingest.writer import Writer
from tests.support.stores import eventually


class Sink:
    """Keeps what it is given; can be held, made to fail, and told to refuse rows."""

    def __init__(self):
        self.batches = []
        self.ids = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.failures = []
        self.refuse = {}

    def write(self, batch_id, rows):
        self.entered.set()
        self.ids.append(batch_id)
        assert self.open.wait(20)
        if self.failures:
            raise self.failures.pop(0)
        self.batches.append(list(rows))
        return self.refuse

    @property
    def providers(self):
        return [row["provider"] for batch in self.batches for row in batch]


@pytest.fixture
def sink():
    return Sink()


@pytest.fixture
def make(sink):
    made = []

    def make(**options):
        settings = {
            "policy": TextPolicy(),
            "clock": itertools.count(1_750_000_000_000).__next__,
            "max_rows": 1000,
            "max_bytes": 10**7,
            "batch_rows": 100,
            "interval_s": 0.01,
        }
        writer = Writer(sink, **settings | options)
        made.append(writer)
        return writer

    yield make
    sink.open.set()
    for writer in made:
        writer.close(5)


def adds_up(account):
    return account.submitted + account.recovered == (
        account.written
        + account.rejected_by.total()
        + account.dropped_by.total()
        + account.spooled
        + account.pending
    )


def has_ended(writer, timeout_s=5):
    for thread in writer._threads.values():
        thread.join(timeout_s)
    return not any(thread.is_alive() for thread in writer._threads.values())


def test_a_listener_is_told_of_each_attempt_and_ends_nothing(make, sink, caplog):
    writer, told = make(), []

    def fail(attempt):
        told.append(attempt)
        raise OSError("a row's value")

    writer.listeners.append(fail)
    sink.failures = [StoreUnavailable("away")]
    writer.submit({"provider": "p"})
    assert writer.flush(10)
    assert [(attempt.rows, attempt.error) for attempt in told] == [
        (1, "StoreUnavailable"),
        (1, None),
    ]
    assert writer.counters().faults_by == {"StoreUnavailable": 1, "OSError": 2}
    assert adds_up(writer.counters())
    for _ in range(3):
        writer.submit({"provider": "p"})
        assert writer.flush(10)
    assert writer.counters().faults_by["OSError"] == 5
    lines = [record.getMessage() for record in caplog.records]
    assert lines.count("a listener of on_batch failed: OSError") == 1
    eventually(lambda: "records are written again" in caplog.text)
    assert caplog.text.count("records are written again") == 1, "of the sink, and of no listener"


def test_records_arrive_in_order_and_in_batches(make, sink):
    sink.open.clear()
    writer = make(batch_rows=10)
    for n in range(95):
        assert writer.submit({"provider": str(n)})
    sink.open.set()
    assert writer.flush(5)
    assert sink.providers == [str(n) for n in range(95)]
    assert max(map(len, sink.batches)) == 10
    assert writer.counters().written == 95


def test_while_the_sink_hangs_some_batches_are_prepared_and_the_fault_is_reported(make, sink):
    sink.open.clear()
    writer = make(batch_rows=10, max_rows=200)
    writer.submit({"provider": "first"})
    assert sink.entered.wait(5)
    for n in range(200):
        assert writer.submit({"provider": str(n)} if n % 10 else {})
    eventually(lambda: writer.counters().rejected_by.total() >= 8)
    assert adds_up(writer.counters())
    sink.open.set()
    assert writer.flush(5)
    assert sink.providers == ["first", *(str(n) for n in range(200) if n % 10)]
    assert writer.counters().rejected_by == {"no_provider": 20}


def test_a_batch_goes_after_the_interval_even_if_it_is_not_full(make, sink):
    writer = make(interval_s=0.01)
    writer.submit({"provider": "p"})
    assert sink.entered.wait(5)


def test_a_flush_does_not_wait_for_the_interval(make, sink):
    writer = make(interval_s=3600)
    writer.submit({"provider": "p"})
    assert writer.flush(5)
    assert sink.providers == ["p"]


def test_a_full_batch_does_not_wait_for_the_interval(make, sink):
    writer = make(interval_s=3600, batch_rows=3)
    for _ in range(3):
        writer.submit({"provider": "p"})
    assert sink.entered.wait(5)


def test_what_does_not_fit_is_dropped_and_counted(make, sink, monkeypatch):
    monkeypatch.setattr("lynkr_store.ingest.preparer._READY", 1)
    sink.open.clear()
    writer = make(max_rows=5, batch_rows=1)
    for name in ("in the sink", "prepared"):
        writer.submit({"provider": name})
    eventually(lambda: writer.counters().in_hand == 2)
    accepted = [writer.submit({"provider": str(n)}) for n in range(8)]
    assert accepted == [True] * 5 + [False] * 3
    account = writer.counters()
    assert (account.queued, account.in_hand) == (5, 2)
    assert account.dropped_by == {"queue_full": 3}
    assert adds_up(account)
    sink.open.set()
    assert writer.flush(5)
    assert sink.providers == ["in the sink", "prepared", "0", "1", "2", "3", "4"]


def test_bytes_are_bounded_whatever_field_they_are_in(make, sink):
    sink.open.clear()
    writer = make(max_bytes=50_000)
    big = "x" * 30_000
    for record in (
        {"provider": big},
        {"provider": "p", "attributes": {"a": [big, {"b": big}]}},
        {"provider": "p", "candidates": [(big, big)]},
        RoutingEvent(provider="p", request_text=big),
    ):
        accepted = [writer.submit(record) for _ in range(4)]
        assert not all(accepted)
    account = writer.counters()
    assert account.dropped_by["queue_full"] >= 12
    assert adds_up(account)


def test_bytes_come_free_again(make, sink):
    writer = make(max_bytes=40_000)
    for _ in range(5):
        assert writer.submit({"provider": "p", "request_text": "x" * 30_000})
        assert writer.flush(5)


def test_nested_containers_are_copied_and_endless_ones_rejected(make, sink):
    writer = make()
    endless = []
    endless.append(endless)
    nested = {"list": [1]}
    assert writer.submit({"provider": "p", "attributes": nested})
    nested["list"].append(2)
    assert writer.submit({"provider": "p", "attributes": endless})
    assert writer.flush(5)
    assert [row["attributes"] for row in sink.batches[0]] == ['{"list":[1]}']
    assert writer.counters().rejected_by == {"wrong_type": 1}


def test_values_whose_own_methods_fail_cost_their_row(make, sink):
    class Hostile(str):
        __slots__ = ()

        def isascii(self):
            raise RuntimeError("no")

        def __contains__(self, other):
            raise RuntimeError("no")

    class HostileNumber:
        def __float__(self):
            raise RuntimeError("no")

    writer = make()
    writer.submit({"provider": Hostile("the text that it holds")})
    writer.submit({"provider": "p", "latency_ms": HostileNumber()})
    writer.submit({"provider": "p"})
    assert writer.flush(5)
    assert writer.counters().rejected_by == {"wrong_type": 1}
    assert sink.providers == ["the text that it holds", "p"]


def test_rows_that_the_sink_refuses_are_counted_by_its_cause(make, sink):
    sink.refuse = {"constraint": 2}
    writer = make()
    for _ in range(5):
        writer.submit({"provider": "p"})
    assert writer.flush(5)
    account = writer.counters()
    assert (account.written, dict(account.rejected_by)) == (3, {"constraint": 2})


def test_a_batch_stays_in_hand_until_the_sink_takes_it(make, sink, monkeypatch, caplog):
    monkeypatch.setattr("lynkr_store.ingest.deliverer._FIRST_RETRY_S", 0.01)
    sink.failures = [StoreUnavailable("gone"), StoreUnavailable("gone"), OSError("a row's text")]
    writer = make()
    for n in range(7):
        writer.submit({"provider": str(n)})
    assert writer.flush(5)
    assert sink.providers == [str(n) for n in range(7)]
    account = writer.counters()
    assert account.last_error == "OSError", "another library's words may repeat the row"
    eventually(lambda: caplog.records[-1].getMessage() == "records are written again")
    assert [r.getMessage() for r in caplog.records[:-1]] == [
        "records wait to be written: StoreUnavailable: gone",
        "records wait to be written: OSError",
    ], "one line for each fault, not for each try"


def test_a_flush_out_of_time_says_no(make, sink):
    sink.open.clear()
    writer = make()
    writer.submit({"provider": "p"})
    assert writer.flush(0.05) is False
    assert writer.flush(0) is False
    sink.open.set()
    assert writer.flush(5) is True


def test_an_idle_flush_and_close_are_quick(make):
    writer = make()
    assert writer.flush(0) is True
    writer.close(0)


@pytest.mark.parametrize("timeout_s", [-1, float("nan")])
def test_bad_deadlines_are_named(make, timeout_s):
    for call in (make().flush, make().close):
        with pytest.raises(BadArgument, match="timeout_s"):
            call(timeout_s)


def test_close_within_an_endless_deadline_writes_everything(make, sink):
    writer = make(interval_s=3600)
    for _ in range(10):
        writer.submit({"provider": "p"})
    writer.close(float("inf"))
    assert len(sink.providers) == 10
    assert has_ended(writer)


def test_close_out_of_time_counts_what_is_left(make, sink):
    sink.open.clear()
    writer = make(batch_rows=2)
    for n in range(7):
        writer.submit({"provider": str(n)})
    assert sink.entered.wait(5)
    began = time.monotonic()
    writer.close(0.05)
    assert time.monotonic() - began < 30  # the sink never opens
    account = writer.counters()
    assert dict(account.dropped_by) == {"outcome_unknown": 2, "deadline": 5}
    assert (account.queued, account.in_hand) == (0, 0)
    assert adds_up(account)
    sink.open.set()
    assert has_ended(writer)
    assert adds_up(writer.counters()), "a late answer is not counted again"
    assert writer.counters().written == 0
    assert writer.submit({"provider": "p"}) is False
    assert writer.counters().dropped_by["closed"] == 1


def test_close_while_the_sink_is_down_knows_that_nothing_was_written(make, sink):
    sink.failures = [StoreUnavailable("down")] * 1000
    writer = make()
    for _ in range(3):
        writer.submit({"provider": "p"})
    assert sink.entered.wait(5)
    while writer.counters().last_error is None:
        time.sleep(0.001)
    writer.close(0.05)
    assert dict(writer.counters().dropped_by) == {"deadline": 3}
    assert has_ended(writer)


def test_losses_are_logged_once_a_burst_without_values(make, sink, caplog):
    writer = make()
    with caplog.at_level(logging.WARNING, "lynkr_store"):
        for _ in range(50):
            writer.submit({"provider": 5, "request_text": "secret"})
            writer.flush(5)
    why, lost = caplog.messages
    assert "wrong_type: provider (int)" in why
    assert "{'wrong_type': 1}" in lost
    assert "secret" not in caplog.text


def test_a_thread_that_cannot_be_started_is_tried_again(make, sink, monkeypatch):
    writer = make()

    def no_more(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_more)
        assert writer.submit({"provider": "a"})
    assert writer.submit({"provider": "b"})
    assert writer.flush(5)
    assert sink.providers == ["a", "b"]


def test_unreadable_values_are_counted(make):
    writer = make()
    writer.note_unreadable(0)
    assert not writer.counters().mended_by
    writer.note_unreadable(2)
    assert writer.counters().mended_by == {"unreadable_on_read": 2}


def test_the_account_adds_up_at_every_moment(make, sink):
    writer = make(max_rows=50, batch_rows=7)
    stop = threading.Event()

    def submit():
        while not stop.is_set():
            writer.submit({"provider": "p"})
            writer.submit({"tier": "no provider"})

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        assert adds_up(writer.counters())
    stop.set()
    for thread in threads:
        thread.join(5)
    writer.close(5)
    account = writer.counters()
    assert adds_up(account)
    assert account.written == len(sink.providers)
