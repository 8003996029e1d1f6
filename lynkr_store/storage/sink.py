"""Where the writer's batches go: each is stored once, whole or in parts."""

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
"""Rows from which on a batch is taken for one of many. Small ones write the same pages again and
again: of these the WAL would hold many times what is in the file."""
_MEMORY: Final = 0.8  # of the last batch's duration in the expectation of the next one's
_OPEN_WAIT_S: Final = 1.0
"""How long the writer waits for a thread that is opening the database. A signal handler may have
interrupted that thread to close the store, and waits for the writer; so both may open it."""


class DatabaseSink(Forkable):
    """Stores batches in a database; the writer's delivering thread calls it.

    Args:
        database: Opened when the first batch comes.
        clock: The present in epoch milliseconds, for the ledger.

    Attributes:
        on_written: Called with the number of rows of each batch that was stored.
    """

    def __init__(self, database: Database, clock: Callable[[], int]) -> None:
        self._database = database
        self._clock = clock
        self.on_written: Callable[[int], None] = lambda _: None
        self._reset()

    def _reset(self) -> None:
        self._held_s = 0.0  # how long the last batches held the write lock
        self._batch = ""  # the last one, and what was refused of it and its parts
        self._refused: dict[str, Counter[str]] = {}
        self._known_good: Row | None = None  # a row that was taken, without its texts

    def after_fork_in_child(self) -> None:
        """Know nothing of the parent's batches."""
        self._reset()

    def write(self, batch_id: str, rows: Sequence[Row]) -> Mapping[str, int]:
        """Store a batch once; see `lynkr_store.ingest.writer.Sink`.

        In one transaction, or, where a row of many is refused, in one for each part.
        """
        with translated():
            try:
                self._database.open(patience_s=_OPEN_WAIT_S)
                refused = self._whole_or_parts(batch_id, rows)
            except DBAPIError as error:
                if fault_of(error) is Fault.UNCLEAR:
                    # the schema may have been changed: check it again, to name the remedy
                    self._database.forget_schema()
                    with self._database.read() as connection:
                        words = hindrance(connection)
                    if words:
                        raise_alone(StoreUnavailable(words))
                raise
        self.on_written(len(rows))
        return refused

    def has_forgotten(self, at_ms: int) -> bool:
        """Whether the ledger may have forgotten a batch that was stored at an instant.

        By what it did forget, not by the present, which may be wrong.

        Raises:
            StoreUnavailable: The database cannot be reached.
        """
        with translated():
            self._database.open(patience_s=_OPEN_WAIT_S)
            with self._database.read() as connection:
                before = connection.scalar(select(progress.value_of(FORGOTTEN)))
        return before is not None and at_ms - DAY_MS < before  # a day for clocks that are set

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
        transaction = self._database.write_transaction(self._held_s, wal_pages=wal_pages)
        with transaction as connection:
            began = time.monotonic()
            if of:
                enter_parts(connection, of, self._clock())
            refused = self._insert(connection, batch_id, rows)
            if refused is None:
                connection.rollback()
            elif refused:  # by a rule that a newer release made? then the batch waits
                try:
                    revisions.require_head(connection)
                except SchemaError:
                    self._database.forget_schema()
                    raise
        # a long one is remembered for some batches: what comes is like what came
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
