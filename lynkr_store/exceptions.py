"""Every error a caller can catch; each says what to do about it.

No message carries a row's values or a URL's password, or anything that a terminal obeys.
"""

from typing import NoReturn


def printable(text: str) -> str:
    r"""The text with escapes in the place of characters that a terminal would obey or hide.

    Names of columns, indexes, revisions and files, and what clients call their models, are other
    people's: an ESC (shown as ``\x1b``) can rewrite what a person reads, a line break can pretend
    another line, and a bidirectional override can show text in another order.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class LynkrStoreError(Exception):
    """The root of this library's own errors."""

    def __str__(self) -> str:
        """The message, printable: it may name what others named, and is logged and printed."""
        return printable(super().__str__())


class BadArgument(LynkrStoreError, ValueError):
    """An argument is not of the form its documentation asks for."""


class UnsupportedDatabase(BadArgument):
    """The URL or engine names a database or driver that this library does not support."""


class MissingDriver(LynkrStoreError, ImportError):
    """The database's driver is not installed; the message names the extra to install."""


class StoreUnavailable(LynkrStoreError):
    """The database cannot be reached or refuses to work; try again when it is back.

    Attributes:
        unclear: A statement failed, which may be because the schema was changed.
    """

    unclear = False


class RollupsRefused(StoreUnavailable):
    """The tables of roll-ups did not keep what was added; statistics read the rows meanwhile.

    A rule, trigger or policy of one of them discards rows without an error. Remove it, then run
    ``lynkr-store maintain``.
    """

    def __init__(
        self,
        message: str = "routing_rollups, routing_dimensions or lynkr_store_progress did not keep "
        "what was added: a rule, trigger or policy of theirs discards rows. Statistics read the "
        "rows meanwhile. Remove it, then run lynkr-store maintain",
    ) -> None:
        super().__init__(message)


class UpgradeTimeout(StoreUnavailable):
    """A migration could not begin in time: another one ran, or somebody kept a table locked."""


class OutcomeUnknown(StoreUnavailable):
    """The connection was lost while a commit was under way: its rows may be stored or not."""


class SpoolError(LynkrStoreError):
    """The spool cannot be used; the message says why, and records wait in memory meanwhile."""


class StoreClosed(LynkrStoreError):
    """The store was closed; open a new one to read."""


class RowRejected(LynkrStoreError, ValueError):
    """The database refused a row for the row's own fault; none of the call's rows is stored.

    Raised without its cause: a driver's message repeats the row.
    """


class ClockAhead(LynkrStoreError):
    """The clock is far ahead of all that the database has seen, and may be wrong.

    Nothing was deleted: set the clock, or, where it is right, insist (``trust_clock=True``).
    """


class SchemaError(LynkrStoreError):
    """The database's schema is not the one this release works with."""


class SchemaBehind(SchemaError):
    """The schema is older than this release: upgrade the database (``lynkr-store upgrade``)."""


class SchemaAhead(SchemaError):
    """The schema's revision is unknown to this release: install a newer lynkr-store."""


class AdoptionRefused(SchemaError):
    """An existing database is not exactly one that the gateway made; nothing was changed.

    Attributes:
        difference: The first difference found, in words.
    """

    def __init__(self, difference: str) -> None:
        self.difference = difference = printable(difference)
        super().__init__(
            f"not adopted, and nothing was changed: {difference}. Use another database, or bring "
            "this one to the gateway's own shape first (see 'Adopting' in the README)"
        )


class DowngradeRefused(SchemaError):
    """A downgrade would destroy what it must keep; nothing was changed."""


def raise_alone(error: LynkrStoreError) -> NoReturn:
    """Raise an error without the one that is being handled, whose words may repeat a row.

    ``from None`` only hides that one from tracebacks; a tool that collects errors still finds it.
    """
    try:
        raise error from None
    finally:
        error.__context__ = None
