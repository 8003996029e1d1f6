"""Two threads that take turns at the interpreter."""

import threading
from contextlib import contextmanager

import pytest

from lynkr_store.ingest import handoff as module
from lynkr_store.ingest.handoff import Turns


@pytest.fixture
def turns():
    return Turns()


@contextmanager
def working(body):
    """The body in a thread, which has ended afterwards."""
    thread = threading.Thread(target=body)
    thread.start()
    yield thread
    thread.join(10)
    assert not thread.is_alive()


def test_who_comes_second_works_while_the_first_is_away(turns, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", 60)
    story, waits = [], threading.Event()

    def second():
        waits.set()
        with turns.second():
            story.append("second")

    with turns.first():
        with working(second) as thread:
            waits.wait(10)
            thread.join(0.05)
            story.append("first")
            with turns.away():
                thread.join(10)
        story.append("first again")
    assert story == ["first", "second", "first again"]


def test_the_first_waits_for_no_more_than_what_the_second_has_begun(turns):
    story, inside, end = [], threading.Event(), threading.Event()

    def second():
        with turns.second():
            inside.set()
            end.wait(10)
            story.append("second")

    with turns.first(), working(second):
        with turns.away():
            assert inside.wait(10)
            end.set()
        story.append("first")
    assert story == ["second", "first"]


def test_a_call_without_an_end_holds_up_the_second_once(turns, monkeypatch):
    waited = []
    lock = turns._lock

    class Watched:
        def acquire(self, timeout=-1):
            waited.append(timeout)
            return lock.acquire(timeout=0)

        release = lock.release

    with turns.first():
        monkeypatch.setattr(turns, "_lock", Watched())
        for _ in range(3):
            with turns.second():
                pass
        assert waited == [module._PATIENCE_S, 0, 0]
        monkeypatch.setattr(turns, "_lock", lock)
    with turns.first():
        monkeypatch.setattr(turns, "_lock", Watched())
        with turns.second():
            pass
        assert waited[3:] == [module._PATIENCE_S]
        monkeypatch.setattr(turns, "_lock", lock)


def test_an_error_ends_the_turn(turns):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), turns.first(), turns.away():
            _ = 1 / 0
        with pytest.raises(ZeroDivisionError), turns.second():
            _ = 1 / 0
