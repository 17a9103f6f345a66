"""Refusal: why no worker came free in time, and what helps against that.

By the thread of a caller that got none. It reads what others change, so the worst it can do is to
tell of a moment that is over.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from . import table as t
from .fleet import retry_in
from .states import WorkerState as S

if TYPE_CHECKING:
    from .handle import Handle
    from .manager import Manager

_TOLD = 3  # leases, those that are held longest
_MORE = "raise `size` or `checkout_timeout`"


def refusal(manager: Manager, mine: int, waited: float) -> tuple[str, str]:
    """Return why nothing came free for a caller, and the remedy.

    `mine` is how many leases its own thread holds; `waited`, in seconds, how long it was there.
    """
    fleet = manager.fleet
    serving = fleet.usable()
    if mine:
        leases = "1 lease" if mine == 1 else f"{mine} leases"
        why = f"this thread already holds {leases}, and would wait for itself"
        return why, "give that back before, make the call with it, or raise `size`"
    if not serving:
        return _nobody_serves(manager)
    held = sorted(_holds(serving), reverse=True)
    if not held:
        return "others were served before", _MORE
    number = len(serving)
    which = f"all {number} workers are" if len(held) == number else f"{len(held)} of {number} are"
    told = "; ".join(text for _, text in held[:_TOLD])
    longest = "the longest held: " if len(held) > 1 else ""
    why = f"{which} leased ({longest}{told})" if number > 1 else f"its worker is leased ({told})"
    if held[0][0] > waited:  # one of them had it all the time
        return why, f"{_MORE}, or look for a lease that is never given back (`leak_warn_after`)"
    return why, _MORE


def _nobody_serves(manager: Manager) -> tuple[str, str]:
    fleet = manager.fleet
    booting = [handle for handle in fleet.staying() if handle.state is S.STARTING]
    failure = fleet.last_failure
    failed = "" if failure is None else f"; the last start failed: {failure}"
    if booting:
        now = time.monotonic_ns()
        longest = max(now - handle.spawned_ns for handle in booting) / 1e9
        are = "1 is" if len(booting) == 1 else f"{len(booting)} are"
        why = f"no worker serves yet: {are} starting, for {longest:.1f} s{failed}"
        if failure is not None:
            return why, "correct that"
        return why, "raise the timeout, or wait for the start with `open()` or `wait_ready()`"
    pause = retry_in(fleet, time.monotonic())
    if failure is not None:
        soon = "" if pause is None else f"; the next is tried in {pause:.1f} s"
        return f"no worker serves{failed}{soon}", "correct that"
    return "no worker serves, and the next is about to be started", "raise the timeout"


def _holds(serving: list[Handle]) -> list[tuple[float, str]]:
    """Return for how long each worker that is leased has been, and by whom, in words."""
    now, names = time.monotonic_ns(), _thread_names()
    held = []
    for handle in serving:
        since = handle.row[t.LEASED_SINCE_NS]
        if not since or handle.live_lease is None:
            continue
        seconds = max(0, now - since) / 1e9
        name = names.get(handle.thread)
        by = f"thread {name!r}" if name is not None else "a thread that has ended"
        call = handle.in_call
        doing = f", in {call.decode(errors='replace')!r}" if isinstance(call, bytes) else ""
        held.append((seconds, f"worker {handle.slot} for {seconds:.1f} s, by {by}{doing}"))
    return held


def _thread_names() -> dict[int, str]:
    """Return the names of all threads, without a lock: a signal handler may ask for them."""
    active: dict[int, Any] = getattr(threading, "_active", {})
    return {ident: thread.name for ident, thread in active.copy().items()}
