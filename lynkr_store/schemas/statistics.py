"""The statistics of a window. Rounding is the gateway's: half up, on the exact value."""

from datetime import datetime
from typing import Any, ClassVar, Final, Literal

from immutabledict import immutabledict
from pydantic.alias_generators import to_camel

from lynkr_store.schemas.base import FrozenMap, FrozenOutput

_SOURCE: Final = frozenset({"source", "raw_from"})


class _Statistic(FrozenOutput):
    """An answer that the gateway's module gives too, in camelCase and without our additions."""

    source: Literal["rows", "buckets"] = "rows"
    """``rows``: computed from exactly the window's rows. ``buckets``: retention removed rows of the
    window, and the answer comes from pre-aggregated buckets, in whole quarters of an hour in UTC;
    it may include rows of the first quarter that are before the window."""
    raw_from: datetime | None = None
    """The instant from which the rows exist; None if the answer is exact."""

    _OWN: ClassVar[frozenset[str]] = _SOURCE

    def to_gateway(self) -> dict[str, Any]:
        """The dictionary that the Node module returns for the same rows."""
        return {
            to_camel(name): dict(value) if isinstance(value, immutabledict) else value
            for name, value in self
            if name not in self._OWN
        }


class RoutingStats(_Statistic):
    """The main figures of a window. Percentages are 0 to 100, to one decimal."""

    total_requests: int
    """Requests in the window."""
    avg_latency_by_provider: FrozenMap[int]
    """Provider to mean latency in whole milliseconds, over requests with a measured latency;
    providers without any are left out."""
    avg_quality_by_tier: FrozenMap[float]
    """Tier to mean quality score (0 to 100) to one decimal, over requests with both."""
    error_rate: float
    """Requests with an error type, in percent of all requests."""
    over_provisioned_pct: float
    """See `RoutingAccuracy`."""
    under_provisioned_pct: float
    """See `RoutingAccuracy`."""
    requests_by_provider: FrozenMap[int]
    """Provider to requests."""
    requests_by_tier: FrozenMap[int]
    """Requests without a tier are left out."""
    total_cost: float | None
    """US dollars to four decimals, over requests with a known cost; None if there are none."""
    unpriced_requests: int
    """Requests with an unknown cost, which `total_cost` does not include."""

    _OWN = _SOURCE | {
        "requests_by_provider",
        "requests_by_tier",
        "total_cost",
        "unpriced_requests",
    }


class ProviderStats(_Statistic):
    """One provider's figures. An average is None if nothing was measured; a true 0 stays 0."""

    total: int
    """Requests to this provider in the window."""
    avg_latency: int | None
    """Whole milliseconds."""
    avg_quality: float | None
    """Mean quality score (0 to 100) to one decimal."""
    avg_output_tokens: int | None
    """Mean of the output tokens, rounded to a whole number."""
    error_rate: float
    """Percent of all requests, to one decimal."""
    fallback_rate: float
    """Percent of all requests, to one decimal."""
    avg_tokens_per_second: float | None
    """To one decimal."""
    total_cost: float | None
    """US dollars to four decimals, over requests with a known cost; None if there are none."""
    unpriced_requests: int
    """Requests with an unknown cost, which `total_cost` does not include."""

    _OWN = _SOURCE | {"unpriced_requests"}


class RoutingAccuracy(_Statistic):
    """How often the tier was wrong, judged by the answer.

    Over-provisioned: a REASONING or COMPLEX tier for an answer with quality above 80 and fewer than
    50 tokens. Under-provisioned: a SIMPLE tier for an answer with quality below 45. Percentages are
    of all requests, measured or not, to one decimal.
    """

    total_requests: int
    """Requests in the window."""
    over_provisioned: int
    """Requests to a higher tier than they needed."""
    under_provisioned: int
    """Requests to a lower tier than they needed."""
    over_provisioned_pct: float
    """Percent of all requests, to one decimal."""
    under_provisioned_pct: float
    """Percent of all requests, to one decimal."""
