"""Rows on their way to the database: one row as a mapping, many as values by column or row."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, overload

Row = dict[str, Any]
"""Column name to value, without ``id``; a column that is absent has no value."""

Columns = dict[str, Sequence[Any]]
"""Column name to the values of several rows, in order; no row has a value in an absent column."""


def by_column(rows: Sequence[Row]) -> Columns:
    """The same rows as columns."""
    return {
        name: [row.get(name) for row in rows] for name in dict.fromkeys(chain.from_iterable(rows))
    }


class RowBatch(Sequence[Row]):
    """Rows with the same columns, kept as the drivers take them: one flat list of values.

    A dictionary with every column is 1.6 KB per row; the references to 30 values here are 240
    bytes. Indexing returns a dictionary for one row, or a batch for a slice.

    Args:
        columns: The names of the columns.
        values: The values of each row in the order of the columns, row after row.
    """

    def __init__(self, columns: Iterable[str], values: list[Any]) -> None:
        self.columns = tuple(columns)
        self.values = values

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "RowBatch":
        """The same rows; a value that only some of them have is None in the others."""
        if isinstance(rows, cls):
            return rows
        return cls.of_columns(by_column(rows))

    @classmethod
    def of_columns(cls, columns: Columns) -> "RowBatch":
        """The same rows, from columns of one length."""
        return cls(columns, list(chain.from_iterable(zip(*columns.values(), strict=True))))

    def __len__(self) -> int:
        return len(self.values) // len(self.columns) if self.columns else 0

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> "RowBatch": ...
    def __getitem__(self, at: int | slice) -> "Row | RowBatch":
        which = range(len(self))[at]
        if isinstance(which, range):
            return RowBatch(
                self.columns, [value for one in which for value in self._values_of(one)]
            )
        return dict(zip(self.columns, self._values_of(which), strict=True))

    def _values_of(self, one: int) -> list[Any]:
        width = len(self.columns)
        return self.values[one * width : (one + 1) * width]

    def tuples(self) -> Iterator[tuple[Any, ...]]:
        """The values of each row."""
        return zip(*[iter(self.values)] * len(self.columns), strict=True)


class BatchBuilder:
    """Builds one `RowBatch` after another.

    A batch has the columns in which any row so far had a value. Python's SQLite driver searches an
    adapter for every None that it binds: for a row of 45 values with 18 None, that took 6 of 16 µs.
    The rows of earlier batches count, so that statements stay the same, and prepared.
    """

    def __init__(self) -> None:
        self._columns: list[str] = []
        self._values: list[Any] = []

    def add(self, columns: Columns) -> None:
        """Add rows to the batch, all or none.

        Add few at a time, so that they are still in the processor's cache.
        """
        count = max(map(len, columns.values()), default=0)
        nothing = (None,) * count
        idle = columns.keys() - self._columns
        new = sorted(name for name in idle if columns[name].count(None) < count)
        names, values = self._columns + new, self._values
        if new:
            more = (None,) * len(new)
            so_far = RowBatch(self._columns, self._values).tuples()
            values = [value for one in so_far for value in (*one, *more)]
        used = (columns.get(name, nothing) for name in names)
        added = list(chain.from_iterable(zip(*used, strict=True)))
        values += added
        self._columns, self._values = names, values

    def rows(self) -> RowBatch:
        """The batch so far."""
        return RowBatch(self._columns, self._values)

    def clear(self) -> None:
        """Begin another batch; batches that were returned before keep their rows."""
        self._values = []

    def take(self) -> RowBatch:
        """Return the batch, and begin another."""
        rows = self.rows()
        self.clear()
        return rows
