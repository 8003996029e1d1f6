"""The supported databases, and how a database of ours is recognised."""

from enum import StrEnum
from typing import Final

VERSION_TABLE: Final = "lynkr_store_alembic_version"
"""Where Alembic stores the revision; a name of our own, because a host may use Alembic too."""


class Backend(StrEnum):
    """A supported database; the value is SQLAlchemy's ``URL.get_backend_name()``."""

    SQLITE = "sqlite"
    POSTGRESQL = "postgresql"


OLDEST: Final = {Backend.SQLITE: (3, 40), Backend.POSTGRESQL: (15,)}
"""The lowest version of each that is tested."""
