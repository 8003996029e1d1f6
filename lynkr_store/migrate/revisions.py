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
"""Read of every database, before anything is known of it."""


class Standing(NamedTuple):
    """Where a database stands.

    Attributes:
        revision: The last revision that was applied; None if none of ours was.
        ahead: A newer release applied it, and this one can work with it all the same.
    """

    revision: str | None
    ahead: bool


def head() -> str:
    """The revision that this release works with."""
    return REVISIONS[-1]


def current(connection: Connection) -> str | None:
    """The database's revision, or None where no revision of ours was applied.

    Raises:
        SchemaError: What should say so is no table, has several rows, or no revision's name.
    """
    if odd := catalogue.not_plain(connection, _READ_FIRST):
        name, kind = next(iter(odd.items()))
        raise SchemaError(
            f"{name} is a {kind} and no table: it is not the store's, and what a read of it does "
            "nobody knows. Give another file, or drop it if it is yours"
        )
    if not catalogue.tables(connection, [VERSION_TABLE]):
        return None
    applied = select(_cut(connection, _VERSION.c.version_num)).limit(2)
    found: list[object] = list(connection.scalars(applied))
    if not found:
        return None
    if len(found) > 1:
        raise SchemaError(
            f"{VERSION_TABLE} has more than one row, as where two databases were merged: delete "
            "all but that of the revision which is applied, then run lynkr-store check"
        )
    revision = found[0]
    if not isinstance(revision, str) or not 0 < len(revision) <= _MOST_CHARS:
        raise SchemaError(
            f"{VERSION_TABLE} holds no revision's name: set it to the revision that is applied "
            f"({head()} is this release's), then run lynkr-store check"
        )
    return revision


def _cut(connection: Connection, name: ColumnClause[Any]) -> ColumnElement[Any]:
    """A revision's name, cut just above the longest: in an SQLite file it can be of any size."""
    if backend_of(connection) is not Backend.SQLITE:
        return name
    return func.substr(name, 1, _MOST_CHARS + 1, type_=NullType()).label(name.name)


def _notes(connection: Connection) -> dict[str, Any]:
    """What newer releases noted, by revision.

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
            f"{NOTES.name} has more than {_MOST_NOTES:,} rows, which no release writes: delete "
            "those that are no revision's"
        )
    return {note.revision: note for note in notes}


def standing(connection: Connection) -> Standing:
    """Where the database stands.

    Raises:
        UnsupportedDatabase: It is too old.
        SchemaAhead: A newer release changed it so that this one cannot work with it.
        SchemaError: The tables that say so are damaged; the message names what to set right.
    """
    require_supported(connection)
    revision = current(connection)
    if revision is None or revision in REVISIONS:
        return Standing(revision, ahead=False)
    notes = _notes(connection)
    release = notes[revision].release if revision in notes else None
    below, rolling = revision, True
    while rolling and below not in REVISIONS:  # down the line, which may have a gap
        note = notes.pop(below, None)  # or be a circle: each note is passed once
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
    """The tables that a schema at this release's revision, or a newer one, has and this has not."""
    there = catalogue.tables(connection, Base.metadata.tables)
    return [table for table in Base.metadata.tables if table not in there]


def lacks_tables(missing: Collection[str]) -> SchemaBehind:
    """The error that names the missing tables and the remedy."""
    return SchemaBehind(
        f"the schema lacks tables that it had, {', '.join(missing)}: run {UPGRADE_COMMAND}, which "
        "makes them again, empty"
    )


def foreign_owners(connection: Connection) -> list[str]:
    """Roles that own the store's tables and need not be trusted, in words; [] for none."""
    return catalogue.foreign_owners(connection, (*Base.metadata.tables, VERSION_TABLE))


def refuse_to_downgrade(stands: Standing) -> None:
    """Refuse to take back what this release does not know.

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

    That is its own, or a newer one whose revisions are all marked as harmless to older releases.

    Raises:
        SchemaBehind: It is older, or there is none.
        SchemaAhead: A newer release changed it so that this one cannot work with it.
    """
    revision, ahead = standing(connection)
    if revision is not None and (ahead or revision == head()):
        return revision
    stands = f"is at revision {revision}" if revision else "has no revision"
    raise SchemaBehind(f"the schema {stands}, this release needs {head()}: run {UPGRADE_COMMAND}")
