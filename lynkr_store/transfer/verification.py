"""Compares what was copied with its source: sums first, and rows where those differ."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from lynkr_store.exceptions import CopyDiffers
from lynkr_store.ingest.batch import Columns, RowBatch, by_column
from lynkr_store.schemas import TEXT_FIELDS, utc
from lynkr_store.schemas.values import INT64_MIN
from lynkr_store.transfer.portable import Converter
from lynkr_store.transfer.sums import Sums, added, sums_of
from lynkr_store.transfer.tables import NOTHING, PAGE_ROWS, TableRows

_CHUNK_ROWS: Final = 20_000
"""Rows whose sums one statement computes: within a second, and so within its time limit."""
_TOLD: Final = 5  # rows that a message names

Add = Callable[[Columns], Counter[str]]
"""Writes rows; returns the number of those that were refused, by cause."""

_Row = dict[str, Any]


class Verified(NamedTuple):
    """What a verification found.

    Attributes:
        rows: The rows that both have.
        days: Their UTC days.
        gone: Rows that only the target has.
        without_texts: Rows that lack a text on one side, which was removed since they were copied.
        left_out: Rows that only the source has, because they lack a required value or the target
            refuses them, by cause; those of earlier copies, too.
    """

    rows: int
    days: int
    gone: int
    without_texts: int
    left_out: Counter[str]


class Chunk(NamedTuple):
    """Rows of a table, and their sums: those with ``after < id <= bound``."""

    after: int
    bound: int
    sums: Sums


def chunks(table: TableRows, upto: int, after: int = NOTHING) -> Iterator[Chunk]:
    """The sums of a table's rows with ``after < id <= upto``, in short statements."""
    while after < upto:
        bound = table.bound(after, upto, _CHUNK_ROWS)
        yield Chunk(after, bound, table.sums(after, bound))
        after = bound


def verify_tables(
    expected: Iterable[Chunk], source: TableRows, target: TableRows, on_rows: Callable[[int], None]
) -> Verified:
    """Compare all copied rows of two tables, and write those that are missing.

    Args:
        expected: The `chunks` of the source up to the last id that was copied.
        source: Where the rows come from.
        target: Where they were copied to.
        on_rows: Called after each step with the number of rows so far.

    Raises:
        CopyDiffers: Rows of the target have other values.
    """
    rows, gone, without_texts, days = 0, 0, 0, set[int]()
    left_out: Counter[str] = Counter()
    for after, bound, ours in expected:
        theirs = target.sums(after, bound)
        if ours != theirs:
            reading = Converter(source.table)
            differences = compare(
                map(reading.convert, source.pages(after, bound)),
                _converted(target, after, bound),
                target.add,
                texts_before=target.texts_before(),
            )
            gone += differences.gone
            without_texts += differences.without_texts
            left_out += reading.left_out + differences.refused
            theirs = target.sums(after, bound)
        rows += _rows_in(theirs)
        days |= {day for day, _ in theirs}
        on_rows(rows)
    return Verified(rows - gone, len(days), gone, without_texts, left_out)


class Differences(NamedTuple):
    """How the rows of a target differ from those of its source.

    Attributes:
        gone: The number of rows that only the target has.
        without_texts: The number of rows that lack a text on one side, as retention leaves them.
        refused: Rows that were missing, and that the target did not take, by cause.
    """

    gone: int
    without_texts: int
    refused: Counter[str]


def compare(
    source: Iterable[Columns],
    target: Iterable[Columns],
    add: Add,
    *,
    texts_before: int = INT64_MIN,
) -> Differences:
    """Compare portable rows one by one, both in the order of their ids.

    Args:
        source: Where the rows come from.
        target: Where they were copied to.
        add: Called with the rows that the target lacks, page by page.
        texts_before: The instant before which the target's retention has removed texts.

    Raises:
        CopyDiffers: Rows of the target have other values than the source's.
    """
    gone, without_texts, refused, missing = 0, 0, Counter[str](), list[_Row]()
    changed: list[tuple[int, tuple[str, ...]]] = []
    ours, theirs = _rows(source), _rows(target)
    one, other = next(ours, None), next(theirs, None)
    while one is not None or other is not None:
        if other is None or (one is not None and one["id"] < other["id"]):
            assert one is not None  # noqa: S101 - one of the two is there
            missing.append(one)
            if len(missing) == PAGE_ROWS:
                refused += add(by_column(missing))
                missing.clear()
            one = next(ours, None)
        elif one is None or other["id"] < one["id"]:
            gone += 1
            other = next(theirs, None)
        else:
            names = {n for n in one.keys() | other.keys() if one.get(n) != other.get(n)}
            removed = {n for n in names if _is_removed(n, one, other, texts_before)}
            without_texts += bool(removed)
            if names - removed:
                changed.append((one["id"], tuple(sorted(names - removed))))
            one, other = next(ours, None), next(theirs, None)
    if missing:
        refused += add(by_column(missing))
    if changed:
        told = "; ".join(f"id {row_id}: {', '.join(names)}" for row_id, names in changed[:_TOLD])
        raise CopyDiffers(
            f"{len(changed):,} rows of the target have other values than the source's ({told}): "
            "one of the two was changed after the copy, and nothing was overwritten. To have the "
            "source's values, delete these rows from the target, and copy again"
        )
    return Differences(gone, without_texts, refused)


def _is_removed(name: str, source: _Row, target: _Row, before: int) -> bool:
    """Whether one side lacks a text because it removed texts, as it may remove rows."""
    if name not in TEXT_FIELDS:
        return False
    if source.get(name) is None:
        return True
    return target.get(name) is None and bool(target["timestamp"] < before)


def verify_file(
    file_pages: Callable[[Converter], Iterable[Columns]],
    table: TableRows,
    upto: int,
    on_rows: Callable[[int], None],
    add: Add,
    *,
    file_is_source: bool,
) -> Verified:
    """Compare all rows with ``id <= upto`` of a file and a table; see `compare`.

    Raises:
        CopyDiffers: Rows of the target have other values.
    """
    reading = Converter(table.table)
    of_file: Sums = {}
    for page in file_pages(reading):
        of_file = added(of_file, sums_of(page, table.table))
    there = _sums(table, NOTHING, upto, on_rows)
    found = Differences(0, 0, Counter())
    if of_file != there:
        ours, theirs = Converter(table.table), Converter(table.table)
        of_both = file_pages(ours), map(theirs.convert, table.pages(NOTHING, upto))
        one, other = of_both if file_is_source else of_both[::-1]
        before = table.texts_before() if file_is_source else INT64_MIN
        found = compare(one, other, add, texts_before=before)
        reading = ours if file_is_source else theirs
        if file_is_source:  # rows may have been added
            there = _sums(table, NOTHING, upto, on_rows)
    in_target = there if file_is_source else of_file
    return Verified(
        _rows_in(in_target) - found.gone,
        _days_in(in_target),
        found.gone,
        found.without_texts,
        reading.left_out + found.refused,
    )


def verify_stream(
    passed: Sums, table: TableRows, after: int, upto: int, on_rows: Callable[[int], None]
) -> Verified:
    """Compare the rows that passed through a stream with those of a table, by their sums.

    Raises:
        CopyDiffers: The sums differ; the message names the first day and column.
    """
    there = _sums(table, after, upto, on_rows)
    if passed != there:
        there = _converted_sums(table, after, upto)
    different = [key for key in passed.keys() | there.keys() if passed.get(key) != there.get(key)]
    if different:
        day, what = min(different)
        raise CopyDiffers(
            f"the sums of what passed differ from the database's, first on {utc(day):%Y-%m-%d} "
            f"({what}): rows were refused, changed or deleted during the copy"
        )
    return Verified(_rows_in(there), _days_in(there), 0, 0, Counter())


def _sums(table: TableRows, after: int, upto: int, on_rows: Callable[[int], None]) -> Sums:
    found: Sums = {}
    for chunk in chunks(table, upto, after):
        found = added(found, chunk.sums)
        on_rows(_rows_in(found))
    return found


def _converted_sums(table: TableRows, after: int, upto: int) -> Sums:
    """The same sums, of the values as a copy converts them."""
    found: Sums = {}
    for page in _converted(table, after, upto):
        found = added(found, sums_of(page, table.table))
    return found


def _rows_in(sums: Sums) -> int:
    return sum(number for (_, what), number in sums.items() if what == "rows")


def _days_in(sums: Sums) -> int:
    return len({day for day, _ in sums})


def _converted(table: TableRows, after: int, upto: int) -> Iterator[Columns]:
    return map(Converter(table.table).convert, table.pages(after, upto))


def _rows(pages: Iterable[Columns]) -> Iterator[_Row]:
    for page in pages:
        yield from RowBatch.of_columns(page)
