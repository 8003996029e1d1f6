"""Defines what each statistic asks and turns the answer into figures. Executes nothing."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final, Self

from lynkr_store.db.functions import joined
from lynkr_store.db.models import SUMMED, measure_columns
from lynkr_store.rollups.answer import Answer, Part
from lynkr_store.rollups.answer_sql import Question
from lynkr_store.schemas import (
    ProviderStats,
    Reading,
    RoutingAccuracy,
    RoutingStats,
    utc,
)
from lynkr_store.schemas.units import half_up

_PERCENT: Final = 100

STATS: Final = Question(
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

PROVIDER_STATS: Final = Question(
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

ACCURACY: Final = Question(by=(), names=("over_provisioned", "under_provisioned"))


def routing_stats(answer: Answer, reading: Reading) -> RoutingStats | None:
    """The figures of an answer to `STATS`; None without requests."""
    by_provider: defaultdict[str, list[Part]] = defaultdict(list)
    by_tier: defaultdict[str, list[Part]] = defaultdict(list)
    for part in answer.parts:
        provider, tier = map(reading.text, part.by)
        # texts that differ only in invalid bytes become one
        by_provider[provider or ""].append(part)
        if tier is not None:
            by_tier[tier].append(part)
    everything = _Tally.of(STATS, answer.parts)
    total = everything["requests"]
    if not total:
        return None
    providers = {name: _Tally.of(STATS, parts) for name, parts in by_provider.items()}
    tiers = {name: _Tally.of(STATS, parts) for name, parts in by_tier.items()}
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


def provider_stats(answer: Answer) -> ProviderStats | None:
    """The figures of an answer to `PROVIDER_STATS`; None without requests."""
    tally = _Tally.of(PROVIDER_STATS, answer.parts)
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


def routing_accuracy(answer: Answer) -> RoutingAccuracy | None:
    """The figures of an answer to `ACCURACY`; None without requests."""
    tally = _Tally.of(ACCURACY, answer.parts)
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


class _Tally(Counter[str]):
    """A question's measures, added up over the parts of its answer."""

    @classmethod
    def of(cls, question: Question, parts: Iterable[Part]) -> Self:
        sums = zip(*(part.sums for part in parts), strict=True)
        return cls(dict(zip(measure_columns(question.names), map(sum, sums), strict=False)))

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
    # a subtracted part can leave 0
    return {name: tally["requests"] for name, tally in tallies.items() if tally["requests"]}


def _source(answer: Answer) -> dict[str, Any]:
    if answer.raw_from is None:
        return {"source": "rows", "raw_from": None}
    return {"source": "buckets", "raw_from": utc(answer.raw_from)}
