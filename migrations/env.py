"""Alembic's environment: which database, one transaction, which objects are ours.

It leaves logging alone, and takes a connection from ``config.attributes["connection"]`` where the
library itself runs the upgrade.
"""

import os

from alembic import command, context
from sqlalchemy import Connection

from lynkr_store import ddl, migrate
from lynkr_store.backend import Backend
from lynkr_store.engine import create_store_engine, disposing, parse_url
from lynkr_store.exclusive import exclusively
from lynkr_store.revisions import standing
from lynkr_store.search_path import checked_schema, quoted

config = context.config
schema = checked_schema(os.environ.get("LYNKR_STORE_SCHEMA"))


def _url() -> str:
    given = context.get_x_argument(as_dictionary=True).get("url")
    return (
        given or os.environ.get("LYNKR_STORE_URL") or config.get_main_option("sqlalchemy.url", "")
    )


def _write_script() -> None:
    dialect = parse_url(_url()).get_backend_name()
    context.configure(dialect_name=dialect, literal_binds=True, **migrate.options())
    with context.begin_transaction():
        if schema and dialect == Backend.POSTGRESQL:
            write = context.get_context().impl.static_output
            write(f"CREATE SCHEMA IF NOT EXISTS {quoted(schema)};")
            write(f"SET LOCAL search_path TO {quoted(schema)};")
        context.run_migrations()


def _command() -> object:
    asked = getattr(config.cmd_opts, "cmd", None)  # of the command line
    return asked[0] if asked else config.attributes.get("command")


def _migrate(connection: Connection) -> None:
    stands = standing(connection)
    if _command() is command.upgrade and stands.ahead:
        return  # in a rolling deploy the older replica finds a newer one's work, and goes on
    if _command() is command.downgrade:
        if stands.revision is None:
            return  # nothing of ours is there, and nothing is left behind
        to = context.get_revision_argument()
        undone = context.script.iterate_revisions(stands.revision, to, select_for_downgrade=True)
        ddl.refuse_early(connection, {script.revision for script in undone})
    context.configure(connection=connection, **migrate.options())
    with context.begin_transaction():
        context.run_migrations()


if context.is_offline_mode():
    _write_script()
elif (connection := config.attributes.get("connection")) is not None:
    _migrate(connection)
else:
    with disposing(create_store_engine(_url(), schema=schema)) as engine:
        exclusively(engine, _migrate)
