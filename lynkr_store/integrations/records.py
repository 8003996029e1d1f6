"""What the integrations share: a record without what it does not take, and what came before."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import suppress
from inspect import isawaitable
from threading import Thread
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from pydantic import ValidationError

from lynkr_store import BadArgument, RoutingEvent

Fields = dict[str, Any]

ROUTING_FIELDS: Final = (
    *("tier", "base_tier", "escalation_source", "complexity_score", "agentic_type"),
    *("routing_method", "propensity", "candidates", "pinned", "switch_reason", "cache_decision"),
    *("quality_score", "cost_efficiency", "circuit_breaker_state"),
)
"""What a host's router may say of its choice, because no other library knows it."""

_REMEMBERED: Final = 10_000

_Key = TypeVar("_Key")
_Store = TypeVar("_Store")
_T = TypeVar("_T")


def is_new(seen: dict[_Key, object], key: _Key) -> bool:
    """Whether a key was not seen before; it is from now on, until 10,000 others came.

    It takes no lock, which a child of a fork would inherit: each use of the dictionary is one step.
    """
    mine = object()
    new = seen.setdefault(key, mine) is mine
    forget_oldest(seen)
    return new


def forget_oldest(kept: dict[Any, Any]) -> None:
    """Keep the newest 10,000 entries."""
    with suppress(RuntimeError, StopIteration):  # another thread changes it; the next call forgets
        while len(kept) > _REMEMBERED:
            kept.pop(next(iter(kept)), None)


def without_invalid(fields: Fields) -> Fields:
    """The fields without those that a record does not take: a wrong one must not cost the row.

    Of ``attributes`` each entry stands for itself.
    """
    wrong = _wrong(fields)
    if not wrong:
        return fields
    kept = {"provider": "unknown"} | {k: v for k, v in fields.items() if k not in wrong}
    if "attributes" in wrong:
        entries = mapping_of(fields["attributes"]).items()
        kept["attributes"] = dict(entry for entry in entries if not _wrong(_only(entry))) or None
    return kept


def _only(entry: tuple[str, Any]) -> Fields:
    return {"provider": "unknown", "attributes": dict([entry])}


def _wrong(fields: Fields) -> set[int | str]:
    try:
        RoutingEvent.model_validate(fields)
    except ValidationError as error:
        return {found["loc"][0] for found in error.errors(include_input=False)}
    return set()


def mapping_of(value: object) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def host_of(address: object) -> str | None:
    """The host's name in a URL or an address, whose other parts may hold keys."""
    if not isinstance(address, str):
        return None
    try:
        return urlsplit(address if "//" in address else f"//{address}").hostname
    except ValueError:
        return None


def checked_store(store: _Store, *methods: str) -> _Store:
    """The store.

    Raises:
        BadArgument: It lacks one of the methods.
    """
    if not all(callable(getattr(store, name, None)) for name in methods):
        raise BadArgument("store: give a Store or an AsyncStore")
    return store


def checked_names(names: Collection[str], argument: str) -> tuple[str, ...]:
    """The names.

    Raises:
        BadArgument: They are a single text.
    """
    if isinstance(names, str):
        raise BadArgument(f"{argument}: give a list of names")
    return tuple(names)


def answer_of(ask: Callable[[], _T | Awaitable[_T]]) -> _T:
    """Call a store's method; an `AsyncStore`'s runs in an event loop of its own."""
    answer = ask()
    if not isawaitable(answer):
        return answer

    async def wait() -> _T:
        return await answer

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # A loop runs in this thread. No executor: at the interpreter's end it takes no work.
    result: Future[_T] = Future()

    def run() -> None:
        try:
            result.set_result(asyncio.run(wait()))
        except BaseException as error:  # noqa: BLE001 - the caller's
            result.set_exception(error)

    Thread(target=run, daemon=True, name="lynkr-store-answer").start()
    return result.result()
