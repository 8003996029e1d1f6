"""What happens to a process: it forks, it ends, it is told to end."""

import contextlib
import logging
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final

from lynkr_store.exceptions import BadArgument
from lynkr_store.process.log import say

FORK_WAIT_S: Final = 5.0
"""Seconds that a fork waits for a part that is at work: longer than SQLite's busy timeout of 3."""

_MULTIPROCESSING_PRIORITY: Final = 100  # before multiprocessing closes what the store may need


class Forkable:
    """A part of the library that must be told when the process forks.

    The parts are told one after the other: before a fork and in the child in the order in which
    `on_fork` was called for them, in the parent in the reverse. A part that raises an exception
    does not keep the others from being told.
    """

    def before_fork(self) -> None:
        """In the parent: bring what the child would inherit half-done to an end, in a few s."""

    def after_fork_in_parent(self) -> None:
        """In the parent: go on."""

    def after_fork_in_child(self) -> None:
        """In the child: start with new threads, locks and connections.

        Also called for a part that was not told before, because another thread made it meanwhile.
        """


class _Forks:
    """Tells the parts of one fork at a time.

    A second thread that forks meanwhile waits: what its child inherits must be at rest too, and the
    first fork's end would set it going again.
    """

    def __init__(self) -> None:
        self._parts: weakref.WeakKeyDictionary[Forkable, None] = weakref.WeakKeyDictionary()
        self._registered = False
        self._reset()

    def _reset(self) -> None:
        self._turn = threading.RLock()  # a signal handler may fork while its thread does
        self._told: list[list[Forkable]] = []  # a list for each fork under way

    def add(self, part: Forkable) -> None:
        self._parts.setdefault(part)
        if not self._registered and hasattr(os, "register_at_fork"):
            self._registered = True
            os.register_at_fork(
                before=self._before,
                after_in_parent=self._after_in_parent,
                after_in_child=self._after_in_child,
            )

    def _alive(self) -> list[Forkable]:
        return [part for known in self._parts.keyrefs() if (part := known()) is not None]

    def _before(self) -> None:
        while True:
            try:
                self._turn.acquire()
                break
            except BaseException as error:  # noqa: BLE001 - of a signal handler; the fork goes on
                _log_failure(error)
        told: list[Forkable] = []
        self._told.append(told)
        for part in self._alive():
            told.append(part)  # also if it fails half-way
            _tell(part.before_fork)

    def _after_in_parent(self) -> None:
        try:
            for part in reversed(self._told.pop()):
                _tell(part.after_fork_in_parent)
        finally:
            self._turn.release()

    def _after_in_child(self) -> None:
        self._reset()
        for part in self._alive():
            _tell(part.after_fork_in_child)


_forks: Final = _Forks()


def on_fork(part: Forkable) -> None:
    """Have an object told of forks for as long as it lives; harmless when called again."""
    _forks.add(part)


def _tell(hook: Callable[[], None]) -> None:
    try:
        hook()
    except BaseException as error:  # noqa: BLE001 - Python would print it and fork all the same
        _log_failure(error)


def _log_failure(error: BaseException) -> None:
    say(logging.WARNING, "a step of a fork failed: %s", type(error).__name__)


def on_exit_of_worker(owner: object, end: Callable[[], None]) -> None:
    """Have a function called when a process that multiprocessing made ends.

    Such a process skips `atexit`. The registration lives as long as the owner, which ``end`` must
    not hold.
    """
    multiprocessing: Any = sys.modules.get("multiprocessing.util")
    process: Any = sys.modules.get("multiprocessing.process")
    if multiprocessing and process and process.parent_process() is not None:
        multiprocessing.Finalize(owner, end, exitpriority=_MULTIPROCESSING_PRIORITY)


@contextlib.contextmanager
def without_sigterm() -> Iterator[None]:
    """Have SIGTERM wait, while a thread is started.

    A handler that closes a store would meet `threading`'s own lock, held by what it interrupted,
    and the threads that it waits for need that lock to end.
    """
    mask = getattr(signal, "pthread_sigmask", None)
    before = mask and mask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)


class SigtermHandler:
    """Runs a function on SIGTERM, then whatever would have run without it.

    Args:
        end: Called in the main thread.

    As process 1 of a container a process does not end by a signal that it sends to itself: there
    it exits with 143 where nothing was to run, as a shell says of a process that SIGTERM ended.

    Raises:
        BadArgument: This is not the main thread, where Python handles signals, or the handler that
            is there is none of Python's.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end
        self._under_way = False
        if signal.getsignal(signal.SIGTERM) is None:
            raise BadArgument(
                "handle_sigterm: the program that runs Python handles SIGTERM itself, and Python "
                "could not call its handler; leave handle_sigterm off, and close the store where "
                "that program says that it ends"
            )
        try:
            self._previous: Any = signal.signal(signal.SIGTERM, self._handle)
        except ValueError:
            raise BadArgument(
                "handle_sigterm: open the store in the main thread, where signals are handled"
            ) from None

    def remove(self) -> None:
        """Put the previous handler back, unless somebody has put another in front of this one."""
        if signal.getsignal(signal.SIGTERM) == self._handle:
            with contextlib.suppress(ValueError):  # not the main thread: it stays, and only chains
                signal.signal(signal.SIGTERM, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._under_way:  # a second signal does not wait for the first
            self._under_way = True
            self._end()
        if callable(self._previous):
            self._previous(number, frame)
        elif self._previous != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            if os.getpid() == 1:  # the system protects process 1 from its own signals
                os._exit(128 + number)
