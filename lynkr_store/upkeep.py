"""The store's own thread for work that nobody asked for just now, such as folding."""

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final

from lynkr_store.exceptions import LynkrStoreError
from lynkr_store.lifecycle import Forkable, without_sigterm

WAKE_ROWS: Final = 10_000
"""Rows written after which the work is due, whatever the time: a statistic reads each of them."""

_FINISH_S: Final = 0.2

_log = logging.getLogger("lynkr_store")


class Upkeep(Forkable):
    """Does some work again and again: at intervals, and when enough rows were written.

    Args:
        work: What there is to do. It asks the function it is given, often, whether to stop.
        interval_s: Seconds from one time to the next.
    """

    def __init__(self, work: Callable[[Callable[[], bool]], None], interval_s: float) -> None:
        self._work = work
        self._interval_s = interval_s
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
            thread = threading.Thread(target=self._run, name="lynkr-store-upkeep", daemon=True)
            with suppress(RuntimeError), without_sigterm():  # no more threads: then next time
                thread.start()
                self._thread = thread

    def note_rows(self, count: int) -> None:
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
        while True:
            with suppress(Empty):
                self._bell.get(timeout=self._interval_s)
            if self._stopped:
                return
            said = ""
            try:
                self._work(lambda: self._stopped)
            except Exception as error:  # noqa: BLE001 - this thread must go on
                # another library's words may repeat a row
                words = f": {error}" if isinstance(error, LynkrStoreError) else ""
                said = f"{type(error).__name__}{words}"
            if said and said != self._said and not self._stopped:
                _log.warning("upkeep will be tried again: %s", said)
            self._said = said
