"""The reserve: workers that are ready, or will be, and out of service. By the manager's thread.

In it are the spares, the stand-ins for workers that are worn, and worn ones that wait for their
successor. Whoever is missing in service is taken from here at once, and another one is raised
behind. A worn worker serves on until a stand-in is ready; one that has made its `max_calls` is
set aside at once, and called up again only if starting others fails.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .care import Care
from .fleet import Fleet
from .handle import Handle
from .states import WorkerState as S
from .turnstile import Turnstile

if TYPE_CHECKING:
    from ..config import PoolConfig


def nearly_used_up(max_calls: int) -> int:
    """Return after how many calls a stand-in is raised: before the worker has made them all."""
    return max(1, max_calls - max(1, max_calls // 10))


class Reserve:
    """Who stands behind the workers in service of one pool."""

    def __init__(self, config: PoolConfig, turnstile: Turnstile, fleet: Fleet, care: Care) -> None:
        self._config = config
        self._turnstile = turnstile
        self._fleet = fleet
        self._care = care

    def _fit(self, *states: S) -> list[Handle]:
        """Return those in the reserve that are not worn, in one of these states."""
        return [h for h in self._fleet.reserve() if h.worn is None and h.state in states]

    def _worn(self) -> list[Handle]:
        """Return those that were set aside, or wore out here."""
        return [h for h in self._fleet.reserve() if h.worn is not None and h.state is S.SPARE]

    def _worn_in_service(self) -> list[Handle]:
        return [handle for handle in self._fleet.live() if handle.worn is not None]

    def _nearly_used_up(self) -> int:
        """Count those in service that will have made their `max_calls` soon."""
        most = self._config.max_calls
        if most is None:
            return 0
        live, soon = self._fleet.live(), nearly_used_up(most)
        return sum(handle.worn is None and handle.calls_sent >= soon for handle in live)

    def _used_up(self, handle: Handle) -> bool:
        return self._config.max_calls is not None and handle.calls_sent >= self._config.max_calls

    def fill(self, count: int) -> bool:
        """Take as many into service, ready ones before booting ones; tell if there was any."""
        if count <= 0:
            return False
        wanted = count
        ready = self._fit(S.SPARE) + [h for h in self._worn() if not self._used_up(h)]
        if self._fleet.failures_in_a_row:  # rather too many calls than nobody to make them
            ready += [handle for handle in self._worn() if self._used_up(handle)]
        for handle in [*ready, *self._fit(S.STARTING)]:
            if count > 0:
                count -= self._care.call_up(handle)
        return count < wanted

    def exchange(self) -> None:
        """Take one worn worker out of service for each stand-in that is ready. The spares stay."""
        worn = self._worn_in_service()
        if not worn:
            return
        staying = [handle for handle in worn if handle.tainted is None]
        ready = self._fit(S.SPARE)
        free = len(ready) - self._config.spares - self._nearly_used_up()
        for handle in staying[: max(0, free - len(worn) + len(staying))]:
            if not self._turnstile.claim(handle.slot, handle):
                handle.tainted = handle.worn  # it goes when it is given back
            elif self._care.call_up(ready.pop()):
                self._care.set_aside(handle)
            else:
                self._turnstile.publish(handle.slot, handle)

    def trim(self, complete: bool) -> None:
        """Let go who is not needed: the worn, once all are in service, and stand-ins for nobody."""
        ready = self._fit(S.SPARE)
        if complete:
            kept = max(0, self._config.spares - len(ready))
            for handle in self._worn()[kept:]:
                self._care.dismiss(handle, handle.worn or "")
        standing_by = [*ready, *self._fit(S.STARTING)]
        for handle in standing_by[self._config.spares + self._to_replace() :]:
            self._care.dismiss(handle, "nobody is left to be replaced")

    def _to_replace(self) -> int:
        return len(self._worn_in_service()) + self._nearly_used_up()

    def missing(self) -> int:
        """Return how many are to be started. Old ones that are still stopping hold others up."""
        room = max(0, self._config.startup_batch - self._fleet.count(S.STOPPING))
        wanted = self._config.spares + min(self._to_replace(), room)
        return wanted - len(self._fit(S.STARTING, S.SPARE, S.PROBING))
