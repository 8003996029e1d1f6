"""The steps of a copy, between two databases, or between a database and a file."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Final

from sqlalchemy import Table, text
from sqlalchemy.exc import DBAPIError

from lynkr_store.backend import Backend
from lynkr_store.db import catalogue
from lynkr_store.db.models import SAVINGS, TELEMETRY
from lynkr_store.exceptions import BadArgument, CopyDiffers, StoreUnavailable
from lynkr_store.ingest.batch import Columns
from lynkr_store.process.threads import ahead
from lynkr_store.rollups.fold import fold, settled_id
from lynkr_store.rollups.repair import compare_counts
from lynkr_store.schemas.copying import CopyReport, CopyStep
from lynkr_store.storage import identities
from lynkr_store.storage.database import Database
from lynkr_store.transfer.files import FileRows
from lynkr_store.transfer.history import bring_ledger, bring_rollups
from lynkr_store.transfer.portable import Converter, required
from lynkr_store.transfer.sums import Sums, added, sums_of
from lynkr_store.transfer.tables import ANCHORS, NOTHING, TableRows, added_since
from lynkr_store.transfer.verification import (
    Verified,
    chunks,
    verify_file,
    verify_stream,
    verify_tables,
)

OnProgress = Callable[[CopyStep], object]
"""Called after each step of a copy."""

_PATIENCE_S: Final = 60.0  # for transactions of the source that may still commit lower ids
_MANY_ROWS: Final = 10_000  # from which on PostgreSQL's plans need new statistics
_GATHER: Final = text(f"ANALYZE (SKIP_LOCKED) {TELEMETRY.name}")
_CHUNKS_AHEAD: Final = 100  # 1 MB; if each chunk has rows of a whole year, 125 MB
_STAGES: Final = {"rows": TELEMETRY, "savings": SAVINGS}


class Run:
    """What one copy has done so far.

    Args:
        on_progress: Called after each step.

    Attributes:
        copied: Rows that were written, by stage.
        left_out: Rows that this run could not copy, by cause.
        rollups: Roll-ups that were written.
        verified: What the comparison found.
    """

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._coerced: Counter[str] = Counter()
        self.copied: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.rollups = 0
        self.verified = Verified(0, 0, 0, 0, Counter())

    def tell(self, stage: str, done: int, total: int | None = None) -> None:
        """Report how far the copy has come."""
        self._on_progress(CopyStep(stage, done, total))

    def convert(self, columns: Columns, table: Table) -> Columns:
        """Portable rows; what was changed or left out is counted."""
        converter = Converter(table)
        converted = converter.convert(columns)
        for (name, change), number in converter.coerced.items():
            self._coerced[f"{name}: {change}"] += number
        self.left_out.update(converter.left_out)
        return converted

    def found(self, verified: Verified) -> None:
        """Take what a comparison found; it counts the rows that earlier runs left out, too."""
        self.verified = verified
        self.left_out = verified.left_out.copy()

    def report(self) -> CopyReport:
        """What the copy did."""
        return CopyReport(
            rows_copied=self.copied["rows"],
            savings_copied=self.copied["savings"],
            rollups_copied=self.rollups,
            rows_verified=self.verified.rows,
            days_verified=self.verified.days,
            rows_only_in_target=self.verified.gone,
            rows_without_texts=self.verified.without_texts,
            coerced=self._coerced,
            left_out=self.left_out,
        )


def between_databases(run: Run, source: Database, target: Database) -> None:
    """Copy rows, savings events, ledger and roll-ups; then compare."""
    pairs = {
        stage: (TableRows(source, table), TableRows(target, table))
        for stage, table in _STAGES.items()
    }
    pairs = {stage: pair for stage, pair in pairs.items() if pair[0].exists}
    for one, other in pairs.values():
        _require_copied_alone(other)
        if (copied := other.copied_upto()) is not None:
            _require_same(one.newest(copied), one.table, other)
    for stage, pair in pairs.items():
        _copy_rows(run, stage, *pair)
    bring_ledger(source, target)
    brought = None
    while brought is None:  # a fold of the source can have gone beyond the copied rows
        upto = {stage: _copy_rows(run, stage, *pair) for stage, pair in pairs.items()}
        brought = bring_rollups(source, target, upto["rows"])
    run.rollups = brought
    run.tell("roll-ups", brought, brought)
    rows_from, rows_to = pairs.pop("rows")
    with ahead(chunks(rows_from, upto["rows"]), _CHUNKS_AHEAD, "copy") as expected:
        _finish(run, target)  # meanwhile the source computes its sums
        on_rows = _verifying(run, rows_from, upto["rows"])
        run.found(verify_tables(expected, rows_from, rows_to, on_rows))
    for stage, (one, other) in pairs.items():
        on_rows = _verifying(run, one, upto[stage])
        found = verify_tables(chunks(one, upto[stage]), one, other, on_rows)
        run.left_out += found.left_out


def _copy_rows(run: Run, stage: str, source: TableRows, target: TableRows) -> int:
    """Copy the rows that the target has not yet; return the id up to which it has them."""
    copied = target.copied_upto()
    last = NOTHING if copied is None else copied
    upto = _settled(source)
    total = _about(source, last, upto)
    with ahead(source.pages(last, upto), 1, "copy") as pages:
        for page in pages:
            _write(run, stage, target, page, last)
            last = page["id"][-1]
            run.tell(stage, run.copied[stage], max(total, run.copied[stage]))
    return last


def _write(run: Run, stage: str, target: TableRows, page: Columns, expected: int) -> Columns:
    """Write one page after the id that is expected; return its portable rows."""
    columns = run.convert(page, target.table)
    refused = target.write(columns, expected, page["id"][-1])
    run.left_out.update(refused)
    run.copied[stage] += len(columns.get("id", ())) - refused.total()
    return columns


def _settled(source: TableRows) -> int:
    """The id up to which no further row can appear in the source.

    Raises:
        StoreUnavailable: Transactions that may still write such rows stay open.
    """
    if source.table is not TELEMETRY:
        ends = source.ends()
        return NOTHING if ends is None else ends[1]
    read, deadline = source.database.read, time.monotonic() + _PATIENCE_S
    while (found := settled_id(read, read)) is None:
        if time.monotonic() > deadline:
            raise StoreUnavailable(
                f"source: transactions that may write rows have been open for {_PATIENCE_S:.0f} s "
                "or longer: end them, or wait for their end, then run the copy again"
            )
    return found


def _about(source: TableRows, after: int, upto: int) -> int:
    """About how many rows come after an id; ids have few gaps, and counting rows takes long."""
    ends = source.ends()
    return 0 if ends is None else max(0, upto - max(after, ends[0] - 1))


def _finish(run: Run, target: Database) -> None:
    """Have the target assign ids after those of the copied rows, know them, and fold them."""
    if target.backend is Backend.POSTGRESQL:  # SQLite derives new ids from the existing ones
        with target.write_transaction() as connection:
            identities.set_forward(connection)
        _gather_statistics(run, target)

    def after_step(rows: int) -> None:
        target.checkpoint()
        run.tell("folding", rows)

    fold(target.write_step, read=target.read, on_step=after_step, pause_s=target.pause_s)
    if run.rollups:  # the source may have lost rows between the copy of rows and of roll-ups
        compare_counts(target.write_step, read=target.read, stop=lambda: False)


def _gather_statistics(run: Run, target: Database) -> None:
    """Have PostgreSQL know the rows sooner than by autovacuum, which may be off; if it can."""
    with suppress(DBAPIError), target.write_transaction() as connection:
        known = catalogue.has_statistics(connection, TELEMETRY.name)
        if run.copied["rows"] >= _MANY_ROWS or not known:
            connection.execute(_GATHER)


def _verifying(run: Run, table: TableRows, upto: int) -> Callable[[int], None]:
    total = _about(table, NOTHING, upto)
    return lambda rows: run.tell("verifying", rows, max(total, rows))


def from_file(run: Run, source: FileRows, target: Database) -> None:
    """Copy a file's rows into a database; then compare."""
    table = TableRows(target, TELEMETRY)
    _require_copied_alone(table)
    copied = table.copied_upto()
    began = last = NOTHING if copied is None else copied
    known = copied is None
    written: Sums = {}
    for page in source.pages():
        if not known and page["id"][0] <= began:
            known = _is_same(page, TELEMETRY, table)
        new = _chosen(page, began.__lt__)
        if not new["id"]:
            continue
        if not known:
            _require_same(page, TELEMETRY, table)
            known = True
        columns = _write(run, "rows", table, new, last)
        last = new["id"][-1]
        if not source.read_again:
            written = added(written, sums_of(columns, TELEMETRY))
        run.tell("rows", run.copied["rows"], source.total(run.copied["rows"]))
    _finish(run, target)
    on_rows = _verifying(run, table, last)
    if source.read_again:
        pages = partial(_file_pages, source, last)
        run.found(verify_file(pages, table, last, on_rows, table.add, file_is_source=True))
    else:
        run.verified = verify_stream(written, table, began, last, on_rows)


def to_file(run: Run, source: Database, target: FileRows) -> None:
    """Copy a database's rows into a file; then compare."""
    table = TableRows(source, TELEMETRY)
    last = NOTHING
    newest = target.newest()
    if newest:
        last = newest["id"][-1]
        _require_same(newest, TELEMETRY, table)
    upto, began = _settled(table), last
    written: Sums = {}
    if upto > began or not newest:
        total = _about(table, began, upto)
        with target.appending(newest) as write:
            for page in table.pages(began, upto):
                columns = run.convert(page, TELEMETRY)
                write(columns)
                last = page["id"][-1]
                if not target.read_again:
                    written = added(written, sums_of(columns, TELEMETRY))
                run.copied["rows"] += len(columns["id"])
                run.tell("rows", run.copied["rows"], max(total, run.copied["rows"]))
    on_rows = _verifying(run, table, last)
    if target.read_again:
        pages = partial(_file_pages, target, last)

        def refuse(_: Columns) -> Counter[str]:
            raise CopyDiffers(
                f"{target.name} lacks rows of the source that were committed after later ones: "
                "remove the file, and copy again"
            )

        run.found(verify_file(pages, table, last, on_rows, refuse, file_is_source=False))
    else:
        run.verified = verify_stream(written, table, began, last, on_rows)


def _file_pages(file: FileRows, upto: int, converter: Converter) -> Iterator[Columns]:
    """A file's portable rows with ``id <= upto``."""
    for page in file.pages():
        if page["id"][0] > upto:
            return
        yield converter.convert(_chosen(page, lambda row_id: row_id <= upto))


def _chosen(page: Columns, wanted: Callable[[int], bool]) -> Columns:
    """The rows of a page whose ids are wanted."""
    chosen = [number for number, row_id in enumerate(page["id"]) if wanted(row_id)]
    if len(chosen) == len(page["id"]):
        return page
    return {name: [values[number] for number in chosen] for name, values in page.items()}


def _require_copied_alone(target: TableRows) -> None:
    """Refuse a target with rows that no copy wrote."""
    ends = target.ends()
    copied = target.copied_upto()  # read last: another copy may write meanwhile
    if ends is not None and (copied is None or ends[1] > copied):
        raise BadArgument(added_since(target.table))


def _require_same(columns: Columns, table: Table, other: TableRows) -> None:
    """Refuse a target none of whose rows the source has."""
    if not _is_same(columns, table, other):
        raise BadArgument(
            "target: the source has none of the target's rows, so it may be another source; copy "
            "into another database or file"
        )


def _is_same(columns: Columns, table: Table, other: TableRows) -> bool:
    """Whether both have one of these rows.

    Raises:
        BadArgument: A row of the other has the same id and is another one.
    """
    ours = _identities(columns, table)
    theirs = _identities(other.identifying(list(ours)), table)
    common = ours.keys() & theirs.keys()
    if any(ours[row_id] != theirs[row_id] for row_id in common):
        raise BadArgument(
            "target: its rows are not this source's; copy into another database or file"
        )
    return bool(common)


def _identities(columns: Columns, table: Table) -> dict[int, tuple[Any, ...]]:
    """What identifies the first rows of a page, by id."""
    first = {name: columns[name][:ANCHORS] for name in required(table) if name in columns}
    portable = Converter(table).convert(first)
    rows = zip(*portable.values(), strict=True)
    return dict(zip(portable.get("id", ()), rows, strict=True))
