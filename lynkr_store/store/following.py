"""The iterators that `follow` returns.

They are no generators: between two reads they hold neither a connection nor a transaction, so they
need not be closed, and after an error the next call continues.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from lynkr_store.exceptions import BadArgument, LynkrStoreError
from lynkr_store.queries.following import Page, Tail
from lynkr_store.schemas import RoutingRowBrief

_NOTICE_S: Final = 0.1  # after which a waiting iterator notices that the store was closed

_Row = TypeVar("_Row", bound=RoutingRowBrief)


class _Following:
    """The rows in hand, where the next ones begin, and when to read them.

    Args:
        poll_s: Seconds to wait after a read that failed.
        is_closed: Whether the store was closed.
    """

    def __init__(self, poll_s: float, is_closed: Callable[[], bool]) -> None:
        self._poll_s = poll_s
        self._is_closed = is_closed
        self._tail: Tail | None = None
        self._rows: deque[Any] = deque()
        self._due = 0.0
        self._in_use = threading.Lock()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one thread or task ask for the next row; two would read the same page."""
        if not self._in_use.acquire(blocking=False):
            raise BadArgument(
                "follow: another thread or task waits for this iterator's next row; give each its "
                "own, by a call of follow"
            )
        try:
            yield
        finally:
            self._in_use.release()

    def _pause_s(self) -> float:
        """Seconds to wait; 0 when it is time to read."""
        return max(0.0, min(self._due - time.monotonic(), _NOTICE_S))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        self._due = time.monotonic() + self._poll_s  # unless it succeeds
        try:
            yield
        except LynkrStoreError:
            if not self._is_closed():
                raise

    def _take(self, page: Page) -> None:
        self._due = time.monotonic() + page.pause_s
        self._rows.extend(page.rows)
        self._tail = page.tail


class Following(_Following, Iterator[_Row]):
    """Rows as they are stored; a thread waits for them.

    Args:
        read: Reads what follows a place; None for the beginning.
        poll_s: As in `Store.follow`.
        is_closed: Whether the store was closed.
    """

    def __init__(
        self, read: Callable[[Tail | None], Page], poll_s: float, is_closed: Callable[[], bool]
    ) -> None:
        super().__init__(poll_s, is_closed)
        self._read = read
        self._take(read(None))

    def __next__(self) -> _Row:
        """Wait for the next row; end if the store is closed."""
        with self._alone():
            while not self._rows:
                if self._is_closed():
                    raise StopIteration
                if pause_s := self._pause_s():
                    time.sleep(pause_s)
                    continue
                with self._reading():
                    self._take(self._read(self._tail))
            row: _Row = self._rows.popleft()
            return row


class AsyncFollowing(_Following, AsyncIterator[_Row]):
    """Rows as they are stored; a coroutine waits for them.

    Args:
        read: Reads what follows a place; None for the beginning.
        poll_s: As in `Store.follow`.
        is_closed: Whether the store was closed.
    """

    def __init__(
        self,
        read: Callable[[Tail | None], Awaitable[Page]],
        poll_s: float,
        is_closed: Callable[[], bool],
    ) -> None:
        super().__init__(poll_s, is_closed)
        self._read = read

    async def __anext__(self) -> _Row:
        """Wait for the next row; end if the store is closed."""
        with self._alone():
            while not self._rows:
                if self._is_closed():
                    raise StopAsyncIteration
                if pause_s := self._pause_s():
                    await asyncio.sleep(pause_s)
                    continue
                with self._reading():
                    self._take(await self._read(self._tail))
            row: _Row = self._rows.popleft()
            return row
