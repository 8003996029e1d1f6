"""The values that go in and come out: records, filters, rows, statistics, health.

Inputs forbid unknown names; outputs ignore them. Every value is frozen, including its parts.
`units` says what a stored number can mean. No database, thread or file may be used here.
"""

from lynkr_store.schemas.base import utc
from lynkr_store.schemas.copying import CopyReport, CopyStep
from lynkr_store.schemas.events import (
    FLAG_FIELDS,
    JSON_FIELDS,
    LONG_FIELDS,
    NAME_MAX_CHARS,
    TEXT_FIELDS,
    RoutingEvent,
    encoded,
    flag_number,
    instant_in_domain,
    sanitize_text,
)
from lynkr_store.schemas.fields import RoutingFields
from lynkr_store.schemas.health import BatchAttempt, Health, MaintenanceReport, Rejection
from lynkr_store.schemas.rows import Cursor, Reading, RoutingRow, RoutingRowBrief
from lynkr_store.schemas.statistics import ProviderStats, RoutingAccuracy, RoutingStats
from lynkr_store.schemas.values import datetime_of, epoch_ms, plain, type_name

__all__ = [
    "FLAG_FIELDS",
    "JSON_FIELDS",
    "LONG_FIELDS",
    "NAME_MAX_CHARS",
    "TEXT_FIELDS",
    "BatchAttempt",
    "CopyReport",
    "CopyStep",
    "Cursor",
    "Health",
    "MaintenanceReport",
    "ProviderStats",
    "Reading",
    "Rejection",
    "RoutingAccuracy",
    "RoutingEvent",
    "RoutingFields",
    "RoutingRow",
    "RoutingRowBrief",
    "RoutingStats",
    "datetime_of",
    "encoded",
    "epoch_ms",
    "flag_number",
    "instant_in_domain",
    "plain",
    "sanitize_text",
    "type_name",
    "utc",
]
