"""Runs the statements in the transaction it is given, and returns schemas."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, Literal, overload

from sqlalchemy.orm import Session

from lynkr_store.backend import Backend
from lynkr_store.db.dialect import backend_of
from lynkr_store.db.errors import translated
from lynkr_store.db.models import TELEMETRY
from lynkr_store.db.postgresql import require_utf8
from lynkr_store.exceptions import BadArgument
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
"""How far a statistic looks back when its window names no beginning; the gateway's."""


class RoutingRepository:
    """Reads and writes in the caller's own Session and transaction; it never commits.

    Args:
        session: The caller's Session, on a database at this release's revision.
        clock: The present in epoch milliseconds, for default windows and stamps.
        policy: What `add_many` keeps of the texts. Default: as the store keeps them whose engine
            the Session is bound to (of several, the one made last); where there is none, as
            ``LYNKR_STORE_CAPTURE_TEXT`` and ``LYNKR_STORE_TEXT_MAX_CHARS`` say.
    """

    def __init__(
        self,
        session: Session,
        *,
        clock: Callable[[], int] = epoch_ms_now,
        policy: TextPolicy | None = None,
    ) -> None:
        self._session = session
        self._clock = clock
        self._given_policy = policy
        self._reading = Reading()

    @property
    def unreadable(self) -> int:
        """How many stored values the reads so far could not make sense of, and gave as None."""
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
        """Rows, newest first: by ``(timestamp, id)`` descending.

        Args:
            criteria: Which rows; all when left out.
            window: From when to when; an end left out is open.
            limit: Rows at most; 0 gives none.
            before: The last row's ``cursor`` of the page before.
            include_text: False gives rows of a type without the two texts, and reads less.

        Raises:
            BadArgument: A limit that is no whole number of rows, or another type.
            StoreUnavailable: The database cannot be reached.
        """
        criteria = checked_criteria(criteria)
        window = checked_window(window)
        if before is not None and not isinstance(before, Cursor):
            raise BadArgument("before: give the cursor of the last row of the page before")
        backend = backend_of(self._session.get_bind(clause=TELEMETRY))
        if backend is Backend.POSTGRESQL and before and isinstance(before.timestamp, str | bytes):
            raise BadArgument(
                "before: the cursor's timestamp is no number, so it is of an SQLite file's row; "
                "give one of this database"
            )
        limit = checked_limit(limit)
        if limit == 0:
            return []
        statement, values = pages.rows(
            backend,
            criteria,
            window.since_ms,
            window.until_ms,
            limit=limit,
            before=before,
            include_text=include_text,
        )
        model = RoutingRow if include_text else RoutingRowBrief
        with translated():
            stored = self._session.execute(statement, values)
            return model.from_stored(tuple(stored.keys()), stored.all(), self._reading)

    def get_stats(self, window: Window | None = None) -> RoutingStats | None:
        """What a person reads first about a window; by default the last 24 hours.

        Returns:
            None when no row lies in the window.

        Raises:
            StoreUnavailable: The database cannot be reached.
        """
        return routing_stats(self._ask(STATS, window), self._reading)

    def get_provider_stats(
        self, provider: str, window: Window | None = None
    ) -> ProviderStats | None:
        """One provider's figures; by default of the last 24 hours.

        Returns:
            None when the provider has no row in the window.

        Raises:
            BadArgument: ``provider`` is no text.
            StoreUnavailable: The database cannot be reached.
        """
        # as a filter has it: mended as records are, so that it finds what was recorded with it
        (name,) = RoutingFilter(provider=checked_provider(provider)).provider or ()
        return provider_stats(self._ask(PROVIDER_STATS, window, provider=name))

    def get_routing_accuracy(self, window: Window | None = None) -> RoutingAccuracy | None:
        """How often the tier was wrong; by default over the last 24 hours.

        Returns:
            None when no row lies in the window.

        Raises:
            StoreUnavailable: The database cannot be reached.
        """
        return routing_accuracy(self._ask(ACCURACY, window))

    def add_many(self, records: Iterable[RoutingEvent | Mapping[str, Any]]) -> int:
        """Add records in the caller's transaction; all of them or none.

        Returns:
            How many were stored: fewer where a trigger of the table skips some.

        Raises:
            ValidationError: A record is not one (a ``ValueError``), or no policy was given and the
                environment's is wrong; nothing is added.
            RowRejected: The database refuses a row; nothing is added.
            UnsupportedDatabase: The connection's client encoding is not UTF-8.
            StoreUnavailable: The database cannot be reached, or takes no record at all.
        """
        columns, _ = rows_of(records, self._clock(), self._policy())
        gathering = BatchBuilder()
        gathering.add(columns)
        if not (rows := gathering.take()):
            return 0
        with translated():
            connection = self._session.connection(bind_arguments={"clause": TELEMETRY})
            require_utf8(connection)
            return insert_or_reject(connection, rows)

    def _policy(self) -> TextPolicy:
        if self._given_policy is not None:
            return self._given_policy
        bind = self._session.get_bind(clause=TELEMETRY)
        return policy_in(bind) or policy_of(TextSettings())

    def _ask(self, question: Question, window: Window | None, **of: str) -> Answer:
        now = self._clock()
        since, until = checked_window(window).resolved(now, LOOK_BACK)
        with translated():
            return ask(self._session, question, since, until, now, **of)
