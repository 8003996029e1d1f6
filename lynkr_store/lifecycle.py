"""What happens to a process: it forks, it ends, it is told to end."""

import contextlib
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from types import FrameType
from typing import Any, Final

from lynkr_store.exceptions import BadArgument

_MULTIPROCESSING_PRIORITY: Final = 100  # before multiprocessing closes what the store may need


class Forkable:
    """What must know that the process forks."""

    def before_fork(self) -> None:
        """In the parent: bring what the child would inherit half-done to an end."""

    def after_fork_in_parent(self) -> None:
        """In the parent: go on."""

    def after_fork_in_child(self) -> None:
        """In the child: start anew. No thread, lock or connection of the parent's is of use."""


_forkable: "weakref.WeakSet[Forkable]" = weakref.WeakSet()
_forking: list[Forkable] = []


def on_fork(part: Forkable) -> None:
    """Have an object told of forks for as long as it lives."""
    _forkable.add(part)
    _register()


@cache
def _register() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
        )


def _before() -> None:
    _forking[:] = _forkable
    for part in _forking:
        part.before_fork()


def _after_in_parent() -> None:
    for part in reversed(_forking):
        part.after_fork_in_parent()
    _forking.clear()


def _after_in_child() -> None:
    for part in _forking:
        part.after_fork_in_child()
    _forking.clear()


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

    Raises:
        BadArgument: This is not the main thread, where Python handles signals.
    """

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end
        self._under_way = False
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
                signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._under_way:  # a second signal does not wait for the first
            self._under_way = True
            self._end()
        if callable(self._previous):
            self._previous(number, frame)
        elif self._previous != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
