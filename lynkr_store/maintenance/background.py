"""The store's own thread for maintenance at intervals, such as folding new rows."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Final

from lynkr_store.process.lifecycle import Forkable
from lynkr_store.process.log import say, words_of
from lynkr_store.process.threads import start_thread

WAKE_ROWS: Final = 10_000
"""Number of written rows after which maintenance runs before its interval is over: a statistic
reads each unfolded row."""

_FINISH_S: Final = 0.2
_RESTART_S: Final = 0.1  # pause before the thread continues after an unexpected exception


class BackgroundMaintenance(Forkable):
    """Runs maintenance in a thread of its own: at intervals, and after enough rows were written.

    Args:
        work: The maintenance. It calls the function that it receives, often, to learn whether to
            stop.
        interval_s: Seconds between two runs.
        on_restart: Called with the exception that ended the thread, before the thread continues.
        on_fault: Called with the exception that ended a run; the next run tries again.
    """

    def __init__(
        self,
        work: Callable[[Callable[[], bool]], None],
        interval_s: float,
        on_restart: Callable[[BaseException], None] = lambda _: None,
        on_fault: Callable[[Exception], None] = lambda _: None,
    ) -> None:
        self._work = work
        self._interval_s = min(interval_s, threading.TIMEOUT_MAX)
        self._on_restart = on_restart
        self._on_fault = on_fault
        self._stopped = False
        self._reset()

    def _reset(self) -> None:
        self._wake: SimpleQueue[None] = SimpleQueue()  # a signal handler may put into it
        self._lock = threading.RLock()  # and may re-enter this lock
        self._thread: threading.Thread | None = None
        self._rows = 0
        self._last_warning = ""

    def start(self) -> None:
        """Start the thread unless it is running."""
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is not None or self._stopped:
                return
            self._thread = start_thread(self._run, "maintenance")  # if None, the next call retries

    def rows_written(self, count: int) -> None:
        """Report that ``count`` rows were written."""
        self.start()
        self._rows += count
        if self._rows >= WAKE_ROWS:
            self._rows = 0
            self._wake.put(None)

    def finish(self) -> None:
        """Stop the thread, and wait up to 0.2 s for the run in progress."""
        self._stopped = True
        self._wake.put(None)
        if self._thread is not None:
            self._thread.join(_FINISH_S)

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller runs in this thread."""
        return self._thread is threading.current_thread()

    def after_fork_in_child(self) -> None:
        """In the child: start without a thread."""
        self._reset()

    def _run(self) -> None:
        while not self._stopped:
            try:
                self._run_regularly()
            except BaseException as error:  # noqa: BLE001 - whatever was raised, the thread goes on
                with suppress(BaseException):
                    self._on_restart(error)
                with suppress(BaseException):
                    time.sleep(_RESTART_S)

    def _run_regularly(self) -> None:
        while True:
            with suppress(Empty):
                self._wake.get(timeout=self._interval_s)
            if self._stopped:
                return
            said = ""
            try:
                self._work(lambda: self._stopped)
            except Exception as error:  # noqa: BLE001 - the next run tries again
                said = words_of(error)
                self._on_fault(error)
            before, self._last_warning = self._last_warning, said
            if said and said != before and not self._stopped:
                say(logging.WARNING, "background maintenance will be retried: %s", said)
