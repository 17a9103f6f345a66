"""Traces: an exception's traceback as text, however deep it went and whatever its own code raises.

Used by workers, to tell of an exception, and by the parent. `traceback` is imported where it is
used: a worker that is well never needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator

if TYPE_CHECKING:
    from traceback import TracebackException

#: What code of the user's may raise when a value of theirs is unpickled or shown. KeyboardInterrupt
#: is left out: in the parent it is the user's own.
OF_THE_USERS = (Exception, SystemExit, GeneratorExit)
_FRAMES = 100  # so many of the first and of the last ones are shown of a traceback


def text_of(error: BaseException) -> str:
    """Return the traceback of an exception, and of those that led to it, as Python prints it."""
    import traceback

    try:
        if any(_is_deep(each) for each in _all_of(error)):
            return "".join(_abridged(error).format())
        return "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except OF_THE_USERS as problem:
        return f"<its traceback cannot be shown: {type(problem).__name__}>"


def _all_of(error: BaseException) -> Iterator[BaseException]:
    """Return an exception, and all that are shown with it."""
    left, seen = [error], set()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        others = (each.__cause__, each.__context__, *getattr(each, "exceptions", ()))
        left += [other for other in others if isinstance(other, BaseException)]


def _is_deep(error: BaseException) -> bool:
    """Tell whether a traceback has more frames than are shown."""
    trace, frames = error.__traceback__, 0
    while trace is not None and frames <= 2 * _FRAMES:
        trace, frames = trace.tb_next, frames + 1
    return frames > 2 * _FRAMES


def _abridged(error: BaseException) -> TracebackException:
    """Return what is shown of an exception: of each traceback the first and the last frames."""
    from traceback import FrameSummary, StackSummary, TracebackException

    def told(limit: int) -> TracebackException:
        return TracebackException(type(error), error, error.__traceback__, limit=limit)

    def join(begin: Any, end: Any) -> None:
        if len(begin.stack) > 2 * _FRAMES:
            gap = FrameSummary("(more frames, which are not shown)", 0, "...", lookup_line=False)
            shown = [*begin.stack[:_FRAMES], gap, *end.stack[-_FRAMES:]]
            begin.stack = StackSummary.from_list(shown)
        parts = [(begin.__cause__, end.__cause__), (begin.__context__, end.__context__)]
        parts += zip(
            getattr(begin, "exceptions", None) or (), getattr(end, "exceptions", None) or ()
        )
        for part in parts:
            if part[0] is not None and part[1] is not None:
                join(*part)

    whole = told(2 * _FRAMES + 1)
    join(whole, told(-_FRAMES))
    return whole
