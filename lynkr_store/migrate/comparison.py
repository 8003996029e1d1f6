"""Compare a database's tables, indexes and triggers with those of this release.

Alembic's environments, the library's and a host's, also learn here which tables are the store's.
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
    """Return the options that every Alembic context of the store is configured with."""
    return {
        "target_metadata": Base.metadata,
        "version_table": VERSION_TABLE,
        # Off by default for SQLite, where it works if the driver does not issue its own BEGIN.
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
    """Leave out the store's tables: the ``include_object`` for a host's own Alembic environment.

    With it, the host's ``alembic revision --autogenerate`` and ``alembic check`` do not drop the
    store's tables if both use one database, and do not create them if the host's metadata includes
    the store's (`lynkr_store.Base.metadata`). The library brings their revisions. Tables are
    recognised by name, in any schema.
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
    """Tell whether a difference counts as drift.

    A column, index or constraint that only the database has belongs to somebody else. A missing
    index of the store is not drift, because ``maintain()`` builds it.
    """
    if compare_to is not None:
        return True
    return not reflected and not (kind == "index" and name in {index.name for index in INDEXES})


def drift(connection: Connection) -> list[str]:
    """Describe how the database's tables differ from this release's; [] for no difference."""
    with catalogue.sealed(connection, VERSION_TABLE) as (schema, _), comparing():
        if schema is None:
            return scripts.differences(connection, options(), Base.metadata)
        with _without_default_schema(connection):
            return scripts.differences(connection, _options_in(schema), _metadata_in(schema))


def _options_in(schema: str) -> dict[str, Any]:
    """Return `options` for tables that are named with their schema."""

    def is_ours(name: str | None, kind: str, parents: object) -> bool:
        return name == schema if kind == "schema" else _is_ours(name, kind, parents)

    own = {"include_schemas": True, "include_name": is_ours, "version_table_schema": schema}
    return options() | own


def _metadata_in(schema: str) -> MetaData:
    """Return the store's tables as tables of a schema."""
    metadata = MetaData()
    for table in Base.metadata.sorted_tables:
        table.to_metadata(metadata, schema=schema)
    return metadata


@contextmanager
def _without_default_schema(connection: Connection) -> Iterator[None]:
    """Make Alembic name every schema, also the default one.

    For the default schema it leaves the name out and looks in the search path, which is empty.
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
    """Ignore the warnings that SQLAlchemy cannot reflect SQLite's indexes on expressions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Skipped unsupported reflection", SAWarning)
        warnings.filterwarnings("ignore", "autogenerate skipping metadata-specified expression")
        yield


def missing_indexes(connection: Connection) -> list[str]:
    """Return the names of the store's indexes that are missing on tables which exist."""
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
    """Return the names of the store's triggers that are missing or disabled."""
    there = catalogue.trigger_names(connection, TELEMETRY.name)
    return [name for name in triggers.NAMES[backend_of(connection)] if name not in there]
