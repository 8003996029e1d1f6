"""What is kept of the texts holds on every way into the table."""

import asyncio
import logging
import os
import subprocess
import sys

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from lynkr_store import (
    AsyncStore,
    RoutingRepository,
    Store,
    StoreSettings,
    TextPolicy,
    create_store_engine,
    writing,
)
from lynkr_store.db.dialect import parse_url
from lynkr_store.db.engines import create_store_async_engine
from lynkr_store.db.models import RoutingTelemetry
from lynkr_store.ingest.spool import Spool
from lynkr_store.ingest.validation import row_of
from lynkr_store.schemas import JSON_FIELDS, LONG_FIELDS, TEXT_FIELDS
from tests.support.recorded import ROOT
from tests.support.stores import Asynchronous, adds_up, eventually

AT = 1_750_000_000_000
MARK = "Hn6Prompt"

RECORD = {
    "provider": "p",
    "request_text": f"{MARK} asked",
    "response_text": f"{MARK} answered",
    **dict.fromkeys(JSON_FIELDS, f'["{MARK}"]'),
}


def masked(said):
    return said.replace(MARK, "***")


def stored(engine, request_id=None):
    """The free texts of each row, by name."""
    names = ", ".join(LONG_FIELDS)
    with engine.connect() as connection:
        found = connection.execute(text(f"SELECT {names} FROM routing_telemetry ORDER BY id"))
        return [dict(row) for row in found.mappings()]


NONE_KEPT = {**RECORD, **dict.fromkeys(TEXT_FIELDS)}
MASKED = {name: masked(RECORD[name]) for name in LONG_FIELDS}
CUT = {**RECORD, "request_text": "Hn6", "response_text": "Hn6"}

OPTIONS = {
    "capture_text": ({"capture_text": False}, NONE_KEPT),
    "redact": ({"redact": masked}, MASKED),
    "text_max_chars": ({"text_max_chars": 3}, CUT),
    "nothing": ({}, RECORD),
}


def of_texts(values):
    return {name: values[name] for name in LONG_FIELDS}


# -- a repository in a host's own Session ------------------------------------------------------


def sessions(store):
    """Ways to bind a Session to a store's engine."""
    yield "engine", lambda: Session(writing(store.engine))
    yield "as it is", lambda: Session(store.engine)
    yield "binds", lambda: Session(binds={RoutingTelemetry: store.engine})
    yield "table", lambda: Session(binds={RoutingTelemetry.__table__: store.engine})
    yield "connection", lambda: Session(store.engine.connect())


@pytest.mark.parametrize(
    ("option", "way"),
    [*((option, 0) for option in OPTIONS), *(("redact", way) for way in range(1, 5))],
)
@pytest.mark.parametrize("own", [True, False], ids=["our engine", "a host's engine"])
def test_a_repository_keeps_what_the_store_keeps_whose_engine_it_is(url, way, option, own):
    options, expected = OPTIONS[option]
    host = create_engine(parse_url(url))
    settings = StoreSettings(url=url, **options)
    with Store(settings=settings, **({} if own else {"engine": host})) as store:
        store.maintain()
        _, make = list(sessions(store))[way]
        with make() as session:
            assert RoutingRepository(session).add_many([RECORD, RECORD]) == 2
            session.commit()
            session.close()
            if way == 4:
                session.get_bind().close()
        assert stored(host) == [of_texts(expected)] * 2
    host.dispose()


@pytest.mark.parametrize("option", OPTIONS)
def test_a_hosts_own_engine_is_bound_by_the_store_that_uses_it(url, option):
    options, expected = OPTIONS[option]
    host = create_engine(parse_url(url))
    with Store(engine=host, settings=StoreSettings(schema_name="public", **options)):
        with Session(host) as session, session.begin():
            RoutingRepository(session).add_many([RECORD])
        assert stored(host) == [of_texts(expected)]
    host.dispose()


@pytest.mark.parametrize("option", OPTIONS)
def test_an_async_engine_is_bound_by_the_store_that_uses_it(url, engine, option):
    options, expected = OPTIONS[option]

    async def body():
        host = create_async_engine(create_store_async_engine(url).url)
        store = AsyncStore(engine=host, settings=StoreSettings(**options))
        await store.maintain()
        async with AsyncSession(host) as session, session.begin():
            added = await session.run_sync(lambda s: RoutingRepository(s).add_many([RECORD]))
            assert added == 1
        assert await store.add_many([RECORD]) == 1
        await store.close()
        await host.dispose()

    asyncio.run(body())
    assert stored(engine) == [of_texts(expected)] * 2


ENVIRONMENTS = {
    "capture_text": ({"LYNKR_STORE_CAPTURE_TEXT": "false"}, NONE_KEPT),
    "text_max_chars": ({"LYNKR_STORE_TEXT_MAX_CHARS": "3"}, CUT),
    "nothing": ({}, RECORD),
    "empty": ({"LYNKR_STORE_CAPTURE_TEXT": ""}, RECORD),
    "others are wrong": (
        {"LYNKR_STORE_CAPTURE_TEXT": "0", "LYNKR_STORE_QUEUE_MAX_ROWS": "x"},
        NONE_KEPT,
    ),
}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("kind", ["sync", "async", "ours"])
def test_on_another_engine_a_repository_keeps_what_the_environment_says(
    url, engine, environment, kind, monkeypatch
):
    variables, expected = ENVIRONMENTS[environment]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    async def body():
        host = create_async_engine(create_store_async_engine(url).url)
        async with AsyncSession(host) as session, session.begin():
            await session.run_sync(lambda s: RoutingRepository(s).add_many([RECORD]))
        await host.dispose()

    if kind == "async":
        asyncio.run(body())
    else:
        host = create_store_engine(url) if kind == "ours" else create_engine(parse_url(url))
        with Session(host) as session, session.begin():
            RoutingRepository(session).add_many([RECORD])
        host.dispose()
    assert stored(engine) == [of_texts(expected)]


def test_a_policy_that_is_given_wins(url, engine, monkeypatch):
    monkeypatch.setenv("LYNKR_STORE_CAPTURE_TEXT", "true")
    with (
        Store(settings=StoreSettings(url=url, redact=masked)) as store,
        Session(store.engine) as session,
        session.begin(),
    ):
        policy = TextPolicy(capture=False)
        RoutingRepository(session, policy=policy).add_many([RECORD])
    assert stored(engine) == [of_texts(NONE_KEPT)]


def test_an_environment_that_is_wrong_fails_no_read_and_stores_nothing(url, engine, monkeypatch):
    monkeypatch.setenv("LYNKR_STORE_CAPTURE_TEXT", "perhaps")
    with Session(engine) as session, session.begin():
        repository = RoutingRepository(session)
        assert repository.query() == []
        with pytest.raises(ValueError, match="LYNKR_STORE_CAPTURE_TEXT"):
            repository.add_many([RECORD])
        assert repository.query() == []


def test_a_policy_shows_nowhere(url, caplog):
    def redact_with_a_name_of_its_own(said):
        return said

    caplog.set_level(logging.DEBUG)
    for name in ("sqlalchemy.engine", "sqlalchemy.pool", "lynkr_store"):
        caplog.set_level(logging.DEBUG, name)
    settings = StoreSettings(url=url, redact=redact_with_a_name_of_its_own, echo=True)
    with Store(settings=settings) as store, Session(writing(store.engine)) as session:
        RoutingRepository(session).add_many([RECORD])
        shown = (store, store.engine, session.connection(), session.connection().engine)
        for said in (*map(repr, shown), *map(str, shown), caplog.text):
            assert "TextPolicy" not in said
            assert "redact_with" not in said
            assert "lynkr_store_text_policy" not in said


README = """
from sqlalchemy.orm import Session
from lynkr_store import RoutingRepository, Store, writing

with Store("sqlite:///telemetry.db") as store:
    store.maintain()
    with Session(writing(store.engine)) as session, session.begin():
        repository = RoutingRepository(session)
        repository.add_many([{"provider": "ollama", "request_text": "Hn6Prompt"}])
"""


def test_the_readmes_example_keeps_no_text_where_none_is_to_be_kept(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LYNKR_")}
    subprocess.run(
        [sys.executable, "-W", "error", "-c", README],
        cwd=tmp_path,
        env=environment | {"LYNKR_STORE_CAPTURE_TEXT": "false", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert b"ollama" in (tmp_path / "telemetry.db").read_bytes()
    assert all(MARK.encode() not in place.read_bytes() for place in tmp_path.iterdir())


# -- a spool that another process left ---------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return tmp_path / "spools" / "spool.db"


def left(path, records, policy=None, batches=1):
    """What a process left that kept its texts by another policy."""
    spool = Spool(path, 2**26)
    spool.open()
    for batch in range(batches):
        made = [row_of(record, AT, policy or TextPolicy())[0] for record in records]
        spool.enter(f"{batch:032x}", made, None)
    spool.close()


def replayed(url, path, kind, **options):
    """The health of a store when it has stored what it found."""
    settings = StoreSettings(url=url, spool_path=path, **options)
    with asyncio.Runner() as runner:
        store = (
            Store(settings=settings)
            if kind == "sync"
            else Asynchronous(AsyncStore(settings=settings), runner)
        )
        with store:
            eventually(lambda: store.health().recovered and not store.health().spooled)
            return store.health()


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize(
    ("option", "mended"),
    [
        ("capture_text", {"not_captured": 6}),
        ("redact", {"redacted": 15}),
        ("text_max_chars", {"cut": 6}),
        ("nothing", {}),
    ],
)
def test_rows_of_another_processs_spool_are_kept_as_this_one_keeps_them(
    url, engine, path, option, mended, kind
):
    left(path, [RECORD] * 3)
    options, expected = OPTIONS[option]
    health = replayed(url, path, kind, **options)
    assert stored(engine) == [of_texts(expected)] * 3
    assert dict(health.mended_by) == mended
    assert (health.recovered, health.written, health.dropped) == (3, 3, 0)
    assert adds_up(health)


def test_what_an_earlier_policy_kept_out_stays_out(url, engine, path):
    left(path, [RECORD], TextPolicy(capture=False, redact=masked))
    health = replayed(url, path, "sync", redact=masked)
    assert stored(engine) == [{**MASKED, **dict.fromkeys(TEXT_FIELDS)}]
    assert dict(health.mended_by) == {}, "nothing was changed"


def test_rows_whose_redaction_fails_on_replay_are_stored_without_texts(url, engine, path):
    def redact(said):
        raise ValueError(said)

    left(path, [RECORD, {"provider": "p"}])
    health = replayed(url, path, "sync", redact=redact)
    assert stored(engine) == [dict.fromkeys(LONG_FIELDS)] * 2
    assert dict(health.mended_by) == {"redact_failed": 1}
    assert (health.written, health.dropped) == (2, 0)
    assert adds_up(health)


@pytest.mark.parametrize("answer", [None, 5, b"bytes"])
def test_a_redaction_that_returns_no_text_fails_on_replay_too(url, engine, path, answer):
    left(path, [RECORD])
    health = replayed(url, path, "sync", redact=lambda _: answer)
    assert stored(engine) == [dict.fromkeys(LONG_FIELDS)]
    assert dict(health.mended_by) == {"redact_failed": 1}


def test_a_processs_own_batches_are_redacted_once(url, engine, path):
    def prefixed(said):
        return f"<{said}>"

    settings = StoreSettings(url=url, spool_path=path, spool_after_s=0, redact=prefixed)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE routing_telemetry RENAME TO elsewhere"))
    with Store(settings=settings) as store:
        for _ in range(3):
            assert store.record(provider="p", request_text="t")
        assert store.flush(30)
        assert store.health().spooled == 3
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE elsewhere RENAME TO routing_telemetry"))
        eventually(lambda: store.health().spooled == 0)
        assert dict(store.health().mended_by) == {}
    assert [row["request_text"] for row in stored(engine)] == ["<t>"] * 3


def test_batches_that_moved_from_a_damaged_file_are_another_processs_still(url, engine, path):
    left(path, [RECORD], batches=3)
    content = path.read_bytes()
    place = content.index(b"Hn6Prompt asked")
    path.write_bytes(content[:place] + b"X" + content[place + 1 :])
    health = replayed(url, path, "sync", capture_text=False)
    assert stored(engine) == [of_texts(NONE_KEPT)] * 2
    assert dict(health.dropped_by) == {"spool_damaged": 1}
    assert dict(health.mended_by) == {"not_captured": 4}
    assert adds_up(health)
