"""Coroutines that wait for threads, without a store."""

import asyncio
import contextvars
import os
import signal
import threading
import time

import pytest

from lynkr_store.exceptions import StoreUnavailable
from lynkr_store.process.waiting import Call, Event, SharedCall, Workers, in_thread
from tests.support.stores import eventually

WAIT_S = 60


def run(coroutine):
    async def within():
        async with asyncio.timeout(WAIT_S):
            return await coroutine

    return asyncio.run(within())


def named(name):
    return [thread for thread in threading.enumerate() if thread.name == f"lynkr-store-{name}"]


# -- events --------------------------------------------------------------------------------------


def test_an_event_wakes_coroutines_of_several_loops():
    event, woken = Event(), []

    def wait():
        woken.append(asyncio.run(event.wait()))

    threads = [threading.Thread(target=wait) for _ in range(5)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(event._futures) == 5)
    assert woken == []
    event.set()
    event.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert woken == [True] * 5
    assert event._futures == {}
    assert run(event.wait(0)) is True, "it stays set"


def test_an_event_that_is_not_set_in_time_says_so():
    event = Event()
    began = time.monotonic()
    assert run(event.wait(0)) is False
    assert run(event.wait(0.05)) is False
    assert 0.05 <= time.monotonic() - began < 5
    assert event._futures == {}


def test_an_event_that_is_set_lets_the_loop_continue():
    event, turns = Event(), []
    event.set()

    async def other():
        turns.append(1)

    async def main():
        task = asyncio.create_task(other())
        await event.wait()
        assert turns == [1]
        await task

    run(main())


def test_a_cancelled_wait_leaves_nothing_behind():
    event = Event()

    async def main():
        task = asyncio.create_task(event.wait(WAIT_S))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        event.set()

    run(main())
    assert event._futures == {}


def test_a_loop_that_was_closed_is_no_fault_of_the_thread_that_sets():
    event, loop = Event(), asyncio.new_event_loop()

    async def begin():
        return asyncio.ensure_future(event.wait())

    task = loop.run_until_complete(begin())
    loop.run_until_complete(asyncio.sleep(0))
    [future] = event._futures
    loop.close()
    event._futures[future] = None
    event.set()
    assert event.is_set
    task._log_destroy_pending = False


def test_a_signal_handler_may_set_it():
    event = Event()

    async def main():
        signal.signal(signal.SIGUSR1, lambda *_: event.set())
        os.kill(os.getpid(), signal.SIGUSR1)
        return await event.wait(WAIT_S)

    before = signal.getsignal(signal.SIGUSR1)
    try:
        assert run(main()) is True
    finally:
        signal.signal(signal.SIGUSR1, before)


# -- calls ---------------------------------------------------------------------------------------


def test_a_call_gives_what_the_function_returns_or_raises():
    def fail(error):
        raise error

    assert run(in_thread("test", lambda a, *, b: (a, b), 1, b=2)) == (1, 2)
    for error in (ValueError("x"), StopAsyncIteration(), TimeoutError()):
        with pytest.raises(type(error)) as caught:
            run(in_thread("test", fail, error))
        assert caught.value is error
    with pytest.raises(RuntimeError, match="StopIteration"):  # no coroutine may raise it
        run(in_thread("test", fail, StopIteration()))


def test_a_call_sees_the_context_variables_of_its_coroutine():
    variable = contextvars.ContextVar("variable", default="none")

    async def main():
        variable.set("set")
        return await in_thread("test", variable.get), await Workers(1, "test").run(variable.get)

    assert run(main()) == ("set", "set")


def test_all_that_ask_while_a_call_is_under_way_share_it():
    shared, release, made = SharedCall("shared"), threading.Event(), []

    def fail():
        made.append(1)
        release.wait(WAIT_S)
        raise ValueError("of all")

    async def main():
        tasks = [asyncio.create_task(shared.run(fail)) for _ in range(3)]
        await asyncio.sleep(0)
        release.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(error) for error in outcomes] == ["of all"] * 3
        assert made == [1]
        with pytest.raises(ValueError, match="of all"):
            await shared.run(fail)

    run(main())
    assert made == [1, 1], "what comes later calls again"


def test_a_child_waits_for_no_call_of_the_parents():
    shared, release = SharedCall("shared"), threading.Event()

    async def main():
        task = asyncio.create_task(shared.run(lambda: release.wait(WAIT_S) and None))
        await asyncio.sleep(0)
        pid = os.fork()
        if not pid:
            shared.after_fork_in_child()
            asyncio.run(asyncio.wait_for(shared.run(lambda: None), 10))
            os._exit(0)
        release.set()
        await task
        return pid

    assert os.waitstatus_to_exitcode(os.waitpid(run(main()), 0)[1]) == 0


def test_a_call_whose_thread_was_ended_says_so():
    call = Call(lambda: None)
    call._over.set()
    with pytest.raises(StoreUnavailable, match="ended from outside"):
        run(call.outcome())


def test_its_thread_keeps_no_process_alive():
    release, daemons = threading.Event(), []

    async def main():
        task = asyncio.create_task(in_thread("held", release.wait, WAIT_S))
        await asyncio.sleep(0)
        daemons.extend(thread.daemon for thread in named("held"))
        release.set()
        await task

    run(main())
    assert daemons == [True]


# -- workers -------------------------------------------------------------------------------------


def test_no_more_calls_are_made_at_once_than_there_are_threads():
    workers, lock = Workers(3, "few"), threading.Lock()
    now, most = 0, 0

    def work(number):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        with lock:
            now -= 1
        return number

    async def main():
        return await asyncio.gather(*(workers.run(work, n) for n in range(50)))

    assert run(main()) == list(range(50))
    assert most == 3
    assert len(named("few")) == 3, "they wait for more"
    workers.finish()
    eventually(lambda: not named("few"))
    assert run(main()) == list(range(50)), "it works on, and keeps no thread"
    eventually(lambda: not named("few"))


def test_one_call_after_the_other_takes_a_thread_that_is_there():
    workers = Workers(30, "one")

    async def main():
        return {await workers.run(threading.get_ident) for _ in range(30)}

    assert len(run(main())) < 10, "the next call may come before a thread waits for it"
    workers.finish()


def test_a_thread_that_waits_too_long_ends(monkeypatch):
    monkeypatch.setattr("lynkr_store.process.waiting._LINGER_S", 0.05)
    workers = Workers(2, "brief")
    for _ in range(3):
        assert run(workers.run(lambda: 1)) == 1
        eventually(lambda: not named("brief"))
        assert not workers._threads


def test_a_cancelled_call_that_has_not_begun_is_not_made():
    workers, release, made = Workers(1, "busy"), threading.Event(), []

    async def main():
        first = asyncio.create_task(workers.run(release.wait, WAIT_S))
        second = asyncio.create_task(workers.run(made.append, 1))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        release.set()
        assert await first is True
        await workers.run(made.append, 2)

    run(main())
    assert made == [2]
    workers.finish()


def test_a_thread_that_something_ended_is_replaced(monkeypatch):
    workers = Workers(1, "mortal")
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def end_thread(call):
        original(call)
        raise SystemExit

    original, broken = Call.run, [1]
    monkeypatch.setattr(
        Call, "run", lambda call: end_thread(call) if broken and broken.pop() else original(call)
    )
    assert run(workers.run(lambda: 1)) == 1
    eventually(lambda: not named("mortal"))
    assert run(workers.run(lambda: 2)) == 2
    workers.finish()


def test_without_threads_the_calls_are_made_all_the_same(monkeypatch):
    def start(_):
        raise RuntimeError("can't start new thread")

    workers = Workers(2, "none")
    monkeypatch.setattr(threading.Thread, "start", start)

    async def main():
        assert await in_thread("none", threading.get_ident) == threading.get_ident()
        return await asyncio.gather(*(workers.run(threading.get_ident) for _ in range(3)))

    assert run(main()) == [threading.get_ident()] * 3


def test_a_child_has_threads_of_its_own():
    workers = Workers(2, "forked")

    async def main():
        return await asyncio.gather(*(workers.run(os.getpid) for _ in range(4)))

    assert run(main()) == [os.getpid()] * 4
    held = threading.Event()

    def hold(release):
        with workers._asked:
            held.set()
            release.wait(WAIT_S)

    release = threading.Event()
    holder = threading.Thread(target=hold, args=(release,))
    holder.start()
    held.wait(WAIT_S)
    pid = os.fork()
    if not pid:
        workers.after_fork_in_child()
        os._exit(0 if run(main()) == [os.getpid()] * 4 else 1)
    release.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    workers.finish()
