"""Whatever a function that is not the writer's raises, at each of its calls, the writer goes on."""

import io
import itertools
import logging
import sys
import threading

import pytest

from lynkr_store import Store, StoreSettings
from lynkr_store.exceptions import StoreUnavailable
from lynkr_store.ingest.conversion import prepare
from lynkr_store.ingest.handoff import RESTARTED
from lynkr_store.ingest.spool import Spool
from lynkr_store.ingest.validation import TextPolicy
from lynkr_store.ingest.writer import Writer
from lynkr_store.maintenance.background import BackgroundMaintenance
from tests.ingest.test_writer import adds_up as account_adds_up
from tests.support.stores import adds_up, eventually

SECRET = "what somebody asked"  # noqa: S105 - a prompt
KINDS = (ValueError, MemoryError, SystemExit, KeyboardInterrupt, GeneratorExit)
CASES = [
    pytest.param(list(itertools.product(range(1, 6), KINDS)), marks=pytest.mark.slow, id="all"),
    pytest.param([(1, ValueError), (2, SystemExit)], id="some"),
]
"""Which call of a function fails, and how."""


class Faults:
    """Raises at one call of one function, and counts the calls of all."""

    def __init__(self, name, call, kind):
        self._wanted = name, call
        self._kind = kind
        self._calls = {}
        self.came = False

    def at(self, name):
        number = self._calls[name] = self._calls.get(name, 0) + 1
        if (name, number) == self._wanted:
            self.came = True
            raise self._kind(SECRET)


class ForeignSpool(Spool):
    def __init__(self, path, faults):
        super().__init__(path, 2**30)
        self._faults = faults


def _failing(name):
    def call(self, *arguments):
        self._faults.at(f"spool.{name}")
        return getattr(Spool, name)(self, *arguments)

    return call


SPOOL = ("open", "first", "enter", "load", "mark_attempt", "remove", "close")
for _name in SPOOL:
    setattr(ForeignSpool, _name, _failing(_name))

NAMES = (
    *("redact", "clock", "sink", "sink, after", "log filter", "log handler", "start"),
    *(f"spool.{name}" for name in SPOOL if name != "close"),
)


class Ledger:
    """A sink that stores a batch once, and is away when it is first asked."""

    def __init__(self, faults):
        self._faults = faults
        self._away = 1
        self.stored = {}

    def write(self, batch_id, rows):
        self._faults.at("sink")
        if self._away:
            self._away -= 1
            raise StoreUnavailable("away")
        self.stored.setdefault(batch_id, [row["provider"] for row in rows])
        self._faults.at("sink, after")
        return {}

    @property
    def providers(self):
        return list(itertools.chain.from_iterable(self.stored.values()))


@pytest.fixture
def printed(monkeypatch):
    """What is printed, and what escapes a thread."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(threading, "excepthook", lambda hook: said.write(f"escaped {hook}"))
    monkeypatch.setattr(sys, "unraisablehook", lambda hook: said.write(f"escaped {hook}"))
    return said


@pytest.fixture
def logger():
    """The package's logger, as it was afterwards."""
    logger = logging.getLogger("lynkr_store")
    before = logger.handlers[:], logger.filters[:], logger.propagate
    yield logger
    logger.handlers, logger.filters, logger.propagate = before


class Handler(logging.Handler):
    def __init__(self, faults):
        super().__init__()
        self._faults = faults

    def emit(self, record):
        assert SECRET not in record.getMessage()
        assert not record.exc_info
        self._faults.at("log handler")


def one_case(faults, tmp_path, monkeypatch, logger, *, spool):
    """Records around an outage, one of them bad; then one more, and a close."""
    clock = itertools.count(1_750_000_000_000)

    def redact(text):
        faults.at("redact")
        return text

    def now():
        if threading.current_thread() is not threading.main_thread():
            faults.at("clock")
        return next(clock)

    def look(_):
        faults.at("log filter")
        return True

    start = threading.Thread.start

    def started(thread):
        if thread.name.startswith("lynkr-store"):
            faults.at("start")
        start(thread)

    logger.handlers, logger.filters, logger.propagate = [Handler(faults)], [], False
    logger.addFilter(look)
    ledger = Ledger(faults)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", started)
        writer = Writer(
            ledger,
            policy=TextPolicy(redact=redact),
            clock=now,
            max_rows=1_000,
            max_bytes=10**7,
            batch_rows=2,
            interval_s=0.001,
            spool=(lambda: ForeignSpool(tmp_path / "spool.db", faults)) if spool else None,
            spool_after_s=0.0,
        )
        for n in range(5):
            assert writer.submit({"provider": str(n), "request_text": SECRET})
        assert writer.submit({"provider": 5, "request_text": SECRET})
        assert writer.flush(60), writer.counters()
        writer._handoff._losses._said_at = -1e9
        assert writer.submit({"provider": "next", "request_text": SECRET})
        eventually(lambda: ledger.providers[-1:] == ["next"], 60)
        eventually(lambda: writer.counters().pending + writer.counters().spooled == 0, 60)
        account = writer.counters()
        writer.close(60)
    check(account, ledger)
    assert account_adds_up(writer.counters())
    return account


def check(account, ledger):
    assert account_adds_up(account)
    assert account.submitted == 7
    assert account.written == len(ledger.providers) >= 6 - account.rejected_by["failed"]
    assert sorted(set(ledger.providers)) == sorted(ledger.providers), "each once"
    assert account.rejected_by["wrong_type"] == 1
    assert not account.dropped_by
    assert SECRET not in (account.last_error or "")


@pytest.mark.sample(3)
@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("spool", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_fault_at_any_foreign_call_costs_no_record(
    name, spool, cases, tmp_path, monkeypatch, logger, printed
):
    came = 0
    for number, (call, kind) in enumerate(cases * 10):
        if number >= len(cases) and came:
            break  # on a busy machine no batch may have come from the spool: try again
        folder = tmp_path / str(number)
        folder.mkdir()
        faults = Faults(name, call, kind)
        account = one_case(faults, folder, monkeypatch, logger, spool=spool)
        came += faults.came
        if faults.came and name == "redact":
            assert account.mended_by == {"redact_failed": 1}
        elif faults.came and name == "sink":
            assert account.faults_by[kind.__name__] == 1
    assert SECRET not in printed.getvalue()
    assert "escaped" not in printed.getvalue()
    print(f"{name}: {came} faults came, of {len(cases)}")
    assert came or (name.startswith("spool") and not spool)


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_that_cannot_be_checked_costs_itself(kind, monkeypatch, tmp_path, logger):
    from lynkr_store.ingest import conversion  # noqa: PLC0415 - what is patched

    checked = conversion.plain_columns

    def plain_columns(records):
        if any(b"3" in record[0] for record in records):
            raise kind(SECRET)
        return checked(records)

    monkeypatch.setattr(conversion, "plain_columns", plain_columns)
    faults = Faults("none", 0, kind)
    account = one_case(faults, tmp_path, monkeypatch, logger, spool=False)
    assert account.rejected_by == {"wrong_type": 1, "failed": 1}
    assert account.written == 5


def test_records_that_end_the_thread_repeatedly_are_dropped_and_it_continues(
    monkeypatch, tmp_path, logger
):
    from lynkr_store.ingest import preparer as module  # noqa: PLC0415 - what is patched

    fails = iter([SystemExit] * 3)

    def failing(*arguments):
        for kind in fails:
            raise kind(SECRET)
        return prepare(*arguments)

    monkeypatch.setattr(module, "prepare", failing)
    ledger = Ledger(Faults("none", 0, ValueError))
    writer = Writer(
        ledger,
        policy=TextPolicy(),
        clock=lambda: 1_750_000_000_000,
        max_rows=100,
        max_bytes=10**6,
        batch_rows=10,
        interval_s=0.001,
    )
    writer.submit({"provider": "lost"})
    assert writer.flush(60)
    assert writer.counters().last_error == "thread_restarted: SystemExit"
    writer.submit({"provider": "next"})
    assert writer.flush(60)
    account = writer.counters()
    assert account_adds_up(account)
    assert account.dropped_by == {RESTARTED: 1}
    assert account.faults_by[RESTARTED] == 3
    assert ledger.providers == ["next"]
    writer.close(60)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_background_maintenance_continues_whatever_its_work_raises(kind):
    noted, done = [], threading.Event()
    faults = iter([kind("a secret"), kind("a secret")])

    def work(_):
        for error in faults:
            raise error
        done.set()

    background = BackgroundMaintenance(work, 0.001, noted.append)
    background.start()
    assert done.wait(60)
    background.finish()
    assert [type(error) for error in noted] == [kind, kind]


@pytest.mark.parametrize("interval_s", [1e10, 1e300, float("inf")])
def test_background_maintenance_waits_as_long_as_it_can(interval_s):
    background = BackgroundMaintenance(lambda _: None, interval_s)
    background.start()
    background._thread.join(0.05)
    assert background._thread.is_alive()
    background.finish()


def test_health_says_that_a_thread_was_restarted(url, monkeypatch):
    with Store(settings=StoreSettings(url=url, upgrade_on_open=True)) as store:
        store.record(provider="p")
        assert store.flush(60)

        def work(_):
            monkeypatch.setattr(store._background, "_work", lambda _: None)
            raise SystemExit("a secret")

        monkeypatch.setattr(store._background, "_work", work)
        store._background._wake.put(None)
        eventually(lambda: store.health().faults_by.get(RESTARTED))
        health = store.health()
        assert health.last_error == "thread_restarted: SystemExit"
        assert adds_up(health)
        store.record(provider="next")
        assert store.flush(60)
        assert store.health().written == 2


@pytest.mark.parametrize("kind", [ValueError, SystemExit])
def test_a_probe_that_fails_repeats_no_words_of_others(url, kind, monkeypatch):
    from lynkr_store.store import health  # noqa: PLC0415 - what is patched

    def look(_):
        raise kind(SECRET)

    with Store(settings=StoreSettings(url=url, upgrade_on_open=True)) as store:
        with monkeypatch.context() as patched:
            patched.setattr(health, "_look", look)
            eventually(lambda: store.health().last_error == kind.__name__)
        eventually(lambda: store.health().reachable)


def test_a_hosts_log_may_ask_for_health_in_another_thread(tmp_path, logger):
    """Lines are logged without the writer's lock: the other thread waits for it."""
    answered = []

    class Asking(logging.Handler):
        def emit(self, _):
            asking = threading.Thread(target=store.health, daemon=True)
            asking.start()
            asking.join(30)
            answered.append(not asking.is_alive())

    logger.handlers, logger.propagate = [Asking()], False
    store = Store(f"sqlite:///{tmp_path}/t.db")
    store.record(provider=5)
    store.close()
    assert answered
    assert all(answered)


def test_a_hosts_log_that_fails_costs_a_caller_nothing(tmp_path, logger):
    class Broken(logging.Handler):
        def emit(self, _):
            raise RuntimeError(SECRET)

    logger.handlers, logger.propagate = [Broken()], False
    store = Store(f"sqlite:///{tmp_path}/t.db")
    store.record(provider=5)
    store.close()
    assert store.health().rejected_by == {"wrong_type": 1}
