"""The ``lynkr_store`` logger. Logging raises nothing here, although a host's handler may."""

import logging
from contextlib import suppress
from typing import Final

from lynkr_store.exceptions import LynkrStoreError

_logger: Final = logging.getLogger("lynkr_store")


def say(level: int, message: str, *values: object) -> None:
    """Log a line; if a filter or handler fails, the line is lost."""
    with suppress(Exception):
        _logger.log(level, message, *values, stacklevel=2)


def words_of(error: BaseException) -> str:
    """An error in words that are safe to log.

    Another library's message may repeat a row or a password, so only its type is named.
    """
    said = f": {error}" if isinstance(error, LynkrStoreError) else ""
    return f"{type(error).__name__}{said}"
