# ruff: noqa: INP001, S311 - a sample, no secret
"""The rows that the benchmarks store, generated from one seed like those of a gateway with tiers.

The tier decides provider and model; 3 % of the requests go to a fallback. 1.5 % fail, and the
values that they did not measure are NULL. One tier, provider and model is rare: 50 of 1,000,000
rows. One provider, a fallback with 3,000 of 1,000,000 rows, is used only in the first third.
Timestamps are spread evenly over the span.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

Row = tuple[Any, ...]
Record = dict[str, Any]

COLUMNS: Final = (
    "request_id",
    "session_id",
    "timestamp",
    "complexity_score",
    "tier",
    "agentic_type",
    "tool_count",
    "input_tokens",
    "message_count",
    "request_type",
    "provider",
    "model",
    "routing_method",
    "was_fallback",
    "output_tokens",
    "latency_ms",
    "status_code",
    "error_type",
    "cost_usd",
    "tool_calls_made",
    "retry_count",
    "circuit_breaker_state",
    "quality_score",
    "tokens_per_second",
    "cost_efficiency",
    "request_text",
    "response_text",
    "base_tier",
    "escalation_source",
    "propensity",
    "candidates",
    "pinned",
    "switch_reason",
    "cache_decision",
    "cache_read_tokens",
    "cache_creation_tokens",
)
"""The columns that the gateway writes: its 37 columns without the key, in their order."""

SESSIONS: Final = "12 each, 40 at a time"
END_MS: Final = int(datetime(2026, 3, 2, 9, 7, 30, tzinfo=UTC).timestamp() * 1_000)
"""The instant of every sample's last row: the middle of a quarter-hour."""
REQUEST_CHARS: Final = 1_200
RESPONSE_CHARS: Final = 800

_FLAGS: Final = ("was_fallback", "pinned")
_AT_A_TIME: Final = 40
_PER_SESSION: Final = 12
_RARE_EVERY: Final = 20_000
_FALLBACKS: Final = 0.03
_ERRORS: Final = 0.015


@dataclass(frozen=True)
class _Model:
    provider: str
    name: str
    ms_a_token: float
    usd_in: float  # for 1,000,000 tokens
    usd_out: float


@dataclass(frozen=True)
class _Tier:
    share: int  # percent
    main: _Model
    fallback: _Model


_TIERS: Final = {
    "SIMPLE": _Tier(
        45,
        _Model("ollama", "qwen2.5-coder:7b", 14, 0.0, 0.0),
        _Model("openrouter", "llama-3.1-8b-instruct", 9, 0.05, 0.08),
    ),
    "MEDIUM": _Tier(
        30,
        _Model("openrouter", "gpt-4o-mini", 9, 0.15, 0.60),
        _Model("ollama", "qwen2.5-coder:32b", 40, 0.0, 0.0),
    ),
    "COMPLEX": _Tier(
        18,
        _Model("bedrock", "claude-sonnet-4-5", 17, 3.0, 15.0),
        _Model("azure-openai", "gpt-4.1", 15, 2.0, 8.0),
    ),
    "REASONING": _Tier(
        7,
        _Model("azure-openai", "o4-mini", 21, 1.1, 4.4),
        _Model("bedrock", "claude-opus-4-1", 35, 15.0, 75.0),
    ),
}
_RARE_TIER: Final = "EXPERT"
_RARE: Final = _Model("vertex", "gemini-2.5-pro", 25, 1.25, 10.0)
_FORMER_TIER: Final = "MEDIUM"
_FORMER: Final = _Model("together", "mixtral-8x7b-instruct", 12, 0.60, 0.60)


@dataclass(frozen=True)
class Sample:
    """Rows of a time span that ends at `END_MS`, oldest first, the same in every run.

    Attributes:
        count: The number of rows.
        span: The length of the span.
    """

    count: int
    span: timedelta

    def rows(self) -> Iterator[Row]:
        """The rows, one at a time, as values of `COLUMNS`; they are not kept in memory."""
        rng = random.Random(11)
        letters = "".join(rng.choices("etaoin shrdlu", k=8_000))
        places = len(letters) - REQUEST_CHARS
        tiers, shares = list(_TIERS), [tier.share for tier in _TIERS.values()]
        sessions = [_session(rng) for _ in range(_AT_A_TIME)]
        span_ms = self.span // timedelta(milliseconds=1)
        for number in range(1, self.count + 1):
            at = int(rng.random() * _AT_A_TIME)
            if rng.random() * _PER_SESSION < 1:
                sessions[at] = _session(rng)
            tier = rng.choices(tiers, shares)[0]
            fallback = rng.random() < _FALLBACKS
            model = _TIERS[tier].fallback if fallback else _TIERS[tier].main
            if fallback and tier == _FORMER_TIER and number * 3 < self.count:
                model = _FORMER
            if number % _RARE_EVERY == _RARE_EVERY // 2:
                tier, fallback, model = _RARE_TIER, False, _RARE
            failed = rng.random() < _ERRORS
            tokens_in = 200 + int(rng.expovariate(1 / 3_000))
            tokens_out = 10 + int(rng.expovariate(1 / 300))
            latency = int(120 + tokens_in / 40 + tokens_out * model.ms_a_token)
            cost = (tokens_in * model.usd_in + tokens_out * model.usd_out) / 1e6
            place = int(rng.random() * places)
            yield (
                f"{rng.getrandbits(128):032x}",
                sessions[at],
                END_MS - span_ms + span_ms * number // self.count,
                rng.random() * 100,
                tier,
                None,
                int(rng.random() * 8),
                tokens_in,
                1 + int(rng.random() * 40),
                ("chat", "code", "tool_result")[int(rng.random() * 3)],
                model.provider,
                model.name,
                "fallback" if fallback else "tier_config",
                int(fallback),
                None if failed else tokens_out,
                None if failed else latency,
                503 if failed else 200,
                "overloaded" if failed else None,
                None if failed else round(cost, 6),
                None if failed else int(rng.random() * 3),
                0,
                "CLOSED",
                None if failed else 30 + rng.random() * 70,
                None if failed else tokens_out / latency * 1_000,
                None,
                letters[place : place + REQUEST_CHARS],
                None if failed else letters[place : place + RESPONSE_CHARS],
                tier,
                None,
                1.0,
                None,
                0,
                None,
                None,
                None if failed else tokens_in // 2,
                None,
            )

    def records(self) -> Iterator[Record]:
        """The rows as a caller records them: without None, and with attributes."""
        for number, row in enumerate(self.rows()):
            record = {
                name: value for name, value in zip(COLUMNS, row, strict=True) if value is not None
            }
            record.update({name: bool(record[name]) for name in _FLAGS})
            record["attributes"] = {"region": "eu", "attempt": number % 3, "tags": ["a", "b"]}
            yield record


def _session(rng: random.Random) -> str:
    return f"{rng.getrandbits(64):016x}"
