"""Reads a database's URL, and shows it without its passwords.

If a password is not percent-encoded, the URL is split in the wrong places, and a part of the
password is taken for a host, a port or a parameter. So no error of this module repeats any part of
the URL except the name of a parameter, and that only if the URL cannot have been split wrongly.
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
"""A parameter for psycopg that a URL may have: the number of executions after which it prepares a
statement on the server, or ``none``."""

_PYTHON_PARAMETERS: Final = frozenset(  # of sqlite3.connect(), as SQLAlchemy takes them
    {"timeout", "isolation_level", "detect_types", "check_same_thread", "cached_statements"}
)
_MOST_PORT: Final = 65_535
_SECRETS: Final = ("sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
_REPEATABLE: Final = ("host", "port", "options")


def read_url(url: str | Path | URL) -> URL:
    """Parse a URL; a password in its query becomes the URL's password, which is never shown.

    A `Path` is the file of an SQLite database.

    Raises:
        UnsupportedDatabase: It is not the URL of a supported database, or a password in it is not
            percent-encoded.
        BadArgument: A parameter is not supported, given twice, or has a wrong value.
    """
    parsed = _parsed(url)
    if "plugin" in parsed.query:
        raise BadArgument("url: plugins of SQLAlchemy are not supported; leave the parameter out")
    if parsed.get_backend_name() == "postgresql":
        if "@" in (parsed.host or "") or (isinstance(url, str) and _has_stray_at(url, parsed)):
            raise UnsupportedDatabase(f"url: it has one @ too many: {_ENCODE}")
        return _with_password_in_its_place(parsed)
    _check_sqlite(parsed)
    return parsed


def _check_sqlite(url: URL) -> None:
    if "uri" not in url.query and not _PYTHON_PARAMETERS.issuperset(url.query):
        raise BadArgument(
            "url: SQLite's own parameters need uri=true, as in "
            "sqlite:///file:path/to/file.db?mode=ro&uri=true"
        )
    try:
        url.get_dialect()().create_connect_args(url)
    except ArgumentError:  # it has a host, user, password or port
        raise UnsupportedDatabase(
            "url: a file's path comes after three slashes, sqlite:///path/to/file.db, or after "
            "four if it is absolute"
        ) from None
    except ValueError:
        raise BadArgument(
            "url: the value of a parameter has the wrong type; write it as in timeout=5"
        ) from None


def _parsed(url: str | Path | URL) -> URL:
    try:
        parsed = URL.create("sqlite", database=str(url)) if isinstance(url, Path) else make_url(url)
        parsed.get_dialect()
    except (ArgumentError, NoSuchModuleError):
        if isinstance(url, str) and url.startswith("postgres:"):
            raise UnsupportedDatabase("url: write postgresql:// instead of postgres://") from None
        raise UnsupportedDatabase(f"url: not a supported database's URL; {REMEDY}") from None
    except ValueError:
        raise UnsupportedDatabase(f"url: the port is not a number: {_ENCODE}") from None
    if parsed.port is not None and not 0 < parsed.port <= _MOST_PORT:
        raise UnsupportedDatabase(f"url: the port must be 1 to {_MOST_PORT}: {_ENCODE}")
    return parsed


def _has_stray_at(text: str, parsed: URL) -> bool:
    """Whether an @ follows the one that ends the user and the password.

    It is allowed in a parameter's value. Elsewhere it more likely belongs to a password than to a
    database's name, and the name can be percent-encoded.
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


def url_text(url: str | Path) -> str:
    """The URL as text; a `Path` is the file of an SQLite database."""
    if not isinstance(url, Path):
        return url
    return URL.create("sqlite", database=str(url)).render_as_string()


def shown(url: URL) -> str:
    """The URL without any password, wherever in the URL that is."""
    return read_url(url).difference_update_query(_SECRETS).render_as_string(hide_password=True)


def without_secrets(url: URL) -> URL:
    """The URL for an engine, whose ``url`` anyone can read; `parameters` returns the rest."""
    return url.difference_update_query([*_SECRETS, PREPARE_THRESHOLD])


def parameters(url: URL) -> dict[str, Any]:
    """The parameters for psycopg in addition to a PostgreSQL URL `without_secrets`.

    Raises:
        BadArgument: libpq has no parameter of that name, or it is given twice or wrong.
    """
    known = {option.keyword.decode() for option in _libpq_options()}
    for name, value in url.query.items():
        if name not in known and name != PREPARE_THRESHOLD:
            named = "" if "@" in str(value) else f" {name!r}"
            raise BadArgument(
                f"url: PostgreSQL's client library has no parameter{named}; if a password contains "
                f"a ?, {_ENCODE}"
            )
        if not isinstance(value, str) and name not in _REPEATABLE:
            raise BadArgument(f"url: the parameter {name} is given twice")
    if not is_utf8(_single(url, "client_encoding")):
        raise BadArgument("url: client_encoding: the store always uses UTF-8; leave it out")
    given: dict[str, Any] = {n: url.query[n] for n in _SECRETS if n in url.query}
    given["client_encoding"] = "UTF8"  # whatever PGCLIENTENCODING says
    given["options"] = options_of(url)  # overrides PGOPTIONS; nothing is sent if it is empty
    if timeout := _single(url, "connect_timeout"):
        given["connect_timeout"] = _whole("connect_timeout", timeout)
    return given


def is_utf8(encoding: str | None) -> bool:
    """Whether the name of an encoding means UTF-8, as servers, clients and poolers write it."""
    return encoding is None or encoding.upper().replace("-", "") in ("UTF8", "UNICODE")


def _libpq_options() -> list[Any]:
    from psycopg import pq  # noqa: PLC0415 - an extra

    return pq.Conninfo.get_defaults()


def prepare_threshold(url: URL, default: int) -> int | None:
    """The number of executions after which a statement is prepared on the server; None: never.

    Raises:
        BadArgument: It is neither a whole number of 0 or more nor ``none``.
    """
    given = _single(url, PREPARE_THRESHOLD)
    if given is None:
        return default
    return None if given.lower() == "none" else _whole(PREPARE_THRESHOLD, given)


def options_of(url: URL) -> str:
    """The server's startup options in the URL."""
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
        raise BadArgument(f"url: the parameter {name} must be a whole number of 0 or more")
    return int(text)


def is_memory(url: URL) -> bool:
    """Whether the URL names an SQLite database in memory."""
    return url.get_backend_name() == Backend.SQLITE and url.database in (None, "", ":memory:")


def file_of(url: URL) -> Path | None:
    """The file of an SQLite database; None for one in memory, and for other backends.

    Also None for a relative ``file:`` name, which means another file in another directory.
    """
    name = url.database
    if url.get_backend_name() != Backend.SQLITE or is_memory(url) or not name:
        return None
    if not name.startswith("file:"):
        return Path(name)
    path = Path(unquote(urlsplit(name).path))
    return path if path.is_absolute() and url.query.get("mode") != "memory" else None
