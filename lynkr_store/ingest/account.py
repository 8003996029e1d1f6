"""Where every record is."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Self


@dataclass
class Account:
    """One moment of a writer: ``submitted + recovered`` is the sum of the six other places."""

    submitted: int = 0
    recovered: int = 0
    written: int = 0
    spooled: int = 0
    queued: int = 0
    in_hand: int = 0
    """Taken from the queue, and neither settled nor spooled."""
    rejected_by: Counter[str] = field(default_factory=Counter)
    dropped_by: Counter[str] = field(default_factory=Counter)
    mended_by: Counter[str] = field(default_factory=Counter)
    faults_by: Counter[str] = field(default_factory=Counter)
    last_error: str | None = None
    last_error_at: float | None = None
    """On the monotonic clock."""

    @property
    def pending(self) -> int:
        """Queued, or in the batches under way."""
        return self.queued + self.in_hand

    def lost(self) -> Counter[str]:
        """Records that will never be written, by cause."""
        return self.rejected_by + self.dropped_by

    def copy(self) -> Self:
        """The same moment, for the caller to keep."""
        return replace(
            self,
            rejected_by=Counter(self.rejected_by),
            dropped_by=Counter(self.dropped_by),
            mended_by=Counter(self.mended_by),
            faults_by=Counter(self.faults_by),
        )
