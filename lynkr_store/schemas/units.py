"""What a stored number can mean: its valid range, and the unit in which it is summed.

A value outside its domain is refused on the way in. If another program stored one, every aggregate
treats it as not measured. Reals are summed as integers, each scaled by ``floor(x * scale + 0.5)``,
so every backend computes the same sum in any order. Within these limits a scaled value is below
2**53, up to which doubles represent every integer exactly.
"""

from typing import Final, NamedTuple


class Domain(NamedTuple):
    """A number's range, ``|x| <= limit``, and how many integer units its sums count per 1."""

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
"""2000-01-01T00:00Z in epoch milliseconds: the earliest timestamp of a record."""

INSTANT_MAX_MS: Final = 4_102_444_800_000
"""2100-01-01T00:00Z in epoch milliseconds: the first instant after the latest timestamp."""

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
        digits: The number of decimals, 0 or more.

    Returns:
        The double nearest to the rounded decimal.
    """
    unit: int = 10**digits
    rounded: int = (2 * numerator * unit + denominator) // (2 * denominator)
    return rounded / unit
