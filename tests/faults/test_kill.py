import itertools
from collections import defaultdict
from pathlib import Path

import pytest

from lynkr_store import create_store_engine
from lynkr_store.migrate.upgrade import upgrade
from tests.support.children import MortalServer, adds_up, run, stored
from tests.support.postgres import available_servers

SERVERS = available_servers()
BACKENDS = ["sqlite-file", *(server.name for server in SERVERS)]

_numbers = itertools.count()


@pytest.fixture(scope="module")
def server_of():
    running = {}

    def server(name):
        if name not in running:
            installation = next(i for i in SERVERS if i.name == name)
            running[name] = MortalServer(installation).start()
        return running[name]

    yield server
    for started in running.values():
        started.stop()


@pytest.fixture
def place(tmp_path, server_of):
    """Make a database at head: its URL, and how a child takes it away."""

    def make(backend, how):
        if backend == "sqlite-file":
            folder, link = tmp_path / "data", tmp_path / "link"
            folder.mkdir()
            url, through = (f"sqlite:///{at}/telemetry.db" for at in (folder, link))
            more = {"file": str(folder / "telemetry.db")}
        else:
            server = server_of(backend)
            folder = Path(server.socket).parent
            link = folder / "link"
            url = server.create_database(f"kill_{next(_numbers)}")
            through = url.replace(f"host={folder}", f"host={link}")
            more = {"pid": server.pid}
        engine = create_store_engine(url)
        upgrade(engine)
        engine.dispose()
        return url, {
            "url": through if how == "missing" else url,
            "link": str(link),
            "target": str(folder),
            **more,
        }

    return make


def kill_at_each_moment(place, backend, capsys, *, spool, timeout_s=600, **story):
    """Kill a process at one moment after another, until one survives; count the moments.

    After each: what a flush confirmed is stored, nothing twice, and in order.
    """
    url, options = place(backend, story["how"])
    options |= {"rows": 5, "batch_max_rows": 3, "spool_after_s": 0, "spool": spool} | story
    options["spool"] = spool and str(spool)
    *deaths, survivor = run("killed", options, timeout_s)
    assert "killed" not in survivor

    rows = defaultdict(list)
    for request_id in stored(url):
        fatal, _, number = request_id.partition("-")
        if number != "after":
            rows[int(fatal)].append(int(number))
    for report in (*deaths, survivor):
        found = rows[report["fatal"]]
        at = f"killed at moment {report['fatal']}, {report.get('killed')}"
        assert set(found) >= set(range(report["confirmed"])), f"{at}: a confirmed row is lost"
        assert found == sorted(set(found)), f"{at}: twice, or out of order"
        assert all(map(adds_up, report["healths"])), at
        assert all(health["dropped"] == 0 for health in report["healths"]), at
        if spool:
            after = report["recovery"]
            assert adds_up(after), at
            assert (after["spooled"], after["dropped"], after["rejected"]) == (0, 0, 0), at
    recorded = story["rounds"].count("+") + story["rounds"].count("-")
    assert rows[survivor["fatal"]] == list(range(recorded * options["rows"]))

    labels = {report["killed"] for report in deaths}
    with capsys.disabled():
        print(f"\n{backend}: killed at {len(deaths)} moments of {len(labels)} kinds")
    assert len(deaths) >= 15
    return labels


def some_and_all(step):
    """Moments that far apart; all of them where there is time."""
    return pytest.mark.parametrize(
        "step", [step, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"]
    )


each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.slow
@each_backend
@some_and_all(5)
def test_what_a_flush_confirmed_survives_a_kill_at_any_moment(place, backend, step, capsys):
    labels = kill_at_each_moment(
        place, backend, capsys, spool=None, how="missing", rounds="++", step=step
    )
    if step == 1:
        # two threads reach their moments in another order each time: one side may be missed
        for name in ("DefaultDialect.do_commit", "Handoff.settle", "RecordQueue.take"):
            assert {f"before {name}", f"after {name}"} & labels
        assert {"begin", "before_cursor_execute", "after_cursor_execute", "checkin"} <= labels


@pytest.mark.slow
@each_backend
@some_and_all(11)
def test_what_a_flush_spooled_survives_a_kill_at_any_moment(place, backend, step, tmp_path, capsys):
    if step == 1 and backend != "sqlite-file":  # its moments are the same ones, and take longer
        step = 3
    labels = kill_at_each_moment(
        place, backend, capsys, spool=tmp_path / "spool", how="missing", rounds="-+=+", step=step
    )
    if step == 1:
        for name in ("enter", "load", "mark_attempt", "remove"):
            assert {f"before Spool.{name}", f"after Spool.{name}"} & labels


@pytest.mark.slow
@each_backend
def test_a_kill_around_an_outage_of_a_database_in_use(place, backend, tmp_path, capsys):
    how = "locked" if backend == "sqlite-file" else "frozen"
    kill_at_each_moment(
        place, backend, capsys, spool=tmp_path / "spool", how=how, rounds="+--+=+", step=11
    )
