"""OpenTelemetry: GenAI spans as rows of a store, and the store's own metrics.

`StoreSpanExporter` is a span exporter for the tracer provider of a service whose model calls are
instrumented. `observe` reports where a store's records are, and how long its writes take.
"""

from lynkr_store import MissingDriver

try:
    import opentelemetry.sdk  # noqa: F401 - to name the extra
except ImportError as error:
    raise MissingDriver(
        "opentelemetry-sdk is not installed: pip install 'lynkr-store[otel]'"
    ) from error

from lynkr_store.integrations.otel.metrics import observe
from lynkr_store.integrations.otel.spans import StoreSpanExporter

__all__ = ["StoreSpanExporter", "observe"]
