"""Counts where every record is, and logs lost records."""

import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final, Self

from lynkr_store.schemas import Rejection

_LOG_EVERY_S: Final = 60.0  # one line a burst
_KEPT: Final = 5  # rejections of each cause
_LOGGED: Final = 100  # different rejections in the life of a store


@dataclass
class Counters:
    """A writer's counters at one moment; ``submitted + recovered`` is the sum of six others.

    Those are ``written``, ``spooled``, ``queued``, ``in_hand``, rejected and dropped.
    """

    submitted: int = 0
    recovered: int = 0
    written: int = 0
    spooled: int = 0
    queued: int = 0
    in_hand: int = 0
    """Taken from the queue, but neither settled nor spooled yet."""
    rejected_by: Counter[str] = field(default_factory=Counter)
    rejections: tuple[Rejection, ...] = ()
    dropped_by: Counter[str] = field(default_factory=Counter)
    queue_bytes: int = 0
    mended_by: Counter[str] = field(default_factory=Counter)
    faults_by: Counter[str] = field(default_factory=Counter)
    last_error: str | None = None
    last_error_at: float | None = None
    """On the monotonic clock."""

    @property
    def pending(self) -> int:
        """Records that are queued or in a batch that is not settled."""
        return self.queued + self.in_hand

    def lost(self) -> Counter[str]:
        """Records that will never be written, by cause."""
        return self.rejected_by + self.dropped_by

    def copy(self) -> Self:
        """A copy that does not change any more."""
        return replace(
            self,
            rejected_by=Counter(self.rejected_by),
            dropped_by=Counter(self.dropped_by),
            mended_by=Counter(self.mended_by),
            faults_by=Counter(self.faults_by),
        )


class LossLog:
    """Decides which losses to log: those since the last line, at most one line per minute."""

    def __init__(self) -> None:
        self._said: Counter[str] = Counter()
        self._said_at = -_LOG_EVERY_S

    def is_due(self) -> bool:
        """Whether a minute has passed since the last line."""
        return time.monotonic() - self._said_at >= _LOG_EVERY_S

    def news(self, lost: Counter[str]) -> Counter[str]:
        """The losses to log now; from then on they count as logged."""
        fresh = lost - self._said
        if fresh:
            self._said, self._said_at = lost, time.monotonic()
        return fresh


class RejectionLog:
    """Keeps the last different rejections of each cause, and those that are to be logged."""

    def __init__(self) -> None:
        self._kept: dict[str, deque[Rejection]] = {}
        self._seen: set[Rejection] = set()
        self._news: deque[Rejection] = deque()

    def add(self, rejections: Iterable[Rejection]) -> None:
        """Note rejections; each is logged once, and only the first hundred."""
        for rejection in rejections:
            kept = self._kept.setdefault(rejection.cause, deque(maxlen=_KEPT))
            if rejection in kept:
                kept.remove(rejection)
            kept.append(rejection)
            if rejection not in self._seen and len(self._seen) < _LOGGED:
                self._seen.add(rejection)
                self._news.append(rejection)

    def kept(self) -> tuple[Rejection, ...]:
        """The last different ones of each cause, the newest of a cause last."""
        return tuple(rejection for kept in self._kept.values() for rejection in kept)

    def news(self) -> list[Rejection]:
        """The rejections to log now; from then on they count as logged."""
        fresh = list(self._news)
        self._news.clear()
        return fresh
