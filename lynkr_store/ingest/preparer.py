"""The preparing thread: takes records from the queue, checks them and makes batches."""

import time
from typing import Final

from lynkr_store.ingest.batch import BatchBuilder
from lynkr_store.ingest.conversion import prepare
from lynkr_store.ingest.handoff import Batch, Handoff
from lynkr_store.ingest.spooling import SpoolMover
from lynkr_store.ingest.validation import TextPolicy, new_ids

_BATCH_BYTES: Final = 8 * 2**20
"""Bytes of records in one batch at most: a transaction of about 0.1 s on SQLite, where a gateway
that writes the same file waits for it, whatever its texts."""
_MOST_TRIES: Final = 3  # at the same records, where something ends the thread again and again
_READY: Final = 14  # batches that may be ready, for when the sink has waited and the rest did not
_SLICE_ROWS: Final = 64  # checked in half a millisecond
_TICK_S: Final = 0.1  # how often the state of a delivery is looked at


class Preparer:
    """Makes batches of records, and goes on while the sink holds one up.

    Args:
        handoff: Shared with the delivering thread.
        spooling: Moves batches to the spool.
        policy: What is kept of the texts.
        batch_rows: Records in one batch at most.
        wake_rows: Records that must wait for this thread to be woken.
        interval_s: Seconds after which a batch goes even if it is not full.
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
        self._wake_rows = wake_rows
        self._interval_s = interval_s
        self._builder = BatchBuilder()
        self._new_id = new_ids().__next__

    def run(self) -> None:
        """Work until the writer is closed; run again, it goes on where something ended it."""
        handoff, spooling = self._handoff, self._spooling
        with handoff.lock:
            handoff.spooling = False
        spooling.open()
        while handoff.preparation or self._is_due():
            self._place(self._prepared())
        while handoff.spool and not handoff.over and spooling.in_hand():
            spooling.relieve()  # close() may run out of time for them
            handoff.listen(_TICK_S)
        with handoff.lock:
            handoff.prepared_all = True
            handoff.changed.notify_all()

    def _is_due(self) -> bool:
        """Wait until a batch is due; False when the writer is closed and has none left."""
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
                due_at = now + self._interval_s
            if due_at is not None and (
                waiting >= self._batch_rows
                or queue.closed
                or queue.is_half_full()
                or handoff.hurry_to > handoff.taken
                or now >= due_at
            ):
                return True
            queue.wake_at = self._wake_rows if waiting else 1
            if len(queue) >= queue.wake_at:
                continue  # meanwhile it came; nobody will ring
            waits = []
            if due_at is not None:
                waits = [due_at - now, _TICK_S]  # nobody rings when half of the bytes are in use
            elif handoff.spool and handoff.delivery:
                waits = [_TICK_S]
            handoff.listen(min(waits, default=None))

    def _prepared(self) -> Batch:
        """The next records as a batch; ones that something ended the thread with come first."""
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
        """Have the batch delivered in its turn; wait until there is room for another."""
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
