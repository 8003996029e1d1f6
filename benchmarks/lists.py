# ruff: noqa: INP001 - a folder of scripts
"""Measures the first page of a list: 100 rows, newest first, from the filter to finished rows.

The baseline is the original's statement through the bare driver, which only fetches the rows. Both
must return the same rows.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, Final

from benchmarks.databases import Place, every_place
from benchmarks.filled import filled_original, filled_store
from benchmarks.harness import Ratio, Result, paired
from benchmarks.original import Original
from benchmarks.sample import COLUMNS, SESSIONS, Sample
from lynkr_store import RoutingFilter, Store

LIMIT: Final = 100
RUNS: Final = 7
TARGET_MS: Final = 5

_FILTERS: Final[dict[str, dict[str, Any]]] = {
    "all": {},
    "provider": {"provider": "openrouter"},
    "provider, rare": {"provider": "vertex"},
    "provider, former": {"provider": "together"},
    "provider, absent": {"provider": "absent"},
    "3 providers": {"provider": ["ollama", "openrouter", "vertex"]},
    "tier": {"tier": "SIMPLE"},
    "tier, rare": {"tier": "EXPERT"},
    "model": {"model": "claude-sonnet-4-5"},
    "model, rare": {"model": "gemini-2.5-pro"},
    "errors": {"has_error": True},
    "errors of a provider": {"has_error": True, "provider": "openrouter"},
}


def results(scale: float = 1.0) -> Iterator[Result]:
    """One line for each filter.

    Args:
        scale: Multiplies the number of rows.
    """
    sample = Sample(int(1_000_000 * scale), timedelta(days=30))
    session = next(sample.rows())[COLUMNS.index("session_id")]
    filters = {**_FILTERS, "session": {"session_id": session}}
    with every_place() as places:
        for place in places:
            with ExitStack() as stack:
                store, _ = filled_store(stack, place, sample)
                original = filled_original(stack, place, sample)
                for name, asked in filters.items():
                    yield _line(f"list: {name}", place, sample, store, original, asked)


def _line(
    name: str, place: Place, sample: Sample, store: Store, original: Original, asked: dict[str, Any]
) -> Result:
    criteria = RoutingFilter(**asked)

    def ask() -> list[int]:
        return [row.id for row in store.query(criteria, limit=LIMIT)]

    def ask_original() -> list[int]:
        return [row[0] for row in original.query(limit=LIMIT, **asked)]

    if ask() != ask_original():
        raise RuntimeError("the store and the original return different rows")
    pairs = paired([(ask, ask_original)] * RUNS)
    return Result(
        name=name,
        backend=place.name,
        rows=sample.count,
        sessions=SESSIONS,
        method=f"in turn, {RUNS} times",
        unit="ms",
        ours=pairs.ours,
        baseline=pairs.baseline,
        against="the original's SQL, schema",
        ratio=Ratio(pairs.times_faster, "× faster"),
        at_most=TARGET_MS,
    )
