"""The store's own thread for work that nobody asked for just now, such as folding."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final

from lynkr_store.process.lifecycle import Forkable, without_sigterm
from lynkr_store.process.log import say, words_of

WAKE_ROWS: Final = 10_000
"""Rows written after which the work is due, whatever the time: a statistic reads each of them."""

_FINISH_S: Final = 0.2
_AGAIN_S: Final = 0.1  # until the thread goes on that something ended


class BackgroundMaintenance(Forkable):
    """Does some work again and again: at intervals, and when enough rows were written.

    Args:
        work: What there is to do. It asks the function it is given, often, whether to stop.
        interval_s: Seconds from one time to the next.
        note_restart: Told what ended the thread, which goes on.
        note_fault: Told what ended the work, which is tried again.
    """

    def __init__(
        self,
        work: Callable[[Callable[[], bool]], None],
        interval_s: float,
        note_restart: Callable[[BaseException], None] = lambda _: None,
        note_fault: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self._work = work
        self._interval_s = min(interval_s, threading.TIMEOUT_MAX)
        self._note_restart = note_restart
        self._note_fault = note_fault
        self._stopped = False
        self._begin()

    def _begin(self) -> None:
        self._bell: SimpleQueue[None] = SimpleQueue()  # may be rung from a signal handler
        self._lock = threading.RLock()  # and such a handler may come back to this one
        self._thread: threading.Thread | None = None
        self._rows = 0
        self._said = ""

    def start(self) -> None:
        """Start the thread, if it is not running."""
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is not None or self._stopped:
                return
            thread = threading.Thread(target=self._run, name="lynkr-store-maintenance", daemon=True)
            # no more threads: then next time
            with suppress(RuntimeError, MemoryError), without_sigterm():
                thread.start()
                self._thread = thread

    def rows_written(self, count: int) -> None:
        """So many rows were written."""
        self.start()
        self._rows += count
        if self._rows >= WAKE_ROWS:
            self._rows = 0
            self._bell.put(None)

    def finish(self) -> None:
        """Do no more; wait a moment for what is under way."""
        self._stopped = True
        self._bell.put(None)
        if self._thread is not None:
            self._thread.join(_FINISH_S)

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller runs in the thread."""
        return self._thread is threading.current_thread()

    def after_fork_in_child(self) -> None:
        """Start anew."""
        self._begin()

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._work_on()
            except BaseException as error:  # noqa: BLE001 - whatever it is, the thread goes on
                with suppress(BaseException):
                    self._note_restart(error)
                with suppress(BaseException):
                    time.sleep(_AGAIN_S)

    def _work_on(self) -> None:
        while True:
            with suppress(Empty):
                self._bell.get(timeout=self._interval_s)
            if self._stopped:
                return
            said = ""
            try:
                self._work(lambda: self._stopped)
            except Exception as error:  # noqa: BLE001 - it is tried again
                said = words_of(error)
                self._note_fault(error)
            before, self._said = self._said, said
            if said and said != before and not self._stopped:
                say(logging.WARNING, "background maintenance will be retried: %s", said)
