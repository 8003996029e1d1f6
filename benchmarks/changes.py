# ruff: noqa: INP001, S608 - a folder of scripts; names are this project's own
"""Measures the triggers that record changes of rows, and the checks that find other changes.

The bare driver inserts, changes and deletes rows of two tables of the store's schema in turn: one
with the triggers, one without. Then maintenance compares counts for a table whose rows are folded,
and recomputes its quarters (the scrub), each until it has checked all rows.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import timedelta
from typing import Any, Final

from benchmarks.databases import Place, connect, every_place, insert, settle
from benchmarks.filled import filled_store
from benchmarks.harness import Ratio, Result, Spread, timed
from benchmarks.sample import END_MS, SESSIONS, Sample
from lynkr_store import Store, upgrade
from lynkr_store.db import triggers
from lynkr_store.rollups import repair

ROUNDS: Final = 3
DAY: Final = timedelta(days=1)

_BATCH: Final = 1_000
_STATEMENTS: Final = {
    "UPDATE of a cost": "UPDATE routing_telemetry SET cost_usd = 1",
    "UPDATE of a text": "UPDATE routing_telemetry SET request_text = NULL",
    # all rows but the last: SQLite empties a table without triggers in one operation
    "DELETE": f"DELETE FROM routing_telemetry WHERE timestamp < {END_MS}",
}


def results(scale: float = 1.0) -> Iterator[Result]:
    """Each statement with and without triggers, then the checks of maintenance.

    Args:
        scale: Multiplies the number of rows.
    """
    few, many = Sample(int(50_000 * scale), DAY), Sample(int(1_000_000 * scale), 30 * DAY)
    with every_place() as places:
        for place in places:
            yield from _statements(place, few)
        for place in places:
            yield from _checks(place, many)


def _statements(place: Place, sample: Sample) -> Iterator[Result]:
    rounds = [(_times(place, sample), _times(place, sample, plain=True)) for _ in range(ROUNDS)]
    for name in rounds[0][0]:
        ours, baseline = ([each[name] for each in side] for side in zip(*rounds, strict=True))
        ratios = [mine / its for mine, its in zip(ours, baseline, strict=True)]
        yield Result(
            name=f"changes: {name}",
            backend=place.name,
            rows=sample.count,
            sessions=SESSIONS,
            method=f"in turn, {ROUNDS} times",
            unit="µs per row",
            ours=Spread.of(ours),
            baseline=Spread.of(baseline),
            against="the same without triggers",
            ratio=Ratio(Spread.of(ratios).median, "× the time"),
        )


def _times(place: Place, sample: Sample, *, plain: bool = False) -> dict[str, float]:
    """Microseconds that each statement takes per row; ``plain`` means without triggers."""
    with place.database() as url:
        upgrade(url)
        with closing(connect(url)) as connection:
            driver: Any = connection
            for statement in triggers.dropping(place.backend) if plain else ():
                driver.execute(statement)
            took = {"INSERT": timed(lambda: insert(connection, sample.rows(), _BATCH))}
            settle(connection)
            for name, statement in _STATEMENTS.items():
                took[name] = timed(lambda statement=statement: driver.execute(statement))
                settle(connection)
    return {name: milliseconds * 1_000 / sample.count for name, milliseconds in took.items()}


def _checks(place: Place, sample: Sample) -> Iterator[Result]:
    with ExitStack() as stack:
        store, _ = filled_store(stack, place, sample)
        store.maintain(budget_s=0)
        for name, check in (("counts", repair.compare_counts), ("scrub", repair.scrub)):
            took = [timed(lambda check=check: _through(store, check)) for _ in range(ROUNDS)]
            yield Result(
                name=f"maintenance: {name}",
                backend=place.name,
                rows=sample.count,
                sessions=SESSIONS,
                method=f"{ROUNDS} times",
                unit="ms for all rows",
                ours=Spread.of(took),
            )


def _through(store: Store, check: Callable[..., repair.Repaired]) -> None:
    """Run a check from the first quarter to the last.

    Raises:
        RuntimeError: It found a difference, so the time includes a repair.
    """
    database = store._database  # noqa: SLF001 - this project's own
    mended = check(database.write_transaction, read=database.read, stop=lambda: False)
    if mended != (0, True):
        raise RuntimeError("roll-ups differed from their rows")
