"""Traces: the text of an exception and of all that led to it, of bounded length.

Runs in the worker, while its caller waits for the reply. To format a frame takes some fifty
microseconds, so what recursed a hundred thousand times would take longer than many a timeout.
"""

from __future__ import annotations

import itertools
import re
import traceback
from types import TracebackType
from typing import Any, Iterator

END = 100  # frames of each exception that are shown, at either end
MOST = 100  # exceptions that are shown: causes, contexts, members of groups

# What stands for frames that are left out, until it is text: a summary takes frames only.
_LEFT_OUT = "<minipool: {} frames are left out>"
_GAP = re.compile(r'  File "<minipool: (\d+) frames are left out>", line 0, in <gap>(?=\n)')
_GAP_TEXT = r"  ... \1 frames are left out here ..."


def text_of(error: BaseException) -> str:
    """Return what Python prints of an exception that nobody catches; of long ones, both ends."""
    related, more = _related(error)
    if more:  # to cut a chain is not possible without changing it
        return f"{_alone(error)}(it has more than {MOST} causes, contexts and members)\n"
    if not any(_longer_than(2 * END, each) for each in related):
        return "".join(traceback.format_exception(type(error), error, error.__traceback__))
    shown = traceback.TracebackException(type(error), error, error.__traceback__, limit=END)
    _complete(error, shown)
    return _GAP.sub(_GAP_TEXT, "".join(shown.format()))


def _related(error: BaseException) -> tuple[list[BaseException], bool]:
    """Return an exception and all that would be shown with it; True if there are too many."""
    found: dict[int, BaseException] = {}
    left = [error]
    while left:
        each = left.pop()
        if id(each) in found:
            continue
        if len(found) >= MOST:
            return list(found.values()), True
        found[id(each)] = each
        members = getattr(each, "exceptions", ()) if _is_group(each) else ()
        left += [
            other
            for other in (each.__cause__, each.__context__, *itertools.islice(members, MOST + 1))
            if other is not None
        ]
    return list(found.values()), False


def _is_group(error: BaseException) -> bool:
    return any(kind.__name__ == "BaseExceptionGroup" for kind in type(error).__mro__)


def _longer_than(most: int, error: BaseException) -> bool:
    return next(itertools.islice(_links(error.__traceback__), most, None), None) is not None


def _links(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _alone(error: BaseException) -> str:
    """Return the text of an exception without what led to it."""
    trace = "".join(_both_ends(error, _stack_of(error.__traceback__, END)).format())
    trace = _GAP.sub(_GAP_TEXT, trace)
    return f"Traceback (most recent call last):\n{trace}{type(error).__name__}: {error}\n"


def _complete(error: BaseException, summary: Any) -> None:
    """Add to what was summarised of an exception, and of all related ones, the last frames."""
    left: list[tuple[BaseException | None, Any]] = [(error, summary)]
    done: set[int] = set()
    while left:
        each, shown = left.pop()
        if each is None or shown is None or id(shown) in done:
            continue
        done.add(id(shown))
        shown.stack = _both_ends(each, shown.stack)
        left += [(each.__cause__, shown.__cause__), (each.__context__, shown.__context__)]
        if getattr(shown, "exceptions", None):  # of a group
            left += zip(getattr(each, "exceptions", ()), shown.exceptions)


def _both_ends(error: BaseException, first: Any) -> traceback.StackSummary:
    """Return the first frames of an exception, then how many are left out, then the last ones."""
    count = sum(1 for _ in _links(error.__traceback__))
    if count <= END:
        return traceback.StackSummary.from_list([*first])
    shown = min(count - END, END)
    frames = [*first]
    if count > END + shown:
        gap = _LEFT_OUT.format(count - END - shown)
        frames.append(traceback.FrameSummary(gap, 0, "<gap>", lookup_line=False, line=""))
    last = next(itertools.islice(_links(error.__traceback__), count - shown, None))
    return traceback.StackSummary.from_list([*frames, *_stack_of(last)])


def _stack_of(trace: TracebackType | None, limit: int | None = None) -> Any:
    """Summarise frames as those of an exception are, which tells where in a line each one is."""
    return traceback.TracebackException(Exception, Exception(), trace, limit=limit).stack
