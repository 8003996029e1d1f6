"""What goes in and what comes out: records, rows, statistics, reports.

Inputs forbid unknown names; outputs ignore them. Everything is frozen all the way down.
"""

from lynkr_store.schemas.base import epoch_ms, utc
from lynkr_store.schemas.events import (
    FLAG_FIELDS,
    LONG_FIELDS,
    TEXT_FIELDS,
    RoutingEvent,
    mend_text,
)
from lynkr_store.schemas.plain import plain_row
from lynkr_store.schemas.reports import Health, MaintenanceReport
from lynkr_store.schemas.rows import Cursor, Reading, RoutingRow, RoutingRowBrief
from lynkr_store.schemas.stats import ProviderStats, RoutingAccuracy, RoutingStats

__all__ = [
    "FLAG_FIELDS",
    "LONG_FIELDS",
    "TEXT_FIELDS",
    "Cursor",
    "Health",
    "MaintenanceReport",
    "ProviderStats",
    "Reading",
    "RoutingAccuracy",
    "RoutingEvent",
    "RoutingRow",
    "RoutingRowBrief",
    "RoutingStats",
    "epoch_ms",
    "mend_text",
    "plain_row",
    "utc",
]
