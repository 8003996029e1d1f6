"""Looks up the addresses of PostgreSQL's hosts for asynchronous connections.

psycopg asks the event loop, which asks in its default executor: where a host has filled that, a
name is found late or never. psycopg asks nothing where it is given addresses.
"""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

from lynkr_store.waiting import in_thread


async def connect(*arguments: Any, **parameters: Any) -> Any:
    """Psycopg's ``AsyncConnection.connect``, with names looked up in a thread of the store's own.

    A name that is not found is left to psycopg, which says so.
    """
    from psycopg import AsyncConnection  # noqa: PLC0415 - an extra

    hosts = _listed(parameters, "host", "PGHOST")
    if any(map(_is_name, hosts)) and not _listed(parameters, "hostaddr", "PGHOSTADDR"):
        ports = _listed(parameters, "port", "PGPORT")
        parameters |= await in_thread("lookup", _with_addresses, hosts, ports)
    return await AsyncConnection.connect(*arguments, **parameters)


def _listed(parameters: Mapping[str, Any], name: str, variable: str) -> list[str]:
    """A parameter that may have a value for each host; libpq takes its default from a variable."""
    value = parameters.get(name) or os.environ.get(variable)
    return str(value).split(",") if value else []


def _is_name(host: str) -> bool:
    if not host or host.startswith(("/", "@")) or host[1:2] == ":":  # of a socket
        return False
    try:
        ip_address(host)
    except ValueError:
        return True
    return False


def _with_addresses(hosts: list[str], ports: list[str]) -> dict[str, str]:
    """The parameters of libpq that name each address of each host."""
    if len(ports) < len(hosts):  # one for all, or none
        ports = (ports or [""]) * len(hosts)
    found = [
        (host, address, port)
        for host, port in zip(hosts, ports, strict=False)
        for address in _addresses(host, port)
    ]
    names = ("host", "hostaddr", "port")
    return {
        name: ",".join(each) for name, each in zip(names, zip(*found, strict=True), strict=True)
    }


def _addresses(host: str, port: str) -> Iterator[str]:
    if not _is_name(host):
        yield "" if host.startswith(("/", "@")) else host
        return
    answers: list[Any] = []
    with suppress(OSError, UnicodeError):
        answers = socket.getaddrinfo(
            host, port or None, proto=socket.IPPROTO_TCP, type=socket.SOCK_STREAM
        )
    yield from [address[0] for *_, address in answers] or [""]
