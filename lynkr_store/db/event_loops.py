"""Decides which event loop uses which asynchronous engine.

The connections of an engine's pool, and the pool's locks and queues, belong to the event loop that
used them first. See https://docs.sqlalchemy.org/en/21/orm/extensions/asyncio.html, "Using multiple
asyncio event loops".
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from sqlalchemy import NullPool, Pool

from lynkr_store.exceptions import BadArgument
from lynkr_store.process.lifecycle import Forkable
from lynkr_store.process.waiting import Event

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from sqlalchemy.ext.asyncio import AsyncEngine

_FINISH_S: Final = 0.5  # for another thread's loop, which may be busy, to close its connections

_inherited: list[object] = []  # keeps the garbage collector from closing the parent's sockets
_owners: "weakref.WeakKeyDictionary[Pool, AbstractEventLoop]" = weakref.WeakKeyDictionary()


class EnginePerLoop(Forkable):
    """Gives each event loop an engine of its own, whose connections are closed when the loop ends.

    The next loop reuses the engine of a loop that ended, with its compiled statements.

    Args:
        make: Makes an engine. It is called once at the start, so that a missing driver is noticed.
    """

    def __init__(self, make: "Callable[[], AsyncEngine]") -> None:
        self._make = make
        self._spare = [make()]
        self._held: dict[AbstractEventLoop, tuple[AsyncEngine, AsyncGenerator[None]]] = {}

    async def engine(self) -> "AsyncEngine":
        """The engine of the running loop."""
        loop = asyncio.get_running_loop()
        if (held := self._held.get(loop)) is None:
            try:
                engine = self._spare.pop()
            except IndexError:
                engine = self._make()
            end = self._at_end()
            # no await since the check above, so that two tasks of the loop get the same engine
            held = self._held[loop] = engine, end
            await anext(end)
            for other in list(self._held):  # a copy: other threads add to it
                if other.is_closed():
                    await self._leave(other)
        return held[0]

    async def close(self) -> None:
        """Close every loop's connections that are not in use."""
        for loop in list(self._held):
            if loop is asyncio.get_running_loop() or not loop.is_running():
                await self._leave(loop)  # closing a connection does not need its loop
            else:
                await self._have_left(loop)

    def after_fork_in_child(self) -> None:
        """Forget the parent's loops: none of them runs in the child."""
        _inherited.append(self._held)
        self._held = {}

    async def _at_end(self) -> AsyncGenerator[None]:
        """Stay suspended until the loop ends: `asyncio.run` closes the loop's generators.

        If a loop is closed without that, the next loop's first read, or `close`, notices it.
        """
        try:
            yield
        finally:
            await self._leave(asyncio.get_running_loop())

    async def _leave(self, loop: "AbstractEventLoop") -> None:
        if held := self._held.pop(loop, None):
            engine, _ = held
            await engine.dispose()
            self._spare.append(engine)

    async def _have_left(self, loop: "AbstractEventLoop") -> None:
        """Ask a loop that runs in another thread to leave its engine, and wait up to 0.5 s."""
        left, tasks = Event(), []

        def leave() -> None:
            tasks.append(task := loop.create_task(self._leave(loop)))
            task.add_done_callback(lambda _: left.set())

        with suppress(RuntimeError):  # it was closed meanwhile
            loop.call_soon_threadsafe(leave)
            await left.wait(_FINISH_S)


class HostsEngine:
    """A host's own engine: the store uses it in one event loop and never disposes it."""

    def __init__(self, engine: "AsyncEngine") -> None:
        self._engine = engine

    async def engine(self) -> "AsyncEngine":
        """The engine, if its connections belong to the running loop.

        Raises:
            BadArgument: They belong to another loop.
        """
        loop, pool = asyncio.get_running_loop(), self._engine.pool
        # a NullPool keeps no connections; `dispose` replaces the pool, so the next loop may use it
        if not isinstance(pool, NullPool) and _owners.setdefault(pool, loop) is not loop:
            raise BadArgument(
                "engine: it was used in another event loop, to which its connections belong; use "
                "it in one loop, 'await engine.dispose()' before that loop ends, or give the "
                "store a url instead, and it makes an engine for each loop"
            )
        return self._engine

    async def close(self) -> None:
        """Do nothing: the host disposes its engine."""


Engines = EnginePerLoop | HostsEngine
