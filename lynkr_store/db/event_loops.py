"""Decides which event loop uses an asynchronous engine.

The connections of an engine's pool, and the pool's locks and queues, belong to the event loop that
used them first. See https://docs.sqlalchemy.org/en/21/orm/extensions/asyncio.html, "Using multiple
asyncio event loops".
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from sqlalchemy import NullPool, Pool
from sqlalchemy.util import greenlet_spawn

from lynkr_store.db.pools import BoundedPool
from lynkr_store.exceptions import BadArgument
from lynkr_store.process.lifecycle import Forkable
from lynkr_store.process.waiting import Event

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from sqlalchemy.ext.asyncio import AsyncEngine

_FINISH_S: Final = 0.5  # for another thread's loop, which may be busy, to close its connections

_inherited: list[object] = []  # keeps the garbage collector from closing the parent's sockets
_owners: "weakref.WeakKeyDictionary[Pool, AbstractEventLoop]" = weakref.WeakKeyDictionary()


class OneLoopsEngine(Forkable):
    """Gives an engine to one event loop at a time; its connections are closed when the loop ends.

    It is one engine, so that all loops together open no more connections than its pool has.

    Args:
        engine: Has an `AsyncBoundedPool`.
        idle_s: Seconds after which a connection that nobody uses is closed.
    """

    def __init__(self, engine: "AsyncEngine", idle_s: float) -> None:
        self._engine = engine
        self._idle_s = idle_s
        self._reset()

    def _reset(self) -> None:
        self._spare = [self._engine]
        self._held: dict[AbstractEventLoop, tuple[AsyncEngine, AsyncGenerator[None]]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def engine(self) -> "AsyncEngine | None":
        """The engine, if no other loop has it."""
        loop = asyncio.get_running_loop()
        if (held := self._held.get(loop)) is None:
            for other in list(self._held):  # a copy: other threads add to it
                if other.is_closed():
                    await self._leave(other)
            if (held := self._held.get(loop)) is None:  # another task of this loop has taken it
                try:
                    engine = self._spare.pop()
                except IndexError:
                    return None
                end = self._at_end()
                held = self._held[loop] = engine, end
                loop.call_later(self._idle_s, self._close_idle, loop)
                await anext(end)
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
        _inherited.append((self._held, self._closing))
        self._reset()

    def _close_idle(self, loop: "AbstractEventLoop") -> None:
        """Close idle connections, and look again later; a timer of the loop calls this."""
        if held := self._held.get(loop):
            task = loop.create_task(self._close_idle_of(held[0], loop))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close_idle_of(self, engine: "AsyncEngine", loop: "AbstractEventLoop") -> None:
        pool, wait_s = engine.pool, None
        if isinstance(pool, BoundedPool):
            wait_s = await greenlet_spawn(pool.close_idle, self._idle_s)
        loop.call_later(wait_s or self._idle_s, self._close_idle, loop)

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
                "store a url instead, and any loop may read"
            )
        return self._engine

    async def close(self) -> None:
        """Do nothing: the host disposes its engine."""


Engines = OneLoopsEngine | HostsEngine
