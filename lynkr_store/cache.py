"""A bounded cache with a time to live, and a decorator that uses it.

Built on `cachetools`. This module adds single-flight computation: while one caller computes an
answer, others with the same question wait for it, in threads and in asyncio.
"""

import asyncio
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Hashable
from functools import partial, wraps
from queue import SimpleQueue
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar, cast

import cachetools

from lynkr_store.process.lifecycle import Forkable

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MISSING: Final = object()


class TTLCache(Forkable):
    """Answers by question, each kept for a limited time. Shared by threads and event loops.

    All callers receive the same object, so values must be immutable. None is cached; failures are
    not. Callers that wait for a computation that fails receive its exception.

    Args:
        ttl_s: Seconds for which an answer is kept after it was computed; 0 switches the cache off.
        max_entries: The maximum number of answers; the least recently used are removed first.
        timer: A monotonic clock in seconds.

    Raises:
        ValueError: ``ttl_s`` is negative or NaN.
    """

    def __init__(
        self,
        ttl_s: float,
        max_entries: int = 256,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        if not ttl_s >= 0:
            raise ValueError("ttl_s: give seconds, 0 or more; 0 switches the cache off")
        self._off = ttl_s == 0
        self._empty = partial(_Answers, max_entries, ttl_s, timer)
        self._answers = self._empty()
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Keep the answers; do not wait for computations of the parent's threads."""
        self._lock = threading.Lock()
        self._flights: dict[Hashable, Any] = {}  # key to _Flight, or loop and key to task

    def __len__(self) -> int:
        """The number of answers in the cache."""
        with self._lock:
            self._answers.expire()
            return len(self._answers)

    def clear(self) -> None:
        """Remove every answer; later callers do not wait for computations in progress."""
        with self._lock:
            self._answers.clear()
            self._flights.clear()

    def get_or_compute(  # noqa: C901 - one block, so that an interruption cannot fall between two
        self, key: Hashable, compute: Callable[[], _T]
    ) -> _T:
        """Return the cached answer, or compute it in this thread, or wait for the thread that does.

        An exception that interrupts a computation (KeyboardInterrupt, SystemExit) is raised only in
        that thread. Waiting threads then compute the answer themselves.
        """
        if self._off:
            return compute()
        own: _Flight | None = None
        try:
            while True:
                with self._lock:
                    answer = self._kept(key)
                    if answer is not _MISSING:
                        return cast("_T", answer)
                    flight: _Flight | None = self._flights.get(key)
                    if flight is None:
                        own = flight = self._flights[key] = _Flight(threading.get_ident())
                if flight is own:
                    flight.answer = compute()
                    self._finish(key, key, flight, flight.answer)
                    flight.end()
                    return cast("_T", flight.answer)
                if flight.leader == threading.get_ident():
                    return compute()  # re-entrant: waiting would be a deadlock
                flight.wait()
                if flight.failure is not None:
                    raise flight.failure  # noqa: TRY301 - the computing thread has handled it
                if flight.answer is not _MISSING:
                    return cast("_T", flight.answer)
        except BaseException as error:
            if own is not None:  # each of these steps may have been done already
                self._finish(key, key, own)
                if own.answer is _MISSING and isinstance(error, Exception):
                    own.failure = error
                own.end()
            raise

    async def get_or_await(self, key: Hashable, compute: Callable[[], Awaitable[_T]]) -> _T:
        """Return the cached answer, or compute it in a task, or wait for the task that does.

        If a waiting caller is cancelled, the computation continues for the others. If the
        computation itself is cancelled or interrupted, waiting callers compute again.
        """
        if self._off:
            return await compute()
        # a future belongs to its event loop, so each loop has its own computations
        place = (asyncio.get_running_loop(), key)
        while True:
            removed: list[Any] = []
            with self._lock:
                answer = self._kept(key)
                if answer is not _MISSING:
                    return cast("_T", answer)
                task = self._flights.get(place)
                if task is None:
                    removed = self._remove_closed_loops()
                    task = asyncio.ensure_future(self._compute(key, place, compute))
                    task.add_done_callback(_retrieve_exception)
                    self._flights[place] = task
            del removed  # after the lock: a task's destructor may acquire it
            if task is asyncio.current_task():
                return await compute()  # re-entrant: waiting would be a deadlock
            await asyncio.wait([task])
            if not task.cancelled() and isinstance(task.exception(), Exception | None):
                return cast("_T", task.result())

    async def _compute(
        self, key: Hashable, place: Hashable, compute: Callable[[], Awaitable[_T]]
    ) -> _T:
        answer: Any = _MISSING
        flight = asyncio.current_task()  # now: the garbage collector may end this without a loop
        try:
            answer = await compute()
        finally:
            self._finish(key, place, flight, answer)
        return cast("_T", answer)

    def _remove_closed_loops(self) -> list[Any]:
        """Remove the computations of event loops that were closed before they ended."""
        closed = [
            place
            for place, flight in self._flights.items()
            if isinstance(flight, asyncio.Future) and flight.get_loop().is_closed()
        ]
        return [self._flights.pop(place) for place in closed]

    def _kept(self, key: Hashable) -> Any:
        try:
            return self._answers[key]
        except BaseException:
            self._answers = self._empty()  # a change of it may have been interrupted
            raise

    def _finish(
        self, key: Hashable, place: Hashable, flight: object, answer: Any = _MISSING
    ) -> None:
        """End a computation, and keep its answer unless `clear` was called meanwhile."""
        if self._flights.get(place) is not flight:
            return  # no lock: the garbage collector may call this while the thread holds it
        with self._lock:
            if self._flights.get(place) is flight:
                try:
                    if answer is not _MISSING:
                        self._answers[key] = answer
                except BaseException:
                    self._answers = self._empty()
                    raise
                finally:
                    del self._flights[place]


def timer_of(clock: Callable[[], int]) -> Callable[[], float]:
    """A timer for a `TTLCache`, in seconds, by a clock that tells epoch milliseconds.

    A step back of the clock counts as time that passed, so no answer is kept longer than its time
    to live. Calls must not overlap.
    """
    last_ms, passed_ms = clock(), 0

    def timer() -> float:
        nonlocal last_ms, passed_ms
        now_ms = clock()
        passed_ms += abs(now_ms - last_ms)
        last_ms = now_ms
        return passed_ms / 1000

    return timer


class _Answers(cachetools.TTLCache[Hashable, Any]):
    """Reports a missing answer in a third of the time of ``get``."""

    def __missing__(self, key: Hashable) -> object:
        return _MISSING


class _Flight:
    """A computation in progress, and the thread that runs it.

    If it has ended with neither `answer` nor `failure`, it was interrupted. `threading.Event`
    cannot be used: an exception that a signal handler raises inside its `set` may leave it locked.
    """

    def __init__(self, leader: int) -> None:
        self.leader = leader
        self.answer: Any = _MISSING
        self.failure: Exception | None = None
        self._ended = False
        self._wake: SimpleQueue[None] = SimpleQueue()  # an item means: check again

    def end(self) -> None:
        """Wake the waiting threads; may be called again."""
        self._ended = True
        self._wake.put(None)

    def wait(self) -> None:
        """Return when the computation has ended."""
        try:
            while not self._ended:
                self._wake.get()
        finally:
            self._wake.put(None)  # for the next waiting thread


def _retrieve_exception(task: asyncio.Future[Any]) -> None:
    """Retrieve a failure if every caller was cancelled; otherwise asyncio logs that nobody did."""
    if not task.cancelled():
        task.exception()


class _Caching(Protocol):
    _cache: TTLCache


_S = TypeVar("_S", bound=_Caching)


def cached(
    question: Callable[_P, Hashable],
) -> Callable[[Callable[Concatenate[_S, _P], _T]], Callable[Concatenate[_S, _P], _T]]:
    """Cache the answers of a method, plain or ``async``, in its object's ``_cache``.

    Args:
        question: Takes the method's arguments and returns a key for the question. A default that
            moves with time, such as the last 24 hours, counts as one question.
    """

    def decorate(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
        name = method.__qualname__

        def key_of(*args: _P.args, **kwargs: _P.kwargs) -> Hashable:
            try:
                return name, question(*args, **kwargs)
            except TypeError as error:  # a wrong call: name what was called
                words = str(error).replace(f"{question.__name__}()", f"{name}()")
                raise TypeError(words) from error

        @wraps(method)
        def answer(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> Any:
            key = key_of(*args, **kwargs)
            return self._cache.get_or_compute(key, lambda: method(self, *args, **kwargs))

        @wraps(method)
        async def answer_later(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> Any:
            key = key_of(*args, **kwargs)
            return await self._cache.get_or_await(
                key, lambda: cast("Awaitable[Any]", method(self, *args, **kwargs))
            )

        return cast(
            "Callable[Concatenate[_S, _P], _T]",
            answer_later if inspect.iscoroutinefunction(method) else answer,
        )

    return decorate
