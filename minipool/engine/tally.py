"""The tally: a desk that counts, for pools whose workers may make so many calls and no more.

A pool without `max_calls` has a plain desk, and pays nothing for this.
"""

from __future__ import annotations

from . import wire
from .desk import Desk
from .handle import Handle
from .manager import Manager
from .passage import passage
from .sizing import nearly_used_up


class TallyDesk(Desk):
    """Offers no worker again that has made its `max_calls`."""

    __slots__ = ("_most", "_soon")

    def __init__(self, manager: Manager, targets: wire.Targets) -> None:
        super().__init__(manager, targets)
        self._most = manager.config.max_calls or 0
        self._soon = nearly_used_up(self._most)

    @passage
    def give_back(self, handle: Handle) -> None:
        """As any desk, but keep back a worker that is used up, and see to its successor in time."""
        if handle.calls_sent >= self._soon:
            if handle.calls_sent >= self._most and handle.tainted is None:
                handle.worn = handle.worn or f"it has made its max_calls={self._most}"
                handle.tainted = handle.worn
            elif handle.calls_before < self._soon:
                self.manager.look_at_all()  # this lease was the one in which it came near
        super().give_back(handle)
