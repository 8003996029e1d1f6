"""Builds the indexes that are missing. Nothing here runs unasked."""

import time
from collections.abc import Callable
from typing import Final, assert_never

from sqlalchemy import Connection, Engine, Index, MetaData, String, column, func, select, text
from sqlalchemy import table as sql_table
from sqlalchemy.schema import CreateIndex, DropIndex
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random

from lynkr_store import folding, migrate, retention, rollups
from lynkr_store.backend import Backend
from lynkr_store.courtesy import GAP_S
from lynkr_store.database import Database
from lynkr_store.engine import backend_of, writing
from lynkr_store.exclusive import ADVISORY_LOCK, is_in_the_way
from lynkr_store.faults import translated
from lynkr_store.models import INDEXES
from lynkr_store.retention import Retained
from lynkr_store.schemas import MaintenanceReport
from lynkr_store.search_path import schema_of, set_path
from lynkr_store.settings import StoreSettings
from lynkr_store.spans import DAY_MS

BUDGET_S: Final = 30.0
"""Seconds for retention: a tenth of the time between two of a store's own, by default."""

OnStep = Callable[[int], None]
"""Told after each step of a fold how many rows were folded so far."""

_TURN: Final = ADVISORY_LOCK + 2
_POLL_S: Final = 0.1
_TRIES: Final = 5


def maintain(
    database: Database,
    settings: StoreSettings,
    clock: Callable[[], int],
    *,
    budget_s: float = BUDGET_S,
    rebuild: bool = False,
    on_step: OnStep = lambda _: None,
) -> MaintenanceReport:
    """Do all that keeps a database in shape; see `lynkr_store.Store.maintain`.

    Raises:
        StoreUnavailable: The database cannot be reached; what was done before stays done.
    """
    built = build_missing_indexes(database.engine)
    folded = fold(database, on_step=on_step)
    if rebuild:
        with translated():
            folded += folding.rebuild(
                database.begun, on_step=lambda rows: on_step(folded + rows)
            ).rows
    retained = retain(database, settings, clock, budget_s)
    with translated(), database.connected(database.engine) as connection:
        lag = connection.scalar(rollups.lag()) or 0
    return MaintenanceReport(
        indexes_built=built, rows_folded=folded, rollup_lag=lag, **retained._asdict()
    )


def keep_up(
    database: Database,
    settings: StoreSettings,
    clock: Callable[[], int],
    stop: Callable[[], bool],
) -> None:
    """What a store does by itself from time to time: fold, and retain where that is configured.

    Raises:
        StoreUnavailable: The database cannot be reached.
    """
    database.open()
    fold(database, stop=stop)
    if not stop():
        retain(database, settings, clock, BUDGET_S if _retains(settings) else 0, stop)


def fold(
    database: Database,
    *,
    stop: Callable[[], bool] = lambda: False,
    on_step: OnStep = lambda _: None,
) -> int:
    """Fold new rows into the roll-ups, and return how many; see `lynkr_store.folding.fold`.

    Raises:
        StoreUnavailable: The database cannot be reached; what was folded stays folded.
    """

    def after_step(rows: int) -> None:
        database.checkpoint()
        on_step(rows)

    with translated():
        return folding.fold(
            database.begun_step, look=database.looked, stop=stop, on_step=after_step
        ).rows


def retain(
    database: Database,
    settings: StoreSettings,
    clock: Callable[[], int],
    budget_s: float,
    stop: Callable[[], bool] = lambda: False,
) -> Retained:
    """Apply the configured retention to rows, texts and roll-ups; see `lynkr_store.retention`.

    Raises:
        StoreUnavailable: The database cannot be reached; what was done before stays done.
    """
    now, deadline = clock(), time.monotonic() + budget_s
    rows_before, texts_before, rollups_before = (
        None if days is None else now - int(days * DAY_MS)
        for days in (
            settings.retention_days,
            settings.text_retention_days,
            settings.rollup_retention_days,
        )
    )
    retained = retention.retain(
        database,
        rows_before_ms=rows_before,
        texts_before_ms=texts_before,
        stop=lambda: stop() or time.monotonic() >= deadline,
        upto_id=folded_upto(database),
    )
    if rollups_before is not None:
        with translated():
            folding.trim(database.begun, rollups_before, look=database.looked, stop=stop)
    return retained


def cleanup(database: Database, cutoff_ms: int) -> int:
    """Delete the rows before a moment, which the roll-ups remember; return how many.

    Raises:
        StoreUnavailable: The database cannot be reached; what was deleted before stays deleted.
    """
    fold(database)
    deleted = retention.delete_older(database, cutoff_ms, upto_id=folded_upto(database))
    retention.give_back(database)
    retention.forget(database)
    return deleted


def folded_upto(database: Database) -> int:
    """The id up to which rows are in the roll-ups; others must not be deleted by retention."""
    with translated(), database.looked() as connection:
        folded: int = connection.execute(rollups.folded()).scalar_one()
    return folded


def _retains(settings: StoreSettings) -> bool:
    return settings.retention_days is not None or settings.text_retention_days is not None


def build_missing_indexes(engine: Engine) -> tuple[str, ...]:
    """Build the indexes that an upgrade left out because their table had rows.

    On PostgreSQL concurrently: writers go on. One that an earlier attempt left invalid is built
    anew. On SQLite a build holds the file's write lock, which cannot be done in pieces: measured, 1
    to 2 µs a row, so a gateway beside it, which waits 3 s, loses nothing up to about 2,000,000
    rows. Safe to interrupt and call again.

    Returns:
        Their names.

    Raises:
        StoreUnavailable: The database cannot be reached.
    """
    with translated():
        backend = backend_of(engine)
        match backend:
            case Backend.SQLITE:
                return _build_sqlite(engine)
            case Backend.POSTGRESQL:
                return _build_postgresql(engine)
            case _:
                assert_never(backend)


def _build_sqlite(engine: Engine) -> tuple[str, ...]:
    with engine.connect() as connection:
        missing = migrate.missing_indexes(connection)
    for number, name in enumerate(missing):
        index = _index(name)
        with engine.connect() as connection:
            # read the table without the lock, so that the build, which holds it, reads from memory
            whole = text(f"{index.table} NOT INDEXED")
            connection.scalar(select(func.count()).select_from(whole))
        if number:
            time.sleep(GAP_S)  # let in who waits since the last one
        with writing(engine).begin() as connection:
            connection.execute(CreateIndex(index, if_not_exists=True))
    return tuple(missing)


def _build_postgresql(engine: Engine) -> tuple[str, ...]:
    # A build waits for transactions with a snapshot; a migration among them may wait for the build:
    # a deadlock, whose victim tries again.
    tries = Retrying(
        retry=retry_if_exception(is_in_the_way),
        stop=stop_after_attempt(_TRIES),
        wait=wait_random(_POLL_S, 5 * _POLL_S),
        reraise=True,
    )
    built: list[str] = []
    tries(_build_concurrently, engine, built)
    return tuple(built)


def _build_concurrently(engine: Engine, built: list[str]) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.detach()  # the session ends here, with its settings
        connection.exec_driver_sql("SET statement_timeout = 0")  # it takes as long as it takes
        if schema := schema_of(connection):
            set_path(connection, schema, local=False)
        # One at a time: to another an index under construction looks invalid. Polled for, since a
        # statement that waits has a snapshot; by the session that builds, since it goes on when
        # its process is killed.
        while not connection.scalar(select(func.pg_try_advisory_lock(_TURN))):
            time.sleep(_POLL_S)
        for name in _invalid_indexes(connection):
            connection.execute(DropIndex(_index(name, concurrently=True), if_exists=True))
        for name in migrate.missing_indexes(connection):
            connection.execute(CreateIndex(_index(name, concurrently=True), if_not_exists=True))
            built.append(name)


def _invalid_indexes(connection: Connection) -> list[str]:
    """Our indexes that a concurrent build left unfinished."""
    indexes = sql_table("pg_index", column("indexrelid"), column("indisvalid"))
    classes = sql_table("pg_class", column("oid"), column("relname", String))
    statement = (
        select(classes.c.relname)
        .join_from(indexes, classes, classes.c.oid == indexes.c.indexrelid)
        .where(
            indexes.c.indisvalid.is_(False),
            classes.c.relname.in_([index.name for index in INDEXES]),
            func.pg_table_is_visible(classes.c.oid),
        )
    )
    return list(connection.scalars(statement))


def _index(name: str, *, concurrently: bool = False) -> Index:
    """A copy of the model's index, which may be given options of its own."""
    own = next(index for index in INDEXES if index.name == name)
    assert own.table is not None  # noqa: S101 - every index of a model has one
    copy = next(i for i in own.table.to_metadata(MetaData()).indexes if i.name == name)
    copy.dialect_options["postgresql"]["concurrently"] = concurrently
    return copy
