"""Starts the library's threads."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Final, TypeVar

from lynkr_store.process.lifecycle import without_sigterm

_FINISH_S: Final = 2.0

_T = TypeVar("_T")


def start_thread(body: Callable[[], None], name: str) -> threading.Thread | None:
    """Run a function in a new daemon thread, which keeps no process alive.

    A SIGTERM waits until the thread has started: its handler closes stores, which may start
    threads, and `threading` would find its locks held.

    Args:
        body: The function.
        name: What the thread does; its name is ``lynkr-store-`` and this.

    Returns:
        The thread; None where the system gives none, or the interpreter is exiting.
    """
    thread = threading.Thread(target=body, name=f"lynkr-store-{name}", daemon=True)
    try:
        with without_sigterm():
            thread.start()
    except (RuntimeError, MemoryError):
        return None
    return thread


@contextmanager
def ahead(items: Iterator[_T], most: int, name: str) -> Iterator[Iterator[_T]]:
    """Have a new thread compute the next items while the block works with the ones before.

    Without threads they are computed when they are asked for. When the block ends before the items,
    because it failed or was interrupted, the thread has 2 seconds to end. An executor's would be
    waited for as long as a frozen server takes, and again when the interpreter exits.

    Args:
        items: The thread alone asks for them.
        most: How many items may wait for the block.
        name: As for `start_thread`.

    Yields:
        The items. What computing one raises is raised in its place.
    """
    # no lock of `threading`: one that an interrupt left held would be waited for without end
    found: SimpleQueue[tuple[_T] | BaseException] = SimpleQueue()
    room: SimpleQueue[None] = SimpleQueue()
    ended: SimpleQueue[None] = SimpleQueue()
    over = False
    for _ in range(most):
        room.put(None)

    def compute() -> None:
        try:
            while room.get() is None and not over:
                found.put((next(items),))
        except BaseException as error:  # noqa: BLE001 - StopIteration too: raised in the block
            found.put(error)
        finally:
            ended.put(None)

    try:
        if start_thread(compute, name) is None:
            ended.put(None)
            yield items
        else:
            yield _found(found, room)
    finally:
        over = True
        room.put(None)
        with suppress(Empty):
            ended.get(timeout=_FINISH_S)


def _found(
    found: "SimpleQueue[tuple[_T] | BaseException]", room: SimpleQueue[None]
) -> Iterator[_T]:
    while not isinstance(item := found.get(), StopIteration):
        if isinstance(item, BaseException):
            raise item
        room.put(None)
        yield item[0]
