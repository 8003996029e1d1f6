"""What the writer's threads share: the queue, the batches in hand, and a count of every record.

At any moment, under any fault, ``submitted + recovered == written + rejected + dropped + spooled +
pending``. A method here moves records from one place to another under one lock.
"""

import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Final

from lynkr_store.ingest.batch import Row
from lynkr_store.ingest.counters import Counters, LossLog, RejectionLog
from lynkr_store.ingest.gil import GilHandoff
from lynkr_store.ingest.queue import Queued, RecordQueue
from lynkr_store.ingest.spool import Entry, Spool
from lynkr_store.process.log import say, words_of
from lynkr_store.schemas import Rejection

RESTARTED: Final = "thread_restarted"
"""The cause under which `health` counts how often one of the store's threads was ended and started
again, and the records that were lost by it."""

_REPORTED_FAULTS: Final = 16  # different ones in one outage


@dataclass(eq=False)
class Batch:
    """Rows on their way to the sink."""

    id: str
    rows: Sequence[Row]
    upto: int = 0
    """Records that had been taken from the queue when its last one was."""
    units: int = 0
    """What it occupies of the queue's bytes."""
    entry: Entry | None = None
    """Its place in the spool, where it has one."""
    began: float = 0.0
    """When the sink was first given it, on the monotonic clock."""
    asked_ms: int | None = None
    """When that was, by the store's clock."""
    asking: bool = False
    """The sink has it now."""
    failures: int = 0
    """Tries that failed."""
    unsure: bool = False
    """An earlier try may have stored it."""
    settled: bool = False
    refused: Mapping[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class Preparation:
    """Records that were taken from the queue, on their way to become a batch."""

    records: list[Queued]
    units: int
    upto: int
    next: int = 0
    """The first record that was not looked at."""
    rejected: Counter[Rejection] = field(default_factory=Counter)
    mended: Counter[str] = field(default_factory=Counter)
    tries: int = 0

    def batch(self, rows: Sequence[Row]) -> Batch:
        """The batch that its records became."""
        return Batch(uuid.uuid4().hex, rows, self.upto, self.units)


class Handoff:
    """The state that `Writer`, `Preparer`, `Deliverer` and `SpoolMover` share.

    Args:
        queue: Where records wait.
        spool: Where batches go while the sink cannot be reached.

    Attributes:
        lock: Guards all of this. A signal handler that closes the store may interrupt its holder.
        changed: Something of this changed.
        freed: More records are settled: only flushes are woken by it.
        gil: Lets the preparing thread run while the delivering thread is in a driver's call.
        delivery: The batch that the sink has, or had when something ended the thread.
        ready: Batches to be delivered next, in order.
        preparation: Records of which a batch is being made.
        spooling: Batches are on their way to the spool.
        to_remove: Entries of the spool whose records are counted elsewhere.
        prepared_all: The queue is closed and empty.
        over: Nothing more will be written.
        taken: Records ever taken from the queue.
        settled: How many of them are settled or spooled: in order, so a flush waits for a number.
        hurry_to: Flushes wait for this many.
        flushes: Functions to call when so many are settled.
    """

    def __init__(self, queue: RecordQueue, spool: Spool | None) -> None:
        self.queue = queue
        self.spool = spool
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.freed = threading.Condition(self.lock)
        self.gil = GilHandoff()
        self.counters = Counters()
        self.delivery: Batch | None = None
        self.ready: deque[Batch] = deque()
        self.preparation: Preparation | None = None
        self.spooling = False
        self.to_remove: deque[Entry] = deque()
        self.prepared_all = False
        self.over = False
        self.taken = self.settled = self.hurry_to = 0
        self.flushes: dict[Callable[[], None], int] = {}
        self._bell: SimpleQueue[None] = SimpleQueue()  # may be rung from a signal handler
        self._losses = LossLog()
        self._rejections = RejectionLog()
        self._faults_said: set[str] = set()
        self._listeners_said: set[str] = set()
        self._retry_now = False

    def ring(self) -> None:
        """Wake the preparing thread."""
        self._bell.put(None)

    def listen(self, timeout_s: float | None) -> None:
        """Wait to be woken, once for all calls of `ring` so far."""
        with suppress(Empty):
            self._bell.get(timeout=timeout_s and min(timeout_s, threading.TIMEOUT_MAX))
            while True:
                self._bell.get_nowait()

    def rest(self, seconds: float) -> None:
        """Wait, but not beyond the end, or until `retry_now`."""
        with self.lock:
            self.changed.wait_for(lambda: self.over or self._retry_now, seconds)
            self._retry_now = False

    def retry_now(self) -> tuple[Batch | None, int]:
        """End the wait before the next try.

        Returns:
            The batch in delivery, and the failures after which a try has failed that began after
            this call.
        """
        with self.lock:
            self._retry_now = True
            self.changed.notify_all()
            batch = self.delivery
            return batch, batch.failures + 1 + batch.asking if batch else 1

    def snapshot(self) -> Counters:
        """One consistent copy of the counters."""
        with self.lock:
            counters = self.counters.copy()
            counters.rejections = self._rejections.kept()
            if self.spool:  # what it found of other processes', and lost
                found, lost = self.spool.found_rows, self.spool.lost_rows
                counters.recovered += found
                counters.spooled += found - lost
                counters.dropped_by += Counter(spool_damaged=lost)
            refused = self.queue.refused()
            counters.dropped_by += refused
            counters.queued, counters.queue_bytes = len(self.queue), self.queue.bytes_in_use
            counters.submitted = self.taken + counters.queued + refused.total()
            return counters

    def report_losses(self, *, now: bool = False) -> None:
        """Log each new rejection, and what was lost since the last line: once a minute, or now."""
        with self.lock:
            rejections = self._rejections.news()
        for rejection in rejections:  # without the lock: a host's handler may ask for `health`
            say(
                logging.WARNING,
                "a record was rejected: %s (RoutingEvent(**fields) raises the exact error)",
                rejection,
            )
        if not now and not self._losses.is_due():
            return
        with self.lock:
            fresh = self._losses.news(self.snapshot().lost())
        if fresh:  # without the lock, too
            say(logging.WARNING, "records lost, by cause: %s", dict(fresh))

    def note_fault(self, error: BaseException) -> None:
        """Count a fault of a batch; log each kind once in an outage."""
        self._note_once(error, self._faults_said, "records wait to be written: %s")

    def note_listener(self, error: BaseException) -> None:
        """Count that a host's listener failed; log each kind once."""
        self._note_once(error, self._listeners_said, "a listener of on_batch failed: %s")

    def _note_once(self, error: BaseException, said: set[str], line: str) -> None:
        words = words_of(error)
        with self.lock:
            self.count_fault(error)
            news = words not in said and len(said) < _REPORTED_FAULTS
            said.add(words)
        if news:
            say(logging.WARNING, line, words)

    def note_restart(self, error: BaseException) -> None:
        """Count that something ended one of the store's threads, which goes on."""
        words = f"{RESTARTED}: {words_of(error)}"
        with self.lock:
            self._note_last(words)
            self.counters.faults_by[RESTARTED] += 1
        say(logging.ERROR, "a thread of the store's own was ended and goes on: %s", words)

    def count_fault(self, error: BaseException) -> None:
        """Count a fault that is logged elsewhere."""
        with self.lock:
            self._note_last(words_of(error))
            self.counters.faults_by[type(error).__name__] += 1

    def _note_last(self, words: str) -> None:
        self.counters.last_error = words
        self.counters.last_error_at = time.monotonic()

    def take(self, max_rows: int, max_bytes: int) -> Preparation:
        """Take records from the queue."""
        with self.lock:
            records, units = self.queue.take(max_rows, max_bytes)
            self.preparation = work = Preparation(records, units, self.taken + len(records))
            self.taken = work.upto
            self.counters.in_hand += len(records)
        return work

    def lose_rest(self, work: Preparation) -> None:
        """Count the records that ended the thread several times as lost, so that it goes on."""
        with self.lock:
            left = len(work.records) - work.next
            work.next = len(work.records)
            if not self.over:
                self.counters.in_hand -= left
                self.counters.dropped_by[RESTARTED] += left

    def place(self, batch: Batch) -> None:
        """Have the batch of the preparation delivered in its turn."""
        with self.lock:
            work, counters = self.preparation, self.counters
            assert work  # noqa: S101 - the batch was made of it
            rejected_by = Counter(counters.rejected_by)
            for rejection, count in work.rejected.items():
                rejected_by[rejection.cause] += count
            self._rejections.add(work.rejected)
            mended_by = counters.mended_by + work.mended
            if not self.over:
                self.ready.append(batch)
                counters.in_hand -= work.rejected.total()
                counters.rejected_by = rejected_by
            counters.mended_by = mended_by
            self.preparation = None
            self.changed.notify_all()

    def settle(self, batch: Batch) -> None:
        """A batch is stored: move its records to where they ended."""
        with self.lock:
            counters, count = self.counters, len(batch.rows)
            if batch.settled and not batch.entry:  # close() gave it up before
                self.delivery = None
                return
            refused = Counter(batch.refused)
            rejected_by = counters.rejected_by + refused
            if batch.entry:
                self.to_remove.append(batch.entry)
                counters.spooled -= count
            else:
                counters.in_hand -= count
            self.delivery = None
            batch.settled = True
            counters.written += count - refused.total()
            counters.rejected_by = rejected_by
            if not batch.entry:
                self.free(batch)
            recovered = bool(self._faults_said) and bool(batch.rows)
            if recovered:
                self._faults_said.clear()
            self.changed.notify_all()
        self.ring()
        if recovered:
            say(logging.WARNING, "records are written again")

    def free(self, batch: Batch) -> None:
        """The batch needs no memory any more, and no flush needs to wait for it."""
        self.queue.release(batch.units)
        self.settled = batch.upto
        self._tell_flushed()

    def _tell_flushed(self) -> None:
        self.freed.notify_all()
        for tell, target in list(self.flushes.items()):
            if self.settled >= target or self.over:
                self.flushes.pop(tell, None)
                tell()

    def give_up(self) -> None:
        """Count what is not settled as dropped; nothing is pending afterwards.

        An exception that a signal handler raises in the middle leaves the counters right, and a
        second call goes on. The interpreter runs such a handler after a call and before no
        assignment, so lines without a call are done together.
        """
        self.over = True
        counters, delivery = self.counters, self.delivery
        self.queue.refuse_queued("deadline")
        dropped_by = Counter(counters.dropped_by)
        left = counters.in_hand
        given_up = [batch for batch in (delivery, *self.ready) if batch and not batch.entry]
        if delivery and not delivery.entry and not delivery.settled:
            cause = "outcome_unknown" if delivery.asking or delivery.unsure else "deadline"
            dropped_by[cause] += len(delivery.rows)
            left -= len(delivery.rows)
        if left:
            dropped_by["deadline"] += left
        counters.dropped_by, counters.in_hand = dropped_by, 0
        for batch in given_up:
            batch.settled = True
        self.settled = self.taken
        self.ready.clear()
        self._tell_flushed()
        self.changed.notify_all()
        self.ring()

    def after_close(self) -> bool:
        """Whether a record that came in while the writer was closing will still be written."""
        with self.lock:
            return not (self.over and self.queue.refuse_queued("closed"))
