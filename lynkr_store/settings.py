"""Every option of a store: an argument wins over the environment, which wins over the default."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

from pydantic import AfterValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from lynkr_store.exceptions import BadArgument

DEFAULT_URL: Final = "sqlite:///.lynkr/telemetry.db"
"""Where the gateway itself keeps its telemetry, below the working directory."""

_MIB: Final = 2**20
_GIB: Final = 2**30
_TIB: Final = 2**40
_LEAST_QUEUE_BYTES: Final = 2_048  # one of the units that records are measured in
_YEAR_S: Final = 366 * 86_400
_MOST_STATEMENT_S: Final = 2_147_483  # PostgreSQL counts milliseconds in 32 bits; 0 is no limit
_SCHEMA_BYTES: Final = 63  # https://www.postgresql.org/docs/current/sql-syntax-lexical.html
_LEAST_SPOOL_BYTES: Final = 32_768  # five pages of 4,096 bytes are an empty spool's


def checked_schema(name: str | None) -> str | None:
    """The schema's name; None for none, which ``""`` means too.

    Raises:
        BadArgument: PostgreSQL takes no schema of that name.
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


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="LYNKR_STORE_",
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        validate_by_name=True,
    )


class DatabaseSettings(_Settings):
    """Which database: the part of `StoreSettings` that a migration needs.

    Raises:
        ValidationError: A ``ValueError`` that names the option and the value it wants.
    """

    url: Annotated[str, Field(repr=False)] = DEFAULT_URL
    """The database: ``sqlite:///path``, ``sqlite://`` (in memory) or ``postgresql://…``."""
    schema_name: Annotated[
        str | None,
        Field(validation_alias="LYNKR_STORE_SCHEMA"),
        AfterValidator(checked_schema),
    ] = None
    """PostgreSQL: the schema of everything that is the store's, created where that is permitted;
    None or ``""``: where the server puts it. From the environment: ``LYNKR_STORE_SCHEMA``."""


class TextSettings(_Settings):
    """What is kept of free texts: the part of `StoreSettings` that is needed without a store.

    Raises:
        ValidationError: A ``ValueError`` that names the option and the value it wants.
    """

    capture_text: bool = True
    """Store what people and models wrote (``request_text``, ``response_text``)."""
    text_max_chars: Annotated[int, Field(ge=0)] = 65_536
    """Characters kept of each of the two texts."""
    redact: Annotated[Callable[[str], str] | None, NoDecode] = None
    """Takes each free text (the two, and the JSON of ``attributes``, ``candidates`` and
    ``cache_decision``) and returns what is stored; for code only. It may be given what it
    returned: rows of another process's spool are redacted again. Where it raises, the row is stored
    without them and counted."""


class StoreSettings(TextSettings, DatabaseSettings):
    """The options of a `Store`, read from ``LYNKR_STORE_*`` when an instance is made.

    Raises:
        ValidationError: A ``ValueError`` that names the option and the value it wants.
    """

    upgrade_on_open: bool | None = None
    """Create, adopt and upgrade the schema on first use. Default: SQLite yes, PostgreSQL no."""
    cache_ttl_s: Annotated[float, Field(ge=0, le=_YEAR_S, allow_inf_nan=False)] = 5.0
    """Seconds for which a statistic is answered from the cache; 0 switches it off."""
    queue_max_rows: Annotated[int, Field(ge=1, le=10**9)] = 50_000
    """Records that may wait; the next one is dropped and counted."""
    queue_max_bytes: Annotated[int, Field(ge=_LEAST_QUEUE_BYTES, le=_TIB)] = 64 * _MIB
    """Bytes of records that may wait; one that does not fit is dropped and counted. The least holds
    one record of some hundred bytes."""
    batch_max_rows: Annotated[int, Field(ge=1, le=10**9)] = 1_000
    """Records written in one transaction."""
    flush_interval_s: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = 0.5
    """Seconds after which a batch is written even if it is not full."""
    spool_path: Path | None = None
    """A local file where batches wait while the database is away; None keeps them in memory."""
    spool_max_bytes: Annotated[int, Field(ge=_LEAST_SPOOL_BYTES, le=_TIB)] = _GIB
    """Size up to which one process fills its spool."""
    spool_after_s: Annotated[float, Field(ge=0, le=_YEAR_S, allow_inf_nan=False)] = 5.0
    """Seconds without the database after which batches enter the spool."""
    handle_sigterm: bool = False
    """Close the store on SIGTERM, then let the handler that was there before run."""
    retention_days: Annotated[float, Field(gt=0, le=36_525)] | None = None
    """``maintain()`` deletes rows that are older; None keeps them for ever."""
    text_retention_days: Annotated[float, Field(gt=0, le=36_525)] | None = None
    """``maintain()`` removes the two texts of rows that are older; None keeps them with the row."""
    rollup_retention_days: Annotated[float, Field(gt=0, le=36_525)] = 400
    """Days for which roll-ups are kept of times whose rows retention has removed; while the rows
    are there, their roll-ups are too."""
    maintenance_interval_s: Annotated[float, Field(ge=0.001, le=_YEAR_S, allow_inf_nan=False)] = 300
    """Seconds from one time to the next that the store's own thread folds new rows into the
    roll-ups; 5,000 rows written make it fold sooner."""
    connect_timeout_s: Annotated[int, Field(ge=1, le=_YEAR_S)] = 5
    """Seconds to wait for a PostgreSQL server's answer to a new connection."""
    statement_timeout_s: Annotated[
        float, Field(ge=0.001, le=_MOST_STATEMENT_S, allow_inf_nan=False)
    ] = 30.0
    """Seconds after which a statement is given up, on PostgreSQL and on read-only SQLite files."""
    echo: bool = False
    """Log the statements, never their values, through SQLAlchemy's logger."""
