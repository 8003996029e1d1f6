"""Runs the statements in the transaction it is given, and returns schemas."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, Literal, Self, overload

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from lynkr_store.backend import Backend
from lynkr_store.db.engines import backend_of, require_utf8
from lynkr_store.db.errors import translated
from lynkr_store.db.functions import joined
from lynkr_store.db.models import TELEMETRY
from lynkr_store.exceptions import BadArgument
from lynkr_store.ingest.batch import Gathering
from lynkr_store.ingest.validation import TextPolicy, rows_of
from lynkr_store.queries import pages
from lynkr_store.rollups.answer import Answer, Part, ask
from lynkr_store.rollups.answer_sql import Question
from lynkr_store.rollups.measures import SUMMED, columns_of
from lynkr_store.schemas import (
    Cursor,
    ProviderStats,
    Reading,
    RoutingAccuracy,
    RoutingEvent,
    RoutingRow,
    RoutingRowBrief,
    RoutingStats,
    utc,
)
from lynkr_store.schemas.filters import (
    RoutingFilter,
    Window,
    checked_limit,
    checked_provider,
    given,
)
from lynkr_store.schemas.units import half_up
from lynkr_store.settings import TextSettings
from lynkr_store.storage.inserts import insert_or_reject

LOOK_BACK: Final = timedelta(hours=24)
"""How far a statistic looks back when its window names no beginning; the gateway's."""

_POLICY: Final = "lynkr_store_text_policy"  # the execution option of an engine that a store uses
_PERCENT: Final = 100

_STATS: Final = Question(
    by=("provider", "tier"),
    names=(
        "errors",
        "over_provisioned",
        "under_provisioned",
        "latency_ms",
        "quality_score",
        "cost_usd",
    ),
)
_PROVIDER_STATS: Final = Question(
    by=(),
    names=(
        "errors",
        "fallbacks",
        "latency_ms",
        "quality_score",
        "output_tokens",
        "tokens_per_second",
        "cost_usd",
    ),
    one_provider=True,
)
_ACCURACY: Final = Question(by=(), names=("over_provisioned", "under_provisioned"))


def epoch_ms_now() -> int:
    """The present in epoch milliseconds."""
    return time.time_ns() // 1_000_000


def policy_of(settings: TextSettings) -> TextPolicy:
    """What the settings keep of the texts."""
    return TextPolicy(settings.capture_text, settings.text_max_chars, settings.redact)


def set_policy(engine: Engine, policy: TextPolicy) -> None:
    """Have each `RoutingRepository` on the engine that is given no policy keep this one.

    An execution option says so, on the engine itself: it holds for a host's own Sessions too.
    """
    engine.update_execution_options(**{_POLICY: policy})


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
        criteria = given(criteria, RoutingFilter, "criteria")
        window = given(window, Window, "window")
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
        answer = self._ask(_STATS, window)
        by_provider: defaultdict[str, list[Part]] = defaultdict(list)
        by_tier: defaultdict[str, list[Part]] = defaultdict(list)
        for part in answer.parts:
            provider, tier = map(self._reading.text, part.by)
            # texts that differ only in bytes that are no text become one
            by_provider[provider or ""].append(part)
            if tier is not None:
                by_tier[tier].append(part)
        everything = _Tally.of(_STATS, answer.parts)
        total = everything["requests"]
        if not total:
            return None
        providers = {name: _Tally.of(_STATS, parts) for name, parts in by_provider.items()}
        tiers = {name: _Tally.of(_STATS, parts) for name, parts in by_tier.items()}
        latencies = {name: tally.mean("latency_ms", 0) for name, tally in providers.items()}
        qualities = {name: tally.mean("quality_score", 1) for name, tally in tiers.items()}
        return RoutingStats(
            total_requests=total,
            avg_latency_by_provider={n: int(ms) for n, ms in latencies.items() if ms is not None},
            avg_quality_by_tier={n: score for n, score in qualities.items() if score is not None},
            error_rate=everything.percent("errors"),
            over_provisioned_pct=everything.percent("over_provisioned"),
            under_provisioned_pct=everything.percent("under_provisioned"),
            requests_by_provider=_requests(providers),
            requests_by_tier=_requests(tiers),
            total_cost=everything.sum("cost_usd", 4),
            unpriced_requests=total - everything["cost_usd_count"],
            **_source(answer),
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
        # as a filter has it: mended as records are, so that it finds what was recorded with it
        (name,) = RoutingFilter(provider=checked_provider(provider)).provider or ()
        answer = self._ask(_PROVIDER_STATS, window, provider=name)
        tally = _Tally.of(_PROVIDER_STATS, answer.parts)
        if not tally["requests"]:
            return None
        latency, output_tokens = tally.mean("latency_ms", 0), tally.mean("output_tokens", 0)
        return ProviderStats(
            total=tally["requests"],
            avg_latency=None if latency is None else int(latency),
            avg_quality=tally.mean("quality_score", 1),
            avg_output_tokens=None if output_tokens is None else int(output_tokens),
            error_rate=tally.percent("errors"),
            fallback_rate=tally.percent("fallbacks"),
            avg_tokens_per_second=tally.mean("tokens_per_second", 1),
            total_cost=tally.sum("cost_usd", 4),
            unpriced_requests=tally["requests"] - tally["cost_usd_count"],
            **_source(answer),
        )

    def get_routing_accuracy(self, window: Window | None = None) -> RoutingAccuracy | None:
        """How often the tier was wrong; by default over the last 24 hours.

        Returns:
            None when no row lies in the window.

        Raises:
            StoreUnavailable: The database cannot be reached.
        """
        answer = self._ask(_ACCURACY, window)
        tally = _Tally.of(_ACCURACY, answer.parts)
        if not tally["requests"]:
            return None
        return RoutingAccuracy(
            total_requests=tally["requests"],
            over_provisioned=tally["over_provisioned"],
            under_provisioned=tally["under_provisioned"],
            over_provisioned_pct=tally.percent("over_provisioned"),
            under_provisioned_pct=tally.percent("under_provisioned"),
            **_source(answer),
        )

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
        gathering = Gathering()
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
        policy: TextPolicy | None = bind.get_execution_options().get(_POLICY)
        return policy or policy_of(TextSettings())

    def _ask(self, question: Question, window: Window | None, **of: str) -> Answer:
        now = self._clock()
        since, until = given(window, Window, "window").resolved(now, LOOK_BACK)
        with translated():
            return ask(self._session, question, since, until, now, **of)


class _Tally(Counter[str]):
    """The measures of a question over the parts of its answer: counts, the two halves of sums."""

    @classmethod
    def of(cls, question: Question, parts: Iterable[Part]) -> Self:
        sums = zip(*(part.sums for part in parts), strict=True)
        return cls(dict(zip(columns_of(question.names), map(sum, sums), strict=False)))

    def percent(self, name: str) -> float:
        return half_up(_PERCENT * self[name], self["requests"], 1)

    def mean(self, name: str, digits: int) -> float | None:
        count = self[f"{name}_count"]
        return half_up(self._sum(name), count * SUMMED[name].scale, digits) if count else None

    def sum(self, name: str, digits: int) -> float | None:
        if not self[f"{name}_count"]:
            return None
        return half_up(self._sum(name), SUMMED[name].scale, digits)

    def _sum(self, name: str) -> int:
        return joined(self[f"{name}_high"], self[f"{name}_low"])


def _requests(tallies: Mapping[str, _Tally]) -> dict[str, int]:
    # a part that was taken away can leave none
    return {name: tally["requests"] for name, tally in tallies.items() if tally["requests"]}


def _source(answer: Answer) -> dict[str, Any]:
    if answer.raw_from is None:
        return {"source": "rows", "raw_from": None}
    return {"source": "buckets", "raw_from": utc(answer.raw_from)}
