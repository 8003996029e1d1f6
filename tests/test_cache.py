"""The cache: time moves by hand, threads and tasks meet at barriers."""

import asyncio
import contextlib
import inspect
import sys
import threading
import time

import pytest
from sqlalchemy import event

from lynkr_store import AsyncStore, Store
from lynkr_store.cache import TTLCache, _Flight, cached
from tests.support.stores import eventually


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Asked:
    """A question whose answer counts how often it was computed."""

    def __init__(self, ttl_s=5.0, **options):
        self.clock = Clock()
        self._cache = TTLCache(ttl_s, timer=self.clock, **options)
        self.computed = 0

    @cached(lambda key=None: key)
    def answer(self, key=None):
        """Say which computation it was."""
        self.computed += 1
        if key == "fails":
            raise LookupError(key)
        return None if key == "none" else (self.computed, key)

    @cached(lambda key=None: key)
    def other(self, key=None):
        self.computed += 1
        return "other", key

    @cached(lambda key=None: key)
    async def later(self, key=None):
        self.computed += 1
        await asyncio.sleep(0)
        if key == "fails":
            raise LookupError(key)
        return None if key == "none" else (self.computed, key)


def waits(thread):
    """Whether a thread waits for another's computation."""
    frame = sys._current_frames().get(thread.ident)
    return frame is not None and frame.f_code is _Flight.wait.__code__


def test_an_answer_is_kept_until_its_time_is_over():
    asked = Asked()
    first = asked.answer("a")
    asked.clock.now = 4.999
    assert asked.answer("a") is first
    asked.clock.now = 5.0
    assert asked.answer("a") == (2, "a")


def test_time_is_counted_from_the_computation_not_from_the_last_use():
    asked = Asked()
    asked.answer("a")
    for second in range(1, 6):
        asked.clock.now = second
        asked.answer("a")
    assert asked.computed == 2


@pytest.mark.parametrize("key", ["none", None, 0, ""])
def test_none_is_kept_too(key):
    asked = Asked()
    asked.answer(key)
    asked.answer(key)
    assert asked.computed == 1


def test_failures_are_not_kept():
    asked = Asked()
    for _ in range(2):
        with pytest.raises(LookupError):
            asked.answer("fails")
    assert asked.computed == 2


def test_keys_methods_and_objects_do_not_share():
    asked, another = Asked(), Asked()
    assert asked.answer("a") != asked.answer("b")
    assert asked.other("a") == ("other", "a")
    assert another.answer("a") == (1, "a")
    assert another.computed == 1


def test_the_number_of_answers_is_bounded():
    asked = Asked(max_entries=3)
    for key in range(10):
        asked.answer(key)
    assert len(asked._cache) == 3
    asked.answer(9)
    assert asked.computed == 10
    asked.clock.now = 99
    assert len(asked._cache) == 0


def test_nothing_is_kept_when_it_is_off():
    asked = Asked(ttl_s=0)
    asked.answer("a")
    asked.answer("a")
    assert asked.computed == 2
    assert asyncio.run(asked.later("a")) == (3, "a")
    assert asyncio.run(asked.later("a")) == (4, "a")


@pytest.mark.parametrize("ttl_s", [-1, float("nan")])
def test_a_bad_time_is_named(ttl_s):
    with pytest.raises(ValueError, match="ttl_s"):
        TTLCache(ttl_s)


def test_clear_forgets():
    asked = Asked()
    asked.answer("a")
    asked._cache.clear()
    asked.answer("a")
    assert asked.computed == 2


def in_threads(count, work):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_hundred_threads_that_miss_together_compute_once():
    cache, barrier, computed, answers = TTLCache(5), threading.Barrier(100), [], []

    def compute():
        computed.append(1)
        release.wait(5)
        return "answer"

    release = threading.Event()

    def ask():
        if barrier.wait(10) == 0:
            threading.Timer(0.05, release.set).start()
        answers.append(cache.get_or_compute("key", compute))

    in_threads(100, ask)
    assert computed == [1]
    assert answers == ["answer"] * 100


def test_threads_that_wait_for_a_failure_get_it_and_the_next_tries_again():
    cache, started, release, failures = TTLCache(5), threading.Event(), threading.Event(), []

    def fail():
        started.set()
        release.wait(5)
        raise LookupError("once")

    def ask(compute):
        try:
            cache.get_or_compute("key", compute)
        except LookupError as error:
            failures.append(str(error))

    leader = threading.Thread(target=ask, args=[fail])
    leader.start()
    assert started.wait(5)
    waiter = threading.Thread(target=ask, args=[lambda: "never"])
    waiter.start()
    eventually(lambda: waits(waiter))
    release.set()
    leader.join(5)
    waiter.join(5)
    assert failures == ["once", "once"]
    assert cache.get_or_compute("key", lambda: "now") == "now"


def test_other_keys_do_not_wait():
    cache, started, release = TTLCache(5), threading.Event(), threading.Event()

    def slow():
        started.set()
        release.wait(5)

    thread = threading.Thread(target=cache.get_or_compute, args=["slow", slow])
    thread.start()
    assert started.wait(5)
    assert cache.get_or_compute("fast", lambda: 1) == 1
    release.set()
    thread.join(5)


def test_a_computation_may_ask_its_own_question():
    cache = TTLCache(5)
    assert cache.get_or_compute("key", lambda: cache.get_or_compute("key", lambda: 1) + 1) == 2

    async def inner():
        return 1

    async def outer():
        return await cache.get_or_await("other", inner) + 1

    assert asyncio.run(cache.get_or_await("other", outer)) == 2


def test_what_was_computed_before_a_clear_is_not_kept_after_it():
    cache = TTLCache(5)

    def compute():
        cache.clear()
        return "old"

    assert cache.get_or_compute("key", compute) == "old"
    assert cache.get_or_compute("key", lambda: "new") == "new"

    async def compute_later():
        cache.clear()
        return "old"

    async def new():
        return "new"

    assert asyncio.run(cache.get_or_await("later", compute_later)) == "old"
    assert asyncio.run(cache.get_or_await("later", new)) == "new"


def test_a_hundred_tasks_that_miss_together_compute_once():
    asked = Asked()

    async def ask():
        return await asyncio.gather(*(asked.later("a") for _ in range(100)))

    assert asyncio.run(ask()) == [(1, "a")] * 100
    assert asyncio.run(asked.later("a")) == (1, "a"), "kept for another loop"


def test_async_failures_reach_every_waiter_and_are_not_kept():
    asked = Asked()

    async def ask():
        return await asyncio.gather(
            *(asked.later("fails") for _ in range(3)), return_exceptions=True
        )

    assert [type(answer) for answer in asyncio.run(ask())] == [LookupError] * 3
    assert asked.computed == 1
    assert asyncio.run(asked.later("none")) is None


def test_a_cancelled_caller_leaves_the_computation_to_the_others():
    cache = TTLCache(5)

    async def main():
        started, release = asyncio.Event(), asyncio.Event()

        async def compute():
            started.set()
            await release.wait()
            return "answer"

        first = asyncio.create_task(cache.get_or_await("key", compute))
        await started.wait()
        second = asyncio.create_task(cache.get_or_await("key", compute))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        release.set()
        assert await second == "answer"
        assert first.cancelled()

    asyncio.run(main())


def test_a_failure_that_nobody_waits_for_is_silent():
    cache = TTLCache(5)

    async def main():
        async def compute():
            await asyncio.sleep(0)
            raise LookupError

        only = asyncio.create_task(cache.get_or_await("key", compute))
        await asyncio.sleep(0)
        only.cancel()
        await asyncio.sleep(0.01)

    asyncio.run(main(), debug=True)


def test_a_computation_that_ends_with_its_loop_is_repeated_in_the_next():
    cache = TTLCache(5)

    async def never():
        await asyncio.sleep(3600)

    async def cut_off():
        waiting = asyncio.create_task(cache.get_or_await("key", never))
        await asyncio.sleep(0)
        waiting.cancel()

    async def now():
        return 1

    asyncio.run(cut_off())
    assert asyncio.run(cache.get_or_await("key", now)) == 1


def test_two_loops_at_once_do_not_wait_for_each_others_futures():
    cache, barrier, answers = TTLCache(5), threading.Barrier(2), []

    async def compute():
        await asyncio.to_thread(barrier.wait, 10)  # both are computing
        return "answer"

    def ask():
        answers.append(asyncio.run(cache.get_or_await("key", compute)))

    in_threads(2, ask)
    assert answers == ["answer"] * 2


def test_a_decorated_method_keeps_its_name_and_signature():
    assert Asked.answer.__name__ == "answer"
    assert "which computation" in Asked.answer.__doc__
    assert list(inspect.signature(Asked.answer).parameters) == ["self", "key"]
    assert inspect.iscoroutinefunction(Asked.later)
    assert not inspect.iscoroutinefunction(Asked.answer)


@contextlib.contextmanager
def slow_queries(engine):
    """Slow every read of the table down, and list it."""
    ran = []

    def note(connection, cursor, statement, *_):
        if "FROM routing_telemetry" in statement:
            ran.append(statement)
            time.sleep(0.05)  # so that all others ask meanwhile

    event.listen(engine, "before_cursor_execute", note)
    yield ran
    event.remove(engine, "before_cursor_execute", note)


def test_a_hundred_threads_ask_a_store_and_it_asks_the_database_once(url):
    with Store(url) as store:
        store.add_many([{"provider": "ollama"}])
        barrier, answers = threading.Barrier(100), []

        def ask():
            barrier.wait(10)
            answers.append(store.get_stats())

        with slow_queries(store.engine) as alone:
            store.get_stats()
        store._cache.clear()
        with slow_queries(store.engine) as ran:
            in_threads(100, ask)
    assert len(ran) == len(alone) > 0
    assert len(answers) == 100
    assert all(answer is answers[0] for answer in answers)
    assert answers[0].total_requests == 1


def test_a_hundred_tasks_ask_a_store_and_it_asks_the_database_once(url):
    async def main():
        async with AsyncStore(url) as store:
            await store.add_many([{"provider": "ollama"}])
            engine = store._database.engine
            if store._engines:
                engine = (await store._engines.engine()).sync_engine
            with slow_queries(engine) as alone:
                await store.get_stats()
            store._cache.clear()
            with slow_queries(engine) as ran:
                answers = await asyncio.gather(*(store.get_stats() for _ in range(100)))
        return alone, ran, answers

    alone, ran, answers = asyncio.run(main())
    assert len(ran) == len(alone) > 0
    assert all(answer is answers[0] for answer in answers)
    assert answers[0].total_requests == 1
