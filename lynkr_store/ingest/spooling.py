"""Moves batches to the spool while the sink cannot be reached, and loads them again later."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from lynkr_store.exceptions import SpoolError
from lynkr_store.ingest.batch import Row
from lynkr_store.ingest.handoff import Batch, Handoff
from lynkr_store.ingest.spool import Entry, Spool, SpoolDamaged
from lynkr_store.ingest.validation import TextPolicy, taken_over
from lynkr_store.process.log import say

_UNANSWERED_S: Final = 1.0  # if a try takes longer, the sink counts as unreachable
SPOOL_AGAIN_S: Final = 1.0
"""Seconds until the spool is tried again after it failed."""


class SpoolMover:
    """The writer's access to the spool, if it has one; both threads use it.

    Args:
        handoff: Holds the spool.
        policy: Decides what is kept of the texts.
        after_s: Seconds without the sink after which batches are moved to the spool.
        forget_after_ms: The age at which the sink forgets a batch that it has stored.
        has_forgotten: Whether the sink has forgotten the batches of an instant. It is called for
            batches of that age, because the clock may be wrong.

    Attributes:
        after_s: As above.
        spool_all: Move batches at once, because `close` runs out of time.
    """

    def __init__(
        self,
        handoff: Handoff,
        policy: TextPolicy,
        *,
        after_s: float,
        forget_after_ms: int,
        has_forgotten: Callable[[int], bool],
    ) -> None:
        self._handoff = handoff
        self._spool = handoff.spool
        self._policy = policy
        self.after_s = after_s
        self._forget_after_ms = forget_after_ms
        self._has_forgotten = has_forgotten
        self.spool_all = False
        self._rests_until = 0.0
        self._asides_said = 0
        self._passed_over_said = 0

    def open(self) -> None:
        """Open the spool, whose batches are delivered first."""
        if not self._spool:
            return
        try:
            self._spool.open()
        except Exception as error:  # noqa: BLE001 - the thread must continue; enter() tries again
            self._handoff.note_fault(error)
        self._report_aside(self._spool)
        with self._handoff.lock:
            self._handoff.changed.notify_all()

    def first(self) -> Entry | None:
        """The oldest batch in the spool."""
        return self._spool.first() if self._spool else None

    def in_hand(self) -> list[Batch]:
        """The batches in memory that are not in the spool, the oldest first."""
        handoff = self._handoff
        with handoff.lock:
            return [b for b in (handoff.delivery, *handoff.ready) if b and not b.entry]

    def relieve(self) -> None:
        """Move the batches in memory to the spool, if that is due."""
        handoff = self._handoff
        if self._spool is None:
            return
        with handoff.lock:
            if not self._is_due(self._spool):
                return
            handoff.spooling = True
        try:
            for batch in self.in_hand():
                self._enter(self._spool, batch)
        except Exception as error:  # noqa: BLE001 - the thread must continue; the batch stays
            self._rests_until = time.monotonic() + SPOOL_AGAIN_S
            handoff.note_fault(error)
        finally:
            with handoff.lock:
                handoff.spooling = False
                handoff.changed.notify_all()

    def _is_due(self, spool: Spool) -> bool:
        now, delivery = time.monotonic(), self._handoff.delivery
        if now < self._rests_until:
            return False
        unreached_s = now - delivery.began if delivery else 0.0
        if delivery and not delivery.failures and unreached_s < _UNANSWERED_S:
            unreached_s = 0.0
        backlog = spool.first() is not None
        return (
            self.spool_all
            or (unreached_s > 0 and unreached_s >= self.after_s)
            or ((unreached_s > 0 or backlog) and self._handoff.queue.is_half_full())
        )

    def _enter(self, spool: Spool, batch: Batch) -> None:
        handoff, entry = self._handoff, None
        if batch.rows and not batch.settled:
            attempted_at = batch.asked_ms if batch.asking or batch.unsure else None
            entry = spool.enter(batch.id, batch.rows, attempted_at)
        with handoff.lock:
            if batch in handoff.ready:
                handoff.ready.remove(batch)
            if not batch.settled:
                handoff.free(batch)
                if entry is None:
                    batch.settled = True
                else:
                    batch.entry = entry
                    handoff.counters.in_hand -= len(batch.rows)
                    handoff.counters.spooled += len(batch.rows)
                    entry = None
                handoff.changed.notify_all()
            if entry:  # it was stored or dropped while it was being moved
                handoff.to_remove.append(entry)
        self.remove_settled()

    def load(self, entry: Entry, now_ms: int) -> Batch | None:
        """Load a batch for delivery; None if it was dropped, or its file was set aside.

        Raises:
            Exception: It cannot be read now; it stays in the spool.
        """
        handoff = self._handoff
        assert self._spool  # noqa: S101 - the entry is from it
        try:
            rows, changed = self._read(self._spool, entry)
        except SpoolDamaged as error:
            handoff.note_fault(error)
            self._spool.abandon(entry)
            self._report_aside(self._spool)
            return None
        asked = entry.attempted_at
        if (
            asked is not None
            and now_ms - asked >= self._forget_after_ms
            and self._has_forgotten(asked)
        ):
            self._drop(entry, "outcome_unknown")
            return None
        batch = Batch(entry.batch_id, rows, entry=entry, began=time.monotonic())
        with handoff.lock:
            if handoff.over:
                return None
            handoff.delivery = batch
            handoff.counters.mended_by.update(changed)
        try:
            self._spool.mark_attempt(entry, now_ms)
        except SpoolError as error:
            handoff.note_fault(error)
        return batch

    def _read(self, spool: Spool, entry: Entry) -> tuple[Sequence[Row], Counter[str]]:
        """A batch's rows, and the number of values that this process's policy changed, by cause.

        This process applied the policy to its own rows before it spooled them. Another process
        applied its own policy, which may have kept more.

        Raises:
            SpoolDamaged: The rows cannot be read, or are not records.
        """
        rows = spool.load(entry)
        if not entry.found:
            return rows, Counter()
        try:
            return taken_over(rows, self._policy)
        except ValueError:
            raise SpoolDamaged("spool_path: a batch has an unknown column") from None

    def _drop(self, entry: Entry, cause: str) -> None:
        handoff = self._handoff
        with handoff.lock:
            handoff.to_remove.append(entry)
            handoff.counters.spooled -= entry.rows
            handoff.counters.dropped_by[cause] += entry.rows
        self.remove_settled()

    def remove_settled(self) -> None:
        """Remove batches that are stored or dropped from the spool, so that they do not repeat."""
        handoff = self._handoff
        while self._spool and handoff.to_remove:
            entry = handoff.to_remove.popleft()
            try:
                self._spool.remove(entry)
            except SpoolError as error:  # the next process will find it in the ledger
                if not handoff.over:
                    handoff.note_fault(error)
            except BaseException:
                handoff.to_remove.append(entry)
                raise

    def _report_aside(self, spool: Spool) -> None:
        for path in spool.set_aside[self._asides_said :]:
            self._asides_said += 1
            say(logging.WARNING, "a damaged spool was set aside: %s", path)
        for error in spool.passed_over[self._passed_over_said :]:
            self._passed_over_said += 1
            with self._handoff.lock:
                self._handoff.counters.faults_by[type(error).__name__] += 1
            say(logging.WARNING, "a spool file was not used: %s", error)
