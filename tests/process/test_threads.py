"""Items that a thread computes ahead, without a store."""

import signal
import threading
import time
from contextlib import suppress

import pytest

from lynkr_store.process import threads
from lynkr_store.process.threads import ahead
from tests.support.stores import eventually


def counting(computed, upto=100):
    for number in range(upto):
        computed.append(number)
        yield number


def test_items_come_in_order_and_from_another_thread():
    by = set()

    def items():
        for number in range(50):
            by.add(threading.current_thread())
            yield number

    with ahead(items(), 3, "test") as found:
        assert list(found) == list(range(50))
    (thread,) = by
    assert thread.name == "lynkr-store-test"
    eventually(lambda: not thread.is_alive())


def test_no_more_are_computed_than_may_wait():
    computed = []
    with ahead(counting(computed), 3, "test") as found:
        eventually(lambda: len(computed) == 3)
        assert next(found) == 0
        eventually(lambda: len(computed) == 4)
        time.sleep(0.05)
        assert len(computed) == 4
    time.sleep(0.05)
    assert len(computed) == 4  # none after the block


def test_what_computing_one_raises_is_raised_in_its_place():
    def items():
        yield 1
        raise ValueError("no second one")

    with ahead(items(), 3, "test") as found:
        assert next(found) == 1
        with pytest.raises(ValueError, match="no second one"):
            next(found)


def test_without_threads_they_are_computed_when_asked_for(monkeypatch):
    monkeypatch.setattr(threads, "start_thread", lambda *_: None)
    computed = []
    with ahead(counting(computed), 3, "test") as found:
        assert next(found) == 0
        assert computed == [0]
        assert list(found) == list(range(1, 100))


def test_a_block_that_fails_waits_for_an_item_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(threads, "_FINISH_S", 0.2)
    for lasts_s in (0.05, 60):
        begun, over, ended = threading.Event(), threading.Event(), threading.Event()

        def items(begun=begun, over=over, ended=ended, lasts_s=lasts_s):
            begun.set()
            over.wait(lasts_s)
            ended.set()
            yield 1

        with suppress(KeyboardInterrupt), ahead(items(), 1, "test"):
            assert begun.wait(60)
            raise KeyboardInterrupt
        assert ended.is_set() is (lasts_s < 1)
        over.set()


def test_an_interrupt_while_the_thread_starts_ends_it(monkeypatch):
    begun = threading.Thread.start

    def start(thread):
        begun(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)
    computed = []
    with suppress(KeyboardInterrupt), ahead(counting(computed), 1_000, "test"):
        pass
    assert not [t for t in threading.enumerate() if t.name == "lynkr-store-test" and t.is_alive()]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
def test_interrupts_at_any_moment_leave_nothing_waiting():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for number in range(1_000):
            with suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.001 + number % 7 * 0.0003)
                with ahead(iter(range(10**9)), 2, "test") as found:
                    for _ in found:
                        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "lynkr-store-test"])
