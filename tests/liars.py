"""Worker code that sends what is no reply, or what is hard to take.

A module of its own, without pytest, because every worker that uses one of these imports it.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import rogues
from gates import pass_gate
from minipool import current_session
from minipool.engine import wire


def frame(call_id: int, status: int, body: bytes = b"") -> bytes:
    return wire.REPLY.pack(wire.REPLY.size - 4 + len(body), call_id, status) + body


def write_and(then: str, data: bytes) -> None:
    """Write to the pipe, and then return, hang or die."""
    rogues.write_to_pipe(data)
    if then == "hang":
        signal.pause()
    if then == "die":
        os._exit(3)
    if then == "close":
        rogues.close_pipe()


def never_have_it(call_id: int) -> None:
    """Say that the session's state is not here, whatever comes along."""
    for _ in range(2):
        rogues.write_to_pipe(frame(call_id, wire.NOT_HERE))
        rogues.take_request()
    signal.pause()


def raise_long(size: int) -> None:
    raise ValueError(bytes(size))


def keep(size: int) -> int:
    current_session()["data"] = bytes(size)
    return size


def kept() -> int:
    return len(current_session()["data"])


class StopsAtGate:
    """Unpickles at once in the process that made it, and elsewhere when a gate opens."""

    def __init__(self, gate: str) -> None:
        self.gate = gate

    def __reduce__(self) -> Any:
        return _stop, (self.gate, os.getpid())


class GateError(StopsAtGate, Exception):
    pass


def _stop(gate: str, pid: int) -> Any:
    if os.getpid() != pid:
        pass_gate(gate)
    return GateError(gate)


def return_gated(gate: str) -> StopsAtGate:
    return StopsAtGate(gate)


class RaisesGated:
    def __init__(self, gate: str) -> None:
        raise GateError(gate)


class SendsGarbledError:
    def __init__(self) -> None:
        rogues.write_to_pipe(frame(0, wire.START_FAILED, b"what?"))
        signal.pause()


class SendsHalfAFrame:
    """Says nothing whole while it starts: nobody may wait for the rest of it."""

    def __init__(self, gate: str) -> None:
        rogues.write_to_pipe(frame(0, wire.READY, bytes(50))[:30])
        pass_gate(gate)
        signal.pause()
