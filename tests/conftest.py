"""Databases of every backend, each test its own."""

import asyncio
import itertools
import os
import re
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
from sqlalchemy import Engine

from lynkr_store import AsyncStore, Store, StoreSettings, create_store_engine
from lynkr_store.migrate.upgrade import upgrade
from tests.support.postgres import CitusServer, ExternalServer, PgServer, Server, available_servers
from tests.support.stores import Asynchronous

EXTERNAL = os.environ.get("LYNKR_STORE_TEST_PG_URL")
CITUS = os.environ.get("LYNKR_STORE_TEST_CITUS_URL")
POSTGRES = [
    *(["citus"] if CITUS else []),
    *(["postgres-external"] if EXTERNAL else []),
] or [i.name for i in available_servers()]
BACKENDS = ["sqlite-file", "sqlite-memory", *POSTGRES]
ON_DISK = ["sqlite-file", *POSTGRES]
"""Backends that more than one engine can open."""

_OLDER = 4
_OF_DATABASES = 3

EACH_BACKEND = ("tests/conformance/test_store.py", "tests/queries/")
"""What every store and every list must do: there the ordinary run has each test on all backends."""

# in a shell's background job Ctrl-C is ignored, and so it would be in each program of the tests
signal.signal(signal.SIGINT, signal.default_int_handler)

# LiteLLM asks the network for prices when it is imported, unless this is set
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

hypothesis.settings.register_profile("lynkr_store", deadline=None)  # a busy machine is no fault
hypothesis.settings.load_profile("lynkr_store")

_numbers = itertools.count()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave a sample of what is enumerated to the ordinary run, and the rest to the slow run.

    The ordinary run takes

    - of the PostgreSQL servers the newest alone; the slow run has the others (see `_repeated`);
    - of a test with several values each on one backend, the backends in turn;
    - of a test without other values all backends in the files of `EACH_BACKEND`, elsewhere one;
    - of a test that is marked with `sample(n)` one of every n values, and one of three of a test
      without the mark that makes databases.
    """
    older = [item for item in items if any(server in item.name for server in POSTGRES[:-1])]
    for item in older:
        item.add_marker(pytest.mark.slow)
    repeated = _repeated(older)
    items[:] = [item for item in items if item not in repeated]
    ordinary = [item for item in items if not item.get_closest_marker("slow")]
    for cases in _grouped(ordinary, _test_of):
        left = _sample(cases)
        for item in cases:
            if item not in left:
                item.add_marker(pytest.mark.slow)


def _repeated(older: list[pytest.Item]) -> set[pytest.Item]:
    """Of the cases on an older server those that are left out: three of four of each test.

    What the servers' releases differ in is how they read SQL and name errors. Each test runs on
    each of them, and all of its cases on the newest.
    """
    repeated: set[pytest.Item] = set()
    for cases in _grouped(older, _test_of):
        first = zlib.crc32(_test_of(cases[0]).encode())
        repeated |= {*cases} - {*cases[first % min(_OLDER, len(cases)) :: _OLDER]}
    return repeated


def _sample(cases: list[pytest.Item]) -> list[pytest.Item]:
    """Of one test's cases those of the ordinary run, the same ones whatever else is collected."""
    values = _grouped(cases, lambda item: _BACKEND.sub("", item.name))
    if len(values) == 1 and cases[0].nodeid.startswith(EACH_BACKEND):
        return cases
    first = zlib.crc32(_test_of(cases[0]).encode())  # or it would be each test's first value
    mark = cases[0].get_closest_marker("sample")
    every = _OF_DATABASES if "new_url" in cases[0].fixturenames else 1
    step = min(mark.args[0] if mark else every, len(values))
    sampled = values[first % step :: step]
    return [same[(first + number) % len(same)] for number, same in enumerate(sampled)]


def _test_of(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


_BACKEND = re.compile(rf"\b({'|'.join(map(re.escape, BACKENDS))})(-a?sync)?\b")


def _grouped(
    items: list[pytest.Item], key: Callable[[pytest.Item], str]
) -> list[list[pytest.Item]]:
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("LYNKR_STORE_") and not name.startswith("LYNKR_STORE_TEST_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def server_of() -> Iterator[Callable[[str], Server]]:
    """Servers by name, started when first asked for and stopped in the end."""
    running: dict[str, Server] = {}

    def server(name: str) -> Server:
        if name not in running:
            if CITUS and name == CitusServer.name:
                running[name] = CitusServer(CITUS)
                return running[name]  # where each database is made by itself
            if EXTERNAL:
                running[name] = ExternalServer(EXTERNAL)
            else:
                running[name] = PgServer(
                    next(i for i in available_servers() if i.name == name)
                ).start()
            url = running[name].create_database("template_head")
            # Named, for the test that asks first may have named another one in the environment.
            engine = create_store_engine(url, schema="public")
            upgrade(engine)
            engine.dispose()
        return running[name]

    yield server
    for started in running.values():
        if isinstance(started, PgServer):
            started.stop()
        elif not isinstance(started, CitusServer):
            started.drop_database("template_head")


@pytest.fixture(scope="session")
def sqlite_at_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file at head, to be copied: nine revisions take longer than most tests."""
    path = tmp_path_factory.mktemp("template") / "telemetry.db"
    engine = create_store_engine(f"sqlite:///{path}")
    upgrade(engine)
    engine.dispose()
    return path


@pytest.fixture
def new_url(
    tmp_path: Path, server_of: Callable[[str], Server], sqlite_at_head: Path
) -> Iterator[Callable[..., str]]:
    """Make an empty database, or one at head, on the backend of that name."""
    made: list[tuple[Server, str]] = []

    def make(backend: str, *, at_head: bool = False) -> str:
        number = next(_numbers)
        if backend == "sqlite-memory":
            return "sqlite://"
        if backend == "sqlite-file":
            path = tmp_path / str(number) / "telemetry.db"
            if at_head:
                path.parent.mkdir()
                shutil.copy(sqlite_at_head, path)  # with its mode
            return f"sqlite:///{path}"
        server, name = server_of(backend), f"test_{number}"
        made.append((server, name))
        return server.create_database(name, "template_head" if at_head else None)

    yield make
    for server, name in made:
        server.drop_database(name)


@pytest.fixture(params=POSTGRES)
def postgres_url(request: pytest.FixtureRequest, new_url: Callable[..., str]) -> str:
    """An empty PostgreSQL database."""
    return new_url(request.param)


@pytest.fixture(params=ON_DISK)
def empty_url(request: pytest.FixtureRequest, new_url: Callable[..., str]) -> str:
    """An empty database that more than one engine can open."""
    return new_url(request.param)


@pytest.fixture(params=ON_DISK)
def url(request: pytest.FixtureRequest, new_url: Callable[..., str]) -> str:
    """A database at head that more than one engine can open."""
    return new_url(request.param, at_head=True)


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """An engine beside those of the test's stores."""
    engine = create_store_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture
def empty_engine(empty_url: str) -> Iterator[Engine]:
    """The store's engine on an empty database."""
    engine = create_store_engine(empty_url)
    yield engine
    engine.dispose()


Opener = Callable[..., Store]

ORDINARY = {("sqlite-memory", "sync"), ("sqlite-file", "async"), (POSTGRES[-1], "async")}
"""Each backend and each kind of store once; `url` serves tests of the others' synchronous store."""
STORES = [
    pytest.param(pair, id="-".join(pair), marks=[] if pair in ORDINARY else [pytest.mark.slow])
    for pair in itertools.product(BACKENDS, ("sync", "async"))
]


@pytest.fixture(params=STORES)
def open_store(request: pytest.FixtureRequest, new_url: Callable[..., str]) -> Iterator[Opener]:
    """Open a store on a database of the parameter's backend; asynchronous ones speak as sync.

    Called again it opens the same database, where that can be. In the end every store is closed
    and no connection may be left checked out.
    """
    backend, kind = request.param
    url = new_url(backend, at_head=True)
    opened: list[Store] = []
    runner = asyncio.Runner()

    def open_(clock: Callable[[], int] | None = None, **options: object) -> Store:
        settings = StoreSettings(url=url, **options)
        store: Store
        if kind == "sync":
            store = Store(settings=settings, clock=clock)
        else:
            store = Asynchronous(AsyncStore(settings=settings, clock=clock), runner)
        opened.append(store)
        return store

    open_.backend = backend  # type: ignore[attr-defined]
    yield open_
    for store in opened:
        store.close()
        pool = store._database.engine.pool
        assert pool.checkedout() == 0, "a connection was not given back"
    runner.close()
