"""Starts the library's threads."""

import threading
from collections.abc import Callable

from lynkr_store.process.lifecycle import without_sigterm


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
