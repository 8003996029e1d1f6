"""Runs the statements in the transaction it is given, and returns schemas."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, Literal, overload

from sqlalchemy.orm import Session

from lynkr_store import queries
from lynkr_store.domains import COUNT, DOLLARS, MILLISECONDS, SCORE, Domain, half_up
from lynkr_store.exceptions import BadArgument, RowRejected
from lynkr_store.faults import Fault, fault_of, translated
from lynkr_store.filters import (
    RoutingFilter,
    Window,
    checked_age,
    checked_limit,
    checked_provider,
    given,
)
from lynkr_store.functions import joined
from lynkr_store.ingest import TextPolicy, row_of
from lynkr_store.inserts import insert_all
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

LOOK_BACK: Final = timedelta(hours=24)
"""How far a statistic looks back when its window names no beginning; the gateway's."""

_PERCENT: Final = 100


def epoch_ms_now() -> int:
    """The present in epoch milliseconds."""
    return time.time_ns() // 1_000_000


class RoutingRepository:
    """Reads and writes in the caller's own Session and transaction; it never commits.

    Args:
        session: The caller's Session, on a database at this release's revision.
        clock: The present in epoch milliseconds, for default windows and stamps.
        policy: What `add_many` keeps of the texts.
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
        self._policy = policy or TextPolicy()
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
        criteria = given(criteria, RoutingFilter, "criteria")
        window = given(window, Window, "window")
        if before is not None and not isinstance(before, Cursor):
            raise BadArgument("before: give the cursor of the last row of the page before")
        if checked_limit(limit) == 0:
            return []
        statement = queries.rows(
            criteria,
            window.since_ms,
            window.until_ms,
            limit=limit,
            before=before,
            include_text=include_text,
        )
        model = RoutingRow if include_text else RoutingRowBrief
        with translated():
            stored = [dict(row) for row in self._session.execute(statement).mappings()]
        return [model.from_stored(row, self._reading) for row in stored]

    def get_stats(self, window: Window | None = None) -> RoutingStats | None:
        """What a person reads first about a window; by default the last 24 hours.

        Returns:
            None when no row lies in the window.

        Raises:
            StoreUnavailable: The database cannot be reached.
        """
        groups = self._groups(queries.routing_stats(*self._resolved(window)))
        everything = _Tally()
        by_provider: defaultdict[str, _Tally] = defaultdict(_Tally)
        by_tier: defaultdict[str, _Tally] = defaultdict(_Tally)
        for group in groups:
            everything.add(group)
            # texts that differ only in bytes that are no text become one
            by_provider[self._reading.text(group["provider"]) or ""].add(group)
            tier = self._reading.text(group["tier"])
            if tier is not None:
                by_tier[tier].add(group)
        total = everything["requests"]
        if not total:
            return None
        latencies = {
            name: tally.mean("latency", MILLISECONDS, 0) for name, tally in by_provider.items()
        }
        qualities = {name: tally.mean("quality", SCORE, 1) for name, tally in by_tier.items()}
        return RoutingStats(
            total_requests=total,
            avg_latency_by_provider={n: int(ms) for n, ms in latencies.items() if ms is not None},
            avg_quality_by_tier={n: score for n, score in qualities.items() if score is not None},
            error_rate=everything.percent("errors"),
            over_provisioned_pct=everything.percent("over"),
            under_provisioned_pct=everything.percent("under"),
            requests_by_provider={name: tally["requests"] for name, tally in by_provider.items()},
            requests_by_tier={name: tally["requests"] for name, tally in by_tier.items()},
            total_cost=everything.sum("cost", DOLLARS, 4),
            unpriced_requests=total - everything["cost_count"],
        )

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
        statement = queries.provider_stats(checked_provider(provider), *self._resolved(window))
        tally = _Tally()
        for group in self._groups(statement):
            tally.add(group)
        if not tally["requests"]:
            return None
        latency = tally.mean("latency", MILLISECONDS, 0)
        output_tokens = tally.mean("output_tokens", COUNT, 0)
        return ProviderStats(
            total=tally["requests"],
            avg_latency=None if latency is None else int(latency),
            avg_quality=tally.mean("quality", SCORE, 1),
            avg_output_tokens=None if output_tokens is None else int(output_tokens),
            error_rate=tally.percent("errors"),
            fallback_rate=tally.percent("fallbacks"),
            avg_tokens_per_second=tally.mean("speed", SCORE, 1),
            total_cost=tally.sum("cost", DOLLARS, 4),
            unpriced_requests=tally["requests"] - tally["cost_count"],
        )

    def get_routing_accuracy(self, window: Window | None = None) -> RoutingAccuracy | None:
        """How often the tier was wrong; by default over the last 24 hours.

        Returns:
            None when no row lies in the window.

        Raises:
            StoreUnavailable: The database cannot be reached.
        """
        tally = _Tally()
        for group in self._groups(queries.routing_accuracy(*self._resolved(window))):
            tally.add(group)
        if not tally["requests"]:
            return None
        return RoutingAccuracy(
            total_requests=tally["requests"],
            over_provisioned=tally["over"],
            under_provisioned=tally["under"],
            over_provisioned_pct=tally.percent("over"),
            under_provisioned_pct=tally.percent("under"),
        )

    def add_many(self, records: Iterable[RoutingEvent | Mapping[str, Any]]) -> int:
        """Add records in the caller's transaction; all of them or none.

        Returns:
            How many were added.

        Raises:
            ValidationError: A record is not one (a ``ValueError``); nothing is added.
            RowRejected: The database refuses a row; nothing is added.
            StoreUnavailable: The database cannot be reached.
        """
        stamp = self._clock()
        rows = [row_of(record, stamp, self._policy)[0] for record in records]
        if rows:
            with translated():
                connection = self._session.connection()
                try:
                    insert_all(connection, rows)
                except Exception as error:
                    if fault_of(error) is not Fault.ROW:
                        raise
                    raise RowRejected("the database refused a row, and none was added") from None
        return len(rows)

    def delete_older(self, older_than: timedelta, *, limit: int) -> int:
        """Delete up to ``limit`` of the rows older than an age, the oldest first.

        Returns:
            How many were deleted; fewer than ``limit`` means that none is left.

        Raises:
            BadArgument: A negative age or limit.
            StoreUnavailable: The database cannot be reached.
        """
        cutoff = self._clock() - checked_age(older_than) // timedelta(milliseconds=1)
        with translated():
            result: Any = self._session.execute(queries.delete_older(cutoff, checked_limit(limit)))
        deleted: int = result.rowcount
        return deleted

    def _resolved(self, window: Window | None) -> tuple[int, int]:
        return given(window, Window, "window").resolved(self._clock(), LOOK_BACK)

    def _groups(self, statement: Any) -> list[dict[str, Any]]:
        with translated():
            return [dict(group) for group in self._session.execute(statement).mappings()]


class _Tally(Counter[str]):
    """Integers added up over groups: counts, and the two halves of each sum."""

    def add(self, group: Mapping[str, Any]) -> None:
        for name, value in group.items():
            if name not in ("provider", "tier"):
                self[name] += int(value or 0)

    def percent(self, name: str) -> float:
        return half_up(_PERCENT * self[name], self["requests"], 1)

    def mean(self, name: str, domain: Domain, digits: int) -> float | None:
        count = self[f"{name}_count"]
        return half_up(self._sum(name), count * domain.scale, digits) if count else None

    def sum(self, name: str, domain: Domain, digits: int) -> float | None:
        return half_up(self._sum(name), domain.scale, digits) if self[f"{name}_count"] else None

    def _sum(self, name: str) -> int:
        return joined(self[f"{name}_high"], self[f"{name}_low"])
