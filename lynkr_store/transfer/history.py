"""Brings what describes a source's rows: roll-ups, also of rows that are gone, and the ledger."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Connection,
    Select,
    bindparam,
    delete,
    func,
    insert,
    select,
    tuple_,
    type_coerce,
)

from lynkr_store.backend import Backend
from lynkr_store.db import catalogue
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.functions import inserting, whole_number
from lynkr_store.db.models import CHANGES, DIMENSIONS, LEDGER, PROGRESS, ROLLUPS, TELEMETRY
from lynkr_store.exceptions import RollupsRefused
from lynkr_store.rollups import state
from lynkr_store.rollups.fold import held_watermark, write_rollups
from lynkr_store.rollups.fold_sql import ROLLUP
from lynkr_store.rollups.state import NOTHING_FOLDED, RAW_FROM, WATERMARK
from lynkr_store.schemas import Reading, sanitize_text
from lynkr_store.schemas.values import INT64_MIN
from lynkr_store.storage import progress
from lynkr_store.storage.database import Database
from lynkr_store.storage.ledger import FORGOTTEN
from lynkr_store.transfer.tables import PAGE_ROWS

_BROUGHT: Final = "copied_rollups"  # the progress value that is set when roll-ups were brought
_KEY: Final = ("span_ms", "start", "dimension_id")
_BY: Final = ("provider", "model", "tier", "request_type")


def bring_rollups(source: Database, target: Database, upto: int) -> int | None:
    """Replace the target's roll-ups by the source's, once; later the target keeps its own.

    They hold the sums of rows that retention has removed. The target folds the rows that come after
    the source's watermark.

    Args:
        source: Its roll-ups are read in one snapshot.
        target: All rows of the source up to an id are copied.
        upto: That id.

    Returns:
        The number of roll-ups. None if the source has folded rows above ``upto`` meanwhile: copy
        those rows first.

    Raises:
        RollupsRefused: The target did not keep what was written.
    """
    with target.read() as connection:
        if connection.scalar(select(progress.value_of(_BROUGHT))) is not None:
            return 0
    with _snapshot(source) as reading:
        there = catalogue.tables(reading, [ROLLUPS.name, DIMENSIONS.name, PROGRESS.name])
        watermark = NOTHING_FOLDED
        if len(there) == 3:  # noqa: PLR2004 - all of them; a gateway's file has none
            watermark = reading.execute(state.watermark()).scalar_one()
        if watermark == NOTHING_FOLDED:
            return 0
        if watermark > upto and reading.scalar(_rows_between(upto, watermark)) is not None:
            return None
        with target.write_transaction() as writing:
            held_watermark(writing)  # a store that has the target open may fold at this moment
            return _replace(reading, writing, watermark)


@contextmanager
def _snapshot(database: Database) -> Iterator[Connection]:
    """A transaction whose statements all see the same state."""
    engine = database.engine
    if database.backend is Backend.POSTGRESQL:
        engine = engine.execution_options(isolation_level="REPEATABLE READ")
    with database.connected(engine) as connection, connection.begin():
        yield connection


def _replace(reading: Connection, writing: Connection, watermark: int) -> int:
    for table in (ROLLUPS, DIMENSIONS, CHANGES):
        writing.execute(delete(table))
    kept = _bring_dimensions(reading, writing)
    number = 0
    for page in _pages(reading):
        rollups: dict[tuple[int, ...], dict[str, int]] = {}
        for row in page:
            row["dimension_id"] = kept[row["dimension_id"]]
            there = rollups.setdefault(tuple(row[name] for name in _KEY), row)
            if there is not row:  # of two dimensions that became one
                for name in ROLLUP[len(_KEY) :]:
                    there[name] += row[name]
        write_rollups(writing, list(rollups.values()))
        number += len(page)
    requests = _requests(reading)
    if _requests(writing) != requests:
        raise RollupsRefused
    _bring_changes(reading, writing)
    # not beyond the rows that are there: the target may assign the next id to a new row
    newest: int | None = writing.scalar(select(func.max(TELEMETRY.c.id)))
    progress.write(writing, WATERMARK, min(watermark, newest or 0))
    raw_from = reading.scalar(select(progress.value_of(RAW_FROM)))
    if raw_from is None:
        writing.execute(progress.remove(RAW_FROM))
    else:
        progress.write(writing, RAW_FROM, raw_from)
    progress.write(writing, _BROUGHT, 1)
    return number


def _rows_between(after: int, upto: int) -> Select[int]:
    ids = TELEMETRY.c.id
    return select(ids).where(ids > after, ids <= upto).limit(1)


def _bring_dimensions(reading: Connection, writing: Connection) -> dict[int, int]:
    """Write the dimensions with texts that can be stored; return each one's id in the target."""
    kept: dict[int, int] = {}
    ids: dict[tuple[str | None, ...], int] = {}
    for row in reading.execute(select(DIMENSIONS).order_by(DIMENSIONS.c.id)).mappings():
        texts = tuple(_storable(row[name]) for name in _BY)
        kept[row["id"]] = ids.setdefault(texts, row["id"])
    rows = [dict(zip(_BY, texts, strict=True)) | {"id": key} for texts, key in ids.items()]
    if rows:
        writing.execute(insert(DIMENSIONS).inline(), rows)
    return kept


def _storable(value: object) -> str | None:
    text = Reading().text(value)
    return None if text is None else sanitize_text(text)[0]


def _bring_changes(reading: Connection, writing: Connection) -> None:
    """Changes that the source has yet to apply to its roll-ups."""
    if not catalogue.tables(reading, [CHANGES.name]):
        return
    entries = select(CHANGES.c.start, CHANGES.c.newest).order_by(CHANGES.c.id)
    if rows := [dict(row) for row in reading.execute(entries).mappings()]:
        writing.execute(insert(CHANGES).inline(), rows)


def _pages(reading: Connection) -> Iterator[list[dict[str, int]]]:
    after = dict.fromkeys(_KEY, INT64_MIN)
    while page := [dict(row) for row in reading.execute(_page(), after).mappings()]:
        after = {name: page[-1][name] for name in _KEY}
        yield page


@cache
def _page() -> Select[*tuple[Any, ...]]:
    keys = [ROLLUPS.c[name] for name in _KEY]
    return (
        select(*(ROLLUPS.c[name] for name in ROLLUP))
        .where(tuple_(*keys) > tuple_(*map(whole_number, _KEY)))
        .order_by(*keys)
        .limit(PAGE_ROWS)
    )


def _requests(connection: Connection) -> dict[int, int]:
    sums = select(ROLLUPS.c.span_ms, func.sum(ROLLUPS.c.requests)).group_by(ROLLUPS.c.span_ms)
    return {int(span): int(requests) for span, requests in connection.execute(sums)}


def bring_ledger(source: Database, target: Database) -> None:
    """Enter the batches that the source has stored in the target's ledger, too.

    A batch whose commit the source never confirmed may wait in a spool; the target must not store
    it a second time. Copy the rows once more afterwards: then all rows of these batches are there.
    """
    with source.read() as connection:
        if not catalogue.tables(connection, [LEDGER.name]):  # a gateway's file
            return
        forgotten: int | None = connection.scalar(select(progress.value_of(FORGOTTEN)))
    after = ""
    while True:
        with source.read() as connection:
            rows = [dict(r) for r in connection.execute(_batches(), {"after": after}).mappings()]
        if not rows:
            break
        after = rows[-1]["batch_id"]
        with target.write_step() as connection:
            enter = inserting(backend_of(connection), LEDGER).on_conflict_do_nothing()
            connection.execute(enter, rows)
    with target.write_transaction() as connection:
        there = connection.scalar(select(progress.value_of(FORGOTTEN)))
        known = [instant for instant in (forgotten, there) if instant is not None]
        if known:
            progress.write(connection, FORGOTTEN, max(known))


@cache
def _batches() -> Select[*tuple[Any, ...]]:
    batch_id = LEDGER.c.batch_id
    after = bindparam("after", type_=batch_id.type)
    committed_at = type_coerce(LEDGER.c.committed_at, BigInteger).label("committed_at")
    return (
        select(batch_id, LEDGER.c.row_count, committed_at)
        .where(batch_id > after)
        .order_by(batch_id)
        .limit(PAGE_ROWS)
    )
