"""The ``lynkr_store`` logger, which raises nothing: a host's filter or handler may."""

import logging
from contextlib import suppress
from typing import Final

from lynkr_store.exceptions import LynkrStoreError

_logger: Final = logging.getLogger("lynkr_store")


def say(level: int, message: str, *values: object) -> None:
    """Log a line; where a filter or handler fails, there is none."""
    with suppress(Exception):
        _logger.log(level, message, *values, stacklevel=2)


def words_of(error: BaseException) -> str:
    """What may be said of an error: another library's words may repeat a row or a password."""
    said = f": {error}" if isinstance(error, LynkrStoreError) else ""
    return f"{type(error).__name__}{said}"
