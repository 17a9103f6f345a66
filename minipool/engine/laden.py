"""A handle whose calls bring context variables along; made only for pools that name some."""

from __future__ import annotations

from typing import Any

from .baggage import Baggage
from .channel import Unsent
from .handle import Handle


class LadenHandle(Handle):
    """One worker process, as the parent sees it, in a pool whose calls have baggage."""

    __slots__ = ("_baggage",)

    def __init__(
        self, baggage: Baggage, slot: int, generation: int, row: memoryview, codec: Any
    ) -> None:
        super().__init__(slot, generation, row, codec)
        self._baggage = baggage

    def started(self) -> None:
        super().started()
        self._exchange = _LadenExchange(self.channel.exchange)

    def request(
        self, kind: int, name: bytes, args: tuple[Any, ...], kwargs: Any, timeout: float | None
    ) -> Any:
        """As `Handle.request`. Packs first: what cannot be pickled is told before all else."""
        self._exchange.packed = self._baggage.pack()
        return super().request(kind, name, args, kwargs, timeout)


class _LadenExchange:
    """An exchange that puts the baggage before the body; knows its handle not, so no cycle."""

    __slots__ = ("_exchange", "packed")

    def __init__(self, exchange: Any) -> None:
        self._exchange = exchange
        self.packed = b""

    def __call__(
        self, call_id: int, kind: int, name: bytes, body: bytes, timeout: float | None, start: int
    ) -> Any:
        try:
            body = self.packed + body
        except MemoryError:
            raise Unsent from None
        return self._exchange(call_id, kind, name, body, timeout, start)
