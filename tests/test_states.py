"""The table of states: what may happen to a worker, and what may not."""

from __future__ import annotations

import itertools

import pytest

from minipool.engine.states import (
    TRANSITIONS,
    IllegalTransition,
    WorkerEvent,
    WorkerState,
    advance,
)

S, E = WorkerState, WorkerEvent

LEGAL = [(state, event) for state, moves in TRANSITIONS.items() for event in moves]
ILLEGAL = [pair for pair in itertools.product(S, E) if pair not in LEGAL]


def test_numbers_are_those_in_shared_memory() -> None:
    """Onlookers of another version read these numbers: they never change."""
    assert {state.name: int(state) for state in S} == {
        "VACANT": 0, "STARTING": 1, "IDLE": 2, "LEASED": 3, "PROBING": 4, "STOPPING": 5, "LOST": 6,
        "SPARE": 7,
    }  # fmt: skip


def test_life_of_a_worker_walks_through_the_table() -> None:
    """Started, used, probed, told to stop, reaped: and the slot is vacant again."""
    life = [E.SPAWNED, E.READY, E.TAKEN, E.RETURNED, E.CLAIMED, E.ANSWERED, E.TOLD_TO_STOP,
            E.REAPED]  # fmt: skip
    state = S.VACANT
    seen = []
    for event in life:
        state = advance(state, event)
        seen.append(state.name)

    assert seen == ["STARTING", "IDLE", "LEASED", "IDLE", "PROBING", "IDLE", "STOPPING", "VACANT"]


@pytest.mark.parametrize("state", [S.STARTING, S.IDLE, S.LEASED, S.PROBING, S.SPARE])
def test_any_worker_may_die_or_be_told_to_stop(state: S) -> None:
    """Whatever a worker does, both ends are open to it, and both lead to a vacant slot."""
    assert advance(advance(state, E.DIED), E.REAPED) is S.VACANT
    assert advance(advance(state, E.TOLD_TO_STOP), E.REAPED) is S.VACANT
    assert advance(advance(state, E.TOLD_TO_STOP), E.DIED) is S.LOST


def test_illegal_moves_are_refused_by_name() -> None:
    """What the table does not have raises, and names event and state."""
    assert len(ILLEGAL) > 40
    for state, event in ILLEGAL:
        with pytest.raises(IllegalTransition, match=f"{event.name} .* {state.name}"):
            advance(state, event)


def test_every_state_is_reached_and_left() -> None:
    """No state is a dead end, and none is unreachable from a vacant slot."""
    reached, border = {S.VACANT}, [S.VACANT]
    while border:
        for after in TRANSITIONS[border.pop()].values():
            if after not in reached:
                reached.add(after)
                border.append(after)

    assert reached == set(S) == set(TRANSITIONS)
    assert all(TRANSITIONS[state] for state in S)
