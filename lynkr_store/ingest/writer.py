"""The writer: takes records at once, and writes them in batches from two threads of its own.

The preparing thread takes records from the queue, checks them and makes batches (`preparer`). The
delivering thread hands batches to the sink (`deliverer`). So a database that hangs holds up one
batch and nothing else: the preparing thread goes on counting, and moves batches to the spool where
there is one (`spooling`). What they share, and the count of every record, is the `handoff`.
"""

import threading
import time
import weakref
from _thread import start_new_thread
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from lynkr_store.exceptions import SpoolError
from lynkr_store.ingest.counters import Counters
from lynkr_store.ingest.deliverer import Deliverer, Sink
from lynkr_store.ingest.handoff import Handoff
from lynkr_store.ingest.preparer import Preparer
from lynkr_store.ingest.queue import RecordQueue
from lynkr_store.ingest.spool import Spool
from lynkr_store.ingest.spooling import SpoolMover
from lynkr_store.ingest.validation import TextPolicy
from lynkr_store.process.lifecycle import (
    FORK_WAIT_S,
    Forkable,
    on_exit_in_celery,
    on_exit_of_worker,
)
from lynkr_store.process.threads import start_thread
from lynkr_store.schemas.filters import checked_seconds

if TYPE_CHECKING:
    from lynkr_store.schemas import BatchAttempt

CLOSE_S: Final = 5.0
"""Seconds that a close takes at most, where nothing else is said."""

_THREADS: Final = 2
_LOOK_S: Final = 0.05  # between two looks at whether the sink answers
_GRACE_S: Final = 0.5  # what close() may take beyond its deadline, to spool what is left
_STUCK_S: Final = 0.1  # and for a thread whose driver's call does not return
_RESTART_S: Final = 0.1  # until a thread that something ended goes on

_inherited: list[Spool] = []


class Writer(Forkable):
    """Takes records at once, writes them in batches from threads of its own.

    Args:
        sink: Where batches go.
        policy: What is kept of the texts.
        clock: The present in epoch milliseconds, for records that name no instant.
        max_rows: Records that may wait.
        max_bytes: Bytes of records that may wait or be in hand.
        batch_rows: Records in one batch at most.
        interval_s: Seconds after which a batch goes even if it is not full.
        spool: Where batches go while the sink cannot be reached.
        spool_after_s: Seconds without the sink after which they do.
        forget_after_ms: The age at which the sink forgets a batch it has stored.
        has_forgotten: Whether it has, of an instant: asked from that age on, for the clock may be
            wrong.

    Attributes:
        submit: See `lynkr_store.ingest.queue.RecordQueue.submit`.
        in_child: Called in a child of a fork by a thread that records, again until it returns True.
        listeners: A host's functions, called with each attempt to write a batch.
    """

    def __init__(  # noqa: PLR0913 - each is one decision of the composition
        self,
        sink: Sink,
        *,
        policy: TextPolicy,
        clock: Callable[[], int],
        max_rows: int,
        max_bytes: int,
        batch_rows: int,
        interval_s: float,
        spool: Callable[[], Spool] | None = None,
        spool_after_s: float = 5.0,
        forget_after_ms: int = 2**62,
        has_forgotten: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self._sink = sink
        self._policy = policy
        self._clock = clock
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._batch_rows = batch_rows
        self._interval_s = interval_s
        self._make_spool = spool
        self._spool_after_s = spool_after_s
        self._forget_after_ms = forget_after_ms
        self._has_forgotten = has_forgotten
        self.in_child: Callable[[], bool] | None = None
        self.listeners: list[Callable[[BatchAttempt], object]] = []
        self._at_ring: Callable[[], bool] | None = None
        self._reset()

    def _reset(self) -> None:
        """Set out with an empty queue, counts of 0, new locks and no thread: also after a fork."""
        self._queue = RecordQueue(
            self._clock,
            self._max_rows,
            self._max_bytes,
            ring=self._on_record,
            after_close=self._after_close,
        )
        self.submit = self._queue.submit
        self._handoff = Handoff(self._queue, self._make_spool() if self._make_spool else None)
        self._spooling = SpoolMover(
            self._handoff,
            self._policy,
            after_s=self._spool_after_s,
            forget_after_ms=self._forget_after_ms,
            has_forgotten=self._has_forgotten,
        )
        self._preparer = preparer = Preparer(
            self._handoff,
            self._spooling,
            policy=self._policy,
            batch_rows=self._batch_rows,
            wake_rows=min(self._batch_rows, -(-self._max_rows // 2)),
            interval_s=self._interval_s,
        )
        deliverer = Deliverer(
            self._handoff, self._spooling, self._sink, self._clock, self.listeners
        )
        self._bodies = {"deliver": deliverer.run, "prepare": preparer.run}
        self._holds_spool = False
        self._patience_s = 0.0  # for which records may still wait: see write_at_once()
        self._started = False
        self._ended: set[str] = set()
        self._threads: dict[str, threading.Thread] = {}

    def start(self) -> None:
        """Start the threads, if they are not running; the first record does."""
        on_exit_of_worker(self, _closing(self))
        self._start_threads()
        on_exit_in_celery(self, _closing(self))

    def _start_threads(self) -> None:
        with self._handoff.lock:
            for name, body in self._bodies.items():
                if name in self._threads or self._handoff.over:
                    continue
                if start_thread(partial(self._run, name, body), name) is None:
                    self._queue.wake_at = 1  # the next record tries again
                    return
                self._started = True

    def _run(self, name: str, body: Callable[[], None]) -> None:
        handoff = self._handoff
        with handoff.lock:
            if name in self._threads:
                return  # a signal handler came between and started another
            self._threads[name] = threading.current_thread()
        while not self._has_ended(body):
            with suppress(BaseException):
                handoff.rest(_RESTART_S)
        with handoff.lock:
            self._ended.add(name)
            handoff.changed.notify_all()

    def _has_ended(self, body: Callable[[], None]) -> bool:
        """Run a thread's body; False when something ended it before its time."""
        try:
            body()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the thread goes on
            with suppress(BaseException):
                self._handoff.note_restart(error)
            return False
        return True

    def _on_record(self) -> None:
        """A record came whose call has to wake the preparing thread."""
        self._ring()
        if self._patience_s > 0 and not self.is_this_thread:
            began = time.monotonic()
            self.flush_while_reached(self._patience_s)
            self._patience_s -= time.monotonic() - began

    def _ring(self) -> None:
        """Wake the preparing thread; the first record has the threads started."""
        if self._at_ring is not None and self._at_ring():
            self._at_ring = None
        self._handoff.ring()
        if len(self._threads) < _THREADS:
            on_exit_of_worker(self, _closing(self))  # it may end before the threads are there
            if not self._start_soon():
                self._queue.wake_at = 1  # the next record tries again

    def _start_soon(self) -> bool:
        """Have the threads started; False where the system gives none.

        Not here: an exception that a signal handler raises in the middle, in the main thread that
        is, would leave locks of `threading` held, or seem to be that there are no more threads.
        """
        try:
            start_new_thread(self._start_aside, ())
        except (RuntimeError, MemoryError):
            return False
        return True

    def _start_aside(self) -> None:
        try:
            self._start_threads()
            on_exit_in_celery(self, _closing(self))
        except BaseException as error:  # noqa: BLE001 - the next record tries again
            self._queue.wake_at = 1
            with suppress(BaseException):
                self._handoff.note_fault(error)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything submitted before is written, rejected, dropped or spooled.

        Raises:
            BadArgument: ``timeout_s`` is negative or NaN.
        """
        timeout_s, handoff = checked_timeout(timeout_s), self._handoff
        with handoff.lock:
            target = self._hurry()
            return handoff.freed.wait_for(
                lambda: handoff.settled >= target or handoff.over, timeout_s
            )

    def when_flushed(self, tell: Callable[[], None]) -> None:
        """Call a function when what `flush` would wait for has come.

        It is called at once, or later by a thread of the writer's, under its lock: it must neither
        wait nor raise. `forget_flush` takes it back.
        """
        handoff = self._handoff
        with handoff.lock:
            target = self._hurry()
            if handoff.settled >= target or handoff.over:
                tell()
            else:
                handoff.flushes[tell] = target

    def forget_flush(self, tell: Callable[[], None]) -> None:
        """Do not call the function any more."""
        with self._handoff.lock:
            self._handoff.flushes.pop(tell, None)

    def _hurry(self) -> int:
        """Have what was submitted so far written at once; return how many records that is."""
        handoff = self._handoff
        target = handoff.taken + len(self._queue)
        handoff.hurry_to = max(handoff.hurry_to, target)
        if handoff.settled < target:
            self._ring()  # which starts the threads, too, where that failed before
        return target

    def write_at_once(self, patience_s: float) -> None:
        """From now on write each record as soon as possible: the process is about to end.

        It may end right after a request, by a signal, so the call that records waits for the
        writer. If the sink cannot be reached, batches enter the spool without waiting for it.

        Args:
            patience_s: Seconds for which all calls together wait at most.
        """
        self._interval_s = self._preparer.interval_s = 0.0
        self._preparer.wake_rows = 1
        self._spool_after_s = self._spooling.after_s = 0.0
        self._patience_s = patience_s

    def flush_while_reached(self, timeout_s: float) -> bool:
        """Flush, but not beyond the next try that fails, unless a spool takes the batches.

        Returns:
            Whether all was written, rejected, dropped or spooled.
        """
        handoff, deadline = self._handoff, time.monotonic() + timeout_s
        first, failures = handoff.retry_now()
        while (left_s := deadline - time.monotonic()) > 0:
            if self.flush(min(left_s, _LOOK_S)):
                return True
            batch = handoff.delivery
            enough = failures if batch is first else 1
            if handoff.spool is None and batch is not None and batch.failures >= enough:
                break
        return False

    def close(self, timeout_s: float) -> None:
        """Take no more records, write what is there, and spool or count what could not be.

        Afterwards nothing is pending. A spool has half of the time for itself. What is left is
        dropped: as ``outcome_unknown`` where the sink was not heard of, else as ``deadline``. May
        be called again.

        Raises:
            BadArgument: ``timeout_s`` is negative or NaN.
        """
        timeout_s, handoff = checked_timeout(timeout_s), self._handoff
        self._queue.closed = True
        running = self._started or (len(self._queue) > 0 and self._start_soon())
        if running and handoff.spool:
            if not self.flush(timeout_s / 2):
                self._spooling.spool_all = True
                self.flush(timeout_s / 2 + _GRACE_S)
        elif running:
            self.flush(timeout_s)
        with handoff.lock:
            stuck = handoff.delivery is not None and handoff.delivery.asking
            handoff.give_up()
            # not by join(): the thread that a signal handler interrupted here may hold the lock
            handoff.changed.wait_for(
                lambda: self._ended >= self._threads.keys(), _STUCK_S if stuck else _GRACE_S
            )
        if handoff.spool:
            handoff.spool.close()
        handoff.report_losses(now=True)

    def _after_close(self) -> bool:
        return self._handoff.after_close()

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller runs in one of the writer's threads."""
        return threading.current_thread() in self._threads.values()

    def counters(self) -> Counters:
        """One consistent copy of the counters."""
        return self._handoff.snapshot()

    def note_restart(self, error: BaseException) -> None:
        """Count that something ended a thread of the store's, which goes on."""
        self._handoff.note_restart(error)

    def note_fault(self, error: BaseException) -> None:
        """Count a fault of something other than a batch, which its finder logs."""
        self._handoff.count_fault(error)

    def note_unreadable(self, values: int) -> None:
        """Count stored values that a read could not make sense of."""
        if values:
            with self._handoff.lock:
                self._handoff.counters.mended_by["unreadable_on_read"] += values

    def before_fork(self) -> None:
        """Let the spool come to rest: what a child inherits must not be half-written."""
        spool = self._handoff.spool
        self._holds_spool = spool is not None and spool.hold(FORK_WAIT_S)

    def after_fork_in_parent(self) -> None:
        """Go on."""
        if self._handoff.spool and self._holds_spool:
            self._handoff.spool.release()

    def after_fork_in_child(self) -> None:
        """Start with nothing; without a spool, if a batch was on its way there.

        The parent's spool is kept from the collector, which would close a file of the parent's.
        """
        spool, closed = self._handoff.spool, self._queue.closed
        without = spool is not None and not self._holds_spool
        if spool:
            _inherited.append(spool)
        if without:
            self._make_spool = None
        self._reset()
        self._at_ring = self.in_child
        if without:
            self._handoff.note_fault(
                SpoolError(
                    "this process was forked while a batch was on its way into the spool; it has "
                    "none. Fork before the store is used, or start processes by multiprocessing's "
                    "'spawn'"
                )
            )
        if closed:
            self.close(0)


def _closing(writer: Writer) -> Callable[[], None]:
    """A function that closes the writer and does not keep it alive."""
    reference = weakref.ref(writer)

    def close() -> None:
        if (alive := reference()) is not None:
            alive.close(CLOSE_S)

    return close


def checked_timeout(timeout_s: float) -> float:
    """The seconds that a caller will wait, as long as the system can.

    Raises:
        BadArgument: ``timeout_s`` is negative or NaN.
    """
    return min(checked_seconds(timeout_s, "timeout_s"), threading.TIMEOUT_MAX)
