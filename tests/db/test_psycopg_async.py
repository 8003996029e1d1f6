"""Psycopg's asynchronous connections, without the event loop's default executor."""

import asyncio
import socket
import threading

import psycopg
import pytest

from lynkr_store.db import psycopg_async

LISTED = {
    "db": ["10.0.0.1", "::1"],
    "other": ["10.0.0.2"],
}
CASES = [
    ({}, {}),
    ({"host": ""}, {}),
    ({"host": "/run/postgresql", "port": "1"}, {}),
    ({"host": "@abstract"}, {}),
    ({"host": "127.0.0.1"}, {}),
    ({"host": "::1", "port": 5433}, {}),
    ({"host": "/run/a,127.0.0.1"}, {}),
    ({"host": "db", "hostaddr": "10.9.9.9"}, {}),
    ({"host": "db"}, {"host": "db,db", "hostaddr": "10.0.0.1,::1", "port": ","}),
    (
        {"host": "db", "port": 5433},
        {"host": "db,db", "hostaddr": "10.0.0.1,::1", "port": "5433,5433"},
    ),
    (
        {"host": "other,db", "port": "1,2"},
        {"host": "other,db,db", "hostaddr": "10.0.0.2,10.0.0.1,::1", "port": "1,2,2"},
    ),
    (
        {"host": "/run/a,127.0.0.1,other,unknown", "port": "7"},
        {
            "host": "/run/a,127.0.0.1,other,unknown",
            "hostaddr": ",127.0.0.1,10.0.0.2,",
            "port": "7,7,7,7",
        },
    ),
]


@pytest.fixture
def asked(monkeypatch):
    """What psycopg is given, and the names that were looked up."""
    seen = {"names": [], "threads": set()}

    async def connect(*arguments, **parameters):
        seen["parameters"] = parameters

    def look_up(host, port, **_):
        seen["names"].append((host, port))
        seen["threads"].add(threading.current_thread().name)
        if host not in LISTED:
            raise socket.gaierror
        return [(0, 0, 0, "", (address, port)) for address in LISTED[host]]

    monkeypatch.setattr(psycopg.AsyncConnection, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for name in ("PGHOST", "PGHOSTADDR", "PGPORT"):
        monkeypatch.delenv(name, raising=False)
    return seen


@pytest.mark.parametrize(("given", "added"), CASES)
def test_each_name_is_replaced_by_its_addresses(asked, given, added):
    asyncio.run(psycopg_async.connect(**given, user="u"))
    assert asked["parameters"] == {**given, "user": "u", **added}
    assert asked["threads"] <= {"lynkr-store-lookup"}
    assert bool(asked["threads"]) is bool(added)


def test_what_libpq_takes_from_the_environment_counts(asked, monkeypatch):
    monkeypatch.setenv("PGHOST", "other")
    monkeypatch.setenv("PGPORT", "99")
    asyncio.run(psycopg_async.connect())
    assert asked["parameters"] == {"host": "other", "hostaddr": "10.0.0.2", "port": "99"}
    monkeypatch.setenv("PGHOSTADDR", "10.1.1.1")
    asyncio.run(psycopg_async.connect())
    assert asked["parameters"] == {}


def test_a_name_that_nobody_knows_is_psycopgs_to_report():
    with pytest.raises(psycopg.OperationalError, match="resolve host"):
        asyncio.run(psycopg_async.connect(host="name.invalid", connect_timeout=5))


@pytest.mark.parametrize("given", [g for g, added in CASES if added])
def test_psycopg_looks_up_no_name_that_has_its_address(asked, given, monkeypatch):
    """It takes the lists apart as they were put together."""
    asyncio.run(psycopg_async.connect(**given))
    names = []

    async def look_up(_, host, *__, **___):
        names.append(host)
        raise socket.gaierror

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", look_up)
    attempts = asyncio.run(attempts_of(asked["parameters"]))
    assert names == (["unknown"] if "unknown" in given["host"] else [])
    told = [(a.get("host"), a.get("hostaddr") or "", a["port"]) for a in attempts]
    hosts, found, ports = (asked["parameters"][n].split(",") for n in ("host", "hostaddr", "port"))
    assert told == [t for t in zip(hosts, found, ports, strict=True) if t[0] != "unknown"]


async def attempts_of(parameters):
    from psycopg._conninfo_attempts_async import conninfo_attempts_async  # noqa: PLC0415

    return await conninfo_attempts_async(parameters)
