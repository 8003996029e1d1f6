# ruff: noqa: INP001 - a folder of scripts
"""Prepares a store and the original with the sample's rows."""

from contextlib import ExitStack, closing
from itertools import islice
from typing import Final

from benchmarks.databases import Place, connect, insert, settle, without_indexes
from benchmarks.original import Original
from benchmarks.sample import END_MS, Sample
from lynkr_store import Store, StoreSettings, upgrade

UNFOLDED: Final = 10_000


def unfolded(sample: Sample) -> int:
    """The number of the newest rows that a filled store has not folded."""
    return min(UNFOLDED, sample.count // 10)


def filled_store(stack: ExitStack, place: Place, sample: Sample) -> tuple[Store, list[int]]:
    """A store without a cache, whose rows are folded except the newest.

    Returns:
        The store, and a list with its present in epoch milliseconds, which can be changed.
    """
    url = stack.enter_context(place.database())
    now = [END_MS + 1]
    # an interval that no benchmark reaches, so that the store starts no maintenance itself
    settings = StoreSettings(url=url, cache_ttl_s=0, maintenance_interval_s=86_400)
    rows = sample.rows()
    upgrade(url)
    with closing(connect(url)) as connection:
        with without_indexes(connection):
            insert(connection, islice(rows, sample.count - unfolded(sample)))
        settle(connection)
        with Store(settings=settings, clock=lambda: now[0]) as store:
            store.maintain()
        insert(connection, rows)
        settle(connection)
    return stack.enter_context(Store(settings=settings, clock=lambda: now[0])), now


def filled_original(stack: ExitStack, place: Place, sample: Sample) -> Original:
    """The original with the sample's rows."""
    original = stack.enter_context(Original(stack.enter_context(place.database())))
    original.create()
    with without_indexes(original.connection):
        insert(original.connection, sample.rows())
    settle(original.connection)
    return original
