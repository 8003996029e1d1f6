"""The data layer for an LLM gateway's routing telemetry.

One row for each routed request: which tier and provider was chosen and why, how long it took,
what it cost, how good the answer was. Importing opens nothing, starts nothing, reads nothing.
"""

from lynkr_store.db.dialect import writing
from lynkr_store.db.engines import create_store_engine
from lynkr_store.db.models import Base, IngestBatch, RoutingTelemetry, SavingsEvent
from lynkr_store.exceptions import (
    AdoptionRefused,
    BadArgument,
    ClockAhead,
    CopyDiffers,
    DowngradeRefused,
    LynkrStoreError,
    MissingDriver,
    RollupsRefused,
    RowRejected,
    SchemaAhead,
    SchemaBehind,
    SchemaError,
    StoreClosed,
    StoreUnavailable,
    UnsupportedDatabase,
    UpgradeTimeout,
)
from lynkr_store.ingest.validation import TextPolicy
from lynkr_store.migrate.comparison import not_ours
from lynkr_store.migrate.upgrade import upgrade
from lynkr_store.queries.repository import RoutingRepository
from lynkr_store.schemas import (
    BatchAttempt,
    CopyReport,
    CopyStep,
    Cursor,
    Health,
    MaintenanceReport,
    ProviderStats,
    Rejection,
    RoutingAccuracy,
    RoutingEvent,
    RoutingFields,
    RoutingRow,
    RoutingRowBrief,
    RoutingStats,
)
from lynkr_store.schemas.filters import RoutingFilter, Window
from lynkr_store.settings import StoreSettings
from lynkr_store.store.aio import AsyncStore
from lynkr_store.store.protocols import AsyncStoreProtocol, Recorder, StoreProtocol
from lynkr_store.store.sync import Store
from lynkr_store.transfer.copying import copy
from lynkr_store.version import __version__

__all__ = [
    "AdoptionRefused",
    "AsyncStore",
    "AsyncStoreProtocol",
    "BadArgument",
    "Base",
    "BatchAttempt",
    "ClockAhead",
    "CopyDiffers",
    "CopyReport",
    "CopyStep",
    "Cursor",
    "DowngradeRefused",
    "Health",
    "IngestBatch",
    "LynkrStoreError",
    "MaintenanceReport",
    "MissingDriver",
    "ProviderStats",
    "Recorder",
    "Rejection",
    "RollupsRefused",
    "RoutingAccuracy",
    "RoutingEvent",
    "RoutingFields",
    "RoutingFilter",
    "RoutingRepository",
    "RoutingRow",
    "RoutingRowBrief",
    "RoutingStats",
    "RoutingTelemetry",
    "RowRejected",
    "SavingsEvent",
    "SchemaAhead",
    "SchemaBehind",
    "SchemaError",
    "Store",
    "StoreClosed",
    "StoreProtocol",
    "StoreSettings",
    "StoreUnavailable",
    "TextPolicy",
    "UnsupportedDatabase",
    "UpgradeTimeout",
    "Window",
    "__version__",
    "copy",
    "create_store_engine",
    "not_ours",
    "upgrade",
    "writing",
]
