"""Psycopg's asynchronous connections, without the event loop's default executor.

Psycopg itself looks up host names there and, with a libpq older than 17, cancels statements there.
If a host program has filled the executor, both happen late or never.
"""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from lynkr_store.process.waiting import in_thread


async def connect(*arguments: Any, **parameters: Any) -> Any:
    """An ``AsyncConnection``; a thread of the store's own looks up the host names.

    Psycopg looks up no name if it is given addresses. A name that is not found is passed on as it
    is, and psycopg raises the error.
    """
    hosts = _listed(parameters, "host", "PGHOST")
    if any(map(_is_name, hosts)) and not _listed(parameters, "hostaddr", "PGHOSTADDR"):
        ports = _listed(parameters, "port", "PGPORT")
        parameters |= await in_thread("lookup", _with_addresses, hosts, ports)
    return await _connection_class().connect(*arguments, **parameters)


@lru_cache
def _connection_class() -> Any:
    from psycopg import AsyncConnection, capabilities  # noqa: PLC0415 - an extra

    class Connection(AsyncConnection[Any]):
        async def cancel_safe(self, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109 - psycopg's
            if capabilities.has_cancel_safe():
                await super().cancel_safe(timeout=timeout)
            else:
                await in_thread("cancel", self.cancel)

    return Connection


def _listed(parameters: Mapping[str, Any], name: str, variable: str) -> list[str]:
    """A parameter with one value for each host; its default is an environment variable of libpq."""
    value = parameters.get(name) or os.environ.get(variable)
    return str(value).split(",") if value else []


def _is_name(host: str) -> bool:
    if not host or host.startswith(("/", "@")) or host[1:2] == ":":  # the path of a Unix socket
        return False
    try:
        ip_address(host)
    except ValueError:
        return True
    return False


def _with_addresses(hosts: list[str], ports: list[str]) -> dict[str, str]:
    """The parameters of libpq for each address of each host."""
    if len(ports) < len(hosts):  # one port for all hosts, or none
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
