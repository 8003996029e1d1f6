"""Alembic's environment: chooses the database, runs one transaction, compares only our objects.

It does not configure logging. If the library itself runs the upgrade, it uses the connection in
``config.attributes["connection"]``.
"""

import logging
from configparser import InterpolationError
from contextlib import nullcontext
from typing import Any

from alembic import command, context
from sqlalchemy import URL, Connection

from lynkr_store.backend import VERSION_TABLE, Backend
from lynkr_store.db import catalogue
from lynkr_store.db.dialect import disposing, parse_url, url_to_migrate
from lynkr_store.db.engines import create_store_engine
from lynkr_store.db.postgresql import require_utf8, schema_of, script_lines, within
from lynkr_store.db.sqlite import ensure_begun
from lynkr_store.exceptions import BadArgument, printable
from lynkr_store.maintenance.restoration import recreate_tables
from lynkr_store.migrate import comparison, operations, upgrade
from lynkr_store.migrate.lock import exclusively
from lynkr_store.migrate.revisions import (
    Standing,
    current,
    head,
    missing_tables,
    refuse_to_downgrade,
    standing,
)
from lynkr_store.migrate.scripts import note_applied
from lynkr_store.process.log import say
from lynkr_store.settings import DatabaseSettings

config = context.config
schema = config.attributes.get("schema", DatabaseSettings().schema_name)
modules: list[Any] = [script.module for script in context.script.walk_revisions()]
revisions = [(module, module.upgrade, module.downgrade) for module in modules]
"""The unwrapped functions: a migration that a lock blocks is tried again, and wraps them again."""


def _url() -> str | URL:
    if given := context.get_x_argument(as_dictionary=True).get("url"):
        return given
    settings = DatabaseSettings()
    if settings.model_fields_set & {"url", "migrate_url"}:
        return url_to_migrate(settings)
    return _url_of_ini_file()


def _url_of_ini_file() -> str:
    try:
        return config.get_main_option("sqlalchemy.url", "")
    except InterpolationError:  # its message repeats what follows, which may be a password
        raise BadArgument("sqlalchemy.url: in an ini file write %% for each %") from None


def _write_script() -> None:
    dialect = parse_url(_url()).get_backend_name()
    options = comparison.options() | {"on_version_apply": note_applied}
    context.configure(dialect_name=dialect, literal_binds=True, **options)
    with context.begin_transaction():
        if schema and dialect == Backend.POSTGRESQL:
            context.get_context().impl.static_output(script_lines(schema))
        context.run_migrations()


def _command() -> object:
    """Alembic's command, if the command line or the library started it; None for a host."""
    asked = getattr(config.cmd_opts, "cmd", None)
    return asked[0] if asked else config.attributes.get("command")


def _moves() -> bool:
    """Whether the command applies revisions or undoes them."""
    try:
        context.get_revision_argument()
    except KeyError:
        return False
    return True


def _wants_head() -> bool:
    asked = context.get_revision_argument()
    return asked in (head(), (head(),)) and _command() is not command.downgrade


def _say_left(stands: Standing) -> None:
    """Say that the schema of a newer release is not changed."""
    _say(
        f"the schema's revision {stands.revision} belongs to a newer release; this release "
        f"(head {head()}) can work with it and does not change it"
    )


def _say_missing_indexes(connection: Connection) -> None:
    """Name the indexes that ``maintain()`` has to build, if the schema is at the head."""
    if current(connection) == head() and (missing := comparison.missing_indexes(connection)):
        _say(comparison.left_to_maintain(missing))


def _say(said: str) -> None:
    """Print a line if Alembic's command line runs; in another program, log it."""
    if getattr(config.cmd_opts, "cmd", None):
        config.print_stdout(printable(said))
    else:
        say(logging.INFO, "%s", said)


def _migrate(connection: Connection) -> None:
    require_utf8(connection)
    stands = standing(connection)
    if stands.ahead and _command() is not command.downgrade:
        # in a rolling deploy an older replica finds a newer replica's schema, and can work with it
        _say_left(stands)
        if _moves() or _command() is command.current:
            return
    if _command() is command.downgrade:
        if stands.revision is None:
            return  # there is none of our tables, so there is nothing to undo
        refuse_to_downgrade(stands)
        to = context.get_revision_argument()
        undone = context.script.iterate_revisions(stands.revision, to, select_for_downgrade=True)
        operations.refuse_early(connection, {script.revision for script in undone})
    if not _moves():  # the command only shows or compares the schema
        context.configure(connection=connection, **comparison.options())
        if stands.ahead:  # Alembic does not know the newer revision's name
            context.get_context().get_current_heads = lambda: (head(),)  # type: ignore[method-assign]
        with comparison.comparing(), context.begin_transaction():
            context.run_migrations()
        return
    is_at_head = _wants_head() and stands.revision == head()
    lost = missing_tables(connection) if is_at_head else []
    with catalogue.sealed(connection, VERSION_TABLE) as (version_table_schema, in_path):
        # Alembic's own statements need no search path, but the revisions do
        for module, up, down in revisions:
            module.upgrade, module.downgrade = in_path(up), in_path(down)
        options = comparison.options() | {"on_version_apply": in_path(note_applied)}
        context.configure(
            connection=connection, version_table_schema=version_table_schema, **options
        )
        with comparison.comparing(), context.begin_transaction():
            context.run_migrations()
            if lost:
                in_path(recreate_tables)(connection, lost)
    _say_missing_indexes(connection)


if context.is_offline_mode():
    _write_script()
elif (connection := config.attributes.get("connection")) is not None:
    # without a transaction, begin one here and commit it
    with nullcontext() if connection.in_transaction() else connection.begin():
        ensure_begun(connection)
        with within(connection, schema if schema_of(connection) is None else None):
            _migrate(connection)
else:
    with (
        disposing(create_store_engine(_url(), schema=schema)) as engine,
        upgrade.permitted(engine),
    ):
        exclusively(engine, _migrate)
