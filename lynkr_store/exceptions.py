"""Every error that a caller can catch; each message says what to do.

No message contains row values, a URL's password, or control characters.
"""

from typing import Any, NoReturn, Self


def printable(text: str) -> str:
    r"""The text with escapes for characters that a terminal would obey or hide.

    Names of columns, indexes, revisions, files and models come from other people. An ESC (shown as
    ``\x1b``) can overwrite what a person reads, a line break can imitate another line, and a
    bidirectional override can reorder the text.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class LynkrStoreError(Exception):
    """The base class of this library's errors; they can be pickled.

    Attributes:
        unclear: A statement failed, possibly because the schema was changed.
    """

    unclear = False

    def __str__(self) -> str:
        """The message, printable, because it may contain names from other people."""
        return printable(super().__str__())


class BadArgument(LynkrStoreError, ValueError):
    """An argument does not have the documented form."""


class UnsupportedDatabase(BadArgument):
    """The URL or engine names a database or driver that this library does not support."""


class MissingDriver(LynkrStoreError, ImportError):
    """The database's driver is not installed; the message names the extra to install."""


class StoreUnavailable(LynkrStoreError):
    """The database cannot be reached or does not work; try again later."""


class RollupsRefused(StoreUnavailable):
    """The tables of roll-ups did not store what was added; until then statistics read raw rows.

    A rule, trigger or policy on one of the tables discards rows without an error. Remove it, then
    run ``lynkr-store maintain``.
    """

    def __init__(
        self,
        message: str = "routing_rollups, routing_dimensions or lynkr_store_progress did not store "
        "what was added: a rule, trigger or policy on one of them discards rows. Remove it, then "
        "run lynkr-store maintain. Until then statistics read the raw rows",
    ) -> None:
        super().__init__(message)


class UpgradeTimeout(StoreUnavailable):
    """A migration could not start in time: another one ran, or another session locked a table."""


class OutcomeUnknown(StoreUnavailable):
    """The connection was lost during a commit: its rows may be stored or not."""


class SpoolError(LynkrStoreError):
    """The spool cannot be used; the message says why. Meanwhile records wait in memory."""


class StoreClosed(LynkrStoreError):
    """The store was closed; open a new one to read."""


class RowRejected(LynkrStoreError, ValueError):
    """The database refused a row because of its content; no row of the call is stored.

    Raised without its cause, because a driver's message repeats the row.
    """


class CopyDiffers(LynkrStoreError):
    """What was copied is not what the source has; the message names the first differences."""


class ClockAhead(LynkrStoreError):
    """The clock is far ahead of everything in the database, and may be wrong.

    Nothing was deleted. Set the clock, or, if it is right, pass ``trust_clock=True``.
    """


class SchemaError(LynkrStoreError):
    """The database's schema is not the one that this release works with."""


class SchemaBehind(SchemaError):
    """The schema is older than this release: upgrade the database (``lynkr-store upgrade``)."""


class SchemaAhead(SchemaError):
    """The schema's revision is unknown to this release: install a newer lynkr-store."""


class AdoptionRefused(SchemaError):
    """An existing database is not exactly one that the gateway created; nothing was changed.

    Attributes:
        difference: The first difference, in words.
    """

    def __init__(self, difference: str) -> None:
        self.difference = difference = printable(difference)
        super().__init__(
            f"not adopted, and nothing was changed: {difference}. Use another database, or bring "
            "this one to the gateway's own shape first (docs/how-to/adopt.md says what is accepted)"
        )

    def __reduce__(self) -> tuple[type[Self], tuple[str], dict[str, Any]]:
        """Pickle the difference, from which the message is made."""
        return type(self), (self.difference,), vars(self)


class DowngradeRefused(SchemaError):
    """A downgrade would destroy what it must keep; nothing was changed."""


def raise_alone(error: LynkrStoreError) -> NoReturn:
    """Raise an error without the one that is being handled, whose message may repeat a row.

    ``from None`` only hides that one from tracebacks; a tool that collects errors still finds it.
    """
    try:
        raise error from None
    finally:
        error.__context__ = None
