"""Imports Alembic, with `scripts`, when a schema is first upgraded, compared or checked.

Alembic and what it brings take a third of the time that importing the library would take with
them, and a store whose database is at the head never needs them.
"""

import threading
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from lynkr_store.exceptions import StoreUnavailable
from lynkr_store.process.lifecycle import FORK_WAIT_S, Forkable, on_fork


class _LateModule(Forkable):
    """A module that is imported when one of its names is first asked for.

    A fork waits until the import is complete. Python never releases an import lock in a child whose
    parent was importing in another thread, so the child would wait for it for ever.

    Raises:
        StoreUnavailable: The module cannot be imported, as where a process gave up its right to
            read the installed packages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._module: ModuleType | None = None
        self._lock = threading.RLock()  # a signal handler may fork while its thread imports

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module or self._imported(), name)

    def _imported(self) -> ModuleType:
        on_fork(self)
        with self._lock:
            try:
                self._module = import_module(self._name)
            except (ImportError, OSError) as error:
                raise StoreUnavailable(
                    f"Alembic, which upgrades a schema, cannot be imported ({error}): run "
                    "lynkr-store upgrade as a user who may read the installed packages"
                ) from error
        return self._module

    def before_fork(self) -> None:
        """Wait until the import is complete, if another thread is importing."""
        self._lock.acquire(timeout=FORK_WAIT_S)

    def after_fork_in_parent(self) -> None:
        """Let the threads that wait go on."""
        with suppress(RuntimeError):  # the wait was in vain
            self._lock.release()

    def after_fork_in_child(self) -> None:
        """Start with a lock that no thread holds."""
        self._lock = threading.RLock()


if TYPE_CHECKING:
    from lynkr_store.migrate import scripts as scripts  # noqa: PLC0414 - what others import here
else:
    scripts: Final = _LateModule("lynkr_store.migrate.scripts")
