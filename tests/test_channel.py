"""Both ends of the pipe in all combinations, over real pipes and sockets, with real deaths."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import math
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from typing import Any, Callable, Iterator

import pytest

from minipool.engine import channel, wire
from minipool.engine.channel import (
    CHUNK,
    SHORT,
    SMALL,
    FastEnd,
    Garbled,
    PeerGone,
    TimedOut,
)
from minipool.engine.portable import PortableEnd
from minipool.engine.workerend import FastWorkerEnd, PortableWorkerEnd

LAST = 20.0  # seconds: far longer than anything here takes
KINDS = ["fast", "portable"]
LIMIT = 4 << 30  # bytes in a frame


class Raw:
    """The worker's side of a pipe, without an end: what to read from and what to write to."""

    def __init__(self, reader: int, writer: int) -> None:
        self._fds = [reader, writer]

    def recv(self, most: int) -> bytes:
        return os.read(self._fds[0], most)

    def sendall(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._fds[1], data) :]

    def copy(self) -> int:
        """Return a copy of what is written to."""
        return os.dup(self._fds[1])

    def detach(self) -> list[int]:
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        for fd in self.detach():
            os.close(fd)


class Connections:
    """One for each direction, as a worker's end takes one for both."""

    def __init__(self, reader: int, writer: int) -> None:
        self._ends = Connection(reader, writable=False), Connection(writer, readable=False)
        self.recv_bytes, self.send_bytes = self._ends[0].recv_bytes, self._ends[1].send_bytes
        self.fileno = self._ends[0].fileno

    def close(self) -> None:
        for end in self._ends:
            end.close()


def make(kind: str, death_fd: int) -> tuple[Any, Raw]:
    """Return a parent's end, and the worker's side of its pipe."""
    if kind == "portable":
        ours, theirs = socket.socketpair()
        fd = theirs.detach()
        return PortableEnd(Connection(ours.detach()), death_fd, LIMIT), Raw(fd, os.dup(fd))
    ends, pipes = channel.pair(None, portable=False)
    return FastEnd(ends, death_fd, LIMIT), Raw(pipes.reader.fd, pipes.writer.fd)


class Pipe:
    """A pipe with a parent's end; `raw` is the worker's side of it."""

    def __init__(self, kind: str) -> None:
        self.kind, self.started_ns = kind, 0  # 0: an exchange begins when it is called
        self.alive, self._dying = os.pipe()  # hangs up when the worker is declared dead
        self.end, self.raw = make(kind, self.alive)
        self._threads: list[threading.Thread] = []

    def exchange(self, body: bytes = b"", timeout: float | None = LAST, call_id: int = 1) -> Any:
        start = self.started_ns or time.monotonic_ns()
        status, reply = self.end.exchange(call_id, wire.METHOD, b"name", body, timeout, start)
        return status, bytes(reply)

    def serve(
        self, kind: str, answer: Callable[..., bytes] = lambda kind, name, body: body
    ) -> None:
        """Answer requests in a thread, with a worker's end of that kind."""
        reader, writer = self.raw.detach()
        if kind == "fast":
            conn: Any = wire.Ends(wire.Descriptor(reader), wire.Descriptor(writer))
            end: Any = FastWorkerEnd(conn, LIMIT)
        else:
            conn = Connections(reader, writer)
            end = PortableWorkerEnd(conn, LIMIT)

        def loop() -> None:
            with contextlib.closing(conn), contextlib.suppress(EOFError, OSError):
                while True:
                    call_id, kind, name, body = end.receive()
                    end.send(call_id, wire.RETURNED, answer(kind, name, bytes(body)))

        self.do(loop)

    def do(self, work: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def reply_raw(self, data: bytes, then_die: bool = False) -> None:
        """Take the request, then write these very bytes."""

        def work() -> None:
            self.raw.recv(CHUNK)
            self.raw.sendall(data)
            if then_die:
                self.die()

        self.do(work)

    def die(self) -> None:
        self.raw.close()
        if self._dying >= 0:
            os.close(self._dying)
            self._dying = -1

    def close(self) -> None:
        self.end.close()
        for thread in self._threads:
            thread.join(LAST)
            assert not thread.is_alive()
        self.die()
        os.close(self.alive)


@pytest.fixture(params=KINDS)
def pipe(request: pytest.FixtureRequest) -> Iterator[Pipe]:
    made = Pipe(request.param)
    yield made
    made.close()


def frame(call_id: int, status: int, body: bytes) -> bytes:
    size = wire.REPLY.size - 4 + len(body)
    return wire.REPLY.pack(size, call_id, status) + body


REQUEST_HEAD = wire.REQUEST.size - 4 + len(b"name")
REPLY_HEAD = wire.REPLY.size - 4
BORDERS = sorted(
    {0, 1, 5_000_001}
    | {
        limit - head + step
        for limit, head in itertools.product(
            (SHORT, SMALL, CHUNK, 2 * CHUNK), (0, 4, REQUEST_HEAD, REPLY_HEAD, REQUEST_HEAD + 4, REPLY_HEAD + 4)
        )
        for step in (-1, 0, 1)
    }
)  # fmt: skip


# -- good frames ---------------------------------------------------------------------------------


@pytest.mark.parametrize("worker", KINDS)
def test_bodies_of_every_size_go_both_ways(pipe: Pipe, worker: str) -> None:
    """Empty, one byte, each side of each border, megabytes: what arrives is what was sent."""
    pipe.serve(worker)
    data = os.urandom(max(BORDERS))

    for call_id, size in enumerate(BORDERS, 1):
        assert pipe.exchange(data[:size], call_id=call_id) == (wire.RETURNED, data[:size])
    assert not pipe.end.disturbed()


@pytest.mark.parametrize("worker", KINDS)
@pytest.mark.parametrize(("there", "back"), [(10, 8_000_000), (8_000_000, 10)])
def test_one_way_may_be_long_and_the_other_short(
    pipe: Pipe, worker: str, there: int, back: int
) -> None:
    """Request and reply choose their way each by its own size."""
    pipe.serve(worker, lambda kind, name, body: bytes(len(body) + back - there))

    status, reply = pipe.exchange(bytes(there))

    assert (status, len(reply)) == (wire.RETURNED, back)


@pytest.mark.parametrize("worker", KINDS)
@pytest.mark.parametrize("size", [0, SMALL * 3])
def test_header_fields_arrive(pipe: Pipe, worker: str, size: int) -> None:
    """Kind and name are told apart from the body, whatever its size."""
    pipe.serve(worker, lambda kind, name, body: b"%d %s %d" % (kind, name, len(body)))

    _, reply = pipe.end.exchange(
        7, wire.FUNCTION | wire.KEYWORDS, b"m:f.g", bytes(size), LAST, time.monotonic_ns()
    )

    assert bytes(reply) == b"%d m:f.g %d" % (wire.FUNCTION | wire.KEYWORDS, size)


@pytest.mark.parametrize("size", [10, SMALL * 5])
def test_reply_in_many_pieces_is_put_together(pipe: Pipe, size: int) -> None:
    """A frame that trickles in, byte by byte at its head, is one frame."""
    whole = frame(1, wire.RETURNED, os.urandom(size))

    def trickle() -> None:
        pipe.raw.recv(CHUNK)
        pieces = [whole[i : i + 1] for i in range(20)] + [whole[20:-1], whole[-1:]]
        for piece in pieces:
            pipe.raw.sendall(piece)

    pipe.do(trickle)

    assert pipe.exchange() == (wire.RETURNED, whole[wire.REPLY.size :])


@pytest.mark.parametrize("timeout", [None, 2.5, 1e7, 1e300, math.inf])
@pytest.mark.parametrize("size", [1, SMALL * 20])
def test_any_timeout_can_be_waited(pipe: Pipe, timeout: float | None, size: int) -> None:
    """For ever, and numbers that no system call takes."""
    pipe.serve("fast")

    assert pipe.exchange(bytes(size), timeout) == (wire.RETURNED, bytes(size))


def test_portable_end_takes_the_words_and_passes_over_the_beginning() -> None:
    """Where no table is shared, a reply is preceded by word that the call has begun."""
    pipe = Pipe("portable")
    seen: list[bytes] = []
    pipe.end.on_words = lambda words: seen.append(bytes(words[: wire.WORDS.size]))
    begun, done = wire.WORDS.pack(*range(9)), wire.WORDS.pack(*range(9, 18))
    pipe.reply_raw(
        frame(1, wire.BEGUN | wire.WITH_WORDS, begun)
        + frame(1, wire.RETURNED | wire.WITH_WORDS, done + b"body")
    )

    assert pipe.exchange() == (wire.RETURNED, b"body")
    assert seen == [begun, done]
    pipe.close()


# -- frames that are none ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [
        frame(2, wire.RETURNED, b"late reply of another call"),
        frame(-1, wire.RETURNED, b""),
        struct.pack("!i", 3) + b"abc",
        struct.pack("!i", 0),
        struct.pack("!i", -2) + bytes(40),
        struct.pack("!iQ", -1, LIMIT + 1) + bytes(40),
        struct.pack("!iQ", -1, 2**64 - 1) + bytes(40),
        b"\xff" * 64,
    ],
)
def test_garbage_is_told_from_a_reply(pipe: Pipe, garbage: bytes) -> None:
    """A wrong call id, a frame without header, lengths that cannot be: Garbled, at once."""
    pipe.reply_raw(garbage)

    with pytest.raises(Garbled):
        pipe.exchange()


def test_more_than_one_reply_is_never_taken_for_the_next(pipe: Pipe) -> None:
    """What follows a reply makes it garbage, or is seen before the next call."""
    pipe.reply_raw(frame(1, wire.RETURNED, b"one") + frame(1, wire.RETURNED, b"two"))

    try:
        assert pipe.exchange() == (wire.RETURNED, b"one")
    except Garbled:
        pass
    else:
        assert pipe.end.disturbed()


def test_text_on_the_pipe_does_not_wait_for_what_it_claims(pipe: Pipe) -> None:
    """ "HTTP" read as a length is a gigabyte that never comes: it ends with its writer."""
    pipe.reply_raw(b"HTTP/1.1 200 OK\r\n\r\n", then_die=True)

    with pytest.raises((PeerGone, Garbled)):
        pipe.exchange()


@pytest.mark.parametrize("cut", [1, 3, 4, 12, wire.REPLY.size, wire.REPLY.size + 5])
def test_half_a_frame_and_death_is_death(pipe: Pipe, cut: int) -> None:
    """However much of the reply came, without its end it is none."""
    pipe.reply_raw(frame(1, wire.RETURNED, b"0123456789")[:cut], then_die=True)

    with pytest.raises(PeerGone):
        pipe.exchange()


@pytest.mark.parametrize("cut", [100, SMALL * 3])
def test_half_a_long_frame_and_death_is_death(pipe: Pipe, cut: int) -> None:
    pipe.reply_raw(frame(1, wire.RETURNED, bytes(SMALL * 6))[:cut], then_die=True)

    with pytest.raises(PeerGone):
        pipe.exchange()


def test_long_lengths_are_understood() -> None:
    """Beyond 2 GB the length takes twelve bytes; they are read only when they are there."""
    head = wire.LONG_LENGTH.pack(-1, 3 << 30)

    assert channel.length_of(head[:3], LIMIT) == (4, None)
    assert channel.length_of(head[:11], LIMIT) == (12, None)
    assert channel.length_of(head, LIMIT) == (12, 3 << 30)
    assert channel.long_length(3 << 30) == head


# -- death and time ------------------------------------------------------------------------------


def test_death_before_the_request_is_death(pipe: Pipe) -> None:
    pipe.die()

    with pytest.raises(PeerGone):
        pipe.exchange()


def test_death_instead_of_a_reply_is_death_at_once(pipe: Pipe) -> None:
    """Not at the timeout: there is none."""
    pipe.do(lambda: (pipe.raw.recv(CHUNK), pipe.die()))

    with pytest.raises(PeerGone):
        pipe.exchange(timeout=None)


@pytest.mark.parametrize("said", [b"", b"half a"])
def test_death_ends_the_wait_for_a_pipe_that_does_not_end(pipe: Pipe, said: bytes) -> None:
    """A grandchild may hold a copy of the dead worker's end."""
    copy = pipe.raw.copy()
    pipe.do(lambda: (pipe.raw.recv(CHUNK), pipe.raw.sendall(said), pipe.die()))

    with pytest.raises(PeerGone):
        pipe.exchange(timeout=None)
    os.close(copy)


def test_hang_up_ends_the_wait_where_nothing_else_tells_of_the_death() -> None:
    """The descriptor that would tell may be another worker's by then; the manager knows better."""
    pipe = Pipe("fast")
    copy = pipe.raw.copy()
    pipe.do(lambda: (pipe.raw.recv(CHUNK), pipe.raw.close(), pipe.end.hang_up()))

    with pytest.raises(PeerGone):
        pipe.exchange(timeout=None)
    os.close(copy)
    pipe.close()


def test_small_pipe_is_written_to_the_end(pipe: Pipe) -> None:
    """A user who has very many pipes gets small ones."""
    if pipe.kind == "fast":
        fcntl.fcntl(pipe.end._out, channel._F_SETPIPE_SZ, 4096)
    pipe.serve("fast")
    for call_id, size in enumerate((4000, 4096, 5000, SMALL - 100, SMALL, 5 * SMALL), 1):
        assert pipe.exchange(bytes(size), call_id=call_id) == (wire.RETURNED, bytes(size))


@pytest.mark.parametrize("timeout", [0, 0.001, 0.2])
def test_silence_times_out_when_it_should(pipe: Pipe, timeout: float) -> None:
    """Not before the timeout, and not long after it."""
    start = time.monotonic()

    with pytest.raises(TimedOut):
        pipe.exchange(timeout=timeout)

    assert timeout <= time.monotonic() - start < timeout + LAST / 2


def test_reply_that_comes_in_time_that_was_lost_is_taken(pipe: Pipe) -> None:
    """The process was stopped, so the call may take as much longer, however often that happens."""
    asked: list[float] = []

    def lost(since: float) -> float:
        asked.append(since)
        if len(asked) == 2:
            pipe.raw.recv(CHUNK)
            pipe.raw.sendall(frame(1, wire.RETURNED, b"late"))
        return len(asked) * 0.01

    pipe.end.lost = lost
    pipe.started_ns = time.monotonic_ns()

    assert pipe.exchange(timeout=0.01) == (wire.RETURNED, b"late")
    assert asked == [pipe.started_ns / 1e9] * 2


def test_time_that_was_lost_before_is_given_once(pipe: Pipe) -> None:
    pipe.end.lost = lambda since: 0.02

    with pytest.raises(TimedOut):
        pipe.exchange(timeout=0.01)


def test_request_that_is_taken_in_time_that_was_lost_is_sent(pipe: Pipe) -> None:
    """One that does not fit into the pipe at once."""
    body = bytes(5_000_001)

    def lost(since: float) -> float:
        if not served:
            served.append(True)
            pipe.serve(pipe.kind)
        return LAST

    served: list[bool] = []
    pipe.end.lost = lost

    assert pipe.exchange(body, timeout=0.01) == (wire.RETURNED, body)


def test_signals_do_not_shorten_the_wait(pipe: Pipe) -> None:
    """A handler that returns is no reason to give up: the reply is waited for to the end."""
    came = []
    old = signal.signal(signal.SIGALRM, lambda *args: came.append(1))

    def answer(kind: int, name: bytes, body: bytes) -> bytes:
        for _ in range(5):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        return body

    try:
        pipe.serve("fast", answer)
        assert pipe.exchange(b"x", timeout=LAST) == (wire.RETURNED, b"x")
    finally:
        signal.signal(signal.SIGALRM, old)
    assert came


@pytest.mark.parametrize("cut", [2, 4, 12, 20, SMALL * 2])
def test_stalled_reply_times_out(pipe: Pipe, cut: int) -> None:
    """A worker that stops in the middle of its reply is too late as any other."""
    pipe.reply_raw(frame(1, wire.RETURNED, bytes(SMALL * 4))[:cut])

    with pytest.raises(TimedOut):
        pipe.exchange(timeout=0.2)


@pytest.mark.parametrize("size", [0, SMALL * 2])
def test_time_before_a_reply_begins_counts(pipe: Pipe, size: int) -> None:
    """A reply that begins in time and then stalls has what is left, and not the whole again."""
    pipe.started_ns = time.monotonic_ns() - int((LAST - 0.3) * 1e9)
    pipe.do(lambda: pipe.raw.recv(4 * SMALL) and pipe.raw.sendall(frame(1, 0, bytes(99))[:30]))

    start = time.monotonic()
    with pytest.raises(TimedOut):
        pipe.exchange(bytes(size), timeout=LAST)
    assert time.monotonic() - start < LAST / 2


def test_request_that_is_too_long_is_refused_and_the_pipe_as_good_as_before(pipe: Pipe) -> None:
    pipe.end._limit = 100_000
    pipe.serve(pipe.kind)
    with pytest.raises(channel.TooLong):
        pipe.exchange(bytes(100_000))
    most = bytes(100_000 - REQUEST_HEAD)
    assert pipe.exchange(most, call_id=2) == (wire.RETURNED, most)


def test_reply_that_claims_more_than_the_limit_is_garbage(pipe: Pipe) -> None:
    pipe.end._limit = 100_000
    pipe.reply_raw(wire.LENGTH.pack(100_001))
    with pytest.raises(Garbled):
        pipe.exchange()


def wait_full(fd: int) -> None:
    """Wait until no more can be written: a send is in the middle of its body."""
    until = time.monotonic() + LAST
    while select.select([], [fd], [], 0)[1]:
        assert time.monotonic() < until, "nothing was sent"


class Stranger:
    """A real process that holds the worker's side of a pipe and never reads from it."""

    def __init__(self, kind: str) -> None:
        self.death_fd, theirs = os.pipe()  # whose other end is the process's alone
        self.end, raw = make(kind, self.death_fd)
        fds = [theirs, *raw.detach()]
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import signal; signal.pause()"], pass_fds=fds
        )
        for fd in fds:
            os.close(fd)
        self.fd = self.end._out if kind == "fast" else self.end.fd.fileno()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for thread in threading.enumerate():
            if thread.name == "minipool-send":
                thread.join(LAST)
        self.end.close()
        os.close(self.death_fd)


@pytest.fixture(params=KINDS)
def stranger(request: pytest.FixtureRequest) -> Iterator[Stranger]:
    made = Stranger(request.param)
    yield made
    made.close()


def test_death_in_mid_send_surfaces_at_once(stranger: Stranger) -> None:
    """Megabytes are on their way to a worker that is killed: no timeout is needed to see it."""

    def kill() -> None:
        wait_full(stranger.fd)
        stranger.process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    start = time.monotonic()
    with pytest.raises(PeerGone):
        stranger.end.exchange(1, wire.METHOD, b"name", bytes(64 << 20), None, time.monotonic_ns())
    assert time.monotonic() - start < LAST
    killer.join()


def test_hang_up_ends_a_send_where_nothing_else_tells_of_the_death() -> None:
    """Nobody reads, nothing tells of a death, and there is no timeout."""
    pipe = Pipe("fast")

    def hang_up() -> None:
        wait_full(pipe.end._out)
        pipe.end.hang_up()

    pipe.do(hang_up)
    with pytest.raises(PeerGone):
        pipe.exchange(bytes(64 << 20), timeout=None)
    pipe.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux can widen a pipe")
def test_long_frames_get_wider_pipes_and_short_ones_do_not() -> None:
    """A user has only so many pages in pipes, so only who needs them takes them."""
    pipe = Pipe("fast")
    fds = pipe.end._out, pipe.raw.copy()
    pipe.serve("fast")

    def sizes() -> list[int]:
        return [fcntl.fcntl(fd, channel._F_SETPIPE_SZ + 1) for fd in fds]  # F_GETPIPE_SZ

    usual = sizes()
    pipe.exchange(bytes(SMALL // 2), call_id=1)
    assert sizes() == usual
    pipe.exchange(bytes(2 * CHUNK), call_id=2)
    assert sizes() == [channel.PIECE] * 2
    os.close(fds[1])
    pipe.close()


def test_stopped_reader_times_out_in_mid_send(stranger: Stranger) -> None:
    """The deadline holds while the body is being written, too."""
    os.kill(stranger.process.pid, signal.SIGSTOP)
    start = time.monotonic()

    with pytest.raises(TimedOut):
        stranger.end.exchange(1, wire.METHOD, b"name", bytes(64 << 20), 0.3, time.monotonic_ns())

    assert 0.3 <= time.monotonic() - start < LAST


# -- the manager's part --------------------------------------------------------------------------


def test_receive_now_never_waits(pipe: Pipe) -> None:
    """Nothing there is None; a whole frame is a frame."""
    assert pipe.end.receive_now() is None
    pipe.raw.sendall(frame(0, wire.READY, b"hello"))

    got = pipe.end.receive_now()

    assert got is not None
    assert wire.REPLY.unpack_from(got)[1:] == (0, wire.READY)
    assert bytes(got[wire.REPLY.size :]) == b"hello"
    assert pipe.end.receive_now() is None


def test_receive_now_keeps_half_a_frame_for_the_next_time() -> None:
    """A worker that was stopped while it told its readiness does not stop the manager."""
    pipe = Pipe("fast")
    whole = frame(0, wire.READY, bytes(CHUNK))
    half = len(whole) // 2
    pipe.do(lambda: pipe.raw.sendall(whole[:half])).join(LAST)
    assert pipe.end.receive_now() is None
    pipe.do(lambda: pipe.raw.sendall(whole[half:])).join(LAST)
    got = pipe.end.receive_now()

    assert got is not None
    assert bytes(got[4:]) == whole[4:]
    pipe.close()


def test_receive_now_of_a_dead_worker_is_death(pipe: Pipe) -> None:
    pipe.die()

    with pytest.raises(PeerGone):
        pipe.end.receive_now()


def test_receive_now_knows_garbage(pipe: Pipe) -> None:
    pipe.raw.sendall(b"\xff" * 64)

    with pytest.raises(Garbled):
        pipe.end.receive_now()


def test_last_words_of_the_dead_are_heard(pipe: Pipe) -> None:
    """Why a worker did not start is in the pipe when it is dead."""
    pipe.raw.sendall(frame(0, wire.START_FAILED, b"because"))
    pipe.die()

    got = pipe.end.receive_now()

    assert got is not None
    assert bytes(got[wire.REPLY.size :]) == b"because"


@pytest.mark.parametrize("worker", KINDS)
def test_probe_is_sent_without_waiting(pipe: Pipe, worker: str) -> None:
    got = threading.Event()
    pipe.serve(worker, lambda kind, name, body: got.set() or b"%d %s" % (kind, name))

    pipe.end.post(-1, wire.PROBE)

    assert got.wait(LAST)
    assert select.select([pipe.end.fd], [], [], LAST)[0]
    reply = pipe.end.receive_now()
    assert wire.REPLY.unpack_from(reply)[1:] == (-1, wire.RETURNED)
    assert bytes(reply[wire.REPLY.size :]) == b"%d " % wire.PROBE


def test_probe_of_a_dead_worker_is_death(pipe: Pipe) -> None:
    pipe.die()

    with pytest.raises(PeerGone):
        pipe.end.post(-1, wire.PROBE)


def test_quiet_pipe_is_undisturbed(pipe: Pipe) -> None:
    assert not pipe.end.disturbed()


@pytest.mark.parametrize("how", ["bytes", "end", "death", "closed"])
def test_disturbance_is_seen_before_the_next_call(pipe: Pipe, how: str) -> None:
    """Stray bytes, the pipe's end, the process's end, our own end closed: all are told."""
    if how == "bytes":
        pipe.raw.sendall(b"!")
    elif how == "end":
        pipe.raw.close()
    elif how == "death":
        os.close(pipe._dying)
        pipe._dying = -1
    else:
        pipe.end.close()

    assert pipe.end.disturbed()


def test_closed_end_is_of_no_more_use(pipe: Pipe) -> None:
    """A thread that was late gets PeerGone, and never another's descriptor."""
    pipe.end.close()
    others = [os.pipe() for _ in range(4)]  # whose descriptors may have its old number
    try:
        with pytest.raises(PeerGone):
            pipe.exchange()
        with pytest.raises(PeerGone):
            pipe.exchange(bytes(SMALL * 4))
        with pytest.raises(PeerGone):
            pipe.end.post(-1, wire.PROBE)
        with pytest.raises(PeerGone):
            pipe.end.receive_now()
        pipe.end.hang_up()
        pipe.end.close()
        assert not any(select.select([reader], [], [], 0)[0] for reader, _ in others)
    finally:
        for fd in itertools.chain.from_iterable(others):
            os.close(fd)
