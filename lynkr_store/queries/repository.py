"""Runs reads and `add_many` in the caller's transaction and returns values of `schemas`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, Literal, overload

from sqlalchemy import Connection, Row, Select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session

from lynkr_store.backend import Backend
from lynkr_store.db.citus import forget, is_distributed
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.errors import translated
from lynkr_store.db.models import TELEMETRY
from lynkr_store.db.postgresql import require_utf8
from lynkr_store.exceptions import BadArgument, StoreUnavailable
from lynkr_store.ingest.batch import BatchBuilder
from lynkr_store.ingest.validation import TextPolicy, policy_of, rows_of
from lynkr_store.queries import pages
from lynkr_store.queries.statistics import (
    ACCURACY,
    PROVIDER_STATS,
    STATS,
    provider_stats,
    routing_accuracy,
    routing_stats,
)
from lynkr_store.rollups.answer import Answer, ask
from lynkr_store.rollups.answer_sql import Question
from lynkr_store.rollups.state import connection_of
from lynkr_store.schemas import (
    Cursor,
    ProviderStats,
    Reading,
    RoutingAccuracy,
    RoutingEvent,
    RoutingRow,
    RoutingRowBrief,
    RoutingStats,
)
from lynkr_store.schemas.base import epoch_ms_now
from lynkr_store.schemas.filters import (
    RoutingFilter,
    Window,
    checked_criteria,
    checked_limit,
    checked_provider,
    checked_window,
)
from lynkr_store.settings import TextSettings
from lynkr_store.storage.inserts import insert_or_reject
from lynkr_store.storage.text_policy import policy_in

LOOK_BACK: Final = timedelta(hours=24)
"""How far back a statistic looks if its window has no beginning; the same as the gateway's."""

_TRIES: Final = 10


class RoutingRepository:
    """Reads and writes in the caller's own Session and transaction; it never commits.

    Args:
        session: The caller's Session, on a database at this release's revision.
        clock: Returns the present in epoch milliseconds, for default windows and timestamps.
        policy: What `add_many` keeps of the texts. Default: the policy of the store whose engine
            the Session is bound to (of several stores, the last one created); without a store, the
            settings ``LYNKR_STORE_CAPTURE_TEXT`` and ``LYNKR_STORE_TEXT_MAX_CHARS``.
        before_statistic: Called with the Session before the statement of a statistic.
        before_rows: Called with the connection before `add_many` stores rows.

    Raises:
        BadArgument: ``session`` is no Session.
    """

    def __init__(
        self,
        session: Session | scoped_session[Session],
        *,
        clock: Callable[[], int] = epoch_ms_now,
        policy: TextPolicy | None = None,
        before_statistic: Callable[[Session], None] = lambda _: None,
        before_rows: Callable[[Connection], None] = lambda _: None,
    ) -> None:
        if not isinstance(session, Session | scoped_session):
            raise BadArgument(
                "session: give a Session, as in Session(engine); with an AsyncSession call "
                "await session.run_sync(lambda session: RoutingRepository(session).query())"
            )
        self._session = session() if isinstance(session, scoped_session) else session
        self._clock = clock
        self._given_policy = policy
        self._before_statistic = before_statistic
        self._before_rows = before_rows
        self._reading = Reading()

    @property
    def unreadable(self) -> int:
        """How many stored values the reads so far could not interpret and returned as None."""
        return self._reading.unreadable

    @overload
    def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: Literal[True] = True,
    ) -> list[RoutingRow]: ...
    @overload
    def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: Literal[False],
    ) -> list[RoutingRowBrief]: ...
    @overload
    def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: bool,
    ) -> Sequence[RoutingRowBrief]: ...

    def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: bool = True,
    ) -> Sequence[RoutingRowBrief]:
        """Return rows, newest first: by ``(timestamp, id)`` descending.

        Args:
            criteria: Which rows; all by default.
            window: The range of time; a missing end is open.
            limit: The maximum number of rows; 0 returns none.
            before: The ``cursor`` of the previous page's last row.
            include_text: False returns rows of a type without the two texts, and reads less.

        Raises:
            BadArgument: The limit is not a whole number of rows, or an argument has another type.
            StoreUnavailable: The database cannot be reached.
        """
        criteria = checked_criteria(criteria)
        window = checked_window(window)
        if before is not None and not isinstance(before, Cursor):
            raise BadArgument(
                "before: give the cursor of the previous page's last row, or Cursor.parse(text)"
            )
        backend = backend_of(self._session.get_bind(clause=TELEMETRY))
        if backend is Backend.POSTGRESQL and before and isinstance(before.timestamp, str | bytes):
            raise BadArgument(
                "before: the cursor's timestamp is not a number, so the cursor is from an SQLite "
                "file; give a cursor of this database"
            )
        limit = checked_limit(limit)
        if limit == 0:
            return []
        model = RoutingRow if include_text else RoutingRowBrief
        with self._connected() as connection:
            distributed = is_distributed(connection)
            statement, values = pages.rows(
                backend,
                criteria,
                window.since_ms,
                window.until_ms,
                limit=limit,
                before=before,
                include_text=include_text,
                distributed=distributed,
            )
            if distributed:
                names, stored = self._read_by_ids(statement, values, include_text=include_text)
            else:
                found = self._session.execute(statement, values)
                names, stored = found.keys(), found.all()
            return model.from_stored(tuple(names), stored, self._reading)

    def _read_by_ids(
        self, ids: Select[*tuple[Any, ...]], values: dict[str, Any], *, include_text: bool
    ) -> tuple[Iterable[str], Sequence[Row[*tuple[Any, ...]]]]:
        """Read ids, and then their rows; again if some of the rows were deleted in between."""
        for _ in range(_TRIES):
            asked = list(self._session.scalars(ids, values))
            found = self._session.execute(pages.with_ids(include_text=include_text), {"ids": asked})
            names, stored = found.keys(), found.all()
            if len(stored) == len(asked):
                return names, stored
        raise StoreUnavailable("rows were deleted while they were read; read them again")

    def get_stats(self, window: Window | None = None) -> RoutingStats | None:
        """The main figures of a window; by default the last 24 hours.

        Returns:
            None if the window has no rows.

        Raises:
            StoreUnavailable: The database cannot be reached.
        """
        return routing_stats(self._ask(STATS, window), self._reading)

    def get_provider_stats(
        self, provider: str, window: Window | None = None
    ) -> ProviderStats | None:
        """One provider's figures; by default of the last 24 hours.

        Returns:
            None if the provider has no rows in the window.

        Raises:
            BadArgument: ``provider`` is not a text.
            StoreUnavailable: The database cannot be reached.
        """
        # sanitized as records and filters are, so that the text finds what was recorded with it
        (name,) = RoutingFilter(provider=checked_provider(provider)).provider or ()
        return provider_stats(self._ask(PROVIDER_STATS, window, provider=name))

    def get_routing_accuracy(self, window: Window | None = None) -> RoutingAccuracy | None:
        """How often the tier was wrong; by default over the last 24 hours.

        Returns:
            None if the window has no rows.

        Raises:
            StoreUnavailable: The database cannot be reached.
        """
        return routing_accuracy(self._ask(ACCURACY, window))

    def add_many(self, records: Iterable[RoutingEvent | Mapping[str, Any]]) -> int:
        """Add records in the caller's transaction; either all of them or none.

        Returns:
            The number of rows stored; lower than the number of records if a trigger of the table
            skips some.

        Raises:
            BadArgument: A record is invalid; nothing is added. The message names its place among
                the records, its fields, and what they need. Or no policy was given, and the
                environment's is invalid.
            RowRejected: The database refuses a row; nothing is added.
            UnsupportedDatabase: The connection's client encoding is not UTF-8.
            StoreUnavailable: The database cannot be reached, or refuses every record.
        """
        columns, _ = rows_of(records, self._clock(), self._policy())
        gathering = BatchBuilder()
        gathering.add(columns)
        if not (rows := gathering.take()):
            return 0
        with self._connected() as connection:
            require_utf8(connection)
            self._before_rows(connection)
            return insert_or_reject(connection, rows)

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        """The Session's connection; raises the library's own errors."""
        with translated():
            connection = connection_of(self._session)
            try:
                yield connection
            except DBAPIError:
                forget(connection)  # the tables may have been distributed meanwhile
                raise

    def _policy(self) -> TextPolicy:
        if self._given_policy is not None:
            return self._given_policy
        bind = self._session.get_bind(clause=TELEMETRY)
        return policy_in(bind) or policy_of(TextSettings())

    def _ask(self, question: Question, window: Window | None, **of: str) -> Answer:
        now = self._clock()
        since, until = checked_window(window).resolved(now, LOOK_BACK)
        with self._connected():
            self._before_statistic(self._session)
            return ask(self._session, question, since, until, now, **of)
