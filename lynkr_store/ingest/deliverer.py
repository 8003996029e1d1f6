"""The delivering thread: hands batches to the sink, one by one and in order."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

from lynkr_store.exceptions import OutcomeUnknown
from lynkr_store.ingest.batch import Row
from lynkr_store.ingest.handoff import Batch, Handoff
from lynkr_store.ingest.spool import Entry
from lynkr_store.ingest.spooling import SPOOL_AGAIN_S, SpoolMover

_FIRST_RETRY_S: Final = 0.1  # the range of the first wait, doubled with each try
_LAST_RETRY_S: Final = 5.0  # and its cap, the most by which a recovery is noticed late


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


class Deliverer:
    """Delivers batches: those of the spool first, then those that are ready.

    Args:
        handoff: Shared with the preparing thread.
        spooling: Loads batches of the spool.
        sink: Where batches go.
        clock: The present in epoch milliseconds.
    """

    def __init__(
        self, handoff: Handoff, spooling: SpoolMover, sink: Sink, clock: Callable[[], int]
    ) -> None:
        self._handoff = handoff
        self._spooling = spooling
        self._sink = sink
        self._clock = clock

    def run(self) -> None:
        """Work until nothing is left or the writer gives up; run again, it goes on."""
        handoff = self._handoff
        while (work := self._next_work()) is not None:
            try:
                batch = self._loaded(work) if isinstance(work, Entry) else work
            except Exception as error:  # noqa: BLE001 - this thread must go on
                handoff.note_fault(error)
                handoff.rest(SPOOL_AGAIN_S)
                continue
            if batch and self._deliver(batch):
                handoff.settle(batch)
                self._spooling.remove_settled()

    def _next_work(self) -> Batch | Entry | None:
        """Wait for the oldest batch that is not stored, in the spool or in hand."""
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
                        return delivery  # something ended this thread in the middle of it
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
        """Hand the batch to the sink until it is answered; False when it was given up."""
        handoff, wait_s = self._handoff, _FIRST_RETRY_S
        while batch.rows:
            try:
                if not self._ask(batch):
                    return False
            except BaseException as error:  # noqa: BLE001 - nothing ends the batch but an answer
                batch.failed = True
                handoff.note_fault(error)
            else:
                break
            handoff.ring()
            handoff.rest(random.uniform(0, wait_s))  # noqa: S311 - so that stores do not keep step
            wait_s = min(2 * wait_s, _LAST_RETRY_S)
        return True

    def _ask(self, batch: Batch) -> bool:
        """Hand the batch to the sink; False when the writer was closed before."""
        handoff = self._handoff
        if batch.asked_ms is None:
            batch.asked_ms = self._now_ms()
        with handoff.lock:
            if handoff.over:
                return False
            batch.asking = True
        try:
            with handoff.gil.delivering():
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
            self._handoff.note_fault(error)
            return time.time_ns() // 10**6
