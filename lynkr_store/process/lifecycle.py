"""Forks, the end of the process, and SIGTERM."""

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
"""Seconds for which a fork waits for a busy part; longer than SQLite's busy timeout of 3."""

_MULTIPROCESSING_PRIORITY: Final = 100  # before multiprocessing closes what the store may need


class Forkable:
    """A part of the library whose hooks are called when the process forks.

    The hooks run one after the other: before a fork and in the child in the order of the calls of
    `on_fork`, in the parent in reverse order. If one raises an exception, the others still run.
    """

    def before_fork(self) -> None:
        """In the parent: within a few seconds, finish what the child would inherit half done."""

    def after_fork_in_parent(self) -> None:
        """In the parent: continue."""

    def after_fork_in_child(self) -> None:
        """In the child: start with new threads, locks and connections.

        Also called for a part that another thread created during the fork, without `before_fork`.
        """


class _Forks:
    """Calls the hooks of one fork at a time.

    A second thread that forks waits for the first fork to end: its child must inherit the parts at
    rest too, and the end of the first fork would make them continue.
    """

    def __init__(self) -> None:
        self._parts: weakref.WeakKeyDictionary[Forkable, None] = weakref.WeakKeyDictionary()
        self._registered = False
        self._reset()

    def _reset(self) -> None:
        self._fork_lock = threading.RLock()  # a signal handler may fork while its thread does
        self._called: list[list[Forkable]] = []  # a list for each fork under way

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
                self._fork_lock.acquire()
                break
            except BaseException as error:  # noqa: BLE001 - from a signal handler; the fork continues
                _log_failure(error)
        called: list[Forkable] = []
        self._called.append(called)
        for part in self._alive():
            called.append(part)  # even if its hook fails
            _call(part.before_fork)

    def _after_in_parent(self) -> None:
        try:
            for part in reversed(self._called.pop()):
                _call(part.after_fork_in_parent)
        finally:
            self._fork_lock.release()

    def _after_in_child(self) -> None:
        self._reset()
        for part in self._alive():
            _call(part.after_fork_in_child)


_forks: Final = _Forks()


def on_fork(part: Forkable) -> None:
    """Call an object's hooks on forks for as long as it lives; repeated calls have no effect."""
    _forks.add(part)


def _call(hook: Callable[[], None]) -> None:
    try:
        hook()
    except BaseException as error:  # noqa: BLE001 - Python would print it and fork anyway
        _log_failure(error)


def _log_failure(error: BaseException) -> None:
    say(logging.WARNING, "a step of a fork failed: %s", type(error).__name__)


_ends: Final[weakref.WeakKeyDictionary[object, Callable[[], None]]] = weakref.WeakKeyDictionary()
"""What to call when Celery ends this process, by its owner."""
_connected: Final[list[object]] = []  # Celery's signal, once the function below is connected


def on_exit_of_worker(owner: object, end: Callable[[], None]) -> None:
    """Call a function when a process that multiprocessing or billiard started ends.

    Such a process skips `atexit`. The registration lives as long as the owner, to which ``end``
    must not hold a reference.
    """
    multiprocessing: Any = sys.modules.get("multiprocessing.util")
    process: Any = sys.modules.get("multiprocessing.process")
    if multiprocessing and process and _is_worker(process):
        multiprocessing.Finalize(owner, end, exitpriority=_MULTIPROCESSING_PRIORITY)


def on_exit_in_celery(owner: object, end: Callable[[], None]) -> None:
    """Call a function when a process of Celery's pool ends; as `on_exit_of_worker`.

    Such a process ends by `os._exit`. Celery's signal `worker_process_shutdown` is the last code
    that runs in it. To connect takes a lock of Celery's, so this is not for a signal handler.
    """
    signals: Any = sys.modules.get("celery.signals")
    if shutdown := getattr(signals, "worker_process_shutdown", None):
        _ends[owner] = end
        if shutdown not in _connected:
            shutdown.connect(_end_in_celery, weak=False)
            _connected.append(shutdown)


def _is_worker(process: Any) -> bool:
    """Whether multiprocessing started this process, or billiard, whose class is its own."""
    current = process.current_process()
    return process.parent_process() is not None or not isinstance(current, process.BaseProcess)


def _end_in_celery(**_: object) -> None:
    for end in list(_ends.values()):
        end()


@contextlib.contextmanager
def without_sigterm() -> Iterator[None]:
    """Block SIGTERM while a thread is started.

    A handler that closes a store would otherwise wait for threads that need `threading`'s lock,
    which the interrupted code holds.
    """
    mask = getattr(signal, "pthread_sigmask", None)
    before = mask and mask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        if mask:
            mask(signal.SIG_SETMASK, before)


class SigtermHandler:
    """Runs a function on SIGTERM, then the handler that would have run without it.

    Args:
        end: Called in the main thread, with whether the program has a handler of its own, which may
            continue for a while, as servers do until their requests are answered.

    A process that is process 1 of a container does not end by a signal that it sends to itself. If
    there was no other handler, it exits with 143, as a shell reports for a process that SIGTERM
    ended.

    Raises:
        BadArgument: This is not the main thread, where Python handles signals, or the installed
            handler is not Python's.
    """

    def __init__(self, end: Callable[[bool], None]) -> None:
        self._end = end
        self._handling = False
        self._process = os.getpid()
        # before the installation: the signal may come at once
        self._previous: Any = signal.getsignal(signal.SIGTERM)
        if self._previous is None:
            raise BadArgument(
                "handle_sigterm: the program that embeds Python handles SIGTERM itself, and Python "
                "cannot call its handler; leave handle_sigterm off, and close the store when that "
                "program shuts down"
            )
        try:
            signal.signal(signal.SIGTERM, self._handle)
        except ValueError:
            raise BadArgument(
                "handle_sigterm: open the store in the main thread, where signals are handled"
            ) from None

    def remove(self) -> None:
        """Restore the previous handler, unless another one was installed after this one."""
        if signal.getsignal(signal.SIGTERM) == self._handle:
            with contextlib.suppress(ValueError):  # not the main thread: it stays, and only chains
                signal.signal(signal.SIGTERM, self._previous)

    def install_in_child(self) -> bool:
        """In a child of a fork: install the handler again if the program replaced it.

        A server's worker sets its handlers after the fork. In the process that opened the store a
        handler that was installed later stays.

        Returns:
            False if this is not the main thread, and so the handler may still have to be installed.
        """
        if self._process != os.getpid():
            if threading.current_thread() is not threading.main_thread():
                return False
            current = signal.getsignal(signal.SIGTERM)
            if current not in (None, self._handle):
                self._previous, self._handling = current, False
                with contextlib.suppress(ValueError):  # an interpreter that handles no signals
                    signal.signal(signal.SIGTERM, self._handle)
            self._process = os.getpid()
        return True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._handling:  # a second signal does not wait for the first
            self._handling = True
            self._end(callable(self._previous))
        if callable(self._previous):
            self._previous(number, frame)
        elif self._previous != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            if os.getpid() == 1:  # the system protects process 1 from its own signals
                os._exit(128 + number)
