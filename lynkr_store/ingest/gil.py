"""Gives the delivering thread the interpreter as soon as a driver's call returns.

A thread releases Python's interpreter lock (GIL) at each call of a driver. If another thread
computes, it waits up to 5 ms to get the lock back (`sys.setswitchinterval`, which is for the host
to set). A batch needs a dozen of these calls, most of them short, and waited longer for the
interpreter than for the disk. So the preparing thread runs only while the delivering thread is
inside a long driver call, and yields often. Measured: 0.53 of a bare executemany's speed without
it, 0.6 with it.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

_YIELD_S: Final = 50e-6  # enough for a waiting thread to get the interpreter
_PATIENCE_S: Final = 0.05


class GilHandoff:
    """Passes the interpreter between the delivering and the preparing thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_call = False
        self._stuck = False

    @contextmanager
    def delivering(self) -> Iterator[None]:
        """Enter it in the delivering thread; inside, `long_call` lets the other thread run."""
        with self._lock:
            token = _current.set(self)
            try:
                yield
            finally:
                _current.reset(token)
                self._stuck = False

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Enter it in the preparing thread for a short piece of work; waits for a long call.

        It waits up to 50 ms, and not again until the delivering thread makes another long call.
        """
        took = self._lock.acquire(timeout=0 if self._stuck else _PATIENCE_S)
        try:
            yield
        finally:
            self._stuck = not took
            if took:
                self._lock.release()
        if self._in_call:
            time.sleep(_YIELD_S)

    @contextmanager
    def _calling(self) -> Iterator[None]:
        self._in_call, self._stuck = True, False
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            self._in_call = False


_current: Final[ContextVar[GilHandoff | None]] = ContextVar("lynkr_store_gil", default=None)


@contextmanager
def long_call() -> Iterator[None]:
    """Enter it around a call that takes long and hardly needs the interpreter.

    Inside `GilHandoff.delivering` the preparing thread runs meanwhile; elsewhere this does nothing.
    """
    handoff = _current.get()
    if handoff is None:
        yield
        return
    with handoff._calling():  # noqa: SLF001 - of this module
        yield
