"""What is counted and summed, computed from raw rows or from roll-ups.

Both give the same columns: ``requests``, each count under its name, and three columns for each sum
(see `lynkr_store.db.functions.exact_sum`). All are integers, so the order of additions, the backend
and the number of steps do not change the result.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from sqlalchemy import BigInteger, ColumnElement, Label, and_, case, func, literal, or_
from sqlalchemy.sql.base import ReadOnlyColumnCollection

from lynkr_store.db.functions import count_of, exact_sum, measured, scaled
from lynkr_store.db.models import COUNTED, ROLLUPS, SUMMED, TELEMETRY, measure_columns
from lynkr_store.schemas.units import COUNT, SCORE

_HIGH_TIERS: Final = ("REASONING", "COMPLEX")
_HIGH_QUALITY: Final = 80  # the gateway's thresholds
_FEW_TOKENS: Final = 50
_LOW_QUALITY: Final = 45

ALL: Final = (*COUNTED, *SUMMED)


NEEDED: Final = ("tier", "error_type", "was_fallback", *SUMMED)
"""The columns that `of_a_row` reads."""


def of_a_row(
    names: Iterable[str] = ALL, row: ReadOnlyColumnCollection[str, Any] = TELEMETRY.c
) -> Iterator[Label[Any]]:
    """What one row adds to each measure: a value or NULL to a count, scaled units to a sum."""
    quality = measured(row.quality_score, SCORE)
    counted: Mapping[str, ColumnElement[Any]] = {
        "errors": row.error_type,
        "fallbacks": case((row.was_fallback == literal(1, BigInteger), 1)),
        "over_provisioned": case(
            (
                and_(
                    quality > literal(_HIGH_QUALITY, quality.type),
                    measured(row.output_tokens, COUNT) < literal(_FEW_TOKENS),
                    or_(*(row.tier == tier for tier in _HIGH_TIERS)),
                ),
                1,
            )
        ),
        "under_provisioned": case(
            (and_(quality < literal(_LOW_QUALITY, quality.type), row.tier == "SIMPLE"), 1)
        ),
    }
    for name in names:
        column = counted[name] if name in counted else scaled(row[name], SUMMED[name])
        yield column.label(name)


def of_rows(
    columns: ReadOnlyColumnCollection[str, Any], names: Iterable[str] = ALL
) -> Iterator[Label[Any]]:
    """The measures of many rows, from the columns of `of_a_row`."""
    yield func.count().label("requests")
    for name in names:
        if name in SUMMED:
            yield from exact_sum(name, columns[name])
        else:
            yield count_of(columns[name]).label(name)


def of_rollups(
    names: Iterable[str] = ALL, columns: ReadOnlyColumnCollection[str, Any] = ROLLUPS.c
) -> Iterator[Label[Any]]:
    """The same measures, from roll-ups."""
    for column in measure_columns(names):
        yield func.sum(columns[column]).label(column)
