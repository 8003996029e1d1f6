"""Runs a copy from one database or file to another."""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import text

from lynkr_store.backend import Backend
from lynkr_store.db.dialect import parse_url
from lynkr_store.db.errors import translated
from lynkr_store.db.urls import file_of, is_memory, url_text
from lynkr_store.exceptions import BadArgument, StoreUnavailable
from lynkr_store.process.files import identity_of
from lynkr_store.schemas.copying import CopyReport
from lynkr_store.settings import StoreSettings
from lynkr_store.storage.database import Database
from lynkr_store.transfer.files import SUFFIXES, FileRows, file_named
from lynkr_store.transfer.run import OnProgress, Run, between_databases, from_file, to_file

_WITH_PASSWORD: Final = re.compile(r"[a-z+0-9]+:(?!//)[^@]*@")
"""How a URL begins that was mistyped."""

_SERVER_OF: Final = text(
    "SELECT pg_catalog.pg_postmaster_start_time(), CAST(oid AS bigint), "
    "CAST(CAST(pg_catalog.to_regclass('routing_telemetry') AS oid) AS bigint) "
    "FROM pg_catalog.pg_database WHERE datname = current_database()"
)


def copy(
    source: str | Path,
    target: str | Path,
    *,
    source_schema: str | None = None,
    target_schema: str | None = None,
    on_progress: OnProgress | None = None,
) -> CopyReport:
    """Copy all rows with their ids, and compare the result with the source.

    Run again, also after an interruption, it copies only what is new. The source may be in use, and
    is not changed; a gateway's SQLite file of any version is read as it is. The target must be at
    this release's revision and have no rows but those of earlier copies of the same source.

    Between databases it brings savings events, roll-ups, and the ledger of batches, too. Values
    that not every database can hold are converted; the report counts them.

    Args:
        source: A database's URL, the path of an SQLite file, of a file of JSON Lines (``.jsonl``,
            ``.ndjson``) or Parquet (``.parquet``, with the extra ``parquet``), or ``-`` for JSON
            Lines from standard input.
        target: The same; ``-`` is standard output. One of the two is a database.
        source_schema: PostgreSQL: the schema of the source's tables; default
            ``LYNKR_STORE_SCHEMA``.
        target_schema: PostgreSQL: the schema of the target's tables, likewise.
        on_progress: Called after each step.

    Raises:
        BadArgument: A place cannot be used, a line or column of a file is wrong, or the target has
            rows that no copy of this source wrote.
        SchemaError: The target, or a source in PostgreSQL, is not at this release's revision.
        StoreUnavailable: A database or file cannot be reached or written; run it again.
        CopyDiffers: The comparison failed; the message names the first differences.
        MissingDriver: A driver or pyarrow is not installed.
    """
    one, other = _named(source, "source"), _named(target, "target")
    run = Run(on_progress or (lambda _: None))
    with translated(), ExitStack() as opened:
        match one, other:
            case str(), str():
                origin = opened.enter_context(_opened(one, source_schema, reads=True))
                goal = opened.enter_context(_opened(other, target_schema, reads=False))
                _refuse_same(origin, goal)
                between_databases(run, origin, goal)
            case str(), FileRows():
                to_file(run, opened.enter_context(_opened(one, source_schema, reads=True)), other)
            case FileRows(), str():
                from_file(
                    run, one, opened.enter_context(_opened(other, target_schema, reads=False))
                )
            case _:
                raise BadArgument("source, target: one of the two must be a database")
    return run.report()


def _named(place: str | Path, name: str) -> FileRows | str:
    """The file that a place names, or the URL of a database."""
    if not isinstance(place, str | Path) or not str(place):
        raise BadArgument(f"{name}: give a URL or a path")
    if _WITH_PASSWORD.match(str(place)):  # a message would show it
        raise BadArgument(f"{name}: a URL needs :// after its first word; give a URL or a path")
    found = file_named(str(place))
    if found is not None:
        return found
    return place if isinstance(place, str) and "://" in place else url_text(Path(place))


@contextmanager
def _opened(url: str, schema: str | None, *, reads: bool) -> Iterator[Database]:
    place: dict[str, Any] = {} if schema is None else {"schema_name": schema}
    settings = StoreSettings(url=url, enabled=True, upgrade_on_open=False, **place)
    parsed = parse_url(url)
    name = "source" if reads else "target"
    if is_memory(parsed):
        raise BadArgument(f"{name}: give the path of an SQLite file, not a database in memory")
    path = file_of(parsed)
    if path is not None and not path.exists():
        remedy = (
            "give a file's path"
            if reads
            else f"create it by lynkr-store upgrade --url sqlite:///{path}, or, for a file with "
            f"rows, give one of {', '.join(SUFFIXES)}"
        )
        raise StoreUnavailable(f"{name}: {path} does not exist; {remedy}")
    database = Database(settings, read_only=reads)
    try:
        database.open()
        yield database
    finally:
        database.dispose()


def _refuse_same(source: Database, target: Database) -> None:
    if source.backend is not target.backend:
        return
    if source.backend is Backend.SQLITE:
        paths = [file_of(database.engine.url) for database in (source, target)]
        same = len({identity_of(path) for path in paths if path}) == 1
    else:
        with source.read() as one, target.read() as other:
            same = one.execute(_SERVER_OF).one() == other.execute(_SERVER_OF).one()
    if same:
        raise BadArgument("target: it is the source; give two different databases")
