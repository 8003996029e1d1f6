"""All options of a store. An argument overrides the environment, which overrides the default."""

import logging
import os
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lynkr_store.exceptions import BadArgument
from lynkr_store.process.log import say

DEFAULT_URL: Final = "sqlite:///.lynkr/telemetry.db"
"""Where the gateway keeps its telemetry, relative to the working directory."""

_MIB: Final = 2**20
_GIB: Final = 2**30
_TIB: Final = 2**40
_LEAST_QUEUE_BYTES: Final = 2_048  # one unit in which the queue measures records
_YEAR_S: Final = 366 * 86_400
_MOST_STATEMENT_S: Final = 2_147_483  # PostgreSQL counts milliseconds in 32 bits; 0 is no limit
_SCHEMA_BYTES: Final = 63  # https://www.postgresql.org/docs/current/sql-syntax-lexical.html
_LEAST_SPOOL_BYTES: Final = 32_768  # an empty spool has five pages of 4,096 bytes


def checked_schema(name: str | None) -> str | None:
    """The schema's name; None for None and ``""``.

    Raises:
        BadArgument: PostgreSQL does not allow a schema of that name.
    """
    if not name:
        return None
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        size = 0
    if "\0" in name or not 0 < size <= _SCHEMA_BYTES or name.startswith("pg_") or name == "$user":
        raise BadArgument(
            f"schema_name: give 1 to {_SCHEMA_BYTES} bytes of text without NUL, not starting "
            "with pg_, and not $user"
        )
    return name


_PREFIX: Final = "LYNKR_STORE_"
_SIMILAR: Final = 0.7  # of 1, as difflib compares: SCHEMA_NAME is as similar to SCHEMA


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        validate_by_name=True,
    )

    if not TYPE_CHECKING:  # a type checker takes the arguments from the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                refused = BadArgument("; ".join(_words(error, values, type(self))))
            else:
                return
            raise refused


def _words(error: ValidationError, given: dict[str, Any], model: type[BaseSettings]) -> list[str]:
    """Each error, with the argument or the environment variable that has the value."""
    words = []
    for found in error.errors(include_url=False, include_context=False, include_input=False):
        name = str(found["loc"][0])
        if found["type"] == "extra_forbidden":
            words.append(_unknown(name, get_close_matches(name, model.model_fields, n=1)))
            continue
        if name not in given and not name.startswith(_PREFIX):
            name = f"{_PREFIX}{name.upper()}"
        words.append(
            f"{name}: {found['msg'].removeprefix('Value error, ').removeprefix('schema_name: ')}"
        )
    return words


def _unknown(name: str, similar: Iterable[str]) -> str:
    return f"{name}: unknown option" + "".join(f"; did you mean {each}?" for each in similar)


_unknown_said: Final[set[str]] = set()


def _warn_of_unknown(known: Iterable[str]) -> None:
    """Log each variable whose name is similar to an option's, once.

    Not every other one with the prefix: Kubernetes sets some for a service of that name.
    """
    options = [name.removeprefix(_PREFIX) for name in known]
    for given in os.environ:
        name = given.upper()
        option = name.removeprefix(_PREFIX)
        if option in (name, *options) or name in _unknown_said:
            continue
        if similar := get_close_matches(option, options, n=1, cutoff=_SIMILAR):
            _unknown_said.add(name)
            say(logging.WARNING, "%s", _unknown(name, [_PREFIX + similar[0]]))


class DatabaseSettings(_Settings):
    """The options of the database: the part of `StoreSettings` that a migration needs.

    Raises:
        BadArgument: The message names the option, or its environment variable, and the value that
            it needs.
    """

    url: Annotated[str, Field(repr=False)] = DEFAULT_URL
    """The database: ``sqlite:///path``, ``sqlite://`` (in memory) or ``postgresql://…``."""
    migrate_url: Annotated[str | None, Field(repr=False)] = None
    """PostgreSQL: another URL of the same database, for changes of the schema alone: if ``url``
    leads to a pooler, or its role may not create tables. Where an argument gives ``url``, the
    environment's is not used."""
    schema_name: Annotated[
        str | None,
        Field(validation_alias="LYNKR_STORE_SCHEMA"),
        AfterValidator(checked_schema),
    ] = None
    """PostgreSQL: the schema that holds all of the store's tables, created if permitted. None or
    ``""``: the server's search_path decides. Environment variable: ``LYNKR_STORE_SCHEMA``."""

    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            if "url" in values:  # the environment's would lead to another database
                values.setdefault("migrate_url", None)
            super().__init__(**values)


class TextSettings(_Settings):
    """What is kept of free texts: the part of `StoreSettings` that is needed without a store.

    Raises:
        BadArgument: The message names the option, or its environment variable, and the value that
            it needs.
    """

    capture_text: bool = True
    """Store the texts of people and models (``request_text``, ``response_text``)."""
    text_max_chars: Annotated[int, Field(ge=0)] = 65_536
    """Characters kept of each of the two texts."""
    redact: Annotated[Callable[[str], str] | None, NoDecode] = None
    """A function that takes each free text (the two texts, and the JSON of ``attributes``,
    ``candidates`` and ``cache_decision``) and returns what is stored; only in code. It may receive
    its own results, because rows from another process's spool are redacted again. If it raises an
    exception, the row is stored without its free texts, and this is counted."""


class StoreSettings(TextSettings, DatabaseSettings):
    """The options of a `Store`, read from ``LYNKR_STORE_*`` when an instance is created.

    Raises:
        BadArgument: The message names the option, or its environment variable, and the value that
            it needs.
    """

    enabled: bool = True
    """False: every method works, nothing is opened or stored, and reads find no rows. The database
    is an empty one in memory, whatever ``url`` or engine was given."""
    upgrade_on_open: bool | None = None
    """Create, adopt and upgrade the schema on first use. Default: yes on SQLite, no on
    PostgreSQL."""
    cache_ttl_s: Annotated[float, Field(ge=0, le=_YEAR_S, allow_inf_nan=False)] = 5.0
    """Seconds for which a statistic is answered from the cache; 0 switches the cache off."""
    queue_max_rows: Annotated[int, Field(ge=1, le=10**9)] = 50_000
    """Maximum records in the queue; further ones are dropped and counted."""
    queue_max_bytes: Annotated[int, Field(ge=_LEAST_QUEUE_BYTES, le=_TIB)] = 64 * _MIB
    """Maximum bytes of records in the queue; a record that does not fit is dropped and counted. The
    minimum holds one record of a few hundred bytes."""
    batch_max_rows: Annotated[int, Field(ge=1, le=10**9)] = 1_000
    """Maximum records written in one transaction."""
    flush_interval_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 0.5
    """Seconds after which a batch is written even if it is not full."""
    spool_path: str | Path | None = None
    """A local file that holds batches while the database is unreachable; None keeps them in
    memory."""
    spool_max_bytes: Annotated[int, Field(ge=_LEAST_SPOOL_BYTES, le=_TIB)] = _GIB
    """Maximum size of the spool of one process."""
    spool_after_s: Annotated[float, Field(ge=0, le=_YEAR_S, allow_inf_nan=False)] = 5.0
    """Seconds without the database after which batches enter the spool."""
    handle_sigterm: bool = False
    """Write pending records on SIGTERM, then run the handler that was installed before. Without
    another handler, the store is closed."""
    strict: bool = False
    """For a host's own tests: ``record()`` raises `BadArgument` for a record that would be
    rejected."""
    retention_days: Annotated[float, Field(gt=0, le=36_525)] | None = None
    """``maintain()`` and the store's own thread delete older rows; None keeps all rows."""
    text_retention_days: Annotated[float, Field(gt=0, le=36_525)] | None = None
    """``maintain()`` and the store's own thread remove the two texts of older rows; None keeps the
    texts as long as their rows."""
    rollup_retention_days: Annotated[float, Field(gt=0, le=36_525)] = 400
    """Days for which roll-ups are kept after retention removed their rows; roll-ups of existing
    rows are always kept."""
    maintenance_interval_s: Annotated[float, Field(ge=0.001, le=_YEAR_S, allow_inf_nan=False)] = 300
    """Seconds between two runs of the store's own maintenance thread, which folds new rows into the
    roll-ups; 10,000 written rows make it run sooner."""
    read_connections: Annotated[int, Field(ge=3, le=10**4)] = 4
    """PostgreSQL: the greatest number of connections of a store, without the one of its writer. Its
    own work (maintenance, the probe of ``health()``) uses two of them at most, which an
    `AsyncStore` keeps free for it. When all are in use, a read waits up to 30 seconds for one."""
    idle_connection_s: Annotated[float, Field(ge=0.1, le=_YEAR_S, allow_inf_nan=False)] = 60.0
    """PostgreSQL: seconds after which a connection that nobody uses is closed."""
    connect_timeout_s: Annotated[int, Field(ge=1, le=_YEAR_S)] = 5
    """Seconds to wait for a PostgreSQL server to accept a connection."""
    statement_timeout_s: Annotated[
        float, Field(ge=0.001, le=_MOST_STATEMENT_S, allow_inf_nan=False)
    ] = 30.0
    """Seconds after which a statement is cancelled, on PostgreSQL and on read-only SQLite files."""
    echo: bool = False
    """Log the statements through SQLAlchemy's logger, never their values."""

    def model_post_init(self, _: Any, /) -> None:
        """Warn of environment variables that name no option."""
        fields = type(self).model_fields
        _warn_of_unknown(
            [
                str(field.validation_alias or f"{_PREFIX}{name.upper()}")
                for name, field in fields.items()
            ]
        )
