"""The revisions' scripts: runs them, counts them, and notes which were applied.

They are Alembic's and lie in ``migrations/``; a wheel carries them as ``lynkr_store/_migrations``.
The only modules that import Alembic are this one and `operations`, which the scripts import. The
rest of the library reaches it through `late`, which imports it with the first upgrade.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, TextIO, cast

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.script import Script, ScriptDirectory
from alembic.script.revision import RangeNotAncestorError, ResolutionError, RevisionError
from alembic.util import CommandError
from sqlalchemy import URL, Connection, MetaData, delete, insert

from lynkr_store.db.models import NOTES
from lynkr_store.exceptions import BadArgument
from lynkr_store.migrate.revisions import REVISIONS, head
from lynkr_store.version import __version__

_NOTES_SINCE: Final = "0007"


def directory() -> Path:
    """Return the scripts' directory: in the installed package, or next to it in a checkout."""
    package = Path(__file__).parents[1]
    shipped = package / "_migrations"
    return shipped if shipped.is_dir() else package.parent / "migrations"


def config(**attributes: object) -> Config:
    """Return Alembic's configuration for the scripts that come with this release."""
    made = Config()
    made.set_main_option("script_location", str(directory()).replace("%", "%%"))
    made.set_main_option("path_separator", "os")
    made.attributes.update(attributes)
    return made


@cache
def script_directory() -> ScriptDirectory:
    """Return Alembic's view of the directory; the scripts are executed once a process."""
    return ScriptDirectory.from_config(config())


@contextmanager
def _explained(revision: str) -> Iterator[None]:
    """Raise Alembic's errors about a revision as the library's own.

    Raises:
        BadArgument: There is no such revision, or it cannot be reached in this direction.
    """
    known = f"use base, head, or {REVISIONS[0]} to {head()}"
    try:
        if not isinstance(revision, str) or not revision:
            raise BadArgument(f"unknown revision {revision!r}; {known}")
        yield
    except (CommandError, RevisionError, AssertionError) as error:
        unknown = isinstance(error, ResolutionError) or isinstance(error.__cause__, ResolutionError)
        # Alembic also asserts, without a word, that a text is the name of a revision
        words = f"revision {revision!r}: {error}" if str(error) and not unknown else ""
        said = words or f"unknown revision {revision!r}"
        raise BadArgument(f"{said}; {known}") from None


def require_known(revision: str) -> None:
    """Make sure that a downgrade from the head could return to the revision.

    Raises:
        BadArgument: There is no such revision.
    """
    with _explained(revision):
        list(script_directory().iterate_revisions("head", revision, implicit_base=True))


def steps(revision: str, stands_at: str | None) -> int:
    """Count the revisions that an upgrade would apply.

    Args:
        revision: The revision to reach.
        stands_at: The revision that the database is at; None for none.

    Raises:
        BadArgument: There is no such revision.
    """
    lower = stands_at or "base"
    with _explained(revision):
        between = script_directory().iterate_revisions(revision, lower, implicit_base=True)
        try:
            return len(list(between))
        except RangeNotAncestorError:
            return 0  # it is older


def upgrade(connection: Connection, revision: str, schema: str | None) -> None:
    """Apply revisions on a connection that is in a transaction.

    Args:
        connection: To the database.
        revision: The revision to reach.
        schema: PostgreSQL: the schema of the store's tables; None for the server's default.

    Raises:
        BadArgument: There is no such revision.
    """
    _run(command.upgrade, config(connection=connection, schema=schema), revision, [])


def downgrade(
    connection: Connection, revision: str, schema: str | None, *, drop_data: bool
) -> None:
    """Undo revisions on a connection that is in a transaction.

    Args:
        connection: To the database.
        revision: The revision to return to.
        schema: PostgreSQL: the schema of the store's tables; None for the server's default.
        drop_data: Drop tables that have rows.

    Raises:
        BadArgument: There is no such revision.
        DowngradeRefused: Rows would be lost without ``drop_data``.
    """
    options = ["drop-data=yes"] if drop_data else []
    _run(command.downgrade, config(connection=connection, schema=schema), revision, options)


def write(
    url: str | URL, revisions: str, output: TextIO, *, down: bool, schema: str | None
) -> None:
    """Write the SQL of an upgrade or downgrade; nothing is connected to.

    Raises:
        BadArgument: There are no such revisions.
    """
    to = config(schema=schema)
    to.output_buffer = output
    what = partial(command.downgrade if down else command.upgrade, sql=True)
    _run(what, to, revisions, [f"url={url}"])


def _run(what: Callable[..., None], to: Config, revision: str, options: list[str]) -> None:
    with _explained(revision):
        to.cmd_opts = Namespace(x=options)
        to.attributes |= {"command": what}
        what(to, revision)


def differences(connection: Connection, options: dict[str, Any], metadata: MetaData) -> list[str]:
    """Compare the database's tables with the metadata's; return the differences in words."""
    context = MigrationContext.configure(connection, opts=options)
    return [str(difference) for difference in compare_metadata(context, metadata)]


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
        ctx.execute(insert(NOTES).values(_note(script)))


def note_all_applied(connection: Connection) -> None:
    """Write down every revision up to the head, after the notes were lost."""
    noted = [each for each in script_directory().walk_revisions() if each.revision >= _NOTES_SINCE]
    connection.execute(insert(NOTES), [_note(script) for script in noted])


def _note(script: Script) -> dict[str, object]:
    return {
        "revision": script.revision,
        "rolling": int(script.module.rolling),
        "after": script.down_revision,
        "release": __version__,
    }
