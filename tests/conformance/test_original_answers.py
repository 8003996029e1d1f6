"""The original module's recorded answers, call by call."""

import math
import shutil
import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, delete, text

from lynkr_store import RoutingFilter, Store, StoreSettings, Window
from lynkr_store.db.models import PROGRESS, ROLLUPS, TELEMETRY
from tests.conftest import POSTGRES
from tests.support.recorded import (
    DATA,
    cases,
    expected_on_gateway_file,
    insert_rows,
    needs_data,
    oracle,
    variant_file,
)

pytestmark = needs_data

# Calls whose right answer on SQLite cannot be PostgreSQL's, by case and number.
NOT_ON_POSTGRES = {
    ("p021-record", 0): "output_tokens of 12.25 are 12 in an integer column",
}


def window_of(options: dict[str, Any], *, closed: bool = False) -> Window:
    until = options.get("until")
    return Window(
        since=options.get("since"), until=until + 1 if closed and until is not None else until
    )


def filter_of(options: dict[str, Any]) -> RoutingFilter:
    named = {k: v for k, v in options.items() if k in ("provider", "tier", "session_id")}
    return RoutingFilter(**named)


def number(value: Any) -> Any:
    return float(value["$float"]) if isinstance(value, dict) else value


def answer(store: Store, call: dict[str, Any], *, closed: bool = False) -> Any:
    """What the store says to a recorded call, in the gateway's own shape."""
    name, args = call["fn"], call["args"]
    options = args[-1] if args and isinstance(args[-1], dict) else {}
    try:
        match name:
            case "query":
                limit = 100 if options.get("limit") is None else number(options["limit"])
                rows = store.query(filter_of(options), window_of(options), limit=limit)
                return [row.to_gateway() for row in rows]
            case "getStats":
                result: Any = store.get_stats(window_of(options, closed=closed))
            case "getProviderStats":
                result = store.get_provider_stats(args[0], window_of(options, closed=closed))
            case "getRoutingAccuracy":
                result = store.get_routing_accuracy(window_of(options, closed=closed))
            case "cleanup":
                if not args or args[0] is None:
                    return store.cleanup()
                return store.cleanup(timedelta(milliseconds=number(args[0])))
            case "record":
                store.record(**args[0])
                assert store.flush(30)
                return None
            case "$ids":
                return sorted(row.id for row in store.iter_records())
            case _:
                raise AssertionError(name)
    except (ValueError, OverflowError) as error:
        return {"$error": type(error).__name__}
    return result and result.to_gateway()


def forget_history(store: Store) -> None:
    """Know no more of deleted rows than the original does; all that is left is folded anew."""
    with store._database.writing.begin() as connection:
        for table in (ROLLUPS, PROGRESS):
            connection.execute(delete(table))


def problems(store: Store, case: dict[str, Any], now: list[int]) -> list[tuple[int, str]]:
    columns = case["rows"][0].keys() if case["rows"] else TELEMETRY.c.keys()[:28]
    found = []
    for number_, call in enumerate(case["calls"]):
        now[0] = call["now"]
        got = answer(store, call)
        if call["fn"] == "cleanup":
            forget_history(store)
        if call["fn"] == "query" and isinstance(got, list):
            got = [{name: row[name] for name in columns} for row in got]
        if call.get("defect") == "negative-age-deletes":
            # ours refuses; the calls after it were recorded on what the original left: the cutoff
            # lay in the future
            now[0] -= number(call["args"][0])
            store.cleanup(timedelta(0))
            forget_history(store)
        wanted = call.get("expected_fixed")
        empty = isinstance(wanted, dict) and 0 in (wanted.get("total"), wanted.get("totalRequests"))
        if got is None and empty:
            continue  # no rows are None here, as in the original
        found += [
            (number_, problem)
            for problem in oracle().check(call, got, case, mode="fixed", half_open=True)
        ]
    return found


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case["name"])
def test_sqlite_agrees_with_every_recorded_call(case: dict[str, Any], tmp_path: Path) -> None:
    now = [case["now"]]
    path = variant_file(tmp_path / "telemetry.db", case["ddl_variant"])
    settings = StoreSettings(url=f"sqlite:///{path}", cache_ttl_s=0)
    with Store(settings=settings, clock=lambda: now[0]) as store:
        store.get_stats()  # adopts the file
        with closing(sqlite3.connect(path)) as connection, connection:
            insert_rows(connection, case["rows"])
        assert problems(store, case, now) == []


@pytest.mark.sample(3)
@pytest.mark.parametrize("backend", POSTGRES)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case["name"])
def test_postgres_agrees_but_for_the_calls_named(
    case: dict[str, Any], backend: str, new_url: Any
) -> None:
    now = [case["now"]]
    url = new_url(backend, at_head=True)
    copy_rows(url, case["rows"])
    settings = StoreSettings(url=url, cache_ttl_s=0)
    with Store(settings=settings, clock=lambda: now[0]) as store:
        found = problems(store, case, now)
    expected = {number_ for name, number_ in NOT_ON_POSTGRES if name == case["name"]}
    assert {number_ for number_, _ in found} == expected, found


def copy_rows(url: str, rows: list[dict[str, Any]]) -> None:
    """Put a gateway's rows into PostgreSQL as they are, but for reals in integer columns."""
    whole = {"output_tokens", "input_tokens", "tool_count", "message_count"}
    engine = create_engine(url)
    with engine.begin() as connection:
        for row in rows:
            values = {
                name: math.floor(value + 0.5) if name in whole and value is not None else value
                for name, value in row.items()
            }
            names = ", ".join(values)
            marks = ", ".join(f":{name}" for name in values)
            connection.execute(
                text(f"INSERT INTO routing_telemetry ({names}) VALUES ({marks})"), values
            )
        if rows:
            after = max(row["id"] for row in rows) + 1
            connection.execute(
                text(
                    f"SELECT setval(pg_get_serial_sequence('routing_telemetry', 'id'), {after - 1})"
                )
            )
    engine.dispose()


def check_gateway_file(store: Store) -> None:
    calls = expected_on_gateway_file()
    assert len(calls) == 42
    for call in calls:
        wanted = call.get("expected_fixed", call["result"])
        got = answer(store, call, closed=True)
        if isinstance(wanted, list):
            got = [{name: row[name] for name in wanted[0]} for row in got]
        assert got == wanted, (call["fn"], call["args"])


def test_the_gateways_own_file_gives_its_own_answers(tmp_path: Path) -> None:
    path = Path(shutil.copy(DATA / "gateway-28185.db", tmp_path / "telemetry.db"))
    path.chmod(0o644)
    with Store(f"sqlite:///{path}") as store:
        check_gateway_file(store)


@pytest.mark.slow
@pytest.mark.parametrize("backend", POSTGRES)
def test_the_same_rows_in_postgres_give_the_same_answers(backend: str, new_url: Any) -> None:
    url = new_url(backend, at_head=True)
    connection = sqlite3.connect(f"file:{DATA}/gateway-28185.db?mode=ro&immutable=1", uri=True)
    connection.row_factory = sqlite3.Row
    rows = [dict(row) for row in connection.execute("SELECT * FROM routing_telemetry")]
    connection.close()
    engine = create_engine(url)
    with engine.begin() as target:
        names = list(rows[0])
        marks = ", ".join(f":{name}" for name in names)
        target.execute(
            text(f"INSERT INTO routing_telemetry ({', '.join(names)}) VALUES ({marks})"), rows
        )
    engine.dispose()
    with Store(url) as store:
        check_gateway_file(store)
