"""What a database's URL says, and what people may see of it.

A password that is not percent-encoded splits a URL in the wrong places: a part of it is then taken
for a host, a port or a parameter. So no error of this module repeats anything of the URL but the
name of a parameter, and that only where the URL cannot have been split wrongly.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from sqlalchemy import URL
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from lynkr_store.backend import Backend
from lynkr_store.exceptions import BadArgument, UnsupportedDatabase

REMEDY: Final = "use sqlite:///path/to/file.db, sqlite:// (in memory) or postgresql://user@host/db"
_ENCODE: Final = (
    'percent-encode the user and the password (urllib.parse.quote(password, safe="")), and give '
    "several hosts as postgresql://user@/db?host=h1:5432&host=h2:5432"
)

PREPARE_THRESHOLD: Final = "prepare_threshold"
"""The parameter of psycopg's own that a URL may have: after how many times it prepares a statement
on the server, or ``none``."""

_SECRETS: Final = ("sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
_REPEATABLE: Final = ("host", "port", "options")


def read_url(url: str | URL) -> URL:
    """Take a URL apart; a password in its query becomes the URL's password, which never shows.

    Raises:
        UnsupportedDatabase: It is none, or a password in it is not percent-encoded.
    """
    try:
        parsed = make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError):
        raise UnsupportedDatabase(f"url: no supported database's URL; {REMEDY}") from None
    except ValueError:  # the port is none
        raise UnsupportedDatabase(
            f"url: what stands for the port is no number: {_ENCODE}"
        ) from None
    if "plugin" in parsed.query:
        raise BadArgument("url: plugins of SQLAlchemy are not supported; leave the parameter out")
    if parsed.get_backend_name() == "postgresql":
        if "@" in (parsed.host or "") or (isinstance(url, str) and _has_stray_at(url, parsed)):
            raise UnsupportedDatabase(f"url: it has an @ too many: {_ENCODE}")
        return _with_password_in_its_place(parsed)
    try:
        parsed.get_dialect()().create_connect_args(parsed)
    except ValueError:
        raise BadArgument(
            "url: a parameter's value is not of its kind, such as timeout=5"
        ) from None
    return parsed


def _has_stray_at(text: str, parsed: URL) -> bool:
    """Whether there is an @ behind the one that ends the user and the password.

    In a parameter's value it may stand; elsewhere it is more likely to be of a password than of a
    database's name, which can be percent-encoded too.
    """
    behind = text.partition("://")[2]
    if parsed.username is not None:
        behind = behind.partition("@")[2]
    before, _, query = behind.partition("?")
    return "@" in before or any(
        "@" in part and not re.match(r"[a-z_]+=", part) for part in query.split("&")
    )


def _with_password_in_its_place(url: URL) -> URL:
    if "password" not in url.query:
        return url
    password, user = _single(url, "password"), _single(url, "user")
    moved = url.difference_update_query(["password", "user"])
    return moved.set(username=user or url.username or "", password=password)


def shown(url: URL) -> str:
    """The URL as people may see it: without any password, wherever it stands."""
    return read_url(url).difference_update_query(_SECRETS).render_as_string(hide_password=True)


def without_secrets(url: URL) -> URL:
    """The URL of an engine, which shows its own to who asks; `parameters` has what is missing."""
    return url.difference_update_query([*_SECRETS, PREPARE_THRESHOLD])


def parameters(url: URL) -> dict[str, Any]:
    """What psycopg is to be given beside a PostgreSQL URL `without_secrets`.

    Raises:
        BadArgument: A parameter of the query is none of libpq's, or not of its form.
    """
    known = {option.keyword.decode() for option in _libpq_options()}
    for name, value in url.query.items():
        if name not in known and name != PREPARE_THRESHOLD:
            named = "" if "@" in str(value) else f" {name!r}"
            raise BadArgument(
                f"url: PostgreSQL's library knows no parameter{named}; if a password has a ?, "
                f"{_ENCODE}"
            )
        if not isinstance(value, str) and name not in _REPEATABLE:
            raise BadArgument(f"url: the parameter {name} is given twice")
    if not is_utf8(_single(url, "client_encoding")):
        raise BadArgument("url: client_encoding: the store always uses UTF-8; leave it out")
    given: dict[str, Any] = {n: url.query[n] for n in _SECRETS if n in url.query}
    given["client_encoding"] = "UTF8"  # whatever PGCLIENTENCODING says
    given["options"] = options_of(url)  # in place of PGOPTIONS; nothing is sent if it is empty
    if timeout := _single(url, "connect_timeout"):
        given["connect_timeout"] = _whole("connect_timeout", timeout)
    return given


def is_utf8(encoding: str | None) -> bool:
    """Whether the name of an encoding, as servers, clients and poolers write it, is UTF-8's."""
    return encoding is None or encoding.upper().replace("-", "") in ("UTF8", "UNICODE")


def _libpq_options() -> list[Any]:
    from psycopg import pq  # noqa: PLC0415 - an extra

    return pq.Conninfo.get_defaults()


def prepare_threshold(url: URL, default: int) -> int | None:
    """After how many times a statement is prepared on the server; None for never.

    Raises:
        BadArgument: It is neither a number from 0 on nor ``none``.
    """
    given = _single(url, PREPARE_THRESHOLD)
    if given is None:
        return default
    return None if given.lower() == "none" else _whole(PREPARE_THRESHOLD, given)


def options_of(url: URL) -> str:
    """The startup options of the server that the URL names."""
    given = url.query.get("options", "")
    return given if isinstance(given, str) else " ".join(given)


def settings_in(options: str) -> Iterator[tuple[str, str]]:
    """The settings in startup options, ``-c name=value`` or ``--name=value``, in lower case.

    See https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNECT-OPTIONS
    """
    words = (re.sub(r"\\(.)", r"\1", w) for w in re.findall(r"(?:\\.|[^\s\\])+", options))
    for word in words:
        if word == "-c":
            setting = next(words, "")
        elif word.startswith(("-c", "--")):
            setting = word[2:]
        else:
            continue
        name, equals, value = setting.partition("=")
        if equals:
            yield name.lower().replace("-", "_"), value


def _single(url: URL, name: str) -> str | None:
    value = url.query.get(name)
    if value is None or isinstance(value, str):
        return value
    raise BadArgument(f"url: the parameter {name} is given twice")


def _whole(name: str, text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise BadArgument(f"url: the parameter {name} wants a whole number from 0 on")
    return int(text)


def is_memory(url: URL) -> bool:
    """Whether the URL names an SQLite database in memory."""
    return url.get_backend_name() == Backend.SQLITE and url.database in (None, "", ":memory:")


def file_of(url: URL) -> Path | None:
    """The file of an SQLite database; None for one in memory, and for other backends.

    None, too, for a ``file:`` name that is relative: what it names changes with the directory.
    """
    name = url.database
    if url.get_backend_name() != Backend.SQLITE or is_memory(url) or not name:
        return None
    if not name.startswith("file:"):
        return Path(name)
    path = Path(unquote(urlsplit(name).path))
    return path if path.is_absolute() and url.query.get("mode") != "memory" else None
