"""One SQLite file that several processes and a gateway write: nobody loses a row."""

import contextlib
import itertools
import json
import sqlite3
import sys

import pytest

from lynkr_store import Store, create_store_engine
from lynkr_store.migrate.upgrade import upgrade
from tests.support.programs import Child

pytestmark = pytest.mark.slow

GATEWAY_COLUMNS = (
    "request_id, session_id, timestamp, complexity_score, tier, agentic_type, tool_count, "
    "input_tokens, message_count, request_type, provider, model, routing_method, was_fallback, "
    "output_tokens, latency_ms, status_code, error_type, cost_usd, tool_calls_made, retry_count, "
    "circuit_breaker_state, quality_score, tokens_per_second, cost_efficiency, request_text, "
    "response_text, base_tier, escalation_source, propensity, candidates, pinned, switch_reason, "
    "cache_decision, cache_read_tokens, cache_creation_tokens"
)
"""Those that the gateway's own INSERT names."""

HOLDER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
connection.execute(
    "INSERT INTO routing_telemetry (request_id, timestamp, provider)"
    " VALUES ('foreign', 1750000000000, 'p')"
)
print("held", flush=True)
time.sleep(5)
connection.execute("COMMIT")
connection.close()
"""

WRITER = """
import json, sys, threading
from lynkr_store import Store, StoreSettings

url, process = sys.argv[1:3]
rows, text_chars, refused_every = map(int, sys.argv[3:])


def number_of(n):
    return 0 if refused_every and n % refused_every == 1 else n  # an id again, to be refused


settings = StoreSettings(url=url, queue_max_rows=10 ** 6, queue_max_bytes=2 ** 30)
with Store(settings=settings) as store:
    print("ready", flush=True)
    sys.stdin.readline()

    def record(thread):
        text = chr(97 + thread) * text_chars
        for n in range(rows):
            assert store.record(
                provider=f"{process}-{thread}",
                request_id=f"{process}-{thread}-{number_of(n)}",
                request_text=text,
                response_text=text,
            )

    threads = [threading.Thread(target=record, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    flushed = store.flush(240)
    health = store.health()
    print(
        json.dumps(
            {
                "flushed": flushed,
                "submitted": health.submitted,
                "written": health.written,
                "rejected": health.rejected,
                "others": health.dropped + health.spooled + health.pending,
                "faults": dict(health.faults_by),
            }
        ),
        flush=True,
    )
"""

GATEWAY = """
import json, sqlite3, sys, threading, time

path, columns, visits = sys.argv[1], sys.argv[2].split(", "), sys.argv[3] == "True"


def opened():
    connection = sqlite3.connect(path, timeout=3.0, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    return connection


connection = opened()
insert = (
    f"INSERT INTO routing_telemetry ({', '.join(columns)})"
    f" VALUES ({', '.join('?' for _ in columns)})"
)
fixed = {"timestamp": 1750000000000.0, "provider": "gateway", "was_fallback": 0, "pinned": 0,
         "retry_count": 0, "latency_ms": 12.5, "request_text": "q" * 2000,
         "response_text": "a" * 2000}
stop, waits, failures = threading.Event(), [], []
threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
print("ready", flush=True)
due = time.monotonic()
while not stop.is_set():
    row = fixed | {"request_id": f"gateway-{len(waits)}"}
    began = time.monotonic()
    if visits:
        connection.close()
        time.sleep(0.05)
        began = time.monotonic()
        connection = opened()
    try:
        connection.execute(insert, [row.get(name) for name in columns])
    except sqlite3.Error as error:
        failures.append(str(error))
    waits.append(time.monotonic() - began)
    due = max(due + 0.02, began)
    time.sleep(max(0.0, due - time.monotonic()))
connection.close()
print(json.dumps({"rows": len(waits), "failures": failures, "longest": max(waits)}), flush=True)
"""


def start(stack, code, *args):
    """A program of its own, killed at the latest when the stack is left."""
    return stack.enter_context(Child([sys.executable, "-W", "error", "-c", code, *map(str, args)]))


def report(child):
    return json.loads(child.end()[-1])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "telemetry.db"


@pytest.fixture
def made(path):
    engine = create_store_engine(f"sqlite:///{path}")
    upgrade(engine)
    engine.dispose()
    return path


def names_in(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        query = "SELECT request_id FROM routing_telemetry ORDER BY id"
        return [name for (name,) in connection.execute(query)]


def check_stored(path, reports, processes, rows, gateways=0, refused_every=0):
    fine = [n for n in range(rows) if not refused_every or n % refused_every != 1]
    for report in reports:
        assert report["flushed"]
        assert report["submitted"] == 2 * rows
        assert report["written"] == 2 * len(fine)
        assert report["rejected"] == 2 * (rows - len(fine))
        assert report["others"] == 0
    found = names_in(path)
    assert len(found) == processes * 2 * len(fine) + gateways
    by_thread = itertools.groupby(
        sorted(found, key=lambda name: name.rpartition("-")[0]),  # stable: in order of the ids
        key=lambda name: name.rpartition("-")[0],
    )
    stored = {
        thread: [int(name.rpartition("-")[2]) for name in names] for thread, names in by_thread
    }
    expected = {f"{p}-{t}": fine for p in range(processes) for t in range(2)}
    if gateways:
        expected["gateway"] = list(range(gateways))
    assert stored == expected, "each once, in the order of its thread"


def run_writers(stack, path, processes, rows, text_chars=100, refused_every=0):
    children = [
        start(stack, WRITER, f"sqlite:///{path}", number, rows, text_chars, refused_every)
        for number in range(processes)
    ]
    for child in children:
        assert child.line() == "ready"
    for child in children:
        child.tell()
    return [report(child) for child in children]


def test_a_foreign_writer_that_holds_the_file_for_5_seconds_is_waited_for(made):
    with contextlib.ExitStack() as stack, Store(f"sqlite:///{made}") as store:
        assert store.record(provider="p", request_id="before")
        assert store.flush(30)
        holder = start(stack, HOLDER, made)
        assert holder.line() == "held"
        expected = [str(n) for n in range(3_000)]
        for name in expected:
            assert store.record(provider="p", request_id=name)
        assert not store.flush(1), "the other has the lock"
        assert store.flush(60)
        health = store.health()
        assert health.submitted == health.written == 3_001
        assert health.rejected == health.dropped == health.spooled == health.pending == 0
        print(f"\n{dict(health.faults_by)} while the file was held")
        holder.end()
    assert names_in(made) == ["before", "foreign", *expected]


def test_4_processes_that_find_no_file_make_it_and_write_it_together(path):
    with contextlib.ExitStack() as stack:
        reports = run_writers(stack, path, 4, 2_500)
    check_stored(path, reports, 4, 2_500)
    print(f"\n{[report['faults'] for report in reports]}")


def run_beside_a_gateway(path, processes, rows, text_chars, refused_every=0, *, visits=False):
    with contextlib.ExitStack() as stack:
        gateway = start(stack, GATEWAY, path, GATEWAY_COLUMNS, visits)
        assert gateway.line() == "ready"
        reports = run_writers(stack, path, processes, rows, text_chars, refused_every)
        answer = report(gateway)
    print(
        f"\n{processes * 2 * rows} rows beside {answer['rows']} of a gateway, whose longest wait "
        f"was {answer['longest'] * 1000:.0f} ms; faults: {[r['faults'] for r in reports]}"
    )
    assert answer["failures"] == []
    assert answer["longest"] < 3.0
    check_stored(path, reports, processes, rows, answer["rows"], refused_every)


def test_a_gateway_keeps_writing_while_4_processes_write_at_full_speed(made):
    run_beside_a_gateway(made, 4, 15_000, 200)


@pytest.mark.parametrize("processes", [1, 4])
def test_a_gateway_keeps_writing_while_batches_of_huge_texts_are_stored(made, processes):
    run_beside_a_gateway(made, processes, 500 if processes == 1 else 125, 65_536)


def test_a_process_that_opens_the_file_for_a_moment_gets_the_lock(made):
    run_beside_a_gateway(made, 1, 60_000, 200, visits=True)


@pytest.mark.parametrize("refused_every", [2, 10])
def test_a_gateway_keeps_writing_while_batches_with_many_refused_rows_are_stored(
    made, refused_every
):
    with contextlib.closing(sqlite3.connect(made)) as connection:
        connection.execute("CREATE UNIQUE INDEX once ON routing_telemetry (request_id)")
    run_beside_a_gateway(made, 4, 2_000, 200, refused_every)
