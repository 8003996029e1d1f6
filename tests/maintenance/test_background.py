"""The thread that does what nobody asked for just now."""

import logging
import os
import threading

import pytest

from lynkr_store import Store, StoreSettings, Window
from lynkr_store.exceptions import StoreUnavailable
from lynkr_store.maintenance.background import WAKE_ROWS, BackgroundMaintenance
from tests.support.stores import eventually, looked

LONG_S = 3_600.0
NOW = 1_750_000_000_000


@pytest.fixture
def background_maintenance():
    """Begin one, which is ended with the test."""
    begun = []

    def begin(work, interval_s):
        background = BackgroundMaintenance(work, interval_s)
        begun.append(background)
        return background

    yield begin
    for background in begun:
        background.finish()
        if background._thread:
            background._thread.join(30)


def test_it_works_again_and_again(background_maintenance):
    times = []
    background = background_maintenance(lambda _: times.append(1), 0.001)
    background.start()
    background.start()
    eventually(lambda: len(times) > 3)
    assert [t.name for t in threading.enumerate()].count("lynkr-store-maintenance") == 1


def test_it_works_when_enough_was_written_and_not_before(background_maintenance):
    times = []
    background = background_maintenance(lambda _: times.append(1), LONG_S)
    background.rows_written(WAKE_ROWS - 1)
    assert background._wake.empty()
    assert not times
    background.rows_written(1)
    eventually(lambda: times)
    assert len(times) == 1


def test_its_work_is_asked_to_stop(background_maintenance):
    at_work, stopped = threading.Event(), threading.Event()

    def work(stop):
        at_work.set()
        eventually(stop)
        stopped.set()

    background = background_maintenance(work, 0.001)
    background.start()
    at_work.wait(30)
    background.finish()
    assert stopped.wait(30)
    background.start()
    background._thread.join(30)
    assert not background._thread.is_alive()


def test_one_that_was_ended_does_not_start(background_maintenance):
    background = background_maintenance(lambda _: None, 0.001)
    background.finish()
    background.start()
    assert background._thread is None


def test_a_fault_is_logged_once_without_words_of_others(background_maintenance, caplog):
    caplog.set_level(logging.WARNING, "lynkr_store")
    faults = iter([ValueError("a secret"), ValueError("a secret"), StoreUnavailable("no server")])
    done = threading.Event()

    def work(_):
        error = next(faults, None)
        if error:
            raise error
        done.set()

    background_maintenance(work, 0.001).start()
    assert done.wait(30)
    assert [record.getMessage() for record in caplog.records] == [
        "background maintenance will be retried: ValueError",
        "background maintenance will be retried: StoreUnavailable: no server",
    ]


def test_without_threads_it_is_tried_the_next_time(background_maintenance, monkeypatch):
    def none_left(_):
        raise RuntimeError("can't start new thread")

    times = []
    background = background_maintenance(lambda _: times.append(1), 0.001)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        background.start()
    assert background._thread is None
    background.start()
    eventually(lambda: times)


def test_a_child_has_one_of_its_own(background_maintenance):
    background = background_maintenance(lambda _: None, LONG_S)
    background.rows_written(1)
    parents, wake = background._thread, background._wake
    background.after_fork_in_child()
    assert background._thread is None
    assert background._rows == 0
    background.finish()
    wake.put(None)
    parents.join(30)
    assert not parents.is_alive()


def test_a_store_folds_what_it_writes(url):
    settings = StoreSettings(url=url, upgrade_on_open=True, cache_ttl_s=0)
    with Store(settings=settings, clock=lambda: NOW) as store:
        for n in range(WAKE_ROWS):
            store.record(provider="p", timestamp=NOW - n, latency_ms=n)
        assert store.flush(30)
        eventually(lambda: looked(store).rollup_lag == 0)
        store.record(provider="p", timestamp=NOW)
        assert store.flush(30)
        assert store.get_stats().total_requests == WAKE_ROWS + 1
        assert looked(store).rollup_lag == 1


def test_a_store_folds_what_others_wrote_at_its_interval(url):
    with Store(settings=StoreSettings(url=url, upgrade_on_open=True)) as writer:
        writer.record(provider="p")
        writer.flush(30)
        assert looked(writer).rollup_lag == 1
        settings = StoreSettings(url=url, maintenance_interval_s=0.01, upgrade_on_open=True)
        with Store(settings=settings) as other:
            assert other.get_stats(Window(since=0)).total_requests == 1
            eventually(lambda: looked(writer).rollup_lag == 0)


def test_a_store_that_only_reads_folds_nothing(url):
    Store(settings=StoreSettings(url=url, upgrade_on_open=True)).close()
    settings = StoreSettings(url=url, maintenance_interval_s=0.001)
    with Store(settings=settings, read_only=True) as store:
        assert store.query() == []
        assert store._background._thread is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_folds_what_it_writes(url):
    with Store(settings=StoreSettings(url=url, upgrade_on_open=True)) as store:
        store.record(provider="p")
        assert store.flush(30)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for _ in range(WAKE_ROWS):
                    store.record(provider="p")
                store.flush(30)
                eventually(lambda: looked(store).rollup_lag == 0)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert looked(store).rollup_lag == 0
