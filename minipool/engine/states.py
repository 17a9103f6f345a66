"""What a slot's worker can be doing, and the one table of how that may change.

All state logic lives here; this module knows no process, pipe or clock.

        SPAWNED        READY        TAKEN            RETURNED
VACANT --------> STARTING ----> IDLE ----> LEASED ------------> IDLE
                                  `------> PROBING -----------> IDLE
                                   CLAIMED          ANSWERED
IDLE, or STARTING: SET_ASIDE -> SPARE, which is out of service; CALLED_UP -> IDLE
any of the five: TOLD_TO_STOP -> STOPPING, DIED -> LOST; both: REAPED -> VACANT
"""

from __future__ import annotations

import enum


class WorkerState(enum.IntEnum):
    """What one worker is doing. The numbers live in shared memory: add, never renumber."""

    VACANT, STARTING, IDLE, LEASED, PROBING, STOPPING, LOST, SPARE = range(8)


WorkerEvent = enum.Enum(
    "WorkerEvent",
    "SPAWNED READY TAKEN RETURNED CLAIMED ANSWERED SET_ASIDE CALLED_UP TOLD_TO_STOP DIED REAPED",
)
S, E = WorkerState, WorkerEvent

_ENDS = {E.TOLD_TO_STOP: S.STOPPING, E.DIED: S.LOST}
TRANSITIONS: dict[WorkerState, dict[WorkerEvent, WorkerState]] = {
    S.VACANT: {E.SPAWNED: S.STARTING},
    S.STARTING: {E.READY: S.IDLE, E.SET_ASIDE: S.SPARE, **_ENDS},
    S.IDLE: {E.TAKEN: S.LEASED, E.CLAIMED: S.PROBING, E.SET_ASIDE: S.SPARE, **_ENDS},
    S.LEASED: {E.RETURNED: S.IDLE, **_ENDS},
    S.PROBING: {E.ANSWERED: S.IDLE, **_ENDS},
    S.SPARE: {E.CALLED_UP: S.IDLE, E.CLAIMED: S.PROBING, **_ENDS},
    S.STOPPING: {E.DIED: S.LOST, E.REAPED: S.VACANT},
    S.LOST: {E.REAPED: S.VACANT},
}


class IllegalTransition(Exception):
    """A state was asked to change in a way the table does not allow: a bug in minipool."""


def advance(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """Return the state after `event`; every change of state in minipool goes through here.

    Raises:
        IllegalTransition: the event cannot happen in that state; nothing has changed.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"{event.name} cannot happen to a {state.name} worker") from None
