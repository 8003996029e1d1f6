"""Print what the command answers: lines, JSON, and tables, bars and sparklines.

All text reaches the terminal through this module, which makes it printable.
"""

import codecs
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from typing import Final, NoReturn

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lynkr_store.exceptions import BadArgument, printable
from lynkr_store.schemas import (
    CopyReport,
    Health,
    ProviderStats,
    RoutingAccuracy,
    RoutingRowBrief,
    RoutingStats,
    utc,
)

_BAR_CELLS: Final = 12  # the tables fit a terminal of 80 columns
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
_WIDE: Final = 80  # columns of a terminal that has room for bars next to the figures
_VALUE: Final = " "  # the second column of a table without headings
_WIDE_ROWS: Final = 100  # columns in which the names of most rows fit on one line
_WHOLE_FROM_MS: Final = 100
_TIME_AND_TIER: Final = "time (UTC)\ntier"
_PROVIDER_AND_MODEL: Final = "provider\nmodel"
_FOLDING: Final = (
    *(_VALUE, "provider", "tier", "model", "result"),
    *(_TIME_AND_TIER, _PROVIDER_AND_MODEL),
)
"""Columns that shrink on a narrow terminal: their texts continue on the next line."""
_LEFT: Final = ("", "time (UTC)", *_FOLDING)
_SPARKS: Final = "▁▂▃▄▅▆▇█"
_FITTING: Final = "lynkr-store"  # the error handler for characters that a stream's encoding lacks
_PLAIN: Final = {"–": "-", "—": "-", "─": "-", "…": ".", "’": "'", "×": "x"} | dict.fromkeys(
    _EIGHTHS[1:] + _SPARKS, "#"
)
_NOBODY_READS: Final = 128 + signal.SIGPIPE
"""The exit code that a shell gives a program which a closed pipe ended."""
_NOT_WRITTEN: Final = 2


def fit_streams() -> None:
    """Make the standard streams replace characters that their encoding lacks, cell by cell."""
    codecs.register_error(_FITTING, _fitting)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_FITTING)


def _fitting(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c, "?" * cell_len(c)) for c in lacking), error.end


@contextmanager
def piped() -> Iterator[None]:
    """Flush standard output; end quietly if its reader closed it.

    The exit code is then 141, because nobody read the answer. If the output cannot be written, for
    example to a full disk, the exit code is 2.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout:  # None where the process was started without it
                with _written():
                    sys.stdout.flush()
    except BrokenPipeError:
        _end_output(_NOBODY_READS)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # rich and typer make it exit code 1
            _end_output(_NOBODY_READS)
        raise


@contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        warn(f"standard output: {error.strerror}; the output is incomplete", "error")
        _end_output(_NOT_WRITTEN)


def _end_output(code: int) -> NoReturn:
    with suppress(
        OSError, ValueError
    ):  # else the interpreter flushes again at exit, and prints an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def show(console: Console, *parts: RenderableType) -> None:
    """Print the parts one after the other."""
    with _written():
        console.print(Group(*parts))


def say(text: str, *, at_once: bool = False) -> None:
    """Print a line, made printable because it may contain names from a database.

    Args:
        text: The line.
        at_once: Also into a pipe, for a program that reads line by line.
    """
    with _written():
        print(printable(text), flush=at_once)


def say_script(text: str) -> None:
    """Print SQL unchanged.

    Raises:
        BadArgument: Standard output's encoding lacks one of the characters, for example of a
            schema's name.
    """
    encoding = _encoding()
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        raise BadArgument(
            f"standard output: the encoding {encoding} lacks characters of the script: set "
            "PYTHONIOENCODING=utf-8"
        ) from None
    with _written():
        print(text, end="")


def warn(text: str, label: str = "") -> None:
    """Print a line on standard error, after a red label."""
    words = Text(printable(text))
    parts = Text.assemble((f"{label}:", "red"), " ", words) if label else words
    with suppress(OSError):  # standard error was closed
        Console(stderr=True).print(parts, highlight=False, soft_wrap=True)


def copy_lines(report: CopyReport) -> Iterator[str]:
    """What a copy did, in words."""
    others = f"{report.savings_copied:,} savings events, {report.rollups_copied:,} roll-ups"
    yield f"copied: {report.rows_copied:,} rows, {others}"
    for what, number in report.coerced.items():
        yield f"changed: {what}: {number:,}"
    for cause, number in report.left_out.items():
        yield f"left out: {number:,} rows because of {cause}"
    if report.rows_only_in_target:
        yield (
            f"only in the target: {report.rows_only_in_target:,} rows, which the source has "
            "removed since they were copied"
        )
    if report.rows_without_texts:
        yield (
            f"without a text: {report.rows_without_texts:,} rows, on one side, which removed it "
            "since they were copied"
        )
    yield (
        f"verified: {report.rows_verified:,} rows (UTC days: {report.days_verified:,}) have the "
        "source's counts and sums"
    )


def say_json(value: object, *, on_one_line: bool = False) -> None:
    """Print JSON; characters that a terminal would obey are escaped in JSON's form.

    If standard output is not UTF-8, all characters beyond ASCII are escaped.

    Args:
        value: What to print.
        on_one_line: Do so at once, also into a pipe, for a program that reads line by line.
    """
    is_utf = codecs.lookup(_encoding()).name.startswith("utf")
    indent = None if on_one_line else 2
    written = json.dumps(value, ensure_ascii=not is_utf, indent=indent, default=str)
    with _written():
        print("\n".join(map(_escaped, written.split("\n"))), flush=on_one_line)


def _encoding() -> str:
    # None for a stream in memory, or where the process was started without it
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def _escaped(line: str) -> str:
    # only strings contain other characters, and json escapes those below U+0020
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def bar(value: float, most: float) -> str:
    """Draw a bar whose length is the value's share of the greatest value; '' for 0 or less."""
    eighths = round(max(0.0, value) / most * _BAR_CELLS * 8) if most > 0 else 0
    return _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def sparkline(values: Sequence[int]) -> str:
    """Draw a column for each value, as high as its share of the greatest; a blank for 0."""
    most = max(values, default=0)
    return "".join(_SPARKS[(v * (len(_SPARKS) - 1)) // most] if v else " " for v in values)


def stats_report(
    stats: RoutingStats,
    accuracy: RoutingAccuracy,
    providers: Mapping[str, ProviderStats],
    slices: Sequence[int],
    ends: tuple[int, int],
    *,
    width: int = _WIDE,
) -> Iterable[RenderableType]:
    """Show the main statistics of a window.

    Args:
        stats: The window's statistics.
        accuracy: The window's routing accuracy.
        providers: The statistics of each provider.
        slices: The number of requests in equal parts of the window, oldest first.
        ends: The window's ends in epoch milliseconds.
        width: Columns of the terminal; a narrow one gets no bars.
    """
    wide = width >= _WIDE
    if not wide:  # half as many columns, each of two parts
        slices = [sum(slices[n : n + 2]) for n in range(0, len(slices), 2)]
    head = _table("", _VALUE, title="Requests")
    head.add_row("requests", f"{stats.total_requests:,}")
    head.add_row("over the window", Text(sparkline(slices), style="cyan"))
    head.add_row("", _between(ends, len(slices)))
    head.add_row("error rate", f"{stats.error_rate} %")
    head.add_row("cost", cost(stats.total_cost))
    head.add_row("unpriced requests", f"{stats.unpriced_requests:,}")
    for name, count, percent in (
        ("over-provisioned", accuracy.over_provisioned, accuracy.over_provisioned_pct),
        ("under-provisioned", accuracy.under_provisioned, accuracy.under_provisioned_pct),
    ):
        head.add_row(name, f"{percent} %  ({count:,})")
    _say_source(head, stats)
    yield head

    slowest = max((p.avg_latency or 0 for p in providers.values()), default=0)
    costs = ("", "cost", "unpriced") if wide else ("cost\nunpriced",)
    table = _table("provider", "requests", "errors", "latency", *costs, title="Providers")
    for name, figures in providers.items():
        latency, price = figures.avg_latency, Text(cost(figures.total_cost))
        bars = Text(bar(latency or 0, slowest), style="magenta")
        unpriced = Text(f"{figures.unpriced_requests:,}")
        table.add_row(
            _printable(name),
            f"{figures.total:,}",
            f"{figures.error_rate} %",
            "–" if latency is None else f"{latency:,} ms",
            *((bars, price, unpriced) if wide else (_stacked(price, unpriced),)),
        )
    yield table

    table = _table("tier", "requests", "quality", "", title="Tiers")
    for tier, count in stats.requests_by_tier.items():
        quality = stats.avg_quality_by_tier.get(tier)
        table.add_row(
            _printable(tier),
            f"{count:,}",
            "–" if quality is None else f"{quality:.1f}",
            Text(bar(quality or 0, 100), style="green"),
        )
    yield table


def _between(ends: tuple[int, int], width: int) -> str:
    """The ends of the window, below the sparkline's."""
    since, until = (_day(ms) for ms in ends)
    return f"{since}{until:>{max(width - len(since), len(until) + 1)}} UTC"


def _day(ms: int) -> str:
    try:
        return f"{utc(ms):%Y-%m-%d %H:%M}"
    except OverflowError:  # a window may begin before the year 1
        return "…"


def _say_source(table: Table, figures: RoutingStats | ProviderStats) -> None:
    if figures.raw_from is not None:
        table.add_row("whole quarter-hours before", f"{figures.raw_from:%Y-%m-%d %H:%M:%S} UTC")


def provider_report(name: str, figures: ProviderStats) -> RenderableType:
    """Show the statistics of one provider."""
    table = _table("", _VALUE, title=_printable(name))
    table.add_row("requests", f"{figures.total:,}")
    table.add_row("error rate", f"{figures.error_rate} %")
    table.add_row("fallback rate", f"{figures.fallback_rate} %")
    table.add_row("latency", f"{_or_dash(figures.avg_latency)} ms")
    table.add_row("quality", _or_dash(figures.avg_quality))
    table.add_row("output tokens", _or_dash(figures.avg_output_tokens))
    table.add_row("tokens per second", _or_dash(figures.avg_tokens_per_second))
    table.add_row("cost", cost(figures.total_cost))
    table.add_row("unpriced requests", f"{figures.unpriced_requests:,}")
    _say_source(table, figures)
    return table


def cost(dollars: float | None) -> str:
    """Format an amount of money to a hundredth of a cent."""
    return "unknown" if dollars is None else f"${dollars:,.4f}"


def rows_table(rows: Sequence[RoutingRowBrief], *, width: int = _WIDE) -> Table:
    """Show rows, one on each line, without their texts.

    Args:
        rows: The rows of a page.
        width: Columns of the terminal; in a narrow one each row has two lines.
    """
    if width >= _WIDE_ROWS:
        table = _table("time (UTC)", "provider", "tier", "model", "latency", "cost", "result")
    else:
        table = _table(_TIME_AND_TIER, _PROVIDER_AND_MODEL, "latency\ncost", "result")
    for row in rows:
        at = Text(f"{row.timestamp:%m-%d %H:%M:%S}" if row.timestamp else "–")
        provider, tier, model = map(_printable, (row.provider, row.tier, row.model))
        latency = Text("–" if row.latency_ms is None else _milliseconds(row.latency_ms))
        price = Text(cost(row.cost_usd))
        result = _printable(row.error_type or row.status_code, "red" if row.error_type else "")
        if width >= _WIDE_ROWS:
            table.add_row(at, provider, tier, model, latency, price, result)
        else:
            pairs = ((at, tier), (provider, model), (latency, price))
            table.add_row(*(_stacked(*pair) for pair in pairs), result)
    if rows:
        table.caption = f"next page: --before {rows[-1].cursor}"
        table.caption_justify = "left"
    return table


def row_line(row: RoutingRowBrief) -> str:
    """Show a row on one line, with the cells of `rows_table`, after its id."""
    at = f"{row.timestamp:%m-%d %H:%M:%S}" if row.timestamp else None
    latency = None if row.latency_ms is None else _milliseconds(row.latency_ms)
    result = row.error_type or row.status_code
    cells = (row.id, at, row.provider, row.tier, row.model, latency, cost(row.cost_usd), result)
    return "  ".join("–" if cell is None else str(cell) for cell in cells)


def _milliseconds(value: float) -> str:
    digits = 0 if abs(value) >= _WHOLE_FROM_MS else 1
    return f"{value:,.{digits}f} ms"


def _stacked(upper: Text, lower: Text) -> Text:
    lower.stylize("dim")
    return Text.assemble(upper, "\n", lower)


def health_table(health: Health) -> Table:
    """Show the part of a store's health that concerns the database."""
    table = _table("", _VALUE)
    table.add_row("backend", health.backend)
    table.add_row("reachable", "yes" if health.reachable else "no")
    if health.server is not None:
        table.add_row("server", _printable(health.server))
        table.add_row("takes writes", "yes" if health.writable else "no")
    table.add_row("revision", _printable(health.revision))
    table.add_row("this release's", health.head)
    for name, size in (
        ("size", health.database_bytes),
        ("free within it", health.reclaimable_bytes),
    ):
        if size is not None:
            table.add_row(name, decimal(size))
    if health.oldest_timestamp:
        table.add_row("oldest row", f"{health.oldest_timestamp:%Y-%m-%d %H:%M:%S} UTC")
    if health.rollup_lag is not None:
        table.add_row("rows to fold", f"{health.rollup_lag:,}")
    if health.last_error:
        table.add_row("last error", _printable(health.last_error))
    return table


def _printable(value: object, style: str = "") -> Text:
    """Make a stored value printable, because clients choose these texts.

    It returns a Text, in which rich interprets no markup.
    """
    return Text("–" if value is None else printable(str(value)), style)


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:,}"


def _table(*columns: str, title: str | Text | None = None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=any(name.strip() for name in columns),
    )
    for name in columns:
        table.add_column(
            name,
            justify="left" if name in _LEFT else "right",
            no_wrap=name not in _FOLDING,
            overflow="fold",
        )
    return table
