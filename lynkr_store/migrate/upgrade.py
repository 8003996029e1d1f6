"""Bring a database's schema to a revision, in one transaction and one migration at a time."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from sqlalchemy import URL, Connection, Engine, inspect
from sqlalchemy.exc import DBAPIError

from lynkr_store.db import catalogue
from lynkr_store.db.dialect import disposing, parse_url
from lynkr_store.db.engines import create_store_engine, in_schema
from lynkr_store.db.errors import sqlstate_of, translated
from lynkr_store.db.postgresql import schema_of
from lynkr_store.db.urls import is_memory
from lynkr_store.exceptions import BadArgument, SchemaError, UpgradeTimeout
from lynkr_store.migrate.backup import back_up, opened_file
from lynkr_store.migrate.late import scripts
from lynkr_store.migrate.lock import WAIT_S, exclusively
from lynkr_store.migrate.revisions import head, missing_tables, standing
from lynkr_store.settings import DatabaseSettings

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

_NOT_PERMITTED: Final = ("42501", "3F000")  # the latter: the role may use no schema of its path

_turns: Final[dict[int, threading.Lock]] = {}


def upgrade(
    target: "Engine | AsyncEngine | URL | Path | str",
    revision: str = "head",
    *,
    wait_s: float = WAIT_S,
    backup: bool = False,
) -> Path | None:
    """Create, adopt or upgrade the schema, in one transaction.

    Tables of the store that were dropped are created again, empty, with their indexes. A schema
    that a newer release made is left as it is, if this release can work with it. Indexes that are
    missing on tables with rows are left to ``maintain()``, and logged at INFO. In an event loop,
    call it by ``asyncio.to_thread``: it blocks while it waits for the database.

    Args:
        target: The database's URL; or an engine, the store's or the host's, which is not disposed.
            An AsyncEngine only gives its URL. On PostgreSQL the tables are in the schema that the
            engine was made with, else in the one that ``LYNKR_STORE_SCHEMA`` names.
        revision: The revision to reach.
        wait_s: Seconds to wait for another migration, or for a session that holds a lock.
        backup: Before anything is changed, copy the SQLite file to a new file in its directory. If
            the upgrade is then refused, or cannot begin in time, the copy is removed.

    Returns:
        The path of the copy; None if none was asked for, or there was nothing to change.

    Raises:
        AdoptionRefused: The gateway did not make the tables of these names; nothing was changed.
        SchemaAhead: A newer release made the schema, and this release cannot work with it.
        UpgradeTimeout: The upgrade could not begin in time; nothing was changed.
        StoreUnavailable: The database cannot be reached, or the copy could not be made.
        BadArgument: There is no such revision, or ``backup`` was asked for and the database is not
            an SQLite file.
    """
    with _engine_of(target) as engine, translated(of_rows=False):
        copy = _copied(engine, revision) if backup else None
        try:
            bring_to(engine, revision, wait_s)
        except (SchemaError, UpgradeTimeout):
            if copy:  # nothing was changed; repeated tries would fill the disk with copies
                copy.unlink(missing_ok=True)
            raise
        return copy


def bring_to(engine: Engine, revision: str = "head", wait_s: float = WAIT_S) -> None:
    """Upgrade by an engine that already names its PostgreSQL schema; see `upgrade`."""
    apply = scripts.upgrade  # the first use imports Alembic: do it before any lock is taken

    def body(connection: Connection) -> None:
        if not standing(connection).ahead:
            apply(connection, revision, schema_of(engine))

    with _alone(wait_s), permitted(engine):
        exclusively(engine, body, wait_s)


@contextmanager
def permitted(engine: Engine) -> Iterator[None]:
    """Say what to do if the database's user lacks a right.

    Raises:
        SchemaError: The user lacks one; the message names the GRANT if one is enough.
    """
    try:
        yield
    except DBAPIError as error:
        if not lacks_right(error):
            raise
        line = str(error.orig).partition("\n")[0]
        with engine.connect() as connection:
            grant = catalogue.missing_grant(connection, schema_of(engine))
        remedy = f"; or let the schema's owner run {grant}" if grant else ""
        raise SchemaError(
            f"nothing was changed: this user lacks a right ({line}). Upgrade as the role that owns "
            f"the tables, or as the owner of the schema that they belong in{remedy}"
        ) from None


def lacks_right(error: DBAPIError) -> bool:
    """Whether the database's user lacks a right."""
    return sqlstate_of(error) in _NOT_PERMITTED


@contextmanager
def _engine_of(target: "Engine | AsyncEngine | URL | Path | str") -> Iterator[Engine]:
    """Give an engine that works in the schema which the target or the environment names."""
    own: Any = getattr(target, "sync_engine", target)
    schema = schema_of(own) if isinstance(own, Engine) else None
    schema = schema or DatabaseSettings().schema_name
    if isinstance(target, Engine):
        yield target if schema_of(target) else in_schema(target, schema)
        return
    given: object = target if own is target else own.url
    if not isinstance(given, str | Path | URL):
        raise BadArgument("target: give a URL, or an engine")
    url = parse_url(given)
    if is_memory(url) and own is not target:
        raise BadArgument(
            "target: a database in memory has only one connection, so only its store can upgrade it"
        )
    with disposing(create_store_engine(url, schema=schema)) as engine:
        yield engine


def _copied(engine: Engine, revision: str) -> Path | None:
    """Copy the engine's file if the upgrade would change anything."""
    opened_file(engine)
    with engine.connect() as connection:
        stands = standing(connection)
        is_empty = not inspect(connection).get_table_names()
        lost = missing_tables(connection)
    is_whole = not (stands.revision == head() and lost)
    if stands.ahead or is_empty or (is_whole and not scripts.steps(revision, stands.revision)):
        return None
    return back_up(engine, f"before-{head()}")


def downgrade(
    engine: Engine, revision: str, *, drop_data: bool = False, wait_s: float = WAIT_S
) -> None:
    """Undo revisions, in one transaction.

    Args:
        engine: The store's engine or the host's; it is not disposed.
        revision: The revision to return to; ``base`` undoes all.
        drop_data: Also drop tables that have rows.
        wait_s: Seconds to wait for another migration, or for a session that holds a lock.

    Raises:
        DowngradeRefused: Rows would be lost and ``drop_data`` was not given, or the gateway had
            made what would be dropped; nothing was changed.
        SchemaAhead: A newer release made the schema.
        UpgradeTimeout: The downgrade could not begin in time; nothing was changed.
        BadArgument: There is no such revision.
    """
    undo = scripts.downgrade  # the first use imports Alembic: do it before any lock is taken

    def body(connection: Connection) -> None:
        if standing(connection).revision is None:
            scripts.require_known(revision)
            return  # there is nothing to undo, and no table is created
        undo(connection, revision, schema_of(engine), drop_data=drop_data)

    with _alone(wait_s):
        exclusively(engine, body, wait_s)


@contextmanager
def _alone(wait_s: float) -> Iterator[None]:
    """Give Alembic to one thread at a time: ``alembic.op`` and ``alembic.context`` are global."""
    # One lock for each process id: in a forked child no thread would release the parent's.
    turn = _turns.setdefault(os.getpid(), threading.Lock())
    if not turn.acquire(timeout=wait_s):
        raise UpgradeTimeout(
            f"nothing was changed: for {wait_s:g} s another thread of this process was migrating "
            "a database"
        )
    try:
        yield
    finally:
        turn.release()


def write_script(
    url: str | URL,
    revisions: str,
    output: TextIO,
    *,
    down: bool = False,
    schema: str | None = None,
) -> None:
    """Write the SQL of an upgrade or downgrade instead of running it.

    Args:
        url: Chooses the dialect; nothing is connected to.
        revisions: In Alembic's form, such as ``head`` or ``0003:base``.
        output: Where the script is written.
        down: Write a downgrade.
        schema: PostgreSQL: the schema of the store's tables; None for the environment's, ``""`` for
            none.

    Raises:
        BadArgument: There are no such revisions.
    """
    if schema is None:
        schema = DatabaseSettings().schema_name
    with _alone(WAIT_S):
        scripts.write(url, revisions, output, down=down, schema=schema or None)
