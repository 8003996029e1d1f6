# ruff: noqa: INP001 - a folder of scripts
"""Measures statistics against the original's SQL on its own schema, and with more rows.

Both databases contain the same rows. The store's are folded, as after maintenance; `get_stats` is
also measured before that, with the newest 10,000 rows not folded. The present is 1 ms after the
newest row, and 3, 6, 9 and 12 minutes later, so that windows begin at different places of a
quarter-hour. No answer is cached.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, Final

from benchmarks.databases import Place, every_place, sqlite_files
from benchmarks.filled import filled_original, filled_store, unfolded
from benchmarks.harness import Pairs, Ratio, Result, paired
from benchmarks.sample import END_MS, SESSIONS, Sample
from lynkr_store import Window
from lynkr_store.backend import Backend

DAY: Final = timedelta(days=1)
MONTH: Final = timedelta(days=30)

_MS: Final = timedelta(milliseconds=1)
_INSTANTS: Final = tuple(END_MS + 1 + minutes * 60_000 for minutes in (0, 3, 6, 9, 12))
_TARGETS: Final = {  # of get_stats, by backend, the table's span and the window's
    (Backend.SQLITE, DAY, DAY): 300,
    (Backend.SQLITE, MONTH, MONTH): 100,
    (Backend.POSTGRESQL, DAY, DAY): 20,
    (Backend.POSTGRESQL, MONTH, DAY): 20,
    (Backend.POSTGRESQL, MONTH, MONTH): 60,
}
_METHOD: Final = "in turn, 5 instants"
_PROVIDER: Final = "openrouter"


def results(scale: float = 1.0) -> Iterator[Result]:
    """Yield every line when it is measured.

    Args:
        scale: Multiplies the numbers of rows.
    """
    with every_place() as places:
        for place in places:
            yield from against_original(place, int(200_000 * scale), DAY)
            yield from against_original(place, int(1_000_000 * scale), MONTH)
    with sqlite_files() as files:
        yield growth(files, int(200_000 * scale), int(2_000_000 * scale))


def against_original(place: Place, count: int, span: timedelta) -> Iterator[Result]:
    """The statistics over the last day, and over the whole span if that is longer."""
    sample = Sample(count, span)
    lengths = sorted({DAY, span})
    with ExitStack() as stack:
        store, now = filled_store(stack, place, sample)
        original = filled_original(stack, place, sample)

        def line(
            name: str,
            length: timedelta,
            ours: Callable[[Window], Any],
            theirs: Callable[[int, int], Any],
            standing: str = "",
        ) -> Result:
            pairs = compared(now, length // _MS, ours, theirs)
            target = _TARGETS.get((place.backend, span, length))
            return Result(
                name=f"{name}, {'24 h' if length == DAY else f'{length.days} d'}{standing}",
                backend=place.name,
                rows=count,
                sessions=SESSIONS,
                method=_METHOD,
                unit="ms",
                ours=pairs.ours,
                baseline=pairs.baseline,
                against="the original's SQL, schema",
                ratio=Ratio(
                    pairs.times_faster,
                    "× faster",
                    target if name == "get_stats" and not standing else None,
                ),
            )

        backlog = f", {unfolded(sample):,} not folded"
        for length in lengths:
            yield line("get_stats", length, store.get_stats, original.get_stats, backlog)
        store.maintain()
        for length in lengths:
            yield line("get_stats", length, store.get_stats, original.get_stats)
        yield line(
            "get_provider_stats",
            span,
            lambda window: store.get_provider_stats(_PROVIDER, window),
            lambda since, until: original.get_provider_stats(_PROVIDER, since, until),
        )
        yield line(
            "get_routing_accuracy",
            span,
            store.get_routing_accuracy,
            original.get_routing_accuracy,
        )


def growth(place: Place, few: int, many: int) -> Result:
    """`get_stats` of the last day with many rows in table and window, against few rows."""
    with ExitStack() as stack:
        small, then = filled_store(stack, place, Sample(few, DAY))
        large, now = filled_store(stack, place, Sample(many, DAY))

        def questions() -> Iterator[tuple[Callable[[], object], Callable[[], object]]]:
            for instant in _INSTANTS:
                then[0] = now[0] = instant
                large.get_stats()
                small.get_stats()
                yield from [(large.get_stats, small.get_stats)] * 5

        pairs = paired(questions(), burst=1)
    return Result(
        name="get_stats, 24 h, more rows",
        backend=place.name,
        rows=many,
        sessions=SESSIONS,
        method=_METHOD,
        unit="ms",
        ours=pairs.ours,
        baseline=pairs.baseline,
        against=f"the same over {few:,} rows",
        ratio=Ratio(1 / pairs.times_faster, "× the time", at_most=2),
    )


def compared(
    now: list[int],
    length_ms: int,
    ours: Callable[[Window], Any],
    theirs: Callable[[int, int], Any],
) -> Pairs:
    """Ask both at each instant about the time before it.

    Raises:
        RuntimeError: Their answers differ, so the times cannot be compared.
    """

    def questions() -> Iterator[tuple[Callable[[], object], Callable[[], object]]]:
        for instant in _INSTANTS:
            now[0], since = instant, instant - length_ms
            window = Window(since=since)

            def ask(window: Window = window) -> Any:
                return ours(window)

            def ask_original(since: int = since, until: int = instant) -> Any:
                return theirs(since, until)

            answer = ask()
            if answer is None or answer.to_gateway() != ask_original():
                raise RuntimeError("the store and the original give different answers")
            yield ask, ask_original

    return paired(questions())
