"""Which event loop an asynchronous engine works for.

The connections of its pool, and the locks and queues about them, belong to the loop in which they
were first used. See https://docs.sqlalchemy.org/en/21/orm/extensions/asyncio.html, "Using multiple
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

_FINISH_S: Final = 0.5  # for a loop of another thread, which may be busy, to close its connections

_inherited: list[object] = []  # the parent's engines: the collector must not close their sockets
_owners: "weakref.WeakKeyDictionary[Pool, AbstractEventLoop]" = weakref.WeakKeyDictionary()


class EnginePerLoop(Forkable):
    """Gives each event loop an engine of its own, whose connections are closed when the loop ends.

    An engine that a loop has left is given to the next one, with the statements it has compiled.

    Args:
        make: Makes an engine. It is called once at the start, to show what is missing.
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
            # in one step with the look, so that two tasks of the loop have one engine
            held = self._held[loop] = engine, end
            await anext(end)
            for other in list(self._held):  # other threads add theirs
                if other.is_closed():
                    await self._leave(other)
        return held[0]

    async def close(self) -> None:
        """Close the connections of every loop that are not in use."""
        for loop in list(self._held):
            if loop is asyncio.get_running_loop() or not loop.is_running():
                await self._leave(loop)  # a connection is closed without its loop
            else:
                await self._have_left(loop)

    def after_fork_in_child(self) -> None:
        """Know none of the parent's loops: none of them runs here."""
        _inherited.append(self._held)
        self._held = {}

    async def _at_end(self) -> AsyncGenerator[None]:
        """Is suspended as long as the loop lives: `asyncio.run` ends generators with their loop.

        Where a loop is closed without that, the next loop's first read, or `close`, notices.
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
        """Have a loop that runs in another thread leave its engine."""
        left, tasks = Event(), []

        def leave() -> None:
            tasks.append(task := loop.create_task(self._leave(loop)))
            task.add_done_callback(lambda _: left.set())

        with suppress(RuntimeError):  # it was closed meanwhile
            loop.call_soon_threadsafe(leave)
            await left.wait(_FINISH_S)


class HostsEngine:
    """A host's own engine, which the store uses in one event loop and never disposes."""

    def __init__(self, engine: "AsyncEngine") -> None:
        self._engine = engine

    async def engine(self) -> "AsyncEngine":
        """The engine, if its connections are the running loop's.

        Raises:
            BadArgument: They are another loop's.
        """
        loop, pool = asyncio.get_running_loop(), self._engine.pool
        # a pool without connections has none of another loop; `dispose` makes another pool
        if not isinstance(pool, NullPool) and _owners.setdefault(pool, loop) is not loop:
            raise BadArgument(
                "engine: it was used in another event loop, to which its connections belong; use "
                "it in one loop, 'await engine.dispose()' before that loop ends, or give the "
                "store a url, for which it makes an engine for each loop"
            )
        return self._engine

    async def close(self) -> None:
        """Leave the engine to its host."""


Engines = EnginePerLoop | HostsEngine
