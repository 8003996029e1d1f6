"""The ``lynkr-store`` command.

Exit codes: 0 done, 1 the answer is no, 2 wrong use, 3 the database cannot be reached, 130 Ctrl-C
ended --follow, 141 standard output was closed by its reader. Commands that read change nothing.
"""

import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from enum import IntEnum
from io import StringIO
from itertools import pairwise
from typing import Annotated, Any, Final, NoReturn, TypeVar

import typer
from rich.console import Console
from sqlalchemy import Engine

from lynkr_store.cli import progress, render
from lynkr_store.db import citus
from lynkr_store.db.dialect import disposing, parse_url, url_to_migrate
from lynkr_store.db.engines import create_store_engine
from lynkr_store.db.errors import translated
from lynkr_store.db.models import TELEMETRY, Base
from lynkr_store.db.urls import file_of
from lynkr_store.exceptions import (
    ClockAhead,
    CopyDiffers,
    LynkrStoreError,
    SchemaError,
    StoreUnavailable,
)
from lynkr_store.migrate import comparison, distribution, revisions
from lynkr_store.migrate import upgrade as migrate
from lynkr_store.queries.repository import LOOK_BACK
from lynkr_store.schemas import Cursor, Health, ProviderStats, RoutingRowBrief, epoch_ms
from lynkr_store.schemas.base import epoch_ms_now
from lynkr_store.schemas.filters import RoutingFilter, Window, checked_limit
from lynkr_store.settings import DatabaseSettings, StoreSettings
from lynkr_store.storage import identities
from lynkr_store.storage.read_only import inspecting_engine
from lynkr_store.store.sync import Store
from lynkr_store.transfer import copying
from lynkr_store.version import __version__

_LOOK_S: Final = 10.0  # a person waits longer for the first probe than a poll does
_SLICES: Final = 48  # columns of the sparkline
_INSTANT: Final = (
    "give ISO 8601 with a date, a time and a zone, such as 2026-11-01T00:00:00Z, or epoch "
    "milliseconds"
)
_UNITS: Final = {
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
    "y": timedelta(days=365),
}


_Options = TypeVar("_Options", bound=DatabaseSettings)


class Exit(IntEnum):
    """The command's exit codes."""

    DONE = 0
    NO = 1
    WRONG_USE = 2
    UNREACHABLE = 3
    INTERRUPTED = 130  # as a shell reports for a program that Ctrl-C ended


app: Final = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

_Url = Annotated[
    str | None,
    typer.Option(help="The database; default LYNKR_STORE_URL, then sqlite:///.lynkr/telemetry.db."),
]
_Schema = Annotated[
    str | None,
    typer.Option(help="PostgreSQL: the schema of the tables; default LYNKR_STORE_SCHEMA."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON, with every field.")]
_Gateway = Annotated[
    bool,
    typer.Option("--gateway", help="Print JSON with the Node gateway's names and structure."),
]
_Provider = Annotated[list[str] | None, typer.Option(help="Only this provider; may be repeated.")]
_Tier = Annotated[list[str] | None, typer.Option(help="Only this tier; may be repeated.")]
_Model = Annotated[list[str] | None, typer.Option(help="Only this model; may be repeated.")]
_Session = Annotated[list[str] | None, typer.Option(help="Only this session; may be repeated.")]
_Request = Annotated[list[str] | None, typer.Option(help="Only this request; may be repeated.")]
_Type = Annotated[list[str] | None, typer.Option(help="Only this type; may be repeated.")]
_Method = Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")]
_Status = Annotated[list[int] | None, typer.Option(help="Only this status; may be repeated.")]
_Since = Annotated[str | None, typer.Option(help="ISO 8601 with a zone, or epoch milliseconds.")]
_Until = Annotated[
    str | None, typer.Option(help="The end, which is not included; in the form of --since.")
]
_Last = Annotated[
    str | None,
    typer.Option(help="The time before now, instead of --since: 90s, 15m, 24h, 7d, 2w, 1y."),
]
_Sql = Annotated[bool, typer.Option("--sql", help="Print the script instead of running it.")]
_TrustClock = Annotated[
    bool,
    typer.Option(
        "--trust-clock",
        help="Delete even if the clock is far ahead of the newest row and the last retention.",
    ),
]


def main() -> None:
    """Run the command and turn the library's errors into exit codes."""
    warnings.showwarning = _warn
    render.fit_streams()
    with render.piped():
        try:
            app()
        except StoreUnavailable as error:
            _fail(error, Exit.UNREACHABLE)
        except (SchemaError, ClockAhead, CopyDiffers) as error:
            _fail(error, Exit.NO)
        except (LynkrStoreError, ValueError) as error:
            _fail(error, Exit.WRONG_USE)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning like every other line; SQLAlchemy's name columns that others made."""
    render.warn(str(message), "warning")


def _fail(error: Exception, code: Exit) -> NoReturn:
    first, *others = str(error).splitlines() or [""]
    render.warn(first, "error")
    for line in others:  # pydantic names each invalid setting in lines of its own
        render.warn(line)
    sys.exit(code)


def _say_version(asked: bool) -> None:  # noqa: FBT001 - typer's callback
    if asked:
        render.say(f"lynkr-store {__version__}, revision {revisions.head()}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Print the release and its schema's revision.",
            callback=_say_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    pass


@app.command()
def upgrade(
    revision: Annotated[str, typer.Argument(help="The revision to reach.")] = "head",
    *,
    url: _Url = None,
    schema: _Schema = None,
    sql: _Sql = False,
    backup: Annotated[
        bool, typer.Option(help="First copy the SQLite file, in its directory.")
    ] = False,
) -> None:
    """Create, adopt or upgrade the database's schema."""
    settings = _to_migrate(url, schema)
    if sql:
        _show_script(settings, revision, down=False)
        return
    with _engine(settings) as engine, translated(of_rows=False):
        with engine.connect() as connection:
            at_head = revisions.current(connection) == revisions.head()
            lost = revisions.missing_tables(connection) if at_head else []
        if copy := migrate.upgrade(engine, revision, backup=backup):
            render.say(f"copied to {copy}")
        elif backup:
            render.say("no copy: there was nothing to change")
        with engine.connect() as connection:
            made = [name for name in lost if name not in revisions.missing_tables(connection)]
            if made:
                render.say(f"created again, empty: {', '.join(made)}")
            stands_at = revisions.current(connection)
            render.say(f"at revision {stands_at}")
            at_head = stands_at == revisions.head()
            missing = comparison.missing_indexes(connection) if at_head else []
    if missing:
        render.say(comparison.left_to_maintain(missing))


def _show_script(settings: DatabaseSettings, revision: str, *, down: bool) -> None:
    script, schema = StringIO(), settings.schema_name or ""  # "": not the environment's
    migrate.write_script(settings.url, revision, script, down=down, schema=schema)
    render.say_script(script.getvalue())


@app.command()
def downgrade(
    revision: Annotated[str, typer.Argument(help="The revision to return to; base undoes all.")],
    *,
    url: _Url = None,
    schema: _Schema = None,
    drop_data: Annotated[bool, typer.Option(help="Also drop tables that have rows.")] = False,
    sql: _Sql = False,
) -> None:
    """Undo revisions."""
    settings = _to_migrate(url, schema)
    if sql:
        _show_script(settings, revision, down=True)
        return
    with _engine(_there(settings)) as engine, translated(of_rows=False):
        migrate.downgrade(engine, revision, drop_data=drop_data)
        with engine.connect() as connection:
            render.say(f"at revision {revisions.current(connection) or 'base'}")


@app.command()
def distribute(*, url: _Url = None, schema: _Schema = None) -> None:
    """Distribute the tables over the servers of a Citus cluster; give the coordinator's URL."""
    with _engine(_there(_to_migrate(url, schema))) as engine:
        done = distribution.distribute(engine)
    for words, tables in zip(("distributed", "copied to every server"), done, strict=True):
        if tables:
            render.say(f"{words}: {', '.join(tables)}")
    if not any(done):
        render.say("nothing to do: Citus manages every table of the store")


@app.command()
def check(*, url: _Url = None, schema: _Schema = None, as_json: _Json = False) -> None:
    """Check whether this release can work with the schema; exit 1 if not."""
    with (
        disposing(inspecting_engine(_store_settings(url, schema))) as engine,
        translated(of_rows=False),
        engine.connect() as connection,
    ):
        revision, ahead = revisions.standing(connection)
        behind = not ahead and revision != revisions.head()
        lost = [] if behind else revisions.missing_tables(connection)
        drift = [] if behind or lost else comparison.drift(connection)
        ids = [] if behind else [problem.words for problem in identities.problems(connection)]
        missing = comparison.missing_indexes(connection)
        managed = citus.managed_tables(connection)
        on_one = [] if behind or not managed else sorted({*Base.metadata.tables} - managed)
        ids += [words for words in [citus.ids_of_workers(connection)] if words]
        has_triggers = not behind and not ahead and TELEMETRY.name not in managed
        lacking = comparison.missing_triggers(connection) if has_triggers else []
        foreign = revisions.foreign_owners(connection)
    good = not behind and not lost and not drift and not ids
    found = {
        "ok": good,
        "revision": revision,
        "head": revisions.head(),
        "missing_tables": lost,
        "drift": drift,
        "ids": ids,
        "missing_indexes": missing,
        "missing_triggers": lacking,
        "distributed_tables": sorted(managed),
        "undistributed_tables": on_one,
        "foreign_owners": foreign,
    }
    if as_json:
        render.say_json(found)
    else:
        for line in _words_of_check(found, behind=behind, ahead=ahead):
            render.say(line)
    if not good:
        sys.exit(Exit.NO)


def _words_of_check(found: dict[str, Any], *, behind: bool, ahead: bool) -> Iterator[str]:
    newer = " (made by a newer release; this one can work with it)" if ahead else ""
    yield f"revision {found['revision']}{newer}, this release's is {found['head']}"
    yield from (f"missing: the table {table}" for table in found["missing_tables"])
    yield from (f"differs: {difference}" for difference in found["drift"])
    yield from (f"ids: {problem}" for problem in found["ids"])
    if behind:
        yield f"run {revisions.UPGRADE_COMMAND}"
    if found["missing_tables"]:
        by = " of the release that made the schema" if ahead else ""
        yield f"run {revisions.UPGRADE_COMMAND}{by}, which creates them again, empty"
    if found["missing_indexes"]:
        yield f"indexes left to 'lynkr-store maintain': {', '.join(found['missing_indexes'])}"
    if found["missing_triggers"]:
        yield (
            f"triggers missing or disabled: {', '.join(found['missing_triggers'])}; without them, "
            "statistics notice rows that SQL changes or deletes only after 'lynkr-store maintain'. "
            "To create them again, run lynkr-store downgrade 0009, then lynkr-store upgrade"
        )
    if TELEMETRY.name in found["distributed_tables"]:
        yield (
            f"Citus distributes {TELEMETRY.name} and runs no triggers on it: statistics notice "
            "rows that SQL changes or deletes only after 'lynkr-store maintain'"
        )
    if found["undistributed_tables"]:
        yield (
            f"only the coordinator has {', '.join(found['undistributed_tables'])}: run lynkr-store "
            "distribute"
        )
    yield from found["foreign_owners"]


@app.command()
def stats(
    *,
    url: _Url = None,
    schema: _Schema = None,
    provider: Annotated[str | None, typer.Option(help="Show only this provider.")] = None,
    since: _Since = None,
    until: _Until = None,
    last: _Last = None,
    as_json: _Json = False,
    gateway: _Gateway = False,
) -> None:
    """Show the main statistics; by default, of the last 24 hours."""
    window = _window(since, until, last)
    with _reading(url, schema) as store:
        if provider is None:
            _show_stats(store, window, as_json=as_json, gateway=gateway)
        else:
            _show_provider(store, provider, window, as_json=as_json, gateway=gateway)


def _show_provider(
    store: Store, provider: str, window: Window, *, as_json: bool, gateway: bool
) -> None:
    answer = store.get_provider_stats(provider, window)
    if gateway:
        render.say_json(answer and answer.to_gateway())
    elif as_json:
        render.say_json({"providers": _dumped({provider: answer} if answer else {})})
    elif answer is None:
        render.say(f"no requests of {provider} in this window")
    else:
        render.show(Console(), render.provider_report(provider, answer))


def _show_stats(store: Store, window: Window, *, as_json: bool, gateway: bool) -> None:
    figures = store.get_stats(window)
    if gateway:
        render.say_json(figures and figures.to_gateway())
        return
    accuracy = store.get_routing_accuracy(window)
    names = figures.requests_by_provider if figures else {}
    answers = {name: store.get_provider_stats(name, window) for name in names}
    providers = {name: answer for name, answer in answers.items() if answer is not None}
    if as_json:
        render.say_json(
            {
                "stats": figures and figures.model_dump(mode="json"),
                "accuracy": accuracy and accuracy.model_dump(mode="json"),
                "providers": _dumped(providers),
            }
        )
    elif figures is None or accuracy is None:
        render.say("no requests in this window")
    else:
        ends = window.resolved(epoch_ms_now(), LOOK_BACK)
        console, slices = Console(), _slices(store, *ends)
        parts = render.stats_report(figures, accuracy, providers, slices, ends, width=console.width)
        render.show(console, *parts)


def _dumped(providers: Mapping[str, ProviderStats]) -> dict[str, Any]:
    return {name: answer.model_dump(mode="json") for name, answer in providers.items()}


@app.command()
def query(  # noqa: PLR0913 - one option for each dimension
    context: typer.Context,
    *,
    url: _Url = None,
    schema: _Schema = None,
    provider: _Provider = None,
    tier: _Tier = None,
    model: _Model = None,
    session_id: _Session = None,
    request_id: _Request = None,
    request_type: _Type = None,
    routing_method: _Method = None,
    status_code: _Status = None,
    errors: Annotated[
        bool | None,
        typer.Option("--errors/--no-errors", help="Only requests with an error_type; or without."),
    ] = None,
    fallback: Annotated[
        bool | None,
        typer.Option("--fallback/--no-fallback", help="Only requests that fell back; or did not."),
    ] = None,
    since: _Since = None,
    until: _Until = None,
    last: _Last = None,
    limit: Annotated[int, typer.Option(help="The greatest number of rows.")] = 20,
    before: Annotated[
        str | None, typer.Option(help="The cursor that the previous page ends with.")
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="With --json or --gateway: include the texts.")
    ] = False,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", help="Print rows as they are stored, a line each, until Ctrl-C ends it."
        ),
    ] = False,
    after: Annotated[
        int | None,
        typer.Option(help="With --follow: begin after this id; 0 begins with the first row."),
    ] = None,
    as_json: _Json = False,
    gateway: _Gateway = False,
) -> None:
    """List rows, newest first, or follow those that are stored from now on."""
    criteria = RoutingFilter(
        provider=provider or None,
        tier=tier or None,
        model=model or None,
        session_id=session_id or None,
        request_id=request_id or None,
        request_type=request_type or None,
        routing_method=routing_method or None,
        status_code=status_code or None,
        has_error=errors,
        was_fallback=fallback,
    )
    if follow:
        _refuse_with_follow(context)
        with _reading(url, schema) as store:
            rows = store.follow(criteria, after=after, include_text=text)
            _print_as_stored(rows, as_json=as_json, gateway=gateway)
        return
    if after is not None:
        raise typer.BadParameter("--after needs --follow")
    window = _window(since, until, last)
    cursor = None if before is None else Cursor.parse(before)
    checked_limit(limit)
    with _reading(url, schema) as store:
        page = store.query(criteria, window, limit=limit, before=cursor, include_text=text)
    if gateway:
        render.say_json([row.to_gateway() for row in page])
    elif as_json:
        more = len(page) == limit and page
        render.say_json(
            {
                "rows": [row.model_dump(mode="json") for row in page],
                "next": str(page[-1].cursor) if more else None,
            }
        )
    else:
        console = Console()
        render.show(console, render.rows_table(page, width=console.width))


def _refuse_with_follow(context: typer.Context) -> None:
    """Refuse the options that choose among the rows that are there."""
    for name in ("since", "until", "last", "limit", "before"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name} and --follow cannot be used together")


def _print_as_stored(rows: Iterator[RoutingRowBrief], *, as_json: bool, gateway: bool) -> None:
    try:
        for row in rows:
            if gateway:
                render.say_json(row.to_gateway(), on_one_line=True)
            elif as_json:
                render.say_json(row.model_dump(mode="json"), on_one_line=True)
            else:
                render.say(render.row_line(row), at_once=True)
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)


@app.command()
def health(*, url: _Url = None, schema: _Schema = None, as_json: _Json = False) -> None:
    """Show the state of the database; exit 3 if it cannot be reached."""
    with Store(settings=_store_settings(url, schema), read_only=True) as store:
        answer = _looked(store)
    if as_json:
        render.say_json(answer.model_dump(mode="json"))
    else:
        render.show(Console(), render.health_table(answer))
    if not answer.reachable:
        sys.exit(Exit.UNREACHABLE)


@app.command()
def cleanup(
    *,
    url: _Url = None,
    schema: _Schema = None,
    older_than: Annotated[str, typer.Option(help="An age: 12h, 30d, 26w.")],
    trust_clock: _TrustClock = False,
    as_json: _Json = False,
) -> None:
    """Delete rows that are older than an age."""
    age = _age(older_than)
    with _changing(url, schema) as store:
        deleted = store.cleanup(age, trust_clock=trust_clock)
    render.say_json({"rows_deleted": deleted}) if as_json else render.say(
        f"{deleted:,} rows deleted"
    )


@app.command()
def maintain(
    *,
    url: _Url = None,
    schema: _Schema = None,
    budget: Annotated[str, typer.Option(help="Time limit for retention: 30s, 10m.")] = "30s",
    rebuild: Annotated[
        bool, typer.Option(help="Compute the roll-ups again from the rows.")
    ] = False,
    trust_clock: _TrustClock = False,
    as_json: _Json = False,
) -> None:
    """Build missing indexes, fold new rows, apply the configured retention, return free pages.

    LYNKR_STORE_RETENTION_DAYS applies to rows, LYNKR_STORE_TEXT_RETENTION_DAYS to their texts.
    Exit 1 if retention did nothing because the clock may be wrong.
    """
    budget_s = _age(budget).total_seconds()
    with _changing(url, schema) as store, Console(stderr=True).status("at work") as status:
        report = store.maintain(
            budget_s=budget_s,
            rebuild=rebuild,
            trust_clock=trust_clock,
            on_step=lambda rows: status.update(f"{rows:,} rows folded"),
        )
    if as_json:
        render.say_json(report.model_dump(mode="json"))
    else:
        render.say(f"indexes built: {', '.join(report.indexes_built) or 'none'}")
        if report.indexes_left:
            render.say(f"indexes left: {', '.join(report.indexes_left)} ({report.waited_for})")
        if report.sequences_set:
            render.say(f"sequences set forward: {', '.join(report.sequences_set)}")
        render.say(f"rows folded: {report.rows_folded}")
        if report.quarters_recounted or report.quarters_mended:
            render.say(
                f"quarters of an hour counted again: {report.quarters_recounted} that were "
                f"changed, {report.quarters_mended} that differed from their rows"
            )
        render.say(f"rows deleted: {report.rows_deleted:,}; remaining: {report.rows_remaining:,}")
        render.say(
            f"texts removed: {report.texts_removed:,}; remaining: {report.texts_remaining:,}"
        )
        render.say(f"bytes freed: {report.bytes_freed:,}")
        if report.retention_waits:
            render.say(f"retention waits: {report.retention_waits}")
    if report.retention_waits:
        sys.exit(Exit.NO)


@app.command()
def copy(
    source: Annotated[
        str, typer.Argument(help="A database's URL, or a file; - is standard input.")
    ],
    target: Annotated[str, typer.Argument(help="The same; - is standard output.")],
    *,
    source_schema: Annotated[
        str | None, typer.Option(help="PostgreSQL: the schema of the source's tables.")
    ] = None,
    target_schema: Annotated[
        str | None, typer.Option(help="PostgreSQL: the schema of the target's tables.")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Copy all rows into another database or file, and compare the result with the source.

    Run again, also after an interruption, it copies only what is new. Files: SQLite, JSON Lines
    (.jsonl, .ndjson, -), Parquet (.parquet). Exit 1 if rows could not be copied, or differ.
    """
    with progress.shown() as show:
        report = copying.copy(
            source,
            target,
            source_schema=source_schema,
            target_schema=target_schema,
            on_progress=show,
        )
    if target == "-":  # standard output is the copy
        for line in render.copy_lines(report):
            render.warn(line)
    elif as_json:
        render.say_json(report.model_dump(mode="json"))
    else:
        for line in render.copy_lines(report):
            render.say(line)
    if report.left_out:
        sys.exit(Exit.NO)


def _place(url: str | None, schema: str | None) -> dict[str, Any]:
    """The options that were given, which override the environment's."""
    given = {"url": url or None, "schema_name": schema}
    return {name: value for name, value in given.items() if value is not None}


def _to_migrate(url: str | None, schema: str | None) -> DatabaseSettings:
    """The options of a change of the schema; the URL that was given is also the one to migrate."""
    settings = DatabaseSettings(**_place(url, schema))
    text = url_to_migrate(settings).render_as_string(hide_password=False)
    return settings.model_copy(update={"url": text})


def _store_settings(url: str | None, schema: str | None) -> StoreSettings:
    """All options; a command that was given works also where stores are switched off."""
    return StoreSettings(enabled=True, **_place(url, schema))


def _engine(settings: DatabaseSettings) -> AbstractContextManager[Engine]:
    return disposing(create_store_engine(settings.url, schema=settings.schema_name))


def _reading(url: str | None, schema: str | None) -> Store:
    store = Store(settings=_store_settings(url, schema), read_only=True)
    if store.missing_columns:
        missing = ", ".join(store.missing_columns)
        render.warn(
            f"this file lacks columns, which are read as empty; the file is not changed: {missing}"
        )
    return store


def _changing(url: str | None, schema: str | None) -> Store:
    """Open a store that may change rows, but does not upgrade the schema."""
    settings = _there(_store_settings(url, schema))
    return Store(settings=settings.model_copy(update={"upgrade_on_open": False}))


def _there(settings: _Options) -> _Options:
    """The settings, if their URL does not name a file that would be created: it may be mistyped.

    Raises:
        StoreUnavailable: There is no such file.
    """
    path = file_of(parse_url(settings.url))
    if path is not None and not path.exists():
        raise StoreUnavailable(
            f"{path} does not exist: give the path of a database, or create one by lynkr-store "
            "upgrade"
        )
    return settings


def _window(since: str | None, until: str | None, last: str | None) -> Window:
    if last is None:
        return Window(since=_instant(since, "--since"), until=_instant(until, "--until"))
    if since is not None:
        raise typer.BadParameter("--last and --since cannot be used together")
    end = _instant(until, "--until")
    age_ms = _age(last) // timedelta(milliseconds=1)
    return Window(since=(epoch_ms_now() if end is None else end) - age_ms, until=end)


def _instant(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    given = int(text) if re.fullmatch(r"-?\d{1,99}", text, re.ASCII) else text
    try:
        return epoch_ms(given, round_up=True)
    except ValueError as error:
        words = str(error) if type(given) is int else _INSTANT
    raise typer.BadParameter(f"{option}: {words}")


def _age(text: str) -> timedelta:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdwy])", text)
    try:
        if found:
            return float(found[1]) * _UNITS[found[2]]
    except OverflowError:
        pass
    raise typer.BadParameter(f"{text}: not an age; use a form such as 90s, 15m, 24h, 7d, 2w or 1y")


def _looked(store: Store) -> Health:
    """Return the store's health after the first probe of the database."""
    deadline = time.monotonic() + _LOOK_S
    while (health := store.health()).probe_age_s is None and time.monotonic() < deadline:
        pass  # each call waits a moment
    return health


def _slices(store: Store, since: int, until: int) -> list[int]:
    """Count requests in equal parts of the window."""
    edges = [since + (until - since) * i // _SLICES for i in range(_SLICES + 1)]
    # not checked: an edge may look like a number of seconds
    parts = (Window.model_construct(since=low, until=high) for low, high in pairwise(edges))
    answers = map(store.get_routing_accuracy, parts)
    return [0 if answer is None else answer.total_requests for answer in answers]
