"""One table of a database: its rows in the order of their ids, read and written in batches."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Final

from sqlalchemy import Connection, Select, Table, func, insert, select, type_coerce
from sqlalchemy.types import TypeDecorator

from lynkr_store.db import catalogue
from lynkr_store.db.functions import whole_number
from lynkr_store.db.models import TELEMETRY
from lynkr_store.exceptions import BadArgument
from lynkr_store.ingest.batch import Columns, RowBatch
from lynkr_store.schemas.values import INT64_MIN
from lynkr_store.storage import progress
from lynkr_store.storage.database import Database
from lynkr_store.storage.inserts import insert_isolating
from lynkr_store.storage.steps import end_of_step
from lynkr_store.transfer.portable import required
from lynkr_store.transfer.sums import Sums, sums_in

PAGE_ROWS: Final = 1_000
"""Rows that are read, and written in one transaction: their texts may have 128 KB each."""

NOTHING: Final = INT64_MIN
"""The id after which all rows come."""

ANCHORS: Final = 100
"""Rows by which a target is recognised."""


class TableRows:
    """The rows of one table of an open database.

    Args:
        database: Open.
        table: With a column ``id``.
    """

    def __init__(self, database: Database, table: Table) -> None:
        self.database = database
        self.table = table
        with database.read() as connection:
            self.exists = bool(catalogue.tables(connection, [table.name]))

    @property
    def _copied(self) -> str:
        """The name of the progress value with the id of the last copied row."""
        return f"copied_{self.table.name}"

    def ends(self) -> tuple[int, int] | None:
        """The least and the greatest id; None without rows."""
        if not self.exists:
            return None
        ids = self.table.c.id
        with self.database.read() as connection:
            least, greatest = connection.execute(select(func.min(ids), func.max(ids))).one()
        return None if least is None else (least, greatest)

    def pages(self, after: int, upto: int) -> Iterator[Columns]:
        """The rows with ``after < id <= upto`` as stored, page by page; no transaction between."""
        while after < upto:
            with self.database.read() as connection:
                found = connection.execute(_page(self.table), {"after": after})
                names, rows = tuple(found.keys()), found.all()
            if rows and rows[-1].id > upto:
                rows = rows[: bisect_right(rows, upto, key=lambda row: row.id)]
            if not rows:
                return
            columns = dict(zip(names, zip(*rows, strict=True), strict=True))
            yield columns
            after = columns["id"][-1]

    def newest(self, upto: int) -> Columns:
        """What identifies the newest rows with ``id <= upto``, as stored."""
        ids = self.table.c.id
        newest = select(ids).where(ids <= upto).order_by(ids.desc()).limit(ANCHORS)
        with self.database.read() as connection:
            found = connection.scalars(newest).all()
        return self.identifying(found)

    def identifying(self, ids: Sequence[int]) -> Columns:
        """What identifies those of these rows that exist, as stored."""
        columns = [_stored(self.table, name) for name in required(self.table)]
        with self.database.read() as connection:
            rows = connection.execute(select(*columns).where(self.table.c.id.in_(ids))).all()
        return dict(zip(required(self.table), zip(*rows, strict=True), strict=False))

    def bound(self, after: int, upto: int, rows: int) -> int:
        """The id of row number ``rows`` after an id; ``upto`` if there are fewer."""
        with self.database.read() as connection:
            return end_of_step(connection, self.table, after, upto, rows)

    def sums(self, after: int, upto: int) -> Sums:
        """The sums of the rows with ``after < id <= upto``, computed by the database."""
        with self.database.read() as connection:
            return sums_in(connection, self.table, after, upto)

    def copied_upto(self) -> int | None:
        """The id up to which earlier copies wrote rows; None if there was no copy."""
        with self.database.read() as connection:
            found: int | None = connection.scalar(select(progress.value_of(self._copied)))
        return found

    def texts_before(self) -> int:
        """The instant before which this database's retention has removed texts."""
        with self.database.read() as connection:
            name = f"{progress.OF_TEXTS}before_ms"
            found: int | None = connection.scalar(select(progress.value_of(name)))
        return INT64_MIN if found is None else found

    def write(self, columns: Columns, expected: int, last: int) -> Counter[str]:
        """Write the rows that come next, and in the same transaction how far the copy has come.

        Args:
            columns: Portable rows, in order; there may be none.
            expected: The id up to which rows are copied.
            last: The id up to which they are copied then.

        Returns:
            The number of rows that the database refused, by cause.

        Raises:
            BadArgument: Another copy wrote into the table meanwhile, or another program.
        """
        with self.database.write_step() as connection:
            self._require(connection, expected)
            refused = _insert(connection, self.table, columns)
            progress.write(connection, self._copied, last)
        self.database.require_file()
        return refused

    def add(self, columns: Columns) -> Counter[str]:
        """Write rows that are missing among those that were copied; see `write`."""
        with self.database.write_step() as connection:
            refused = _insert(connection, self.table, columns)
        self.database.require_file()
        return refused

    def _require(self, connection: Connection, expected: int) -> None:
        if progress.held(connection, self._copied, NOTHING) != expected:
            raise BadArgument(
                "target: another copy into this database is under way; let it end, then run this "
                "one again"
            )
        greatest = connection.scalar(select(func.max(self.table.c.id)))
        if greatest is not None and greatest > expected:
            raise BadArgument(added_since(self.table))


def _insert(connection: Connection, table: Table, columns: Columns) -> Counter[str]:
    count = max(map(len, columns.values()), default=0)
    if not count:
        return Counter()
    used = {name: values for name, values in columns.items() if values.count(None) < count}
    # other columns are left out, for speed, except those whose default would be stored
    defaults = [column.name for column in table.c if column.server_default and column.nullable]
    used = {**dict.fromkeys(defaults, (None,) * count), **used}
    rows = RowBatch.of_columns(used)
    if table is TELEMETRY:
        return insert_isolating(connection, rows)
    connection.execute(insert(table).inline(), list(rows))
    return Counter()


def added_since(table: Table) -> str:
    """The words about a target that has rows of its own."""
    return (
        f"target: {table.name} has rows that no copy wrote, and rows of the source could have the "
        "same ids: copy into another database. To move a gateway, stop it, copy once more, and "
        "only then let it write into the target"
    )


@cache
def _page(table: Table) -> Select[*tuple[Any, ...]]:
    """The rows after an id; without an upper limit, see `nth_after`."""
    ids = table.c.id
    return (
        select(*(_stored(table, column.name) for column in table.c))
        .where(ids > whole_number("after"))
        .order_by(ids)
        .limit(PAGE_ROWS)
    )


def _stored(table: Table, name: str) -> Any:
    """The column as stored, whatever its type."""
    column = table.c[name]
    if isinstance(column.type, TypeDecorator):
        return type_coerce(column, column.type.impl_instance).label(name)
    return column
