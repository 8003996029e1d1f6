"""Brings a database's schema to a revision, in one transaction that none runs beside."""

import os
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script.revision import RevisionError
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, MetaData, inspect
from sqlalchemy.exc import DBAPIError, SAWarning
from sqlalchemy.schema import SchemaItem

from lynkr_store.backend import VERSION_TABLE
from lynkr_store.db import catalogue, triggers
from lynkr_store.db.dialect import backend_of, disposing, parse_url
from lynkr_store.db.engines import create_store_engine, in_schema
from lynkr_store.db.errors import translated
from lynkr_store.db.models import INDEXES, TELEMETRY, Base
from lynkr_store.db.postgresql import schema_of
from lynkr_store.db.urls import is_memory
from lynkr_store.exceptions import BadArgument, SchemaError, UpgradeTimeout
from lynkr_store.migrate.adoption import ADOPTION_TABLE
from lynkr_store.migrate.backup import back_up, opened_file
from lynkr_store.migrate.lock import WAIT_S, exclusively
from lynkr_store.migrate.revisions import (
    config,
    head,
    missing_tables,
    note_applied,
    standing,
    steps,
)
from lynkr_store.settings import DatabaseSettings

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine

_NOT_PERMITTED: Final = ("42501", "3F000")  # the latter: no schema of the path may be used

_turns: Final[dict[int, threading.Lock]] = {}


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
        "on_version_apply": note_applied,
    }


def not_ours(
    item: SchemaItem,
    name: str | None,
    kind: str,
    reflected: bool,  # noqa: FBT001 - Alembic's signature
    compare_to: SchemaItem | None,
) -> bool:
    """The ``include_object`` of a host's own Alembic environment: leave out what is the store's.

    With it, ``alembic revision --autogenerate`` and ``alembic check`` of the host neither drop the
    store's tables, where both are in one database, nor create them, where the host's metadata
    includes the store's (`lynkr_store.Base.metadata`). Their revisions come with this library.
    It goes by the tables' names, in whatever schema they are.
    """
    del reflected, compare_to
    table = name if kind == "table" else getattr(getattr(item, "table", None), "name", None)
    return table not in Base.metadata.tables and table not in (VERSION_TABLE, ADOPTION_TABLE)


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


@contextmanager
def _explained() -> Iterator[None]:
    """Give Alembic's complaints of wrong use the library's form."""
    try:
        yield
    except (CommandError, RevisionError, AssertionError) as error:
        said = error if str(error) else "that is none"
        raise BadArgument(f"revision: {said}; there are base to {head()}, and head") from None


def upgrade(
    target: "Engine | AsyncEngine | URL | str",
    revision: str = "head",
    *,
    wait_s: float = WAIT_S,
    backup: bool = False,
) -> Path | None:
    """Create, adopt or upgrade the schema, in one transaction.

    Tables of the store's that were dropped are made again, empty, with their indexes.
    A schema that a newer release made stays as it is, if this release can work with it. Inside an
    event loop call it by ``asyncio.to_thread``: it waits for the database.

    Args:
        target: The database's URL; or the store's engine or the host's, which is not disposed. Of
            an AsyncEngine the URL is used. Everything is put into the PostgreSQL schema that the
            engine was made with, else ``LYNKR_STORE_SCHEMA`` names.
        revision: The revision to reach.
        wait_s: Seconds to wait for another migration, or for who holds a lock.
        backup: Before anything is changed, copy the SQLite file to a new one beside it. Where the
            upgrade is then refused, or does not begin in time, the copy is removed.

    Returns:
        Where the copy is; None if none was asked for, or nothing was to be changed.

    Raises:
        AdoptionRefused: The tables that are there are not the gateway's; nothing was changed.
        SchemaAhead: A newer release made the schema, and this one cannot work with it.
        UpgradeTimeout: It could not begin in time; nothing was changed.
        StoreUnavailable: The database cannot be reached, or the copy could not be made.
        BadArgument: There is no such revision, or ``backup`` of what is no SQLite file.
    """
    with _engine_of(target) as engine, translated(of_rows=False):
        copy = _copied(engine, revision) if backup else None
        try:
            bring_to(engine, revision, wait_s)
        except (SchemaError, UpgradeTimeout):
            if copy:  # nothing was changed; who tries again and again would fill the disk
                copy.unlink(missing_ok=True)
            raise
        return copy


def foreign_owners(connection: Connection) -> list[str]:
    """Roles that own the store's tables and need not be trusted, in words; [] for none."""
    return catalogue.foreign_owners(connection, (*Base.metadata.tables, VERSION_TABLE))


def bring_to(engine: Engine, revision: str = "head", wait_s: float = WAIT_S) -> None:
    """`upgrade` of an engine that says itself which schema it works in."""

    def body(connection: Connection) -> None:
        if not standing(connection).ahead:
            to = config(connection=connection, schema=schema_of(engine))
            _run(command.upgrade, to, revision)

    with _alone(wait_s), permitted(engine):
        exclusively(engine, body, wait_s)


@contextmanager
def permitted(engine: Engine) -> Iterator[None]:
    """Say what to do where this user lacks a right.

    Raises:
        SchemaError: It does; the message names the GRANT where one is enough.
    """
    try:
        yield
    except DBAPIError as error:
        if getattr(error.driver_exception, "sqlstate", None) not in _NOT_PERMITTED:
            raise
        line = str(error.orig).partition("\n")[0]
        with engine.connect() as connection:
            grant = catalogue.missing_grant(connection, schema_of(engine))
        remedy = f"; or have the schema's owner run {grant}" if grant else ""
        raise SchemaError(
            f"nothing was changed, for this user may not: {line}. Upgrade as the role that owns "
            f"the tables, or the schema that they are to be made in{remedy}"
        ) from None


@contextmanager
def _engine_of(target: "Engine | AsyncEngine | URL | str") -> Iterator[Engine]:
    """An engine for the target, that works in the schema which it or the environment names."""
    own = getattr(target, "sync_engine", target)
    schema = schema_of(own) if isinstance(own, Engine) else None
    schema = schema or DatabaseSettings().schema_name
    if isinstance(target, Engine):
        yield target if schema_of(target) else in_schema(target, schema)
        return
    url = parse_url(target if isinstance(target, str | URL) else target.url)
    if is_memory(url) and own is not target:
        raise BadArgument("target: SQLite in memory has one connection; its store upgrades it")
    with disposing(create_store_engine(url, schema=schema)) as engine:
        yield engine


def _copied(engine: Engine, revision: str) -> Path | None:
    """Copy the engine's file, if the upgrade has something to do."""
    opened_file(engine)
    with engine.connect() as connection:
        stands = standing(connection)
        is_empty = not inspect(connection).get_table_names()
        lost = missing_tables(connection)
    with _explained():
        is_whole = not (stands.revision == head() and lost)
        if stands.ahead or is_empty or (is_whole and not steps(revision, stands.revision)):
            return None
    return back_up(engine, f"before-{head()}")


def downgrade(
    engine: Engine, revision: str, *, drop_data: bool = False, wait_s: float = WAIT_S
) -> None:
    """Take revisions back, in one transaction.

    Args:
        engine: The store's engine or the host's; it is not disposed.
        revision: The revision to return to; ``base`` for none.
        drop_data: Drop tables that have rows.
        wait_s: Seconds to wait for another migration, or for who holds a lock.

    Raises:
        DowngradeRefused: Rows would be lost without ``drop_data``, or what the gateway had made
            before the database was adopted; nothing was changed.
        SchemaAhead: A newer release made the schema.
        UpgradeTimeout: It could not begin in time; nothing was changed.
        BadArgument: There is no such revision.
    """

    def body(connection: Connection) -> None:
        if standing(connection).revision is None:
            with _explained():
                steps("head", revision)
            return  # nothing of ours is there, and nothing is left behind
        options = Namespace(x=["drop-data=yes"] if drop_data else [])
        to = config(connection=connection, schema=schema_of(engine))
        _run(command.downgrade, to, revision, options)

    with _alone(wait_s):
        exclusively(engine, body, wait_s)


@contextmanager
def _alone(wait_s: float) -> Iterator[None]:
    """Alembic for this thread alone: ``alembic.op`` and ``alembic.context`` are the process's."""
    # by its id, because a forked child has nobody who would release the parent's lock
    turn = _turns.setdefault(os.getpid(), threading.Lock())
    if not turn.acquire(timeout=wait_s):
        raise UpgradeTimeout(
            f"nothing was changed: for {wait_s:g} s this process was migrating another database"
        )
    try:
        yield
    finally:
        turn.release()


def _run(
    what: Callable[..., None], to: Config, revision: str, options: Namespace | None = None
) -> None:
    if not isinstance(revision, str) or not revision:
        raise BadArgument(f"revision: there are base to {head()}, and head")
    with _explained():
        to.cmd_opts = options
        to.attributes |= {"command": what}
        what(to, revision)


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
    to = config()
    to.output_buffer = output
    what = partial(command.downgrade if down else command.upgrade, sql=True)
    with _alone(WAIT_S):
        _run(what, to, revisions, Namespace(x=[f"url={url}"]))


def drift(connection: Connection) -> list[str]:
    """The differences between the database's tables and this release's, in words; [] for none."""
    with catalogue.sealed(connection, VERSION_TABLE) as (schema, _), comparing():
        if schema is None:
            context = MigrationContext.configure(connection, opts=options())
            return [str(difference) for difference in compare_metadata(context, Base.metadata)]
        with _without_default_schema(connection):
            context = MigrationContext.configure(connection, opts=_options_in(schema))
            return [str(each) for each in compare_metadata(context, _metadata_in(schema))]


def _options_in(schema: str) -> dict[str, Any]:
    """`options` for tables that are named with their schema."""

    def is_ours(name: str | None, kind: str, parents: object) -> bool:
        return name == schema if kind == "schema" else _is_ours(name, kind, parents)

    own = {"include_schemas": True, "include_name": is_ours, "version_table_schema": schema}
    return options() | own


def _metadata_in(schema: str) -> MetaData:
    """The store's tables in a schema."""
    metadata = MetaData()
    for table in Base.metadata.sorted_tables:
        table.to_metadata(metadata, schema=schema)
    return metadata


@contextmanager
def _without_default_schema(connection: Connection) -> Iterator[None]:
    """Have Alembic take every schema by its name, also that which it would take for the default.

    It leaves the name of that out, and asks for what is in the path, where nothing is.
    """
    shared = connection.dialect
    connection.dialect = copy(shared)
    connection.dialect.default_schema_name = None
    try:
        yield
    finally:
        connection.dialect = shared


@contextmanager
def comparing() -> Iterator[None]:
    """Without the warnings that indexes on expressions, ours or not, cannot be read of SQLite."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Skipped unsupported reflection", SAWarning)
        warnings.filterwarnings("ignore", "autogenerate skipping metadata-specified expression")
        yield


def missing_indexes(connection: Connection) -> list[str]:
    """Names of the store's indexes that the database lacks, on tables that it has."""
    tables = catalogue.tables(connection, Base.metadata.tables)
    there = {name for table in tables for name in catalogue.index_names(connection, table)}
    return [
        str(index.name)
        for index in INDEXES
        if index.name not in there and index.table is not None and index.table.name in tables
    ]


def missing_triggers(connection: Connection) -> list[str]:
    """Names of the store's triggers that its table lacks, or that are disabled."""
    there = catalogue.trigger_names(connection, TELEMETRY.name)
    return [name for name in triggers.NAMES[backend_of(connection)] if name not in there]
