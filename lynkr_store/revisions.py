"""The revisions that this release knows, and where a database stands among them.

They are Alembic's and lie in ``migrations/``; a wheel carries them as ``lynkr_store/_migrations``.
"""

from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from alembic.config import Config
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.script import Script, ScriptDirectory
from alembic.script.revision import RangeNotAncestorError
from sqlalchemy import Connection, column, delete, insert, select
from sqlalchemy import table as sql_table

from lynkr_store import catalogue
from lynkr_store.backend import VERSION_TABLE
from lynkr_store.engine import require_supported
from lynkr_store.exceptions import SchemaAhead, SchemaBehind
from lynkr_store.models import NOTES
from lynkr_store.version import __version__

UPGRADE_COMMAND: Final = "lynkr-store upgrade"

_APPLIED: Final = select(sql_table(VERSION_TABLE, column("version_num")).c.version_num)

_NOTES_SINCE: Final = "0007"


class Standing(NamedTuple):
    """Where a database stands.

    Attributes:
        revision: The last revision that was applied; None if none of ours was.
        ahead: A newer release applied it, and this one can work with it all the same.
    """

    revision: str | None
    ahead: bool


def directory() -> Path:
    """Where the revisions lie: in the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    shipped = package / "_migrations"
    return shipped if shipped.is_dir() else package.parent / "migrations"


def config(**attributes: object) -> Config:
    """Alembic's configuration for the revisions that come with this release."""
    made = Config()
    made.set_main_option("script_location", str(directory()).replace("%", "%%"))
    made.set_main_option("path_separator", "os")
    made.attributes.update(attributes)
    return made


@cache
def _script() -> ScriptDirectory:
    return ScriptDirectory.from_config(config())


@cache
def _known() -> frozenset[str]:
    return frozenset(script.revision for script in _script().walk_revisions())


def head() -> str:
    """The revision that this release works with."""
    revision = _script().get_current_head()
    assert revision is not None, "the installation lacks its revisions"  # noqa: S101
    return revision


def current(connection: Connection) -> str | None:
    """The database's revision, or None where no revision of ours was applied."""
    if not catalogue.tables(connection, [VERSION_TABLE]):
        return None
    return connection.execute(_APPLIED).scalar_one_or_none()


def standing(connection: Connection) -> Standing:
    """Where the database stands.

    Raises:
        UnsupportedDatabase: It is too old.
        SchemaAhead: A newer release changed it so that this one cannot work with it.
    """
    require_supported(connection)
    revision = current(connection)
    if revision is None or revision in _known():
        return Standing(revision, ahead=False)
    notes: dict[str, Any] = {}
    if catalogue.tables(connection, [NOTES.name]):
        notes = {note.revision: note for note in connection.execute(select(NOTES))}
    below, rolling = revision, True
    while rolling and below not in _known():  # down the line, which may have a gap
        rolling = below in notes and bool(notes[below].rolling)
        below = notes[below].after if rolling else below
    if rolling:
        return Standing(revision, ahead=True)
    release = notes[revision].release if revision in notes else None
    remedy = f"lynkr-store {release} or newer" if release else "a newer lynkr-store"
    raise SchemaAhead(
        f"the schema's revision {revision} is newer than this release (head {head()}): "
        f"install {remedy}"
    )


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


def steps(revision: str, stands_at: str | None) -> int:
    """How many revisions an upgrade to the one from the other would apply.

    Raises:
        RevisionError: Alembic's; there is no such revision.
    """
    lower = stands_at or "base"
    try:
        return len(list(_script().iterate_revisions(revision, lower, implicit_base=True)))
    except RangeNotAncestorError:
        return 0  # it is behind


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


def note_applied(*, ctx: MigrationContext, step: MigrationInfo, **_: object) -> None:
    """Write down, for older releases, what a revision means to them; Alembic calls it after each.

    In a script (``--sql``) the note becomes a statement of it.
    """
    script = cast("Script", step.up_revision)  # one a step: there are no branches
    # of 0007 itself the table goes with the downgrade
    if script.revision < _NOTES_SINCE or (not step.is_upgrade and script.revision == _NOTES_SINCE):
        return
    if step.is_stamp:
        return  # the table may not be there, and nothing was applied
    ctx.execute(delete(NOTES).where(NOTES.c.revision == script.revision))
    if step.is_upgrade:
        rolling = int(script.module.rolling)
        note = {"revision": script.revision, "rolling": rolling, "after": script.down_revision}
        ctx.execute(insert(NOTES).values(note | {"release": __version__}))
