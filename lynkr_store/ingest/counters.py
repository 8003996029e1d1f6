"""Counts where every record is, and logs what was lost."""

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Final, Self

_LOG_EVERY_S: Final = 60.0  # one line a burst


@dataclass
class Counters:
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


class LossLog:
    """Knows which losses are to be logged: those since the last line, at most one line a minute."""

    def __init__(self) -> None:
        self._said: Counter[str] = Counter()
        self._said_at = -_LOG_EVERY_S

    def is_due(self) -> bool:
        """Whether a minute has passed since the last line."""
        return time.monotonic() - self._said_at >= _LOG_EVERY_S

    def news(self, lost: Counter[str]) -> Counter[str]:
        """The losses to be logged now, which count as logged from here on."""
        fresh = lost - self._said
        if fresh:
            self._said, self._said_at = lost, time.monotonic()
        return fresh
