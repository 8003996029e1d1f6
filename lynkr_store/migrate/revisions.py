"""Which revisions this release knows, and where a database stands among them.

Nothing here loads Alembic: a store whose database is at the head needs no more than this module.
"""

from collections.abc import Collection
from typing import Any, Final, NamedTuple

from sqlalchemy import ColumnClause, ColumnElement, Connection, column, func, select
from sqlalchemy import table as sql_table
from sqlalchemy.types import NullType

from lynkr_store.backend import VERSION_TABLE, Backend
from lynkr_store.db import catalogue
from lynkr_store.db.citus import refuse_worker
from lynkr_store.db.dialect import backend_of, require_supported
from lynkr_store.db.models import NOTES, Base
from lynkr_store.exceptions import SchemaAhead, SchemaBehind, SchemaError

REVISIONS: Final = (
    "0001",
    "0002",
    "0003",
    "0004",
    "0005",
    "0006",
    "0007",
    "0008",
    "0009",
    "0010",
)
"""The revisions of this release, oldest first; ``migrations/`` holds a script for each.

Written down here so that opening a database at the head loads no script; a test compares the two.
"""

UPGRADE_COMMAND: Final = "lynkr-store upgrade"

_VERSION: Final = sql_table(VERSION_TABLE, column("version_num"))

_MOST_CHARS: Final = 255  # of a revision's name: Alembic's own column takes 32
_MOST_NOTES: Final = 10_000
_READ_FIRST: Final = (VERSION_TABLE, NOTES.name)
"""Tables that are read before anything is known about a database."""


class Standing(NamedTuple):
    """Where a database stands.

    Attributes:
        revision: The last revision that was applied; None if no revision of the store was.
        ahead: A newer release applied it, and this release can work with it.
    """

    revision: str | None
    ahead: bool


def head() -> str:
    """Return the revision that this release works with."""
    return REVISIONS[-1]


def current(connection: Connection) -> str | None:
    """Return the database's revision, or None if no revision of the store was applied.

    Raises:
        SchemaError: The version table is not a table, has several rows, or does not contain the
            name of a revision.
    """
    if odd := catalogue.not_plain(connection, _READ_FIRST):
        name, kind = next(iter(odd.items()))
        raise SchemaError(
            f"{name} is a {kind}, not a table, so the store did not make it, and reading it could "
            "run anything. Use another database, or drop it if it is yours"
        )
    if not catalogue.tables(connection, [VERSION_TABLE]):
        return None
    applied = select(_cut(connection, _VERSION.c.version_num)).limit(2)
    found: list[object] = list(connection.scalars(applied))
    if not found:
        return None
    if len(found) > 1:
        raise SchemaError(
            f"{VERSION_TABLE} has more than one row, as after two databases were merged: delete "
            "all but the row of the applied revision, then run lynkr-store check"
        )
    revision = found[0]
    if not isinstance(revision, str) or not 0 < len(revision) <= _MOST_CHARS:
        raise SchemaError(
            f"{VERSION_TABLE} does not contain the name of a revision: set it to the applied one "
            f"(this release's is {head()}), then run lynkr-store check"
        )
    return revision


def _cut(connection: Connection, name: ColumnClause[Any]) -> ColumnElement[Any]:
    """Cut a revision's name just above the longest allowed: in SQLite it can have any size."""
    if backend_of(connection) is not Backend.SQLITE:
        return name
    return func.substr(name, 1, _MOST_CHARS + 1, type_=NullType()).label(name.name)


def _notes(connection: Connection) -> dict[str, Any]:
    """Return what newer releases noted about their revisions, by revision.

    Raises:
        SchemaError: There are more notes than any release writes.
    """
    if not catalogue.tables(connection, [NOTES.name]):
        return {}
    names = (_cut(connection, name) for name in (NOTES.c.revision, NOTES.c.after, NOTES.c.release))
    rolling = (NOTES.c.rolling == 1).label("rolling")
    notes = connection.execute(select(*names, rolling).limit(_MOST_NOTES + 1)).all()
    if len(notes) > _MOST_NOTES:
        raise SchemaError(
            f"{NOTES.name} has more than {_MOST_NOTES:,} rows, more than any release writes: "
            "delete the rows that do not belong to a revision"
        )
    return {note.revision: note for note in notes}


def standing(connection: Connection) -> Standing:
    """Find out where the database stands.

    Raises:
        UnsupportedDatabase: The database's version is too old, or it is a worker of a cluster.
        SchemaAhead: A newer release changed the schema so that this release cannot work with it.
        SchemaError: The tables that record the revision are damaged; the message says what to do.
    """
    require_supported(connection)
    refuse_worker(connection)
    revision = current(connection)
    if revision is None or revision in REVISIONS:
        return Standing(revision, ahead=False)
    notes = _notes(connection)
    release = notes[revision].release if revision in notes else None
    below, rolling = revision, True
    while rolling and below not in REVISIONS:  # from newer to older; a note can be missing
        note = notes.pop(below, None)  # notes can form a circle, so each is used once
        rolling = note is not None and bool(note.rolling)
        below = note.after if rolling else below
    if rolling:
        return Standing(revision, ahead=True)
    named = isinstance(release, str) and 0 < len(release) <= _MOST_CHARS
    remedy = f"lynkr-store {release} or newer" if named else "a newer lynkr-store"
    raise SchemaAhead(
        f"the schema's revision {revision} is newer than this release (head {head()}): "
        f"install {remedy}"
    )


def missing_tables(connection: Connection) -> list[str]:
    """Return the names of the store's tables that the database lacks."""
    there = catalogue.tables(connection, Base.metadata.tables)
    return [table for table in Base.metadata.tables if table not in there]


def lacks_tables(missing: Collection[str]) -> SchemaBehind:
    """Return the error that names the missing tables and the remedy."""
    return SchemaBehind(
        f"tables of the schema are missing: {', '.join(missing)}; run {UPGRADE_COMMAND}, which "
        "creates them again, empty"
    )


def foreign_owners(connection: Connection) -> list[str]:
    """Describe roles that own the store's tables and may not be trusted; [] for none."""
    return catalogue.foreign_owners(connection, (*Base.metadata.tables, VERSION_TABLE))


def refuse_to_downgrade(stands: Standing) -> None:
    """Refuse to undo revisions that this release does not know.

    Raises:
        SchemaAhead: A newer release made the schema.
    """
    if stands.ahead:
        raise SchemaAhead(
            f"the schema's revision {stands.revision} is newer than this release (head {head()}): "
            "downgrade it with the release that made it"
        )


def require_head(connection: Connection) -> str:
    """Return the database's revision if this release can work with it.

    It can work with its own, and with a newer one if every revision after its own is marked as
    harmless to older releases.

    Raises:
        SchemaBehind: The revision is older, or the schema has none.
        SchemaAhead: A newer release changed the schema so that this release cannot work with it.
    """
    revision, ahead = standing(connection)
    if revision is not None and (ahead or revision == head()):
        return revision
    stands = f"is at revision {revision}" if revision else "has no revision"
    raise SchemaBehind(f"the schema {stands}, this release needs {head()}: run {UPGRADE_COMMAND}")
