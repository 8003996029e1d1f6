"""What a service calls of a store, as protocols: to type against, and to substitute in its tests.

Opening, maintenance and retention belong to the code that creates the store, and are not here.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, Unpack, overload

from lynkr_store.schemas import (
    Cursor,
    Health,
    ProviderStats,
    RoutingAccuracy,
    RoutingEvent,
    RoutingFields,
    RoutingRow,
    RoutingRowBrief,
    RoutingStats,
)
from lynkr_store.schemas.filters import RoutingFilter, Window


class Recorder(Protocol):
    """For code that only records; `Store` and `AsyncStore` both satisfy it."""

    def record(
        self,
        event: RoutingEvent | Mapping[str, Any] | None = None,
        /,
        **fields: Unpack[RoutingFields],
    ) -> bool:
        """See `Store.record`."""


class StoreProtocol(Recorder, Protocol):
    """What a service calls of a `Store`."""

    def flush(self, timeout_s: float = ...) -> bool:
        """See `Store.flush`."""

    @overload
    def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: Literal[True] = True,
    ) -> list[RoutingRow]: ...
    @overload
    def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: Literal[False],
    ) -> list[RoutingRowBrief]: ...
    @overload
    def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: bool,
    ) -> Sequence[RoutingRowBrief]: ...

    def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: bool = True,
    ) -> Sequence[RoutingRowBrief]:
        """See `RoutingRepository.query`."""

    def iter_records(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        page_rows: int = ...,
    ) -> Iterator[RoutingRow]:
        """See `Store.iter_records`."""

    @overload
    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = ...,
        include_text: Literal[True] = True,
    ) -> Iterator[RoutingRow]: ...
    @overload
    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = ...,
        include_text: Literal[False],
    ) -> Iterator[RoutingRowBrief]: ...
    @overload
    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = ...,
        include_text: bool,
    ) -> Iterator[RoutingRowBrief]: ...

    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = ...,
        include_text: bool = True,
    ) -> Iterator[RoutingRowBrief]:
        """See `Store.follow`."""

    def get_stats(self, window: Window | None = None) -> RoutingStats | None:
        """See `RoutingRepository.get_stats`."""

    def get_provider_stats(
        self, provider: str, window: Window | None = None
    ) -> ProviderStats | None:
        """See `RoutingRepository.get_provider_stats`."""

    def get_routing_accuracy(self, window: Window | None = None) -> RoutingAccuracy | None:
        """See `RoutingRepository.get_routing_accuracy`."""

    def health(self) -> Health:
        """See `Store.health`."""


class AsyncStoreProtocol(Recorder, Protocol):
    """What a service calls of an `AsyncStore`."""

    async def flush(self, timeout_s: float = ...) -> bool:
        """See `Store.flush`."""

    @overload
    async def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: Literal[True] = True,
    ) -> list[RoutingRow]: ...
    @overload
    async def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: Literal[False],
    ) -> list[RoutingRowBrief]: ...
    @overload
    async def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: bool,
    ) -> Sequence[RoutingRowBrief]: ...

    async def query(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        limit: int = 100,
        before: Cursor | None = None,
        include_text: bool = True,
    ) -> Sequence[RoutingRowBrief]:
        """See `RoutingRepository.query`."""

    def iter_records(
        self,
        criteria: RoutingFilter | None = None,
        window: Window | None = None,
        *,
        page_rows: int = ...,
    ) -> AsyncIterator[RoutingRow]:
        """See `Store.iter_records`."""

    @overload
    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = ...,
        include_text: Literal[True] = True,
    ) -> AsyncIterator[RoutingRow]: ...
    @overload
    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = ...,
        include_text: Literal[False],
    ) -> AsyncIterator[RoutingRowBrief]: ...
    @overload
    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = ...,
        include_text: bool,
    ) -> AsyncIterator[RoutingRowBrief]: ...

    def follow(
        self,
        criteria: RoutingFilter | None = None,
        *,
        after: int | None = None,
        poll_s: float = ...,
        include_text: bool = True,
    ) -> AsyncIterator[RoutingRowBrief]:
        """See `Store.follow`."""

    async def get_stats(self, window: Window | None = None) -> RoutingStats | None:
        """See `RoutingRepository.get_stats`."""

    async def get_provider_stats(
        self, provider: str, window: Window | None = None
    ) -> ProviderStats | None:
        """See `RoutingRepository.get_provider_stats`."""

    async def get_routing_accuracy(self, window: Window | None = None) -> RoutingAccuracy | None:
        """See `RoutingRepository.get_routing_accuracy`."""

    async def health(self) -> Health:
        """See `Store.health`."""
