"""A bounded cache with a time to live, and the decorator that uses one.

Built on `cachetools`, to which this adds one flight per key: while an answer is being computed,
whoever asks the same waits for it, in threads and in asyncio alike.
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
    """Answers by the question asked, each kept for a time. Shared between threads and loops.

    Values are given to every caller alike, so they must be immutable. Failures are not kept; None
    is. Whoever waits for a computation that fails gets its failure.

    Args:
        ttl_s: Seconds an answer is kept, from its computation's end; 0 switches the cache off.
        max_entries: Answers kept; the least recently used go first.
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
        """Wait for no thread of the parent's; what was answered stays answered."""
        self._lock = threading.Lock()
        self._flights: dict[Hashable, Any] = {}  # key to _Flight, or loop and key to task

    def __len__(self) -> int:
        """How many answers are kept now."""
        with self._lock:
            self._answers.expire()
            return len(self._answers)

    def clear(self) -> None:
        """Forget every answer, those under way included: nobody new waits for them."""
        with self._lock:
            self._answers.clear()
            self._flights.clear()

    def get_or_compute(  # noqa: C901 - one block, so that no interruption falls between two
        self, key: Hashable, compute: Callable[[], _T]
    ) -> _T:
        """The kept answer, or the one computed now, by this thread or one that is at it.

        What interrupts a computation (KeyboardInterrupt, SystemExit) is its own thread's: those
        who wait for it compute themselves.
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
                    self._land(key, key, flight, flight.answer)
                    flight.end()
                    return cast("_T", flight.answer)
                if flight.leader == threading.get_ident():
                    return compute()  # asked again while computing: waiting would be for oneself
                flight.wait()
                if flight.failure is not None:
                    raise flight.failure  # noqa: TRY301 - who leads has handled it
                if flight.answer is not _MISSING:
                    return cast("_T", flight.answer)
        except BaseException as error:
            if own is not None:  # each step here may have been done before
                self._land(key, key, own)
                if own.answer is _MISSING and isinstance(error, Exception):
                    own.failure = error
                own.end()
            raise

    async def get_or_await(self, key: Hashable, compute: Callable[[], Awaitable[_T]]) -> _T:
        """The kept answer, or the one computed now, by this task or one that is at it.

        A caller that is cancelled leaves the computation to the others; where the computation is
        cancelled, or something interrupts it, those who wait for it compute again.
        """
        if self._off:
            return await compute()
        # a future belongs to its loop: each has flights of its own
        place = (asyncio.get_running_loop(), key)
        while True:
            gone: list[Any] = []
            with self._lock:
                answer = self._kept(key)
                if answer is not _MISSING:
                    return cast("_T", answer)
                task = self._flights.get(place)
                if task is None:
                    gone = self._of_closed_loops()
                    task = asyncio.ensure_future(self._fly(key, place, compute))
                    task.add_done_callback(_look_at)
                    self._flights[place] = task
            del gone  # only now: what ends with a task may want the lock
            if task is asyncio.current_task():
                return await compute()  # asked again while computing: waiting would be for oneself
            await asyncio.wait([task])
            if not task.cancelled() and isinstance(task.exception(), Exception | None):
                return cast("_T", task.result())

    async def _fly(
        self, key: Hashable, place: Hashable, compute: Callable[[], Awaitable[_T]]
    ) -> _T:
        answer: Any = _MISSING
        flight = asyncio.current_task()  # asked now: the collector may end this without a loop
        try:
            answer = await compute()
        finally:
            self._land(key, place, flight, answer)
        return cast("_T", answer)

    def _of_closed_loops(self) -> list[Any]:
        """Take out the computations of loops that were closed in the middle of them."""
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
            self._answers = self._empty()  # it may have been interrupted in the middle of a change
            raise

    def _land(self, key: Hashable, place: Hashable, flight: object, answer: Any = _MISSING) -> None:
        """End a flight, and keep its answer unless `clear` came between."""
        if self._flights.get(place) is not flight:
            return  # without the lock, which this thread may hold: the collector ends flights too
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


class _Answers(cachetools.TTLCache[Hashable, Any]):
    """Says that an answer is missing in a third of the time that its ``get`` takes."""

    def __missing__(self, key: Hashable) -> object:
        return _MISSING


class _Flight:
    """A computation under way, and the thread that is at it.

    Where it ended and there is neither `answer` nor `failure`, something interrupted it.
    `threading.Event` does not do here: an exception that a signal handler raises in its `set` may
    leave it locked.
    """

    def __init__(self, leader: int) -> None:
        self.leader = leader
        self.answer: Any = _MISSING
        self.failure: Exception | None = None
        self._ended = False
        self._wake: SimpleQueue[None] = SimpleQueue()  # holds one when it ended, or for nothing

    def end(self) -> None:
        """Let the others go on; may be called again."""
        self._ended = True
        self._wake.put(None)

    def wait(self) -> None:
        """Return when it ended."""
        try:
            while not self._ended:
                self._wake.get()
        finally:
            self._wake.put(None)  # for the next who waits


def _look_at(task: asyncio.Future[Any]) -> None:
    """See a failure that every caller was cancelled before seeing; asyncio would complain."""
    if not task.cancelled():
        task.exception()


class _Caching(Protocol):
    _cache: TTLCache


_S = TypeVar("_S", bound=_Caching)


def cached(
    question: Callable[_P, Hashable],
) -> Callable[[Callable[Concatenate[_S, _P], _T]], Callable[Concatenate[_S, _P], _T]]:
    """Answer a method, plain or ``async``, from its object's ``_cache``.

    Args:
        question: Takes the method's arguments and returns what is asked, as a key. A default
            that moves with time, such as the last 24 hours, is one question.
    """

    def decorate(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
        name = method.__qualname__

        @wraps(method)
        def answer(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> Any:
            key = (name, question(*args, **kwargs))
            return self._cache.get_or_compute(key, lambda: method(self, *args, **kwargs))

        @wraps(method)
        async def answer_later(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> Any:
            key = (name, question(*args, **kwargs))
            return await self._cache.get_or_await(
                key, lambda: cast("Awaitable[Any]", method(self, *args, **kwargs))
            )

        return cast(
            "Callable[Concatenate[_S, _P], _T]",
            answer_later if inspect.iscoroutinefunction(method) else answer,
        )

    return decorate
