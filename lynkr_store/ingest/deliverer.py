"""The delivering thread: gives batches to the sink, one by one and in order."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from lynkr_store.exceptions import OutcomeUnknown
from lynkr_store.ingest.batch import Row
from lynkr_store.ingest.handoff import Batch, Handoff
from lynkr_store.ingest.spool import Entry
from lynkr_store.ingest.spooling import SPOOL_AGAIN_S, SpoolMover
from lynkr_store.schemas import BatchAttempt

_FIRST_RETRY_S: Final = 0.1  # the longest first wait; it doubles with each try
_LAST_RETRY_S: Final = 5.0  # its maximum, after which a recovered database is noticed at the latest


class Sink(Protocol):
    """Stores batches."""

    def write(self, batch_id: str, rows: Sequence[Row]) -> Mapping[str, int]:
        """Store the rows, in order and durably, unless an earlier try under this id did.

        Enter `lynkr_store.ingest.gil.long_call` around calls that hardly need the interpreter.

        Args:
            batch_id: The same for every try.
            rows: One or more.

        Returns:
            The number of rows refused because of their values, by cause; the others are stored.

        Raises:
            OutcomeUnknown: The rows may be stored; the writer tries the same batch again.
            Exception: Nothing is stored; the writer tries the same batch again.
        """
        ...


class Deliverer:
    """Delivers batches: first those in the spool, then those that are ready.

    Args:
        handoff: Shared with the preparing thread.
        spooling: Loads batches from the spool.
        sink: Stores batches.
        clock: Returns the present in epoch milliseconds.
        listeners: A host's functions, which are called after each attempt.
    """

    def __init__(
        self,
        handoff: Handoff,
        spooling: SpoolMover,
        sink: Sink,
        clock: Callable[[], int],
        listeners: Sequence[Callable[[BatchAttempt], object]] = (),
    ) -> None:
        self._handoff = handoff
        self._spooling = spooling
        self._sink = sink
        self._clock = clock
        self._listeners = listeners

    def run(self) -> None:
        """Work until nothing is left or the writer gives up; when run again, it continues."""
        handoff = self._handoff
        while (work := self._next_work()) is not None:
            try:
                batch = self._loaded(work) if isinstance(work, Entry) else work
            except Exception as error:  # noqa: BLE001 - this thread must continue
                handoff.note_fault(error)
                handoff.rest(SPOOL_AGAIN_S)
                continue
            if batch and self._deliver(batch):
                handoff.settle(batch)
                self._spooling.remove_settled()

    def _next_work(self) -> Batch | Entry | None:
        """Wait for the oldest batch that is not stored, in the spool or in memory."""
        handoff = self._handoff
        while not handoff.over:
            self._spooling.remove_settled()
            with handoff.lock:
                if handoff.to_remove:
                    continue
                if not handoff.spooling:
                    if entry := self._spooling.first():
                        return entry
                    delivery = handoff.delivery
                    if delivery and not delivery.entry and not delivery.settled:
                        return delivery  # this thread was ended during the delivery
                    if handoff.ready:
                        batch = handoff.delivery = handoff.ready.popleft()
                        batch.began = time.monotonic()
                        handoff.ring()
                        return batch
                    if handoff.prepared_all:
                        return None
                if not handoff.over:
                    handoff.changed.wait()
        return None

    def _loaded(self, entry: Entry) -> Batch | None:
        return self._spooling.load(entry, self._now_ms())

    def _deliver(self, batch: Batch) -> bool:
        """Give the batch to the sink until that succeeds; False if the writer gave up."""
        handoff, wait_s = self._handoff, _FIRST_RETRY_S
        while batch.rows:
            try:
                if not self._ask(batch):
                    return False
            except BaseException as error:  # noqa: BLE001 - only an answer ends the batch
                batch.failures += 1
                handoff.note_fault(error)
            else:
                break
            handoff.ring()
            handoff.rest(random.uniform(0, wait_s))  # noqa: S311 - so that stores do not keep step
            wait_s = min(2 * wait_s, _LAST_RETRY_S)
        return True

    def _ask(self, batch: Batch) -> bool:
        """Give the batch to the sink once; False if the writer had given up before."""
        handoff = self._handoff
        if batch.asked_ms is None:
            batch.asked_ms = self._now_ms()
        with handoff.lock:
            if handoff.over:
                return False
            batch.asking = True
        began, failed = time.monotonic(), None
        try:
            with handoff.gil.delivering():
                batch.refused = self._sink.write(batch.id, batch.rows)
        except BaseException as error:
            batch.unsure |= isinstance(error, OutcomeUnknown) or not isinstance(error, Exception)
            failed = type(error).__name__
            raise
        finally:
            batch.asking = False
            if self._listeners:
                self._tell(len(batch.rows), time.monotonic() - began, failed)
        return True

    def _tell(self, rows: int, duration_s: float, error: str | None) -> None:
        attempt = BatchAttempt(rows=rows, duration_s=duration_s, error=error)
        for listener in tuple(self._listeners):
            try:
                listener(attempt)
            except BaseException as fault:  # noqa: BLE001 - a host's function ends nothing here
                self._handoff.note_listener(fault)

    def _now_ms(self) -> int:
        try:
            return self._clock()
        except BaseException as error:  # noqa: BLE001 - a host's clock failed; use the system's
            self._handoff.note_fault(error)
            return time.time_ns() // 10**6
