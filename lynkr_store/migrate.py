"""Brings a database's schema to this release's revision, and says where it stands.

The revisions are Alembic's and lie in ``migrations/``; a wheel carries them as
``lynkr_store/_migrations``.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, TextIO

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, inspect
from sqlalchemy.schema import SchemaItem

from lynkr_store.backend import VERSION_TABLE
from lynkr_store.engine import writing
from lynkr_store.exceptions import BadArgument, SchemaAhead, SchemaBehind
from lynkr_store.models import INDEXES, Base

UPGRADE_COMMAND: Final = "lynkr-store upgrade"


def _directory() -> Path:
    package = Path(__file__).parent
    shipped = package / "_migrations"
    return shipped if shipped.is_dir() else package.parent / "migrations"


def _config(**attributes: object) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_directory()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes.update(attributes)
    return config


@cache
def _script() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def head() -> str:
    """The revision that this release works with."""
    revision = _script().get_current_head()
    assert revision is not None, "the installation lacks its revisions"  # noqa: S101
    return revision


def options() -> dict[str, Any]:
    """What every Alembic context of ours is configured with."""
    return {
        "target_metadata": Base.metadata,
        "version_table": VERSION_TABLE,
        # Off by default for SQLite, where it works as long as the driver's own BEGIN is off.
        "transactional_ddl": True,
        "include_name": _is_ours,
        "include_object": _matters,
        "compare_type": True,
    }


def _is_ours(name: str | None, kind: str, _parents: object) -> bool:
    return kind != "table" or name in Base.metadata.tables


def _matters(
    _item: SchemaItem,
    name: str | None,
    kind: str,
    reflected: bool,  # noqa: FBT001 - Alembic's signature
    compare_to: SchemaItem | None,
) -> bool:
    """Whether a difference counts as drift.

    What only the database has is somebody else's: a foreign column, index or constraint. An index
    of ours that is missing waits for ``maintain()``.
    """
    if compare_to is not None:
        return True
    return not reflected and not (kind == "index" and name in {index.name for index in INDEXES})


def current(connection: Connection) -> str | None:
    """The database's revision, or None where no revision of ours was applied."""
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    return context.get_current_revision()


def require_head(connection: Connection) -> str:
    """Return the database's revision if it is this release's.

    Raises:
        SchemaBehind: It is older, or there is none.
        SchemaAhead: This release does not know it.
    """
    revision = current(connection)
    if revision == head():
        return revision
    _require_known(connection)
    stands = f"is at revision {revision}" if revision else "has no revision"
    raise SchemaBehind(f"the schema {stands}, this release needs {head()}: run {UPGRADE_COMMAND}")


def _require_known(connection: Connection) -> None:
    revision = current(connection)
    connection.rollback()  # what follows begins a transaction of its own
    if revision is not None and revision not in {s.revision for s in _script().walk_revisions()}:
        raise SchemaAhead(
            f"the schema's revision {revision} is newer than this release (head {head()}): "
            "install a newer lynkr-store"
        )


@contextmanager
def _explained() -> Iterator[None]:
    """Give Alembic's complaints of wrong use the library's form."""
    try:
        yield
    except CommandError as error:
        raise BadArgument(f"revision: {error}; there are base to {head()}, and head") from None


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Create, adopt or upgrade the schema, in one transaction.

    Args:
        engine: The store's engine or the host's; it is not disposed.
        revision: The revision to reach.

    Raises:
        AdoptionRefused: The tables that are there are not the gateway's; nothing was changed.
        SchemaAhead: A newer release made the schema.
        BadArgument: There is no such revision.
    """
    with writing(engine).connect() as connection, _explained():
        _require_known(connection)
        command.upgrade(_config(connection=connection), revision)


def downgrade(engine: Engine, revision: str, *, drop_data: bool = False) -> None:
    """Take revisions back, in one transaction.

    Args:
        engine: The store's engine or the host's; it is not disposed.
        revision: The revision to return to; ``base`` for none.
        drop_data: Drop tables that have rows.

    Raises:
        DowngradeRefused: Rows would be lost without ``drop_data``, or what the gateway had made
            before the database was adopted; nothing was changed.
        SchemaAhead: A newer release made the schema.
        BadArgument: There is no such revision.
    """
    with writing(engine).connect() as connection, _explained():
        _require_known(connection)
        config = _config(connection=connection)
        config.cmd_opts = Namespace(x=["drop-data=yes"] if drop_data else [])
        command.downgrade(config, revision)


def write_script(url: str | URL, revisions: str, output: TextIO, *, down: bool = False) -> None:
    """Write the SQL of an upgrade or downgrade instead of running it.

    Args:
        url: Chooses the dialect; nothing is connected to.
        revisions: As Alembic takes them, ``head`` or ``0003:base``.
        output: Where to.
        down: The revisions are a downgrade.

    Raises:
        BadArgument: There are no such revisions.
    """
    config = _config()
    config.output_buffer = output
    config.cmd_opts = Namespace(x=[f"url={url}"])
    with _explained():
        (command.downgrade if down else command.upgrade)(config, revisions, sql=True)


def drift(connection: Connection) -> list[str]:
    """The differences between the database's tables and this release's, in words; [] for none."""
    context = MigrationContext.configure(connection, opts=options())
    return [str(difference) for difference in compare_metadata(context, Base.metadata)]


def missing_indexes(connection: Connection) -> list[str]:
    """Names of the store's indexes that the database lacks, on tables that it has."""
    inspector = inspect(connection)
    there: set[str | None] = set()
    for table in Base.metadata.tables:
        if inspector.has_table(table):
            there |= {index["name"] for index in inspector.get_indexes(table)}
    return [str(index.name) for index in INDEXES if index.name not in there]
