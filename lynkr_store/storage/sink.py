"""Stores the writer's batches, each exactly once, as a whole or in parts."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from sqlalchemy import Connection, select
from sqlalchemy.exc import DBAPIError

from lynkr_store.db.errors import Fault, fault_of, translated
from lynkr_store.db.sqlite import WAL_PAGES
from lynkr_store.exceptions import SchemaError, StoreUnavailable, raise_alone
from lynkr_store.ingest.batch import Row
from lynkr_store.migrate import revisions
from lynkr_store.process.lifecycle import Forkable
from lynkr_store.schemas import LONG_FIELDS
from lynkr_store.schemas.units import DAY_MS
from lynkr_store.storage import progress
from lynkr_store.storage.database import Database
from lynkr_store.storage.diagnosis import hindrance
from lynkr_store.storage.inserts import PART_ROWS, insert_once
from lynkr_store.storage.ledger import FORGOTTEN, enter_parts
from lynkr_store.storage.write_lock import MANY_WAL_PAGES

_NO_TEXTS: Final = dict.fromkeys(LONG_FIELDS)
_MANY_ROWS: Final = 100
"""Rows from which a batch counts as large, and may leave a long WAL. Small batches write the same
pages repeatedly, so the WAL would become many times as large as their content."""
_MEMORY: Final = 0.8  # the share of an earlier batch's duration that the expectation keeps
_OPEN_WAIT_S: Final = 1.0
"""Seconds that the writer waits for a thread that is opening the database. A signal handler that
closes the store may have interrupted that thread, and waits for the writer. After this time the
writer opens the database itself."""


class DatabaseSink(Forkable):
    """Stores batches in a database; the writer's delivering thread calls it.

    Args:
        database: Opened with the first batch.
        clock: The present in epoch milliseconds, for the ledger.

    Attributes:
        on_written: Called after each stored batch with its number of rows.
    """

    def __init__(self, database: Database, clock: Callable[[], int]) -> None:
        self._database = database
        self._engine = database.of_writer
        self._clock = clock
        self.on_written: Callable[[int], None] = lambda _: None
        self._reset()

    def _reset(self) -> None:
        self._held_s = 0.0  # how long the last batches held the write lock
        self._batch = ""  # the last batch, and the rows refused of it and of its parts
        self._refused: dict[str, Counter[str]] = {}
        self._known_good: Row | None = None  # a row that was stored, without its texts

    def after_fork_in_child(self) -> None:
        """Forget the parent's batches."""
        self._reset()

    def write(self, batch_id: str, rows: Sequence[Row]) -> Mapping[str, int]:
        """Store a batch once; see `lynkr_store.ingest.deliverer.Sink`.

        It uses one transaction; if a row of a large batch is refused, one for each part.
        """
        with translated():
            try:
                self._open()
                refused = self._whole_or_parts(batch_id, rows)
            except DBAPIError as error:
                if fault_of(error) is Fault.UNCLEAR:
                    # the schema may have been changed: check it again, to name the remedy
                    self._database.forget_schema()
                    with self._database.read(self._engine) as connection:
                        words = hindrance(connection)
                    if words:
                        raise_alone(StoreUnavailable(words))
                raise
        self.on_written(len(rows))
        return refused

    def has_forgotten(self, at_ms: int) -> bool:
        """Whether the ledger may have forgotten a batch that was stored at an instant.

        It compares with what the ledger did forget, because the clock may be wrong.

        Raises:
            StoreUnavailable: The database cannot be reached.
        """
        with translated():
            self._open()
            with self._database.read(self._engine) as connection:
                before = connection.scalar(select(progress.value_of(FORGOTTEN)))
        return before is not None and at_ms - DAY_MS < before  # a day for clocks that are set

    def _open(self) -> None:
        self._database.open(patience_s=_OPEN_WAIT_S, engine=self._engine)

    def _whole_or_parts(self, batch_id: str, rows: Sequence[Row]) -> Counter[str]:
        if batch_id != self._batch:
            self._batch = batch_id
            self._refused.clear()
        refused = self._store(batch_id, rows)
        if refused is None:
            refused = Counter()
            for at in range(0, len(rows), PART_ROWS):
                part = rows[at : at + PART_ROWS]
                refused += self._store(f"{batch_id}.{at}", part, of=batch_id) or Counter()
        return refused

    def _store(
        self, batch_id: str, rows: Sequence[Row], *, of: str | None = None
    ) -> Counter[str] | None:
        """Store a batch, or a part of one, in one transaction; None where it must go in parts."""
        wal_pages = MANY_WAL_PAGES if len(rows) >= _MANY_ROWS else WAL_PAGES
        transaction = self._database.write_transaction(
            self._held_s, wal_pages=wal_pages, engine=self._engine
        )
        with transaction as connection:
            began = time.monotonic()
            if of:
                enter_parts(connection, of, self._clock())
            refused = self._insert(connection, batch_id, rows)
            if refused is None:
                connection.rollback()
            elif refused:  # if a newer release's constraint refused them, the batch waits
                try:
                    revisions.require_head(connection)
                except SchemaError:
                    self._database.forget_schema()
                    raise
        # a long duration counts for several batches, because the next ones are likely similar
        self._held_s = max(time.monotonic() - began, _MEMORY * self._held_s)
        if refused is not None:
            self._database.require_file()
        return refused

    def _insert(
        self, connection: Connection, batch_id: str, rows: Sequence[Row]
    ) -> Counter[str] | None:
        now, good = self._clock(), self._known_good
        done = insert_once(connection, batch_id, rows, now, known_good=good)
        if done is None:
            return None
        stored, refused = done
        missing = len(rows) - stored - refused.total()
        if missing:  # an earlier try was committed without them
            causes = self._refused.get(batch_id, Counter())
            refused = causes if causes.total() == missing else Counter(refused_earlier=missing)
        self._refused[batch_id] = refused
        if not refused:
            self._known_good = {**rows[-1], **_NO_TEXTS}
        return refused
