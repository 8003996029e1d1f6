# ruff: noqa: INP001 - a folder of scripts
"""Measures the constants that `docs/capacity.md` calculates with.

Bytes per row of the table and of each index, with texts of 2,000 characters and without; bytes of a
roll-up and how many a day needs; rows per second of folding and of retention, in one process.
"""

from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from typing import Any, Final

from benchmarks.databases import Driver, Place, connect, every_place, insert, settle
from benchmarks.harness import Result, Spread, timed
from benchmarks.sample import COLUMNS, END_MS, SESSIONS, Row, Sample
from lynkr_store import Store, StoreSettings, upgrade
from lynkr_store.backend import Backend

_BATCH: Final = 1_000
_DAYS: Final = 30
_TEXTS: Final = tuple(COLUMNS.index(name) for name in ("request_text", "response_text"))
_SQLITE: Final = "SELECT name, sum(pgsize) FROM dbstat GROUP BY name"
_POSTGRESQL: Final = (
    "SELECT relname, pg_table_size(oid) FROM pg_class "
    "WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'i')"
)
_TABLE: Final = "routing_telemetry"


def results(scale: float = 1.0) -> Iterator[Result]:
    """A line for each table and index, and for each rate.

    Args:
        scale: Multiplies the number of rows.
    """
    sample = Sample(int(1_000_000 * scale), timedelta(days=_DAYS))
    with every_place() as places:
        for place in places:
            yield from _without_texts(place, sample)
            yield from _with_texts(place, sample)


def _without_texts(place: Place, sample: Sample) -> Iterator[Result]:
    with place.database() as url:
        upgrade(url)
        with closing(connect(url)) as connection:
            insert(connection, map(_bare, sample.rows()), _BATCH)
            settle(connection)
            size = _sizes(place, connection)[_TABLE]
    yield _line(place, sample, "table, without texts", "bytes per row", size / sample.count)


def _with_texts(place: Place, sample: Sample) -> Iterator[Result]:
    settings = {"maintenance_interval_s": 86_400.0, "cache_ttl_s": 0.0}
    with place.database() as url:
        upgrade(url)
        with closing(connect(url)) as connection:
            insert(connection, sample.rows(), _BATCH)
            settle(connection)
            before = _sizes(place, connection)
            given = StoreSettings(url=url, **settings)  # type: ignore[arg-type]
            with Store(settings=given, clock=lambda: END_MS + 1) as store:
                folding = timed(lambda: store.maintain(budget_s=0))
                settle(connection)
                after = _sizes(place, connection)
                deleting = timed(lambda: store.cleanup(timedelta(days=_DAYS / 2)))
            [(rollups,)] = _asked(connection, "SELECT count(*) FROM routing_rollups")
    of_rows = {name: size for name, size in before.items() if _is_of_rows(name)}
    for name, size in sorted(of_rows.items()):
        yield _line(place, sample, name, "bytes per row", size / sample.count)
    kept = sum(size for name, size in after.items() if "rollups" in name)
    yield _line(place, sample, "roll-up, with its index", "bytes", kept / rollups)
    yield _line(place, sample, "roll-ups", "per day", rollups / _DAYS)
    yield _line(place, sample, "fold", "rows/s", sample.count / folding * 1_000)
    yield _line(place, sample, "cleanup of half", "rows/s", sample.count / 2 / deleting * 1_000)


def _is_of_rows(name: str) -> bool:
    ours = ("idx_telemetry", "ix_routing_telemetry")
    return name in (_TABLE, f"{_TABLE}_pkey", f"pk_{_TABLE}") or name.startswith(ours)


def _bare(row: Row) -> Row:
    values = list(row)
    for at in _TEXTS:
        values[at] = None
    return tuple(values)


def _sizes(place: Place, connection: Driver) -> dict[str, int]:
    question = _SQLITE if place.backend is Backend.SQLITE else _POSTGRESQL
    return {name: int(size) for name, size in _asked(connection, question)}


def _asked(connection: Any, question: str) -> list[tuple[Any, ...]]:
    return list(connection.execute(question).fetchall())


def _line(place: Place, sample: Sample, name: str, unit: str, value: float) -> Result:
    return Result(
        name=name,
        backend=place.name,
        rows=sample.count,
        sessions=SESSIONS,
        method="once",
        unit=unit,
        ours=Spread(value, value),
    )
