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
_START = "correct what made the last start fail"


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
            return why, _START
        return why, "raise the timeout, or wait for the start with `open()` or `wait_ready()`"
    pause = retry_in(fleet, time.monotonic())
    if failure is not None:
        soon = "" if pause is None else f"; the next is tried in {pause:.1f} s"
        return f"no worker serves{failed}{soon}", _START
    return "no worker serves, and the next is about to be started", "raise the timeout"


def _holds(serving: list[Handle]) -> list[tuple[float, str]]:
    return [hold for hold in map(hold_of, serving) if hold is not None]


def hold_of(handle: Handle) -> tuple[float, str] | None:
    """Return for how many seconds a worker is leased, and by whom, in words; None: it is not."""
    since = handle.row[t.LEASED_SINCE_NS]
    if not since or handle.live_lease is None:
        return None
    seconds = max(0, time.monotonic_ns() - since) / 1e9
    name = _thread_name(handle.thread)
    by = f"thread {name!r}" if name is not None else "a thread that has ended"
    call = handle.in_call
    doing = f", in {call.decode(errors='replace')!r}" if isinstance(call, bytes) else ""
    return seconds, f"worker {handle.slot} for {seconds:.1f} s, by {by}{doing}"


def _thread_name(ident: int) -> str | None:
    """Return the name of a thread, without a lock: a signal handler may ask for it."""
    active: dict[int, Any] = getattr(threading, "_active", {})
    thread = active.get(ident)
    return None if thread is None else thread.name
