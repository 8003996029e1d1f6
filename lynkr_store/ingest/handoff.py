"""Two threads that take turns at the interpreter, where Python's own way would have one wait.

A thread lets go of the interpreter at each call of a driver, and beside one that is at work it
waits up to 5 ms to go on (`sys.setswitchinterval`, which is the host's to set). A batch takes a
dozen such calls, most of them short, and waited longer for the interpreter than for the disk. So
who prepares works only while who delivers is away in a long call, and makes a pause often.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final

Away = Callable[[], AbstractContextManager[None]]
"""Gives what is entered around calls that take long and hardly need the interpreter."""

_BREATH_S: Final = 50e-6  # enough for whoever waits for the interpreter to get it
_PATIENCE_S: Final = 0.05


class Turns:
    """Whose turn it is: that of one thread with precedence, or of another beside it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._away = False
        self._stuck = False

    @contextmanager
    def first(self) -> Iterator[None]:
        """The thread with precedence is at work."""
        with self._lock:
            try:
                yield
            finally:
                self._stuck = False

    @contextmanager
    def away(self) -> Iterator[None]:
        """It is in long calls, hardly in need of the interpreter; only inside `first`."""
        self._away, self._stuck = True, False
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()
            self._away = False

    @contextmanager
    def second(self) -> Iterator[None]:
        """The other thread does a little; it waits for its turn, unless a call has no end."""
        took = self._lock.acquire(timeout=0 if self._stuck else _PATIENCE_S)
        try:
            yield
        finally:
            self._stuck = not took
            if took:
                self._lock.release()
        if self._away:
            time.sleep(_BREATH_S)
