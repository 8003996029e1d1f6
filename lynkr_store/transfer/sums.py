"""Counts and integer sums of each day and column, from SQL and from values in memory.

Two copies of the same rows have the same sums. Numbers are scaled as statistics scale them, of a
text the length in bytes is summed, of an instant its distance from the start of the UTC day.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

from sqlalchemy import (
    BigInteger,
    Connection,
    Label,
    Select,
    Table,
    cast,
    func,
    select,
)

from lynkr_store.db.functions import (
    byte_length,
    each_row,
    exact_sum,
    joined,
    scaled,
    whole_number,
)
from lynkr_store.db.models import SUMMED
from lynkr_store.ingest.batch import Columns
from lynkr_store.schemas.units import COUNT, DAY_MS, SCORE, Domain
from lynkr_store.transfer.portable import Kind, kinds_of

_TEXTS: Final = (Kind.NAME, Kind.LONG_TEXT)


class _Measured(NamedTuple):
    """A column that is summed: the domain of a number; None for a text's bytes."""

    name: str
    domain: Domain | None


Sums = dict[tuple[int, str], int]
"""Sums by day (its first millisecond) and what was summed: ``rows``, ``<column>_count`` for its
values, and ``<column>`` for their sum in integer units. What is 0 is left out."""


def added(one: Mapping[tuple[int, str], int], other: Mapping[tuple[int, str], int]) -> Sums:
    """The sums of both together."""
    both = {key: one.get(key, 0) + other.get(key, 0) for key in one.keys() | other.keys()}
    return {key: value for key, value in both.items() if value}


@cache
def _measured_columns(table: Table) -> tuple[_Measured, ...]:
    domains = {Kind.REAL: SCORE, Kind.WHOLE: COUNT, Kind.FLAG: COUNT}
    return tuple(
        _Measured(name, None if kind in _TEXTS else SUMMED.get(name, domains[kind]))
        for name, kind in kinds_of(table).items()
        if kind is not Kind.INSTANT and name != "id"
    )


@cache
def _by_day(table: Table) -> Select[*tuple[Any, ...]]:
    """The sums of the rows with ``after < id <= upto``, one row a day."""
    instant = cast(table.c.timestamp, BigInteger)
    into_day = instant % DAY_MS
    values: list[Label[Any]] = [
        (byte_length(table.c[name]) if domain is None else scaled(table.c[name], domain)).label(
            name
        )
        for name, domain in _measured_columns(table)
    ]
    rows = each_row(
        select((instant - into_day).label("day"), into_day.label("timestamp"), *values).where(
            table.c.id > whole_number("after"), table.c.id <= whole_number("upto")
        )
    )
    summed = [part for name in _names(table) for part in exact_sum(name, rows.c[name])]
    return select(rows.c.day, func.count().label("rows"), *summed).group_by(rows.c.day)


def _names(table: Table) -> Iterator[str]:
    yield "timestamp"
    yield from (column.name for column in _measured_columns(table))


def sums_in(connection: Connection, table: Table, after: int, upto: int) -> Sums:
    """The sums of a table's rows with ``after < id <= upto``."""
    found: Sums = {}
    for row in connection.execute(_by_day(table), {"after": after, "upto": upto}).mappings():
        day = int(row["day"])
        found[day, "rows"] = row["rows"]
        for name in _names(table):
            found[day, f"{name}_count"] = row[f"{name}_count"]
            found[day, name] = joined(row[f"{name}_high"], row[f"{name}_low"])
    return added(found, {})


def sums_of(columns: Columns, table: Table) -> Sums:
    """The sums of portable rows."""
    found: Sums = {}
    instants = columns.get("timestamp", ())
    into_days = [_into_day(instant) for instant in instants]
    days = [instant - into for instant, into in zip(instants, into_days, strict=True)]
    every = set(days)
    for day in every:
        found[day, "rows"] = days.count(day)
        chosen = None if len(every) == 1 else [n for n, each in enumerate(days) if each == day]
        _add(found, day, "timestamp", _chosen(into_days, chosen))
        for name, domain in _measured_columns(table):
            values = [v for v in _chosen(columns.get(name, ()), chosen) if v is not None]
            units = [_bytes(v) for v in values] if domain is None else _units(values, domain)
            _add(found, day, name, units)
    return added(found, {})


def _into_day(instant: int) -> int:
    """The remainder as SQL computes it: negative before 1970."""
    return instant % DAY_MS if instant >= 0 else -(-instant % DAY_MS)


def _chosen(values: Sequence[Any], chosen: list[int] | None) -> Sequence[Any]:
    return values if chosen is None or not values else [values[n] for n in chosen]


def _add(found: Sums, day: int, name: str, units: Sequence[int]) -> None:
    found[day, f"{name}_count"] = len(units)
    found[day, name] = sum(units)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _units(values: Sequence[float], domain: Domain) -> list[int]:
    limit, scale = domain
    return [math.floor(v * scale + 0.5) for v in values if -limit <= v <= limit]
