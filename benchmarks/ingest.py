# ruff: noqa: INP001 - a folder of scripts
"""Measures recording: from the call to the disk against the bare drivers, and the call alone.

The store's time includes everything: each `record`, checking, writing, and folding until no row is
left. The bare drivers get finished tuples, the ones that the store makes of the same records, in
batches of the same size, and fold nothing. Each has an empty database of its own.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from datetime import timedelta
from typing import Any, Final, NamedTuple

from benchmarks import calls
from benchmarks.databases import Place, connect, every_place, insert
from benchmarks.harness import Ratio, Result, Spread, timed
from benchmarks.original import Original
from benchmarks.sample import COLUMNS, SESSIONS, Record, Sample
from lynkr_store import Store, StoreSettings, upgrade
from lynkr_store.backend import Backend
from lynkr_store.db.models import TELEMETRY
from lynkr_store.ingest.validation import TextPolicy, row_of

BATCH: Final = 1_000
ROUNDS: Final = 3

_COLUMNS: Final = [column.name for column in TELEMETRY.c if column.name != "id"]
_LONG_S: Final = 600

Values = list[tuple[Any, ...]]


class _Baseline(NamedTuple):
    """A bare driver's insert: a function for the milliseconds it takes, and the target ratio."""

    milliseconds: Callable[[Place, Values], float]
    at_least: float


def results(scale: float = 1.0) -> Iterator[Result]:
    """Rows per second against each baseline, then the call.

    Args:
        scale: Multiplies the number of rows.
    """
    records = list(Sample(int(200_000 * scale), timedelta(days=1)).records())
    values = [_values(record) for record in records]
    with every_place() as places:
        for place in places:
            yield from _drained(place, records, values)
    yield from calls.results(records[: len(records) // 5])


def _drained(place: Place, records: list[Record], values: Values) -> Iterator[Result]:
    baselines = _BASELINES[place.backend]
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in baselines}
    for _ in range(ROUNDS):
        ours.append(_by_store(place, records))
        for name, baseline in baselines.items():
            theirs[name].append(baseline.milliseconds(place, values))
    for name, baseline in baselines.items():
        pairs = zip(ours, theirs[name], strict=True)
        ratio = Spread.of([its / mine for mine, its in pairs]).median
        yield Result(
            name="record, flush, fold",
            backend=place.name,
            rows=len(records),
            sessions=SESSIONS,
            method=f"in turn, {ROUNDS} times",
            unit="rows/s",
            ours=_rates(len(records), ours),
            baseline=_rates(len(records), theirs[name]),
            against=name,
            ratio=Ratio(ratio, "× the speed", at_least=baseline.at_least),
        )


def _by_store(place: Place, records: list[Record]) -> float:
    """Milliseconds from the first `record` until all rows are folded.

    Raises:
        RuntimeError: A row was lost or not folded, so the time means nothing.
    """
    with place.database() as url:
        upgrade(url)
        settings = StoreSettings(
            url=url,
            batch_max_rows=BATCH,
            queue_max_rows=calls.MANY_ROWS,
            queue_max_bytes=calls.MANY_BYTES,
        )
        with Store(settings=settings) as store:
            store.maintain()  # opens the database

            def drain() -> None:
                for record in records:
                    store.record(record)
                store.flush(_LONG_S)
                lags.append(store.maintain(budget_s=0).rollup_lag)  # folds, without checks

            lags: list[int] = []
            milliseconds = timed(drain)
            if lags != [0] or store.health().written != len(records):
                raise RuntimeError("rows were lost, or are not folded")
    return milliseconds


def _by_driver(place: Place, values: Values) -> float:
    with place.database() as url:
        upgrade(url)
        with closing(connect(url)) as connection:
            return timed(lambda: insert(connection, values, BATCH, _COLUMNS))


def _into_original(place: Place, values: Values) -> float:
    rows = [row[: len(COLUMNS)] for row in values]  # the store's own columns come last
    with place.database() as url, Original(url) as original:
        original.create()
        return timed(lambda: insert(original.connection, rows, BATCH))


def _values(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """The tuple that the store makes of a record, for a driver."""
    row, _ = row_of(record, 0, TextPolicy())
    return tuple(row[name] for name in _COLUMNS)


def _rates(count: int, milliseconds: list[float]) -> Spread:
    return Spread.of([count / each * 1_000 for each in milliseconds])


_BASELINES: Final = {
    Backend.SQLITE: {
        "executemany, our schema": _Baseline(_by_driver, 0.8),
        "executemany, the original's schema": _Baseline(_into_original, 1.0),
    },
    Backend.POSTGRESQL: {"COPY, our schema": _Baseline(_by_driver, 0.7)},
}
