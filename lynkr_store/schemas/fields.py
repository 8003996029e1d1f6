"""The fields of a record as keyword arguments, so that a type checker sees a misspelt name."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Any, SupportsFloat, SupportsIndex, TypedDict
from uuid import UUID

_Text = str | UUID | Enum | None
_Number = SupportsFloat | SupportsIndex | Enum | None
_Flag = bool | SupportsIndex | None
_Json = str | Mapping[str, Any] | Sequence[Any] | None


class RoutingFields(TypedDict, total=False):
    """The fields of a `RoutingEvent`, which says what each means; only ``provider`` is required."""

    request_id: _Text
    session_id: _Text
    timestamp: datetime | str | SupportsIndex | None
    complexity_score: _Number
    tier: _Text
    agentic_type: _Text
    tool_count: _Number
    input_tokens: _Number
    message_count: _Number
    request_type: _Text
    provider: _Text
    model: _Text
    routing_method: _Text
    was_fallback: _Flag
    output_tokens: _Number
    latency_ms: _Number
    status_code: _Number | str
    error_type: _Text
    cost_usd: _Number
    tool_calls_made: _Number
    retry_count: _Number
    circuit_breaker_state: _Text
    quality_score: _Number
    tokens_per_second: _Number
    cost_efficiency: _Number
    request_text: _Text
    response_text: _Text
    base_tier: _Text
    escalation_source: _Text
    propensity: _Number
    candidates: _Json
    pinned: _Flag
    switch_reason: _Text
    cache_decision: _Json
    cache_read_tokens: _Number
    cache_creation_tokens: _Number
    trace_id: _Text
    attempt_index: _Number
    requested_model: _Text
    ttft_ms: _Number
    stream: _Flag
    cache_tokens_included: _Flag
    reasoning_tokens: _Number
    finish_reason: _Text
    attributes: _Json
