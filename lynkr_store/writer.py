"""The writer: a bounded queue, a thread that batches, and an account of every record.

It knows no database. Batches go to the sink it is given; a batch stays in hand until the sink has
returned, so that at any moment, under any fault,
``submitted == written + rejected + dropped + pending``.
"""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from sys import getsizeof
from typing import Any, Final, Protocol

from pydantic import ValidationError

from lynkr_store.exceptions import BadArgument, LynkrStoreError
from lynkr_store.ingest import Row, TextPolicy, cause_of, row_of
from lynkr_store.schemas import RoutingEvent

_RECORD_BYTES: Final = 1_024  # what a queued record costs beside its texts, about
_RETRY_S: Final = 0.5  # how long a batch waits before the sink is tried again
_LOG_EVERY_S: Final = 60.0  # one line a burst

_MAX_DEPTH: Final = 50  # of containers in a record's JSON fields
_TOO_DEEP: Final = object()

_log = logging.getLogger("lynkr_store")


class Sink(Protocol):
    """Where batches go."""

    def write(self, rows: Sequence[Row]) -> Mapping[str, int]:
        """Store the rows, in order and durably.

        Returns:
            Cause to number of rows refused for their own fault; the others are stored.

        Raises:
            Exception: Nothing is stored; the same rows will come again.
        """
        ...


@dataclass
class Account:
    """Where every record is. Read and changed under the writer's lock only."""

    submitted: int = 0
    written: int = 0
    queued: int = 0
    in_batch: int = 0
    rejected_by: Counter[str] = field(default_factory=Counter)
    dropped_by: Counter[str] = field(default_factory=Counter)
    mended_by: Counter[str] = field(default_factory=Counter)
    last_error: str | None = None
    last_error_at: float | None = None
    """On the monotonic clock."""


@dataclass
class _Queued:
    record: Any
    stamp_ms: int
    size: int


class Writer:
    """Takes records at once, writes them in batches from a thread of its own.

    Args:
        sink: Where batches go.
        policy: What is kept of the texts.
        clock: The present in epoch milliseconds, for records that name no instant.
        max_rows: Records that may wait.
        max_bytes: Bytes of texts that may wait.
        batch_rows: Records in one batch at most.
        interval_s: Seconds after which a batch goes even if it is not full.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        policy: TextPolicy,
        clock: Callable[[], int],
        max_rows: int,
        max_bytes: int,
        batch_rows: int,
        interval_s: float,
    ) -> None:
        self._sink = sink
        self._policy = policy
        self._clock = clock
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._batch_rows = batch_rows
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)  # there is something for the thread to do
        self._progress = threading.Condition(self._lock)  # records were settled
        self._queue: deque[_Queued] = deque()
        self._queued_bytes = 0
        self._accepted = 0  # records ever queued, and how many of them are settled: they settle
        self._settled = 0  # in order, so a flush waits for a number
        self._hurry_to = 0  # flushes wait for this many to be settled
        self._in_sink = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._account = Account()
        self._reported: Counter[str] = Counter()
        self._reported_at = -_LOG_EVERY_S

    def submit(self, record: dict[str, Any] | RoutingEvent) -> bool:
        """Queue a record. Never raises, never waits for I/O.

        A dict becomes the writer's: the caller must not keep it. Containers in it are copied.

        Returns:
            True when it was queued; False when it was dropped, and counted: the queue is full or
            the writer closed.
        """
        stamp_ms = self._clock()
        size = _RECORD_BYTES
        values = record if isinstance(record, dict) else vars(record)
        for name, value in values.items():
            if isinstance(value, str):
                size += getsizeof(value)
            elif isinstance(value, list | dict | tuple):
                values[name], extra = _copied(value)
                size += extra
        with self._lock:
            account = self._account
            account.submitted += 1
            if self._closed:
                account.dropped_by["closed"] += 1
                return False
            if account.queued >= self._max_rows or self._queued_bytes + size > self._max_bytes:
                account.dropped_by["queue_full"] += 1
                return False
            self._queue.append(_Queued(record, stamp_ms, size))
            self._queued_bytes += size
            self._accepted += 1
            account.queued += 1
            if account.queued in (1, self._batch_rows):
                self._wake.notify()
            if self._thread is None:
                self._start()
        return True

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything submitted before is written, rejected or dropped.

        Raises:
            BadArgument: ``timeout_s`` is negative or NaN.
        """
        deadline = _deadline(timeout_s)
        with self._lock:
            target = self._accepted
            self._hurry_to = max(self._hurry_to, target)
            self._wake.notify()
            return self._progress.wait_for(
                lambda: self._settled >= target, max(0.0, deadline - time.monotonic())
            )

    def close(self, timeout_s: float) -> None:
        """Take no more records, write what is there, and count what could not be by the deadline.

        Afterwards nothing is pending. A batch that the sink has not answered for is dropped as
        ``outcome_unknown``, the others as ``deadline``. May be called again.

        Raises:
            BadArgument: ``timeout_s`` is negative or NaN.
        """
        _deadline(timeout_s)
        with self._lock:
            self._closed = True
        done = self.flush(timeout_s)
        with self._lock:
            if not done:
                account = self._account
                unknown = "outcome_unknown" if self._in_sink else "deadline"
                if account.in_batch:
                    account.dropped_by[unknown] += account.in_batch
                if account.queued:
                    account.dropped_by["deadline"] += account.queued
                account.in_batch = account.queued = self._queued_bytes = 0
                self._queue.clear()
                self._settled = self._accepted
                self._progress.notify_all()
            self._wake.notify()
            thread = self._thread
        if done and thread is not None and thread is not threading.current_thread():
            thread.join()

    def account(self) -> Account:
        """One consistent copy of the account."""
        with self._lock:
            own = self._account
            return Account(
                own.submitted,
                own.written,
                own.queued,
                own.in_batch,
                Counter(own.rejected_by),
                Counter(own.dropped_by),
                Counter(own.mended_by),
                own.last_error,
                own.last_error_at,
            )

    def note_unreadable(self, values: int) -> None:
        """Count stored values that a read could not make sense of."""
        if values:
            with self._lock:
                self._account.mended_by["unreadable_on_read"] += values

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="lynkr-store-writer", daemon=True)
        with suppress(RuntimeError):  # no more threads: the next record tries again
            thread.start()
            self._thread = thread

    def _run(self) -> None:
        while batch := self._next_batch():
            rows = self._validated(batch)
            if rows:
                self._write(rows)
            self._report()

    def _next_batch(self) -> list[_Queued]:
        """Wait for a batch; [] when the writer is closed and has none left."""
        with self._lock:
            self._wake.wait_for(lambda: self._queue or self._closed)
            self._wake.wait_for(self._batch_is_due, self._interval_s)
            count = min(len(self._queue), self._batch_rows)
            batch = [self._queue.popleft() for _ in range(count)]
            self._queued_bytes -= sum(item.size for item in batch)
            self._account.queued -= count
            self._account.in_batch += count
            return batch

    def _batch_is_due(self) -> bool:
        return (
            self._closed or len(self._queue) >= self._batch_rows or self._hurry_to > self._settled
        )

    def _validated(self, batch: Sequence[_Queued]) -> list[Row]:
        rows: list[Row] = []
        rejected: Counter[str] = Counter()
        mended: Counter[str] = Counter()
        for item in batch:
            try:
                row, causes = row_of(item.record, item.stamp_ms, self._policy)
            except ValidationError as error:
                rejected[cause_of(error)] += 1
            except Exception:  # noqa: BLE001 - a value whose own methods fail; it costs its row
                rejected["wrong_type"] += 1
            else:
                rows.append(row)
                mended.update(causes)
        with self._lock:
            self._account.mended_by.update(mended)
            self._settle(0, rejected)
        return rows

    def _write(self, rows: Sequence[Row]) -> None:
        """Hand the batch to the sink until it is stored, or given up by `close`."""
        while True:
            with self._lock:
                if not self._account.in_batch:
                    return
                self._in_sink = True
            try:
                refused = self._sink.write(rows)
            except Exception as error:  # noqa: BLE001 - whatever it was, the batch stays in hand
                self._note_error(error)
                with self._lock:
                    self._in_sink = False
                    self._wake.wait_for(lambda: not self._account.in_batch, _RETRY_S)
            else:
                with self._lock:
                    self._in_sink = False
                    self._settle(len(rows) - sum(refused.values()), refused)
                return

    def _settle(self, written: int, rejected: Mapping[str, int]) -> None:
        """Move records of the batch to where they ended, unless `close` gave them up."""
        account = self._account
        count = written + sum(rejected.values())
        if not account.in_batch or not count:
            return
        account.in_batch -= count
        account.written += written
        account.rejected_by.update(rejected)
        self._settled += count
        self._progress.notify_all()

    def _note_error(self, error: Exception) -> None:
        # another library's words may repeat the row
        said = f": {error}" if isinstance(error, LynkrStoreError) else ""
        words = f"{type(error).__name__}{said}"
        with self._lock:
            known = words == self._account.last_error
            self._account.last_error = words
            self._account.last_error_at = time.monotonic()
        if not known:
            _log.warning("records wait to be written: %s", words)

    def _report(self) -> None:
        """Log what was lost since the last line, at most one line a minute."""
        with self._lock:
            lost = self._account.rejected_by + self._account.dropped_by
        fresh = lost - self._reported
        now = time.monotonic()
        if fresh and now - self._reported_at >= _LOG_EVERY_S:
            _log.warning("records lost, by cause: %s", dict(fresh))
            self._reported, self._reported_at = lost, now


def _deadline(timeout_s: float) -> float:
    if not timeout_s >= 0:
        raise BadArgument("timeout_s: give seconds, 0 or more")
    return time.monotonic() + min(timeout_s, threading.TIMEOUT_MAX)


def _copied(value: Any, depth: int = 0) -> tuple[Any, int]:
    """A copy of nested containers that later changes do not reach, and its size in bytes.

    What is nested too deep, in itself perhaps, becomes a value that is rejected later.
    """
    if depth > _MAX_DEPTH:
        return _TOO_DEEP, 0
    size = getsizeof(value)
    if isinstance(value, dict):
        copy: Any = {}
        for key, item in value.items():
            copy[key], extra = _copied(item, depth + 1)
            size += extra
        return copy, size
    if isinstance(value, list | tuple):
        items = [_copied(item, depth + 1) for item in value]
        return [item for item, _ in items], size + sum(extra for _, extra in items)
    return value, size
