"""For a host's tests: records as a gateway makes them, a clock that a test moves, and fixtures.

`RecordFactory` and `EventFactory` are factory-boy's. The fixtures are those of the pytest plugin
`lynkr_store.testing.plugin`, which a ``conftest.py`` names.
"""

from lynkr_store import MissingDriver

try:
    import factory  # noqa: F401 - to name the extra
except ImportError as error:
    raise MissingDriver(
        "factory-boy is not installed: pip install 'lynkr-store[testing]'"
    ) from error

from lynkr_store.testing.clock import Clock
from lynkr_store.testing.factories import EventFactory, RecordFactory

__all__ = ["Clock", "EventFactory", "RecordFactory"]
