"""Exceptions that a signal handler raises, at every moment of a call: Ctrl-C, a task's time limit.

`sys.settrace` raises them between two instructions. Where a call takes locks, only at those where
CPython may run a handler: between a lock's release and the end of its `with` it never does.
"""

# ruff: noqa: B023 - each moment's functions are called in its own turn of the loop

import asyncio
import itertools
import shutil
import sqlite3
import threading
from queue import SimpleQueue

import cachetools
import pytest

import lynkr_store
from lynkr_store import RoutingEvent, Store, StoreSettings
from lynkr_store.cache import TTLCache
from lynkr_store.ingest.validation import TextPolicy
from lynkr_store.ingest.writer import Writer
from tests.ingest.test_writer import Sink
from tests.ingest.test_writer import adds_up as account_adds_up
from tests.support.interrupts import Interruption, interrupted, moments
from tests.support.stores import adds_up, eventually
from tests.test_cache import waits

pytestmark = pytest.mark.sample(3)

OURS = (str(lynkr_store.__path__[0]),)
WITH_THREADING = (*OURS, threading.__file__)


class TimeLimit(Exception):
    """What a task's time limit raises."""


# -- record() ----------------------------------------------------------------------------------


def written(writer):
    return writer.counters().pending == 0


def fresh(sink, **options):
    settings = {
        "policy": TextPolicy(),
        "clock": itertools.count(1_750_000_000_000).__next__,
        "max_rows": 100,
        "max_bytes": 10**6,
        "batch_rows": 10,
        "interval_s": 0.001,
    }
    return Writer(sink, **settings | options)


def running(sink, **options):
    """A writer that has written one record."""
    writer = fresh(sink, **options)
    writer.submit({"provider": "first"})
    assert writer.flush(30)
    return writer


def of_rows(sink):
    return running(sink)


def with_a_batch_to_fill(sink):
    writer = running(sink, interval_s=3_600, batch_rows=3)
    writer.submit({"provider": "1 of 3"})
    writer.submit({"provider": "2 of 3"})
    return writer


def without_room_for_a_row(sink):
    writer = running(sink, interval_s=3_600, batch_rows=3, max_rows=2)
    sink.open.clear()
    for _ in range(30):
        writer.submit({"provider": "in the way"})
    return writer


def without_room_for_bytes(sink):
    writer = running(sink, max_bytes=10_000)
    sink.open.clear()
    while writer.submit({"provider": "in the way", "request_text": "x" * 2_000}):
        pass
    return writer


KINDS = {
    "plain": (of_rows, lambda: {"provider": "p", "timestamp": 1_750_000_000_000}),
    "texts": (of_rows, lambda: {"provider": "p", "request_text": "a", "response_text": "b"}),
    "large": (of_rows, lambda: {"provider": "p", "request_text": "a" * 100_000}),
    "not packable": (of_rows, lambda: {"provider": "p", "attributes": {"a": (1, {"b": 1})}}),
    "event": (of_rows, lambda: RoutingEvent(provider="p")),
    "bad": (of_rows, lambda: {"provider": {1}}),
    "first": (fresh, lambda: {"provider": "p"}),
    "batch": (with_a_batch_to_fill, lambda: {"provider": "p"}),
    "no row": (without_room_for_a_row, lambda: {"provider": "p"}),
    "no bytes": (without_room_for_bytes, lambda: {"provider": "p", "request_text": "x" * 9_000}),
    "too large": (of_rows, lambda: {"provider": "p", "attributes": (["x" * 2_000_000],)}),
}


SHORT = {"texts", "first", "batch", "no bytes"}
"""The kinds whose every moment is tried in the ordinary run."""


@pytest.mark.sample(12)
@pytest.mark.parametrize(
    ("kind", "stride"),
    [
        *((kind, 1) for kind in sorted(SHORT)),
        *((kind, 17) for kind in sorted(KINDS.keys() - SHORT)),
        *(pytest.param(kind, 1, marks=pytest.mark.slow) for kind in sorted(KINDS.keys() - SHORT)),
    ],
)
def test_record_is_right_whatever_interrupts_it(kind, stride):
    make, record = KINDS[kind]
    for moment in moments(stride):
        sink = Sink()
        writer = make(sink)
        before = writer.counters()
        error = (Interruption, TimeLimit)[moment % 2]()
        one = record()
        came = interrupted(lambda: writer.submit(one), moment, OURS, everywhere=True, error=error)
        account = writer.counters()
        assert account_adds_up(account)
        assert account.submitted - before.submitted in (0, 1), moment
        sink.open.set()
        if account.submitted == before.submitted and make is with_a_batch_to_fill:
            writer.submit({"provider": "3 of 3"})
        eventually(lambda: written(writer), 30)
        assert writer.submit({"provider": "next"})
        if make in (with_a_batch_to_fill, without_room_for_a_row):
            writer.flush(30)
        eventually(lambda: written(writer), 30)
        account = writer.counters()
        assert account_adds_up(account)
        assert account.written == len(sink.providers)
        assert sink.providers[-1] == "next"
        assert len(writer._queue) == writer._queue._units.tell() == 0, "every place is free"
        writer.close(30)
        if not came:
            break
    print(f"{kind}: interrupted at {moment} moments, every {stride}")
    assert moment > 60


@pytest.mark.slow
@pytest.mark.parametrize("event", [None, {"provider": "p"}, RoutingEvent(provider="p")])
def test_a_stores_record_is_right_whatever_interrupts_it(tmp_path, event):
    settings = StoreSettings(url=f"sqlite:///{tmp_path}/t.db", flush_interval_s=0.001)
    with Store(settings=settings) as store:
        store.record(provider="first")
        assert store.flush(30)
        for moment in moments():
            came = interrupted(
                lambda: store.record(event, provider="p") if event is None else store.record(event),
                moment,
                OURS,
                everywhere=True,
            )
            store.record(provider="next")
            eventually(lambda: store.health().pending == 0)
            assert adds_up(store.health())
            assert store._writer._queue._units.tell() == 0
            if not came:
                break
        assert moment > 40


# -- flush() and close() -----------------------------------------------------------------------


def is_free(lock):
    """Whether another thread gets the lock."""
    got = []

    def take():
        if lock.acquire(timeout=30):
            lock.release()
            got.append(lock)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join(60)
    return bool(got)


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_an_interrupted_flush_holds_nothing_up(stride):
    for moment in moments(stride):
        sink = Sink()
        writer = running(sink, interval_s=0.001)
        sink.open.clear()
        for n in range(25):
            writer.submit({"provider": str(n)})
        threading.Timer(0.01, sink.open.set).start()
        came = interrupted(lambda: writer.flush(30), moment, WITH_THREADING, everywhere=False)
        assert is_free(writer._handoff.lock)
        sink.open.set()
        eventually(lambda: written(writer))
        assert writer.submit({"provider": "next"})
        assert writer.flush(30)
        assert sink.providers == ["first", *map(str, range(25)), "next"]
        assert account_adds_up(writer.counters())
        writer.close(30)
        if not came:
            break
    print(f"flush: interrupted at {moment} moments, every {stride}")
    assert moment > 20


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 11])
@pytest.mark.parametrize("spool", [False, True])
def test_an_interrupted_close_is_finished_at_the_end_of_the_interpreter(
    tmp_path, sqlite_at_head, stride, spool
):
    for moment in moments(stride):
        path = tmp_path / f"{moment}.db"
        shutil.copy(sqlite_at_head, path)
        options = {"spool_path": tmp_path / f"{moment}.spool"} if spool else {}
        store = Store(settings=StoreSettings(url=f"sqlite:///{path}", **options))
        for n in range(100):
            assert store.record(provider="p", request_id=str(n))
        came = interrupted(lambda: store.close(30), moment, WITH_THREADING, everywhere=False)
        assert is_free(store._writer._handoff.lock)
        store._finalizer()  # what the interpreter calls when it ends
        health = store.health()
        assert adds_up(health)
        kept = health.written + health.spooled  # a slow machine has no time for the database
        assert (kept, health.pending, health.dropped) == (100, 0, 0), moment
        with sqlite3.connect(path) as connection:
            (rows,) = connection.execute("SELECT count(*) FROM routing_telemetry").fetchone()
        connection.close()
        assert rows == health.written
        if not came:
            break
    print(f"close: interrupted at {moment} moments, every {stride}")
    assert moment > 40


@pytest.mark.slow
def test_a_close_without_time_that_is_interrupted_counts_each_record_once():
    for moment in moments():
        sink = Sink()
        writer = running(sink, batch_rows=3, interval_s=0.001)
        sink.open.clear()
        sink.entered.clear()
        for n in range(20):
            writer.submit({"provider": str(n)})
        assert sink.entered.wait(30)
        came = interrupted(lambda: writer.close(0), moment, OURS, everywhere=False)
        writer.close(0)
        account = writer.counters()
        assert account_adds_up(account)
        assert (account.written, account.pending) == (1, 0)
        assert account.dropped_by.keys() <= {"deadline", "outcome_unknown"}
        assert account.dropped_by.total() == 20
        sink.open.set()
        if not came:
            break
    print(f"close without time: interrupted at {moment} moments")
    assert moment > 20


# -- the cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Interruption, TimeLimit])
def test_an_interrupted_computation_leaves_nobody_waiting(kind):
    files = (*WITH_THREADING, cachetools.__file__)
    for moment in moments():
        cache, answers, failures, computing = TTLCache(5), [], [], SimpleQueue()

        def ask():
            computing.get(timeout=30)
            try:
                answers.append(cache.get_or_compute("key", lambda: "mine"))
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        waiter = threading.Thread(target=ask)
        waiter.start()

        def compute():
            computing.put(None)
            if cache._flights:
                eventually(lambda: waits(waiter), 30)
            return "the first's"

        came = interrupted(
            lambda: cache.get_or_compute("key", compute),
            moment,
            files,
            everywhere=False,
            error=kind(),
        )
        computing.put(None)
        waiter.join(30)
        assert not waiter.is_alive(), f"it waits for ever: {moment}"
        assert answers in (["mine"], ["the first's"]) or (
            kind is TimeLimit and isinstance(failures[0], TimeLimit)
        )
        assert not cache._flights
        assert cache.get_or_compute("key", lambda: "now") in ("mine", "now", "the first's")
        assert cache.get_or_compute("other", lambda: "other") == "other"
        assert len(cache) == 2
        if not came:
            break
    print(f"cache: interrupted at {moment} moments")
    assert moment > 20


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_waiter_computes_itself_where_another_thread_is_interrupted(kind):
    cache, answers, interruptions = TTLCache(5), [], []
    computing, waiting = threading.Event(), threading.Event()

    def compute():
        computing.set()
        assert waiting.wait(30)
        raise kind

    def lead():
        try:
            cache.get_or_compute("key", compute)
        except kind as error:
            interruptions.append(error)

    leader = threading.Thread(target=lead)
    leader.start()
    assert computing.wait(30)
    waiters = [
        threading.Thread(target=lambda: answers.append(cache.get_or_compute("key", lambda: "own")))
        for _ in range(3)
    ]
    for waiter in waiters:
        waiter.start()
    eventually(lambda: all(map(waits, waiters)), 30)
    waiting.set()
    for thread in (leader, *waiters):
        thread.join(30)
    assert answers == ["own"] * 3
    assert len(interruptions) == 1


def test_a_task_computes_itself_where_the_computation_is_cancelled():
    cache, asked, begun = TTLCache(5), [], asyncio.Event()

    async def compute():
        asked.append(asyncio.current_task())
        begun.set()
        if len(asked) == 1:
            await asyncio.sleep(60)
        return "answer"

    async def main():
        callers = [asyncio.create_task(cache.get_or_await("key", compute)) for _ in range(3)]
        await begun.wait()
        asked[0].cancel()
        return await asyncio.gather(*callers)

    assert asyncio.run(main()) == ["answer"] * 3
    assert len(asked) == 2
