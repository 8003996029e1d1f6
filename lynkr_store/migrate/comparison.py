"""Compares a database's tables, indexes and triggers with this release's.

And says which of them are the store's, to this library's Alembic environment and to a host's.
"""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from sqlalchemy import Connection, MetaData
from sqlalchemy.exc import SAWarning
from sqlalchemy.schema import SchemaItem

from lynkr_store.backend import VERSION_TABLE
from lynkr_store.db import catalogue, triggers
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.models import INDEXES, TELEMETRY, Base
from lynkr_store.migrate.adoption import ADOPTION_TABLE
from lynkr_store.migrate.late import scripts


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


def drift(connection: Connection) -> list[str]:
    """The differences between the database's tables and this release's, in words; [] for none."""
    with catalogue.sealed(connection, VERSION_TABLE) as (schema, _), comparing():
        if schema is None:
            return scripts.differences(connection, options(), Base.metadata)
        with _without_default_schema(connection):
            return scripts.differences(connection, _options_in(schema), _metadata_in(schema))


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


def left_to_maintain(indexes: Collection[str]) -> str:
    """Say which indexes an upgrade did not build, because their tables have rows."""
    return f"left to 'lynkr-store maintain': {', '.join(indexes)}"


def missing_triggers(connection: Connection) -> list[str]:
    """Names of the store's triggers that its table lacks, or that are disabled."""
    there = catalogue.trigger_names(connection, TELEMETRY.name)
    return [name for name in triggers.NAMES[backend_of(connection)] if name not in there]
