"""The writer: two threads between the queue and the database, and an account of every record.

One thread prepares: it takes records from the queue, checks them and makes batches. The other
delivers: it hands batches to the sink, one at a time and in order, and tries again until it is
answered. So a database that hangs holds up one batch and nothing else: the first thread goes on
accounting, and moves batches to the spool where there is one.

It knows no database. A batch stays in hand until the sink has returned, and at any moment, under
any fault, ``submitted + recovered == written + rejected + dropped + spooled + pending``.
"""

import logging
import random
import threading
import time
import uuid
import weakref
from _thread import start_new_thread
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Final, Protocol

from lynkr_store.exceptions import OutcomeUnknown, SpoolError
from lynkr_store.ingest.account import Account
from lynkr_store.ingest.batch import BatchBuilder, Row
from lynkr_store.ingest.gil import GilHandoff
from lynkr_store.ingest.preparer import prepare
from lynkr_store.ingest.queue import Queued, RecordQueue
from lynkr_store.ingest.spool import Entry, Spool, SpoolDamaged
from lynkr_store.ingest.validation import TextPolicy, new_ids, taken_over
from lynkr_store.process.lifecycle import FORK_WAIT_S, Forkable, on_exit_of_worker, without_sigterm
from lynkr_store.process.log import say, words_of
from lynkr_store.schemas.filters import checked_seconds

_BATCH_BYTES: Final = 8 * 2**20
"""Bytes of records in one batch at most: a transaction of about 0.1 s on SQLite, where a gateway
that writes the same file waits for it, whatever its texts."""

CLOSE_S: Final = 5.0
"""Seconds that a close takes at most, where nothing else is said."""

_FIRST_RETRY_S: Final = 0.1  # the range of the first wait, doubled with each try
_LAST_RETRY_S: Final = 5.0  # and its cap, the most by which a recovery is noticed late
_UNANSWERED_S: Final = 1.0  # a try that takes longer counts as a database away
_THREADS: Final = 2
_MOST_TRIES: Final = 3  # at the same records, where something ends the thread again and again
_READY: Final = 14  # batches that may be ready, for when the sink has waited and the rest did not
_SLICE_ROWS: Final = 64  # checked in half a millisecond
_TICK_S: Final = 0.1  # how often the state of a delivery is looked at
_GRACE_S: Final = 0.5  # what close() may take beyond its deadline, to spool what is left
_SPOOL_AGAIN_S: Final = 1.0  # after the spool failed
_LOG_EVERY_S: Final = 60.0  # one line a burst
_REPORTED_FAULTS: Final = 16  # different ones in one outage
_AGAIN_S: Final = 0.1  # until a thread that something ended goes on

RESTARTED: Final = "thread_restarted"
"""The cause under which `health` counts how often one of the store's threads had to go on anew, and
what was lost by it."""

_inherited: list[Spool] = []


class Sink(Protocol):
    """Where batches go."""

    def write(self, batch_id: str, rows: Sequence[Row]) -> Mapping[str, int]:
        """Store the rows, in order and durably, unless an earlier try under this id did.

        Enter `lynkr_store.ingest.gil.long_call` around calls that hardly need the interpreter.

        Args:
            batch_id: The same at every try.
            rows: One or more.

        Returns:
            Cause to number of rows refused for their own fault; the others are stored.

        Raises:
            OutcomeUnknown: They may be stored; the same batch will come again.
            Exception: Nothing is stored; the same batch will come again.
        """
        ...


@dataclass(eq=False)
class _Batch:
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
    failed: bool = False
    unsure: bool = False
    """An earlier try may have stored it."""
    settled: bool = False
    refused: Mapping[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class _Preparation:
    """Records that were taken from the queue, on their way to become a batch."""

    records: list[Queued]
    units: int
    upto: int
    next: int = 0
    """The first record that was not looked at."""
    rejected: Counter[str] = field(default_factory=Counter)
    mended: Counter[str] = field(default_factory=Counter)
    tries: int = 0


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
        spool: Where batches go while the sink is away.
        spool_after_s: Seconds without the sink after which they do.
        forget_after_ms: The age at which the sink forgets a batch it has stored.
        has_forgotten: Whether it has, of an instant: asked from that age on, for the clock may be
            wrong.

    Attributes:
        submit: See `lynkr_store.ingest.queue.RecordQueue.submit`.
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
        self._wake_rows = min(batch_rows, -(-max_rows // 2))
        self._interval_s = interval_s
        self._make_spool = spool
        self._spool_after_s = spool_after_s
        self._forget_after_ms = forget_after_ms
        self._has_forgotten = has_forgotten
        self.begin()

    def begin(self) -> None:
        """Set out with an empty queue and account, new locks and no thread: also after a fork."""
        # a signal handler that closes the store may interrupt a holder of this lock
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._freed = threading.Condition(self._lock)  # who flushes is woken for nothing else
        self._bell: SimpleQueue[None] = SimpleQueue()  # may be rung from a signal handler
        self._gil = GilHandoff()
        self._account = Account()
        self._intake = RecordQueue(
            self._clock,
            self._max_rows,
            self._max_bytes,
            ring=self._ring,
            after_close=self._after_close,
        )
        self.submit = self._intake.submit
        self._spool = self._make_spool() if self._make_spool else None
        self._holds_spool = False
        self._spool_rests_until = 0.0
        self._spool_all = False  # close() runs out of time
        self._spooling = False  # batches are on their way there
        self._delivery: _Batch | None = None
        self._ready: deque[_Batch] = deque()  # to be delivered next
        self._gathering = BatchBuilder()
        self._preparation: _Preparation | None = None
        self._to_remove: deque[Entry] = deque()  # of the spool: they are accounted for
        self._new_id = new_ids().__next__
        self._taken = 0  # records ever taken from the queue, and how many of them are settled or
        self._settled = 0  # spooled: in order, so a flush waits for a number
        self._hurry_to = 0  # flushes wait for this many
        self._flushes: dict[Callable[[], None], int] = {}  # whom to tell, and of how many
        self._prepared_all = False
        self._over = False  # nothing more will be written
        self._started = False
        self._ended: set[str] = set()
        self._threads: dict[str, threading.Thread] = {}
        self._asides_said = 0
        self._passed_over_said = 0
        self._faults_said: set[str] = set()
        self._lost_said: Counter[str] = Counter()
        self._lost_said_at = -_LOG_EVERY_S

    def start(self) -> None:
        """Start the threads, if they are not running; the first record does."""
        on_exit_of_worker(self, _closing(self))
        self._start_threads()

    def _start_threads(self) -> None:
        with self._lock:
            for name, body in (("deliver", self._deliver_all), ("prepare", self._prepare_all)):
                if name in self._threads or self._over:
                    continue
                thread = threading.Thread(
                    target=self._run, args=(name, body), name=f"lynkr-store-{name}", daemon=True
                )
                try:
                    with without_sigterm():
                        thread.start()
                except (RuntimeError, MemoryError):  # no more threads: the next record tries again
                    self._intake.wake_at = 1
                    return
                self._started = True

    def _run(self, name: str, body: Callable[[], None]) -> None:
        with self._lock:
            if name in self._threads:
                return  # a signal handler came between and started another
            self._threads[name] = threading.current_thread()
        while not self._has_ended(body):
            with suppress(BaseException), self._lock:
                self._changed.wait_for(lambda: self._over, _AGAIN_S)
        with self._lock:
            self._ended.add(name)
            self._changed.notify_all()

    def _has_ended(self, body: Callable[[], None]) -> bool:
        """Run a thread's body; False when something ended it before its time."""
        try:
            body()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the thread goes on
            with suppress(BaseException):
                self.note_restart(error)
            return False
        return True

    def note_restart(self, error: BaseException) -> None:
        """Note that something ended one of the store's threads, which goes on."""
        words = f"{RESTARTED}: {words_of(error)}"
        with self._lock:
            self._note_last(words)
            self._account.faults_by[RESTARTED] += 1
        say(logging.ERROR, "a thread of the store's own was ended and goes on: %s", words)

    def note_fault(self, error: BaseException) -> None:
        """Note what failed that is no batch; whoever noticed it logs it."""
        with self._lock:
            self._note_last(words_of(error))
            self._account.faults_by[type(error).__name__] += 1

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything submitted before is written, rejected, dropped or spooled.

        Raises:
            BadArgument: ``timeout_s`` is negative or NaN.
        """
        timeout_s = checked_timeout(timeout_s)
        with self._lock:
            target = self._hurry()
            return self._freed.wait_for(lambda: self._settled >= target or self._over, timeout_s)

    def when_flushed(self, tell: Callable[[], None]) -> None:
        """Call a function when what `flush` would wait for has come.

        It is called at once, or later by a thread of the writer's, under its lock: it must neither
        wait nor raise. `forget_flush` takes it back.
        """
        with self._lock:
            target = self._hurry()
            if self._settled >= target or self._over:
                tell()
            else:
                self._flushes[tell] = target

    def forget_flush(self, tell: Callable[[], None]) -> None:
        """Do not call the function any more."""
        with self._lock:
            self._flushes.pop(tell, None)

    def _hurry(self) -> int:
        """Have what was submitted so far written at once; return how many records that is."""
        target = self._taken + len(self._intake)
        self._hurry_to = max(self._hurry_to, target)
        if self._settled < target:
            self._ring()
        return target

    def close(self, timeout_s: float) -> None:
        """Take no more records, write what is there, and spool or count what could not be.

        Afterwards nothing is pending. A spool has half of the time for itself. What is left is
        dropped: as ``outcome_unknown`` where the sink was not heard of, else as ``deadline``. May
        be called again.

        Raises:
            BadArgument: ``timeout_s`` is negative or NaN.
        """
        timeout_s = checked_timeout(timeout_s)
        self._intake.closed = True
        running = self._started or (len(self._intake) > 0 and self._start_soon())
        if running and self._spool:
            if not self.flush(timeout_s / 2):
                self._spool_all = True
                self.flush(timeout_s / 2 + _GRACE_S)
        elif running:
            self.flush(timeout_s)
        with self._lock:
            stuck = self._delivery is not None and self._delivery.asking
            self._give_up()
            # not by join(): whoever a signal handler interrupted here may hold the lock
            self._changed.wait_for(
                lambda: self._ended >= self._threads.keys(), _TICK_S if stuck else _GRACE_S
            )
        if self._spool:
            self._spool.close()
        self._report_losses(now=True)

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller runs in one of the writer's threads."""
        return threading.current_thread() in self._threads.values()

    def account(self) -> Account:
        """One consistent copy of the account."""
        with self._lock:
            account = self._account.copy()
            if self._spool:  # what it found of other processes', and lost
                found, lost = self._spool.found_rows, self._spool.lost_rows
                account.recovered += found
                account.spooled += found - lost
                account.dropped_by += Counter(spool_damaged=lost)
            refused = self._intake.refused()
            account.dropped_by += refused
            account.queued = len(self._intake)
            account.submitted = self._taken + account.queued + refused.total()
            return account

    def note_unreadable(self, values: int) -> None:
        """Count stored values that a read could not make sense of."""
        if values:
            with self._lock:
                self._account.mended_by["unreadable_on_read"] += values

    def before_fork(self) -> None:
        """Let the spool come to rest: what a child inherits must not be half-written."""
        self._holds_spool = self._spool is not None and self._spool.hold(FORK_WAIT_S)

    def after_fork_in_parent(self) -> None:
        """Go on."""
        if self._spool and self._holds_spool:
            self._spool.release()

    def after_fork_in_child(self) -> None:
        """Start with nothing; without a spool, if a batch was on its way there.

        The parent's spool is kept from the collector, which would close a file of the parent's.
        """
        without = self._spool is not None and not self._holds_spool
        if self._spool:
            _inherited.append(self._spool)
        if without:
            self._make_spool = None
        closed = self._intake.closed
        self.begin()
        if without:
            self._note_fault(
                SpoolError(
                    "this process was forked while a batch was on its way into the spool; it has "
                    "none. Fork before the store is used, or start processes by multiprocessing's "
                    "'spawn'"
                )
            )
        if closed:
            self.close(0)

    # -- both threads --------------------------------------------------------------------------

    def _ring(self) -> None:
        """Wake the thread that prepares; the first record has it started."""
        self._bell.put(None)
        if len(self._threads) < _THREADS:
            on_exit_of_worker(self, _closing(self))  # it may end before the threads are there
            if not self._start_soon():
                self._intake.wake_at = 1  # the next record tries again

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
        except BaseException as error:  # noqa: BLE001 - the next record tries again
            self._intake.wake_at = 1
            with suppress(BaseException):
                self._note_fault(error)

    def _listen(self, timeout_s: float | None) -> None:
        """Wait for the bell, and take all its strokes."""
        with suppress(Empty):
            self._bell.get(timeout=timeout_s and min(timeout_s, threading.TIMEOUT_MAX))
            while True:
                self._bell.get_nowait()

    def _note_fault(self, error: BaseException) -> None:
        words = words_of(error)
        with self._lock:
            self._note_last(words)
            self._account.faults_by[type(error).__name__] += 1
            news = words not in self._faults_said and len(self._faults_said) < _REPORTED_FAULTS
            self._faults_said.add(words)
        if news:
            say(logging.WARNING, "records wait to be written: %s", words)

    def _note_last(self, words: str) -> None:
        self._account.last_error = words
        self._account.last_error_at = time.monotonic()

    def _settle(self, batch: _Batch) -> None:
        """A batch is stored: move its records to where they ended."""
        with self._lock:
            account, count = self._account, len(batch.rows)
            if batch.settled and not batch.entry:  # close() gave it up before
                self._delivery = None
                return
            refused = Counter(batch.refused)
            rejected_by = account.rejected_by + refused
            if batch.entry:
                self._to_remove.append(batch.entry)
                account.spooled -= count
            else:
                account.in_hand -= count
            self._delivery = None
            batch.settled = True
            account.written += count - refused.total()
            account.rejected_by = rejected_by
            if not batch.entry:
                self._free(batch)
            recovered = bool(self._faults_said) and bool(batch.rows)
            if recovered:
                self._faults_said.clear()
            self._changed.notify_all()
        self._bell.put(None)
        self._remove_spooled()
        if recovered:
            say(logging.INFO, "records are written again")

    def _remove_spooled(self) -> None:
        """Remove from the spool what is accounted for, and may not be delivered once more."""
        while self._spool and self._to_remove:
            entry = self._to_remove.popleft()
            try:
                self._spool.remove(entry)
            except SpoolError as error:  # the next process finds it in the ledger
                if not self._over:
                    self._note_fault(error)
            except BaseException:
                self._to_remove.append(entry)
                raise

    def _free(self, batch: _Batch) -> None:
        """The batch needs no memory any more, and whoever flushes need not wait for it."""
        self._intake.release(batch.units)
        self._settled = batch.upto
        self._tell_flushed()

    def _tell_flushed(self) -> None:
        self._freed.notify_all()
        for tell, target in list(self._flushes.items()):
            if self._settled >= target or self._over:
                self._flushes.pop(tell, None)
                tell()

    # -- the thread that prepares --------------------------------------------------------------

    def _prepare_all(self) -> None:
        with self._lock:
            self._spooling = False
        self._open_spool()
        while self._preparation or self._is_due():
            self._place(self._prepared())
        while self._spool and not self._over and self._in_hand():
            self._relieve()  # close() may run out of time for them
            self._listen(_TICK_S)
        with self._lock:
            self._prepared_all = True
            self._changed.notify_all()

    def _is_due(self) -> bool:
        """Wait until a batch is due; False when the writer is closed and has none left."""
        intake, due_at = self._intake, None
        while True:
            self._relieve()
            self._report_losses()
            waiting, now = len(intake), time.monotonic()
            if not waiting:
                due_at = None
                if intake.closed:
                    return False
            elif due_at is None:
                due_at = now + self._interval_s
            if due_at is not None and (
                waiting >= self._batch_rows
                or intake.closed
                or intake.is_half_full()
                or self._hurry_to > self._taken
                or now >= due_at
            ):
                return True
            intake.wake_at = self._wake_rows if waiting else 1
            if len(intake) >= intake.wake_at:
                continue  # meanwhile it came; nobody will ring
            waits = []
            if due_at is not None:
                waits = [due_at - now, _TICK_S]  # nobody rings when half of the bytes are in use
            elif self._spool and self._delivery:
                waits = [_TICK_S]
            self._listen(min(waits, default=None))

    def _prepared(self) -> _Batch:
        """The next records as a batch; ones that something ended the thread with come first."""
        work = self._preparation or self._taken_records()
        work.tries += 1
        if work.tries > _MOST_TRIES:
            self._lose_rest(work)
        while work.next < len(work.records):
            with self._gil.preparing():
                some = work.records[work.next : work.next + _SLICE_ROWS]
                rejected, mended = prepare(some, self._gathering, self._policy, self._new_id)
                rejected, mended = work.rejected + rejected, work.mended + mended
                work.next, work.rejected, work.mended = work.next + len(some), rejected, mended
        return _Batch(uuid.uuid4().hex, self._gathering.rows(), work.upto, work.units)

    def _taken_records(self) -> _Preparation:
        with self._lock:
            records, units = self._intake.take(self._batch_rows, _BATCH_BYTES)
            self._preparation = work = _Preparation(records, units, self._taken + len(records))
            self._taken = work.upto
            self._account.in_hand += len(records)
        return work

    def _lose_rest(self, work: _Preparation) -> None:
        """Count the records that ended the thread several times as lost, so that it goes on."""
        with self._lock:
            left = len(work.records) - work.next
            work.next = len(work.records)
            if not self._over:
                self._account.in_hand -= left
                self._account.dropped_by[RESTARTED] += left

    def _place(self, batch: _Batch) -> None:
        """Have the batch delivered in its turn; wait until there is room for another."""
        with self._lock:
            work, account = self._preparation, self._account
            assert work  # noqa: S101 - the batch was made of it
            rejected_by = account.rejected_by + work.rejected
            mended_by = account.mended_by + work.mended
            if not self._over:
                self._ready.append(batch)
                account.in_hand -= work.rejected.total()
                account.rejected_by = rejected_by
            account.mended_by = mended_by
            self._preparation = None
            self._gathering.clear()
            self._changed.notify_all()
        while not self._over:
            self._relieve()
            self._report_losses()
            with self._lock:
                if len(self._ready) < _READY:
                    return
            self._listen(_TICK_S)

    def _relieve(self) -> None:
        """Move the batches in hand to the spool, if it is time to."""
        if self._spool is None:
            return
        with self._lock:
            if not self._spool_is_due():
                return
            self._spooling = True
        try:
            for batch in self._in_hand():
                self._enter(self._spool, batch)
        except Exception as error:  # noqa: BLE001 - this thread must go on, the batch stays in hand
            self._spool_rests_until = time.monotonic() + _SPOOL_AGAIN_S
            self._note_fault(error)
        finally:
            with self._lock:
                self._spooling = False
                self._changed.notify_all()

    def _in_hand(self) -> list[_Batch]:
        """The batches that are not in the spool, the oldest first."""
        with self._lock:
            return [b for b in (self._delivery, *self._ready) if b and not b.entry]

    def _spool_is_due(self) -> bool:
        now, delivery = time.monotonic(), self._delivery
        if not self._spool or now < self._spool_rests_until:
            return False
        away_s = now - delivery.began if delivery else 0.0
        if delivery and not delivery.failed and away_s < _UNANSWERED_S:
            away_s = 0.0
        backlog = self._spool.first() is not None
        return (
            self._spool_all
            or (away_s > 0 and away_s >= self._spool_after_s)
            or ((away_s > 0 or backlog) and self._intake.is_half_full())
        )

    def _enter(self, spool: Spool, batch: _Batch) -> None:
        entry = None
        if batch.rows and not batch.settled:
            attempted_at = batch.asked_ms if batch.asking or batch.unsure else None
            entry = spool.enter(batch.id, batch.rows, attempted_at)
        with self._lock:
            if batch in self._ready:
                self._ready.remove(batch)
            if not batch.settled:
                self._free(batch)
                if entry is None:
                    batch.settled = True
                else:
                    batch.entry = entry
                    self._account.in_hand -= len(batch.rows)
                    self._account.spooled += len(batch.rows)
                    entry = None
                self._changed.notify_all()
            if entry:  # it was stored, or given up, while it was on its way
                self._to_remove.append(entry)
        self._remove_spooled()

    def _open_spool(self) -> None:
        if not self._spool:
            return
        try:
            self._spool.open()
        except Exception as error:  # noqa: BLE001 - this thread must go on; enter() tries again
            self._note_fault(error)
        self._report_aside()
        with self._lock:
            self._changed.notify_all()

    def _report_aside(self) -> None:
        assert self._spool  # noqa: S101 - who asks has one
        for path in self._spool.set_aside[self._asides_said :]:
            self._asides_said += 1
            say(logging.WARNING, "a damaged spool was set aside: %s", path)
        for error in self._spool.passed_over[self._passed_over_said :]:
            self._passed_over_said += 1
            with self._lock:
                self._account.faults_by[type(error).__name__] += 1
            say(logging.WARNING, "a spool file was not used: %s", error)

    def _report_losses(self, *, now: bool = False) -> None:
        """Log what was lost since the last line, at most one line a minute."""
        at = time.monotonic()
        if not now and at - self._lost_said_at < _LOG_EVERY_S:
            return
        with self._lock:
            lost = self.account().lost()
            fresh = lost - self._lost_said
            if not fresh:
                return
            self._lost_said, self._lost_said_at = lost, at
        say(logging.WARNING, "records lost, by cause: %s", dict(fresh))

    # -- the thread that delivers --------------------------------------------------------------

    def _deliver_all(self) -> None:
        while (work := self._next_work()) is not None:
            try:
                batch = self._loaded(work) if isinstance(work, Entry) else work
            except Exception as error:  # noqa: BLE001 - this thread must go on
                self._note_fault(error)
                self._rest(_SPOOL_AGAIN_S)
                continue
            if batch and self._deliver(batch):
                self._settle(batch)

    def _next_work(self) -> _Batch | Entry | None:
        """Wait for the oldest batch that is not stored, in the spool or in hand."""
        while not self._over:
            self._remove_spooled()
            with self._lock:
                if self._to_remove:
                    continue
                if not self._spooling:
                    if self._spool and (entry := self._spool.first()):
                        return entry
                    delivery = self._delivery
                    if delivery and not delivery.entry and not delivery.settled:
                        return delivery  # something ended this thread in the middle of it
                    if self._ready:
                        batch = self._delivery = self._ready.popleft()
                        batch.began = time.monotonic()
                        self._bell.put(None)
                        return batch
                    if self._prepared_all:
                        return None
                if not self._over:
                    self._changed.wait()
        return None

    def _loaded(self, entry: Entry) -> _Batch | None:
        """A batch of the spool, to be delivered; None where there is none to be had of it."""
        assert self._spool  # noqa: S101 - the entry is from it
        try:
            rows, mended = self._read(self._spool, entry)
        except SpoolDamaged as error:
            self._note_fault(error)
            self._spool.abandon(entry)
            self._report_aside()
            return None
        now, asked = self._now_ms(), entry.attempted_at
        if (
            asked is not None
            and now - asked >= self._forget_after_ms
            and self._has_forgotten(asked)
        ):
            self._drop_spooled(entry, "outcome_unknown")
            return None
        batch = _Batch(entry.batch_id, rows, entry=entry, began=time.monotonic())
        with self._lock:
            if self._over:
                return None
            self._delivery = batch
            self._account.mended_by.update(mended)
        try:
            self._spool.mark_attempt(entry, now)
        except SpoolError as error:
            self._note_fault(error)
        return batch

    def _read(self, spool: Spool, entry: Entry) -> tuple[Sequence[Row], Counter[str]]:
        """A batch's rows, and cause to number of values that this process's policy changed.

        Its own rows went through the policy before they were spooled; another process's went
        through its own, which may have kept more.

        Raises:
            SpoolDamaged: They cannot be read, or are no records.
        """
        rows = spool.load(entry)
        if not entry.found:
            return rows, Counter()
        try:
            return taken_over(rows, self._policy)
        except ValueError:
            raise SpoolDamaged("spool_path: a batch has a column that no record has") from None

    def _drop_spooled(self, entry: Entry, cause: str) -> None:
        assert self._spool  # noqa: S101 - the entry is from it
        with self._lock:
            self._to_remove.append(entry)
            self._account.spooled -= entry.rows
            self._account.dropped_by[cause] += entry.rows
        self._remove_spooled()

    def _deliver(self, batch: _Batch) -> bool:
        """Hand the batch to the sink until it is answered; False when it was given up."""
        wait_s = _FIRST_RETRY_S
        while batch.rows:
            try:
                if not self._ask(batch):
                    return False
            except BaseException as error:  # noqa: BLE001 - nothing ends the batch but an answer
                batch.failed = True
                self._note_fault(error)
            else:
                break
            self._bell.put(None)
            self._rest(random.uniform(0, wait_s))  # noqa: S311 - so that stores do not keep step
            wait_s = min(2 * wait_s, _LAST_RETRY_S)
        return True

    def _ask(self, batch: _Batch) -> bool:
        """Hand the batch to the sink; False when the writer was closed before."""
        if batch.asked_ms is None:
            batch.asked_ms = self._now_ms()
        with self._lock:
            if self._over:
                return False
            batch.asking = True
        try:
            with self._gil.delivering():
                batch.refused = self._sink.write(batch.id, batch.rows)
        except BaseException as error:
            batch.unsure |= isinstance(error, OutcomeUnknown) or not isinstance(error, Exception)
            raise
        finally:
            batch.asking = False
        return True

    def _now_ms(self) -> int:
        try:
            return self._clock()
        except BaseException as error:  # noqa: BLE001 - the host's own; a batch needs none
            self._note_fault(error)
            return time.time_ns() // 10**6

    def _rest(self, seconds: float) -> None:
        with self._lock:
            self._changed.wait_for(lambda: self._over, seconds)

    # -- the end -------------------------------------------------------------------------------

    def _give_up(self) -> None:
        """Count what is not settled as dropped; nothing is pending afterwards.

        An exception that a signal handler raises in the middle leaves the account right: who calls
        again goes on. Such a handler comes after a call and before no assignment, so lines without
        a call are done together.
        """
        self._over = True
        account, delivery = self._account, self._delivery
        self._intake.refuse_queued("deadline")
        dropped_by = Counter(account.dropped_by)
        left = account.in_hand
        given_up = [batch for batch in (delivery, *self._ready) if batch and not batch.entry]
        if delivery and not delivery.entry and not delivery.settled:
            cause = "outcome_unknown" if delivery.asking or delivery.unsure else "deadline"
            dropped_by[cause] += len(delivery.rows)
            left -= len(delivery.rows)
        if left:
            dropped_by["deadline"] += left
        account.dropped_by, account.in_hand = dropped_by, 0
        for batch in given_up:
            batch.settled = True
        self._settled = self._taken
        self._ready.clear()
        self._tell_flushed()
        self._changed.notify_all()
        self._bell.put(None)

    def _after_close(self) -> bool:
        """Whether a record that came in while the writer was closing will still be written."""
        with self._lock:
            return not (self._over and self._intake.refuse_queued("closed"))


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
