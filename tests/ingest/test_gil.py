"""The preparing thread runs while the delivering thread is inside a long call."""

import threading
from contextlib import contextmanager

import pytest

from lynkr_store.ingest import gil as module
from lynkr_store.ingest.gil import GilHandoff, long_call


@pytest.fixture
def gil():
    return GilHandoff()


@contextmanager
def working(body):
    """The body in a thread, which has ended afterwards."""
    thread = threading.Thread(target=body)
    thread.start()
    yield thread
    thread.join(10)
    assert not thread.is_alive()


def test_the_preparing_thread_runs_during_a_long_call(gil, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_S", 60)
    story, waits = [], threading.Event()

    def second():
        waits.set()
        with gil.preparing():
            story.append("second")

    with gil.delivering():
        with working(second) as thread:
            waits.wait(10)
            thread.join(0.05)
            story.append("first")
            with long_call():
                thread.join(10)
        story.append("first again")
    assert story == ["first", "second", "first again"]


def test_the_delivering_thread_waits_for_what_the_other_has_begun_and_no_more(gil):
    story, inside, end = [], threading.Event(), threading.Event()

    def second():
        with gil.preparing():
            inside.set()
            end.wait(10)
            story.append("second")

    with gil.delivering(), working(second):
        with long_call():
            assert inside.wait(10)
            end.set()
        story.append("first")
    assert story == ["second", "first"]


def test_a_call_without_an_end_holds_up_the_preparing_thread_once(gil, monkeypatch):
    waited = []
    lock = gil._lock

    class Watched:
        def acquire(self, timeout=-1):
            waited.append(timeout)
            return lock.acquire(timeout=0)

        release = lock.release

    with gil.delivering():
        monkeypatch.setattr(gil, "_lock", Watched())
        for _ in range(3):
            with gil.preparing():
                pass
        assert waited == [module._PATIENCE_S, 0, 0]
        monkeypatch.setattr(gil, "_lock", lock)
    with gil.delivering():
        monkeypatch.setattr(gil, "_lock", Watched())
        with gil.preparing():
            pass
        assert waited[3:] == [module._PATIENCE_S]
        monkeypatch.setattr(gil, "_lock", lock)


def test_an_error_gives_the_interpreter_back(gil):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), gil.delivering(), long_call():
            _ = 1 / 0
        with pytest.raises(ZeroDivisionError), gil.preparing():
            _ = 1 / 0


def test_elsewhere_a_long_call_is_a_call(gil):
    with long_call(), gil.preparing():
        pass
    with gil.delivering(), long_call():
        assert not gil._lock.locked()
    with long_call():
        assert not gil._lock.locked()
