"""Lets coroutines wait for threads, without an event loop's default executor.

The default executor has few threads, which a host's own blocking calls may occupy, and it accepts
no work once the interpreter exits. The threads here are daemons, so they do not keep the process
alive.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, Final, Generic, ParamSpec, TypeVar

from lynkr_store.exceptions import StoreUnavailable
from lynkr_store.process.lifecycle import Forkable
from lynkr_store.process.threads import start_thread

_LINGER_S: Final = 10.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Event:
    """Set once, by any thread; coroutines of any event loop wait for it.

    It has no lock, so that a signal handler may set it at any moment.
    """

    def __init__(self) -> None:
        self._set = False
        self._futures: dict[asyncio.Future[None], None] = {}

    @property
    def is_set(self) -> bool:
        """Whether it is set."""
        return self._set

    def set(self) -> None:
        """Wake every waiting coroutine; never blocks, and may be called again."""
        self._set = True
        for future in list(self._futures):
            with suppress(RuntimeError):  # the future's loop was closed
                future.get_loop().call_soon_threadsafe(_wake, future)

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Return when it is set, or after ``timeout_s`` seconds; returns whether it is set."""
        # no asyncio.timeout(): CPython 3.11 crashed when garbage collection ended a task inside it
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        timer = None if timeout_s is None else loop.call_later(timeout_s, _wake, future)
        self._futures[future] = None
        try:
            if self._set:  # checked after the future is registered, so that no `set` is missed
                await asyncio.sleep(0)  # a caller that polls must not block its loop
            else:
                await future
        finally:
            del self._futures[future]
            if timer is not None:
                timer.cancel()
        return self._set


def _wake(future: "asyncio.Future[None]") -> None:
    if not future.done():  # its coroutine may have continued or been cancelled
        future.set_result(None)


class Call(Generic[_T]):
    """One call of a function in a thread; coroutines of any event loop wait for its result.

    The function sees the context variables of the coroutine that requested the call.
    """

    def __init__(self, function: Callable[[], _T]) -> None:
        self._function: Callable[[], _T] | None = partial(copy_context().run, function)
        self._over = Event()
        self._result: Any = None
        self._error: BaseException | None = StoreUnavailable(
            "a thread of the store was ended from outside; try again"
        )

    @property
    def is_over(self) -> bool:
        """Whether the call has ended."""
        return self._over.is_set

    def run(self) -> None:
        """Call the function; the coroutines receive its result or exception."""
        try:
            assert self._function  # noqa: S101 - it is called once
            self._result, self._error = self._function(), None
        except BaseException as error:  # noqa: BLE001 - raised in the caller, not in this thread
            self._error = error
        finally:
            self._function = None  # releases what only the call kept alive
            self._over.set()

    async def outcome(self) -> _T:
        """Wait for the function's result, or raise its exception."""
        await self._over.wait()
        if self._error is not None:
            raise self._error
        result: _T = self._result
        return result


async def in_thread(
    name: str, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
) -> _T:
    """Call a function in a new thread and wait for it.

    If the coroutine is cancelled, it stops waiting, and the call continues.
    """
    return await _start(partial(function, *args, **kwargs), name).outcome()


class SharedCall(Forkable):
    """A call in a new thread; callers that arrive during the call wait for the same one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._call: Call[None] | None = None

    def after_fork_in_child(self) -> None:
        """Start without a call; the parent's continues in the parent."""
        self._call = None

    async def run(self, function: Callable[[], None]) -> None:
        """Call the function unless a call is in progress; raise what the call raises."""
        call = self._call
        if call is None or call.is_over:
            call = self._call = _start(function, self._name)
        await call.outcome()


class Workers(Forkable):
    """At most ``most`` threads that run the calls of coroutines, in the order of the requests.

    An idle thread waits a while for the next call, because starting a thread takes longer than most
    reads, and then ends.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._linger_s = _LINGER_S
        self._reset()

    def _reset(self) -> None:
        self._asked = threading.Condition()
        self._calls: deque[Call[Any]] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0

    def after_fork_in_child(self) -> None:
        """Start without calls; the threads are the parent's."""
        self._reset()

    async def run(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call a function in one of the threads and wait for it.

        If the coroutine is cancelled before the call begins, the call is not made.
        """
        call = Call(partial(function, *args, **kwargs))
        with self._asked:
            self._calls.append(call)
            self._asked.notify()
            if len(self._calls) > self._idle:
                self._add_thread()
            alone = not self._threads
            if alone:
                self._calls.remove(call)
        if alone:  # the system gives no threads: call it here
            call.run()
        try:
            return await call.outcome()
        finally:
            with self._asked, suppress(ValueError):
                self._calls.remove(call)

    def finish(self) -> None:
        """Make the threads end as soon as they are idle."""
        self._linger_s = 0
        with self._asked:
            self._asked.notify_all()

    def _add_thread(self) -> None:
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        if len(self._threads) < self._most and (thread := start_thread(self._work, self._name)):
            self._threads.add(thread)

    def _work(self) -> None:
        while (call := self._next_call()) is not None:
            call.run()
            del call  # do not keep its result alive in this thread

    def _next_call(self) -> Call[Any] | None:
        with self._asked:
            if not self._calls:
                self._idle += 1
                try:
                    self._asked.wait(self._linger_s)
                finally:
                    self._idle -= 1
            with suppress(IndexError):
                return self._calls.popleft()
            # under the same lock: the next caller must not count on this thread
            self._threads.discard(threading.current_thread())
            return None


def _start(function: Callable[[], _T], name: str) -> Call[_T]:
    """Call a function in a new thread; without threads, call it here."""
    call = Call(function)
    if start_thread(call.run, name) is None:
        call.run()
    return call
