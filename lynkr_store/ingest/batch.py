"""Rows on their way to the database: one as a mapping, many as values by column or by row."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, overload

Row = dict[str, Any]
"""Column name to value, for every column but ``id``; one that is absent has no value."""

Columns = dict[str, Sequence[Any]]
"""Column name to the values of several rows, in order; of one that is absent none has a value."""


def by_column(rows: Sequence[Row]) -> Columns:
    """The same rows."""
    return {
        name: [row.get(name) for row in rows] for name in dict.fromkeys(chain.from_iterable(rows))
    }


class RowBatch(Sequence[Row]):
    """Rows of the same columns, kept as the drivers take them: values, one after the other.

    A dictionary of every column is 1.6 KB a row; the places of its 30 values here are 240 bytes.
    Indexing makes a dictionary of one row, or a batch of a slice.

    Args:
        columns: Their names.
        values: Those of each row in the order of the columns, row after row.
    """

    def __init__(self, columns: Iterable[str], values: list[Any]) -> None:
        self.columns = tuple(columns)
        self.values = values

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "RowBatch":
        """The same rows; what one of them lacks and another has is None."""
        if isinstance(rows, cls):
            return rows
        columns = by_column(rows)
        return cls(columns.keys(), list(chain.from_iterable(zip(*columns.values(), strict=True))))

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
    """Makes one `RowBatch` after another.

    They have the columns in which any row so far had a value. Python's SQLite driver looks for an
    adapter of every None that it binds: that was 6 µs of the 16 that a row took, of whose 45
    values 18 were None. Earlier batches count, so that statements stay the same, and prepared.
    """

    def __init__(self) -> None:
        self._columns: list[str] = []
        self._values: list[Any] = []

    def add(self, columns: Columns) -> None:
        """Add rows to the batch, or none where that fails.

        Few at a time are still in the processor's cache.
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
        """The batch, as far as it is."""
        return RowBatch(self._columns, self._values)

    def clear(self) -> None:
        """Begin another batch; the rows of this one stay whose they are."""
        self._values = []

    def take(self) -> RowBatch:
        """The batch; what is added next belongs to another."""
        rows = self.rows()
        self.clear()
        return rows
