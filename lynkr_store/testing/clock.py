"""A clock for a store, which stands still until a test moves it."""

from datetime import UTC, datetime, timedelta
from typing import Final

_START_MS: Final = 1_750_043_200_000
"""2025-06-16 03:06:40 UTC: twelve hours after the factories' first record. Each record is a second
later than the one before, so the last 24 hours have 43,200 of them."""


class Clock:
    """Epoch milliseconds: ``Store("sqlite://", clock=Clock())``.

    Args:
        now_ms: The present, in epoch milliseconds.
    """

    def __init__(self, now_ms: int = _START_MS) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        """The present, in epoch milliseconds."""
        return self.now_ms

    @property
    def now(self) -> datetime:
        """The present, in UTC."""
        return datetime.fromtimestamp(self.now_ms / 1000, UTC)

    def advance(self, by: timedelta) -> None:
        """Move on, or back by a negative time."""
        self.now_ms += by // timedelta(milliseconds=1)
