"""The preparing thread: takes records from the queue, checks them and builds batches."""

import time
from typing import Final

from lynkr_store.ingest.batch import BatchBuilder
from lynkr_store.ingest.conversion import prepare
from lynkr_store.ingest.handoff import Batch, Handoff
from lynkr_store.ingest.spooling import SpoolMover
from lynkr_store.ingest.validation import TextPolicy, new_ids

_BATCH_BYTES: Final = 8 * 2**20
"""The most bytes of records in one batch: on SQLite a transaction of about 0.1 s, for which a
gateway that writes the same file has to wait."""
_MOST_TRIES: Final = 3  # for the same records, if the thread is ended each time
_READY: Final = 14  # batches that may be ready, so that the sink has work after a long wait
_SLICE_ROWS: Final = 64  # checked in half a millisecond
_TICK_S: Final = 0.1  # seconds between two checks of a delivery's state


class Preparer:
    """Builds batches of records, and continues while the sink delays one.

    Args:
        handoff: Shared with the delivering thread.
        spooling: Moves batches to the spool.
        policy: Decides what is kept of the texts.
        batch_rows: The most records in one batch.
        wake_rows: The number of queued records at which this thread is woken.
        interval_s: Seconds after which a batch is due even if it is not full.

    Attributes:
        wake_rows, interval_s: The same; they may be changed.
    """

    def __init__(
        self,
        handoff: Handoff,
        spooling: SpoolMover,
        *,
        policy: TextPolicy,
        batch_rows: int,
        wake_rows: int,
        interval_s: float,
    ) -> None:
        self._handoff = handoff
        self._spooling = spooling
        self._policy = policy
        self._batch_rows = batch_rows
        self.wake_rows = wake_rows
        self.interval_s = interval_s
        self._builder = BatchBuilder()
        self._new_id = new_ids().__next__

    def run(self) -> None:
        """Work until the writer is closed; if the thread was ended, run again, it continues."""
        handoff, spooling = self._handoff, self._spooling
        with handoff.lock:
            handoff.spooling = False
        spooling.open()
        while handoff.preparation or self._is_due():
            self._place(self._prepared())
        while handoff.spool and not handoff.over and spooling.in_hand():
            spooling.relieve()  # close() may have no time left to deliver them
            handoff.listen(_TICK_S)
        with handoff.lock:
            handoff.prepared_all = True
            handoff.changed.notify_all()

    def _is_due(self) -> bool:
        """Wait until a batch is due; False if the writer is closed and no record is left."""
        handoff, due_at = self._handoff, None
        queue = handoff.queue
        while True:
            self._spooling.relieve()
            handoff.report_losses()
            waiting, now = len(queue), time.monotonic()
            if not waiting:
                due_at = None
                if queue.closed:
                    return False
            elif due_at is None:
                due_at = now + self.interval_s
            if due_at is not None and (
                waiting >= self._batch_rows
                or queue.closed
                or queue.is_half_full()
                or handoff.hurry_to > handoff.taken
                or now >= due_at
            ):
                return True
            queue.wake_at = self.wake_rows if waiting else 1
            if len(queue) >= queue.wake_at:
                continue  # a record came meanwhile, and its call did not wake this thread
            waits = []
            if due_at is not None:
                waits = [due_at - now, _TICK_S]  # no call wakes it when half of the bytes are used
            elif handoff.spool and handoff.delivery:
                waits = [_TICK_S]
            handoff.listen(min(waits, default=None))

    def _prepared(self) -> Batch:
        """The next records as a batch; first those in work when the thread was ended."""
        handoff = self._handoff
        work = handoff.preparation or handoff.take(self._batch_rows, _BATCH_BYTES)
        work.tries += 1
        if work.tries > _MOST_TRIES:
            handoff.lose_rest(work)
        while work.next < len(work.records):
            with handoff.gil.preparing():
                some = work.records[work.next : work.next + _SLICE_ROWS]
                rejected, mended = prepare(some, self._builder, self._policy, self._new_id)
                rejected, mended = work.rejected + rejected, work.mended + mended
                work.next, work.rejected, work.mended = work.next + len(some), rejected, mended
        return work.batch(self._builder.rows())

    def _place(self, batch: Batch) -> None:
        """Queue the batch for delivery; wait until there is room for another."""
        handoff = self._handoff
        with handoff.lock:
            handoff.place(batch)
            self._builder.clear()
        while not handoff.over:
            self._spooling.relieve()
            handoff.report_losses()
            with handoff.lock:
                if len(handoff.ready) < _READY:
                    return
            handoff.listen(_TICK_S)
