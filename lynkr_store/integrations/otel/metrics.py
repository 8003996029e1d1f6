"""A store's metrics, reported through OpenTelemetry."""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.util.types import AttributeValue

from lynkr_store import AsyncStore, BadArgument, BatchAttempt, Health, Store
from lynkr_store.integrations.records import answer_of

_DURATIONS_S: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
"""The limits that the semantic conventions give for a database operation's duration."""


@dataclass(frozen=True)
class _Observed:
    store: weakref.ref[Store | AsyncStore]
    attributes: Mapping[str, AttributeValue]

    def health(self) -> Health | None:
        store = self.store()
        return None if store is None else answer_of(store.health)


_observed: Final[weakref.WeakKeyDictionary[Meter, list[_Observed]]] = weakref.WeakKeyDictionary()
"""By meter, because the SDK ignores the callbacks of a second instrument of the same name."""


def observe(
    store: Store | AsyncStore,
    meter: Meter,
    *,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> None:
    """Report a store's metrics through a meter, until the store is gone.

    ``lynkr_store.rows`` in ``{row}``, an up-down counter: where the records are, by
    ``lynkr_store.row.state`` (written, rejected, dropped, spooled or pending) and
    ``lynkr_store.row.cause`` (of the rejected and the dropped). The sum is the number of records
    that were passed to ``record()`` or found in a spool.
    ``lynkr_store.queue.bytes`` in ``By``, an up-down counter: the memory of those that wait.
    ``lynkr_store.batch.duration`` in ``s``, a histogram: each attempt to write a batch, with
    ``error.type`` if it failed.

    Each collection asks ``health()`` twice, which answers within 50 ms.

    Args:
        store: The store. The metrics do not keep it alive.
        meter: Where the metrics go, of any name. Get it after the meter provider was set: each
            meter from before is another one, and only the first's stores are reported.
        attributes: Added to each measurement: they tell two stores of one process apart.

    Raises:
        BadArgument: It is no store, or it is reported through this meter already.
    """
    if not isinstance(store, Store | AsyncStore):
        raise BadArgument("store: give a Store or an AsyncStore")
    own = dict(attributes or {})
    if meter not in _observed:
        _observed[meter] = []
        _create_observable(meter, _observed[meter])
    observed = _observed[meter]
    observed[:] = [each for each in observed if each.store() is not None]
    if any(each.store() is store for each in observed):
        raise BadArgument("store: this meter reports it already")
    observed.append(_Observed(weakref.ref(store), own))
    duration = meter.create_histogram(
        "lynkr_store.batch.duration",
        unit="s",
        description="Duration of the attempts to write a batch.",
        explicit_bucket_boundaries_advisory=_DURATIONS_S,
    )

    def on_batch(attempt: BatchAttempt) -> None:
        failed = {"error.type": attempt.error} if attempt.error else {}
        duration.record(attempt.duration_s, own | failed)

    store.on_batch(on_batch)


def _create_observable(meter: Meter, observed: list[_Observed]) -> None:
    def rows(_: CallbackOptions) -> Iterable[Observation]:
        for each in tuple(observed):
            for state, cause, count in _places(each.health()):
                where = {"lynkr_store.row.state": state}
                if cause:
                    where["lynkr_store.row.cause"] = cause
                yield Observation(count, {**each.attributes, **where})

    def queue_bytes(_: CallbackOptions) -> Iterable[Observation]:
        for each in tuple(observed):
            if health := each.health():
                yield Observation(health.queue_bytes, each.attributes)

    meter.create_observable_up_down_counter(
        "lynkr_store.rows", [rows], unit="{row}", description="Where the records are."
    )
    meter.create_observable_up_down_counter(
        "lynkr_store.queue.bytes",
        [queue_bytes],
        unit="By",
        description="Memory of the records that wait to be written.",
    )


def _places(health: Health | None) -> Iterable[tuple[str, str | None, int]]:
    if health is None:
        return
    yield "written", None, health.written
    yield "spooled", None, health.spooled
    yield "pending", None, health.pending
    for state, causes in (("rejected", health.rejected_by), ("dropped", health.dropped_by)):
        yield state, None, 0  # so that the first loss is an increase
        yield from ((state, cause, count) for cause, count in causes.items())
