"""The closed set of supported databases, and how a database of ours is known."""

from enum import StrEnum
from typing import Final

VERSION_TABLE: Final = "lynkr_store_alembic_version"
"""Where Alembic notes the revision; a name of our own, since a host may have its own Alembic."""


class Backend(StrEnum):
    """A database we support; the value is SQLAlchemy's ``URL.get_backend_name()``."""

    SQLITE = "sqlite"
    POSTGRESQL = "postgresql"


OLDEST: Final = {Backend.SQLITE: (3, 40), Backend.POSTGRESQL: (15,)}
"""The lowest version of each that the tests run on."""
