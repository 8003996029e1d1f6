"""Starts the library's threads."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
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
def meanwhile(function: Callable[[], _T], name: str) -> Iterator[Future[_T]]:
    """Call a function in a new thread while the block runs; without threads, before it.

    When the block ends without the result, because it failed or was interrupted, the call has 2
    seconds to end. An executor's thread would be waited for as long as a frozen server takes, and
    again when the interpreter exits.

    Args:
        function: The function.
        name: As for `start_thread`.

    Yields:
        A future of the call's result.
    """
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            outcome.set_exception(error)

    if start_thread(run, name) is None:
        run()
    try:
        yield outcome
    finally:
        wait([outcome], _FINISH_S)
