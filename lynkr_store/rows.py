"""Rows on their way to the database: what one holds by column, and many of them side by side."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, overload

Row = dict[str, Any]
"""Column name to value, for every column but ``id``; one that is absent has no value."""


class Rows(Sequence[Row]):
    """Rows of the same columns, kept as the drivers take them: values, one after the other.

    A dictionary of every column is 1.6 KB a row; the places of its 30 values here are 240 bytes.
    Whoever asks for a row is given one.

    Args:
        columns: Their names.
        values: Those of each row in the order of the columns, row after row.
    """

    def __init__(self, columns: Sequence[str], values: list[Any]) -> None:
        self.columns = tuple(columns)
        self.values = values

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Rows":
        """The same rows; what one of them lacks and another has is None."""
        if isinstance(rows, cls):
            return rows
        columns = tuple(dict.fromkeys(chain.from_iterable(rows)))
        return cls(columns, [value for row in rows for value in map(row.get, columns)])

    def __len__(self) -> int:
        return len(self.values) // len(self.columns) if self.columns else 0

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> "Rows": ...
    def __getitem__(self, at: int | slice) -> "Row | Rows":
        which = range(len(self))[at]
        if isinstance(which, range):
            return Rows(self.columns, [value for one in which for value in self._values_of(one)])
        return dict(zip(self.columns, self._values_of(which), strict=True))

    def _values_of(self, one: int) -> list[Any]:
        width = len(self.columns)
        return self.values[one * width : (one + 1) * width]

    def tuples(self) -> Iterator[tuple[Any, ...]]:
        """The values of each row."""
        return zip(*[iter(self.values)] * len(self.columns), strict=True)


class Gathering:
    """Makes `Rows` of one batch after another.

    They have the columns in which any row so far had a value. Python's SQLite driver looks for an
    adapter of every None that it binds: that was 6 µs of the 16 that a row took, of whose 45
    values 18 were None. Earlier batches count, so that statements stay the same, and prepared.
    """

    def __init__(self) -> None:
        self._columns: list[str] = []
        self._values: list[Any] = []

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows to the batch; few at a time are still in the processor's cache."""
        idle = set().union(*rows).difference(self._columns)
        new = sorted(name for name in idle if any(row.get(name) is not None for row in rows))
        if new:
            nothing = (None,) * len(new)
            so_far = Rows(self._columns, self._values).tuples()
            self._values = [value for one in so_far for value in (*one, *nothing)]
            self._columns += new
        for row in rows:
            self._values += map(row.get, self._columns)

    def take(self) -> Rows:
        """The batch; what is added next belongs to another."""
        rows, self._values = Rows(self._columns, self._values), []
        return rows
