"""When a write to a shared SQLite file may begin, so that no other writer waits in vain.

SQLite has no queue for its one write lock: who finds it taken sleeps and looks again, after at most
100 ms (``sqliteDefaultBusyCallback``). Writers that follow one another closely can therefore keep
another out for as long as they like, and the gateway gives up after 3 s. So all stores of a
machine, which share its clock, leave the lock alone together for a moment again and again,
long enough for whoever waits to look once; a store that has no company need not.
"""

import random
from typing import Final

PERIOD_S: Final = 1.4
"""How often the lock is left alone: twice within the gateway's 3 s; whoever waits may miss one."""

GAP_S: Final = 0.13
"""For how long: the 100 ms after which a waiting writer looks again, and a margin."""

PAUSE_S: Final = 0.026
"""From one of several short writes to the next: in its first 128 ms a writer that found the lock
taken looks again after 25 ms at most, so it gets in after one of them."""

_AGAIN_S: Final = (0.002, 0.02)


def pause_s(now_s: float, expected_s: float) -> float:
    """Seconds to wait before a write that takes as long as expected may begin.

    Args:
        now_s: Seconds since the epoch, by the machine's clock.
        expected_s: How long the lock will be held; more than half a period counts as that.
    """
    into = now_s % PERIOD_S
    if into < GAP_S:
        return GAP_S - into
    if into + min(expected_s, PERIOD_S / 2) > PERIOD_S:
        return PERIOD_S - into + GAP_S
    return 0.0


def again_s() -> float:
    """Seconds after which a lock that was found taken may be asked for again."""
    return random.uniform(*_AGAIN_S)  # noqa: S311 - so that processes do not keep step
