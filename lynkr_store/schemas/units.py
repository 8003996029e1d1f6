"""What a stored number can mean: the range it must lie in and the unit it is summed in.

A value outside its domain is refused on the way in; where one is stored all the same (by another
writer), every aggregate counts it as not measured. Reals are summed as integers, each scaled by
``floor(x * scale + 0.5)``, so that every backend gives the same sum in any order. With these
limits a scaled value stays below 2**53, where doubles hold every integer exactly.
"""

from typing import Final, NamedTuple


class Domain(NamedTuple):
    """A number's range, ``|x| <= limit``, and the integer units per 1 that sums are made of."""

    limit: int
    scale: int


COUNT: Final = Domain(limit=10**12, scale=1)
"""Requests, tokens, tools: whole numbers."""

MILLISECONDS: Final = Domain(limit=10**9, scale=1_000)
"""Durations, summed in thousandths of a millisecond."""

DOLLARS: Final = Domain(limit=10**6, scale=10**9)
"""Money in US dollars, summed in nano-dollars."""

SCORE: Final = Domain(limit=10**9, scale=10**6)
"""Scores and rates, summed in millionths."""

INSTANT_MIN_MS: Final = 946_684_800_000
"""2000-01-01T00:00Z in epoch milliseconds: the earliest instant a record may carry."""

INSTANT_MAX_MS: Final = 4_102_444_800_000
"""2100-01-01T00:00Z in epoch milliseconds: the latest instant a record may carry."""

QUARTER_MS: Final = 900_000
HOUR_MS: Final = 3_600_000
DAY_MS: Final = 86_400_000


def half_up(numerator: int, denominator: int, digits: int) -> float:
    """Round the exact fraction to ``digits`` decimals, ties toward +infinity.

    This is JavaScript's ``Math.round(x * 10**digits) / 10**digits``, the gateway's rounding,
    without the error of its doubles.

    Args:
        numerator: Any integer.
        denominator: A positive integer.
        digits: Decimals to keep, 0 or more.

    Returns:
        The double nearest to the rounded decimal.
    """
    unit: int = 10**digits
    rounded: int = (2 * numerator * unit + denominator) // (2 * denominator)
    return rounded / unit
