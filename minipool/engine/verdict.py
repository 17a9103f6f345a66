"""Verdict: what a start that failed says about the next one. Pure; by the manager's thread.

A worker that somebody's signal has ended, or for which the system lacked something, may have had
bad luck: it is tried again. One whose class raised will raise again; whoever waits for a pool to
open is told so at once.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from .handle import Handle

if TYPE_CHECKING:
    from ..errors import WorkerStartError

MANY = 5  # failed starts in a row, after which it is no chance any more
# What the system lacks now may be there a moment later.
_SCARCE = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class Verdict(NamedTuple):
    """The last failed start that says that the next one will fail as well."""

    at: float  #: monotonic
    failure: WorkerStartError
    left: tuple[int, ...]  #: generations of workers still booting all the same; 0: it was ready
    tried: float  #: how many had been started by then; infinity: no other is worth a try

    def hope(self, target: int) -> int:
        """Return how many of `target` workers there may be nevertheless.

        Those that are booting in the place of one that failed will do no better: where each start
        takes long and fails, one of them is booting at any time.
        """
        booting = sum(generation <= target for generation in self.left)
        return booting + int(max(0, target - self.tried))


def by_chance(handle: Handle | None, exitcode: int | None, cause: BaseException | None) -> bool:
    """Tell whether a start that failed may well succeed if it is tried again.

    So may one that somebody else's signal ended, or for which the system lacked something. One
    whose class or preload raised, that left by itself, or that was not ready in time, may not.
    """
    if handle is None:
        return isinstance(cause, OSError) and cause.errno in _SCARCE
    if handle.start_error is not None or handle.killed_for is not None:
        return False
    return handle.ready_ns > 0 or exitcode is None or exitcode < 0
