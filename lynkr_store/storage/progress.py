"""Named numbers, such as the watermark, that say how far the library's own work has come."""

from collections.abc import Iterable
from functools import cache
from typing import Any, Final

from sqlalchemy import Connection, Delete, Insert, ScalarSelect, Select, delete, select

from lynkr_store.backend import Backend
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.functions import inserting
from lynkr_store.db.models import PROGRESS

OF_TEXTS: Final = "texts_"
"""The names of how far retention has removed texts begin so; ``texts_before_ms`` is an instant."""


def value_of(name: str) -> ScalarSelect[int]:
    """The value with this name, or NULL."""
    return select(PROGRESS.c.value).where(PROGRESS.c.name == name).scalar_subquery()


def values_of(names: Iterable[str]) -> Select[*tuple[Any, ...]]:
    """The names that have a value, and the values."""
    return select(PROGRESS.c.name, PROGRESS.c.value).where(PROGRESS.c.name.in_(names))


@cache
def upsert(backend: Backend) -> Insert:
    """Insert or replace a value; takes ``name`` and ``value``."""
    into = inserting(backend, PROGRESS)
    statement: Insert = into.on_conflict_do_update(
        index_elements=[PROGRESS.c.name], set_={"value": into.excluded.value}
    )
    return statement


@cache
def _raising(backend: Backend) -> Insert:
    into = inserting(backend, PROGRESS)
    statement: Insert = into.on_conflict_do_update(
        index_elements=[PROGRESS.c.name],
        set_={"value": into.excluded.value},
        where=PROGRESS.c.value < into.excluded.value,
    )
    return statement


def insert_if_absent(backend: Backend) -> Insert:
    """Insert a value unless the name has one; takes ``name`` and ``value``."""
    statement: Insert = inserting(backend, PROGRESS).on_conflict_do_nothing()
    return statement


def remove(name: str) -> Delete:
    """Delete a value."""
    return delete(PROGRESS).where(PROGRESS.c.name == name)


def write(connection: Connection, name: str, value: int) -> None:
    """Set a value, in the caller's transaction."""
    connection.execute(upsert(backend_of(connection)), {"name": name, "value": value})


def raise_to(connection: Connection, name: str, value: int) -> None:
    """Set a value unless it is greater already, in the caller's transaction."""
    connection.execute(_raising(backend_of(connection)), {"name": name, "value": value})


def held(connection: Connection, name: str, first: int) -> int:
    """A value, locked on PostgreSQL until the transaction ends; ``first`` if there was none yet."""
    statement = select(PROGRESS.c.value).where(PROGRESS.c.name == name).with_for_update()
    value: int | None = connection.scalar(statement)
    if value is None:  # one process inserts it, others wait for its lock
        entry = {"name": name, "value": first}
        connection.execute(insert_if_absent(backend_of(connection)), entry)
        value = connection.scalar(statement)
    return first if value is None else value
