"""The black box of a worker: a pipe into which it writes where it was when it crashed or was asked.

`faulthandler` writes in C, without the GIL, so it tells also of a worker that sits in a C function
or has crashed in one. The pipe takes what fits and never makes a worker wait; nothing is on disk.
The parent reads what is there once the process has ended. It does not wait for the end of the
pipe: processes that user code forked may hold it open. Two signals ask:

* LAST_WORDS: the worker writes and then dies, because `faulthandler` hands on to the signal's
  default action, which ends a process. So the end of the process is the end of its words.
* SHOW: the worker writes and goes on. Nothing marks the end of what it writes, so the signal is
  sent twice: it is held back while it is being handled, and the second stacks begin where the
  first are whole.

The pipe also takes what a fork server has to say of a worker, where it can: first the pid, before
the worker runs any code of ours, and last the exit code. Each is 8 bytes, as the stacks are not
that are plain text. The server must not be held up by a pipe that is full of stacks, else nothing
would come of the next start; so it is emptied while anybody waits for the server.

Real-time signals, because they queue and hardly anybody uses them. Where there are none (macOS)
crashes are told of all the same. `install` runs in the worker, everything else in the parent.
"""

from __future__ import annotations

import _signal
import os
import signal
import struct
import time
import weakref
from typing import Any, Callable, Iterable

from .._sync import Guard, guarded
from .descriptors import close_all, close_held, lifted, pipe
from .wire import Descriptor

_TOP = getattr(signal, "SIGRTMAX", 0)
LAST_WORDS, SHOW = (int(_TOP) - 5, int(_TOP) - 6) if _TOP else (0, 0)  # 0: there are none
PATIENCE = 0.5  # seconds; a worker that is stopped, or blocks signals, does not answer
_PIECE, _MOST = 1 << 16, 1 << 20  # bytes; a pipe holds one piece, unless it is filled meanwhile
_FATAL = "Fatal Python error"
_OF_C = "Current thread's C stack trace"  # what follows, from CPython 3.14 on
_LINES = 8  # of a short form
_OURS = f'{os.sep}engine{os.sep}child.py"'  # as it stands in stacks
_SAID_BY_SERVER = struct.Struct("q")  # as `multiprocessing.forkserver` does
_SMALL = (b"\0" * 7, b"\xff" * 7)  # what follows the lowest byte of any exit code, which comes last
_asking = Guard()  # of two who ask one worker, neither would get the whole answer


# -- in the worker -------------------------------------------------------------------------------


def install(fd: int) -> None:
    """Write this process's stacks to `fd` when it crashes, and when it is asked to."""
    import faulthandler

    faulthandler.enable(file=fd)
    if LAST_WORDS:
        faulthandler.register(LAST_WORDS, file=fd, chain=True)
        faulthandler.register(SHOW, file=fd)
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (LAST_WORDS, SHOW))
    pipe = os.fstat(fd)

    def uninstall() -> None:  # what user code forks has no say in this, and holds no end of it
        _uninstall()
        try:
            if os.path.samestat(os.fstat(fd), pipe):
                os.close(fd)
        except OSError:
            pass  # user code has closed it

    os.register_at_fork(after_in_child=uninstall)


def _uninstall() -> None:
    import faulthandler

    faulthandler.disable()
    if LAST_WORDS:
        faulthandler.unregister(LAST_WORDS)
        faulthandler.unregister(SHOW)


# -- in the parent -------------------------------------------------------------------------------


def make() -> BlackBox | None:
    """Return a black box for a worker that is about to be started; None if there can be none.

    Raises:
        OSError: out of descriptors.
    """
    import faulthandler

    return BlackBox() if hasattr(faulthandler, "register") else None


def of_servers() -> dict[int, BlackBox]:
    """Return what a fork server may be waiting to write to, by descriptor.

    Not what waits for its first word: that is for its own thread to read, and has room.
    """
    boxes: dict[int, BlackBox] = {}
    for box in tuple(_of_servers):
        if box.heard_server and box._fd is not None and not box.ended:
            boxes[box._fd] = box
    return boxes


class BlackBox:
    """The parent's end. Any thread may read; one at a time does."""

    _fd: int | None = None

    def __init__(self) -> None:
        self._fd, fd = pipe()
        self.theirs: Descriptor | None = Descriptor(fd)  # travels to the worker
        os.set_blocking(self._fd, False)
        os.set_blocking(fd, False)
        self.ended = False  # nothing more will come
        self.heard_server = False  # the pid came this way, and so will the exit code
        self._pieces: list[bytes] = []  # that were read
        self._question: object = None  # to which what was said is the answer
        self._reading = Guard()

    def lend(self) -> Descriptor | None:
        """Return the worker's end, which is the caller's to close once the worker is started."""
        theirs, self.theirs = self.theirs, None
        return theirs

    @property
    def fd(self) -> int:
        """What there is to read from.

        Raises:
            ValueError: it is closed.
        """
        if self._fd is None:
            raise ValueError("the black box is closed")
        return self._fd

    # -- of the fork server ------------------------------------------------------------------

    def lend_to_server(self) -> int:
        """Return an end for the fork server, the caller's to close.

        It is opened anew: the worker's end never waits, which would end the server.

        Raises:
            OSError: out of descriptors.
        """
        fd = self.fd
        _of_servers.add(self)
        return lifted(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_CLOEXEC))

    def pid_from_server(self) -> int:
        """Return the pid of a worker that a fork server has started, once that has been said.

        Raises:
            EOFError: the fork server has ended.
        """
        said = os.read(self.fd, _SAID_BY_SERVER.size)  # in one piece, and nothing came before
        if len(said) < _SAID_BY_SERVER.size:
            raise EOFError("the fork server has ended")
        self.heard_server = True
        pid: int = _SAID_BY_SERVER.unpack(said)[0]
        return pid

    def exitcode(self) -> int | None:
        """Return what the fork server has said of the end; None if nothing yet. Never waits.

        Only of a process that has ended: a live one could have written the like.
        """
        said = self._reading.run(self._all_said)
        if self.heard_server and said[-7:] in _SMALL:
            code: int = _SAID_BY_SERVER.unpack(said[-8:])[0]
            return code
        return None

    def _all_said(self) -> bytes:
        self._listen()
        return self._said

    def listen(self) -> None:
        """Read what is there."""
        self._listen()

    # -- of the worker -----------------------------------------------------------------------

    @property
    def _said(self) -> bytes:
        return b"".join(self._pieces)

    @property
    def _stacks(self) -> str:
        """What the worker said, without what the fork server did."""
        said = self._said
        return (said[:-8] if said[-7:] in _SMALL else said).decode(errors="replace")

    def ask(self, kill: Callable[[int], bool], signum: int, times: int = 1) -> object:
        """Ask a worker for its stacks by a signal; what it said before is forgotten.

        Returns what `take_back` takes; None if it could not be asked: one that has crashed is past
        answering, and what it said of that is kept.
        """
        if not signum:
            return None
        question = self._forget()
        asked = question is not None and all(kill(signum) for _ in range(times))
        return question if asked else None

    @guarded("_reading")
    def _forget(self) -> object:
        """Drop what was said; return the next question. None: it has ended, or crashed."""
        self._listen()
        if self.ended or _FATAL.encode() in self._said:
            return None
        self._pieces.clear()
        self._question = question = object()
        return question

    def take_back(self, question: object) -> None:
        """Take what was said for no answer any more: it does not tell of the worker's end."""
        if self._question is question:
            self._question = None

    def stacks(self) -> list[str]:
        """Return the stacks that the worker has written since it was asked, or as it crashed.

        The last are those of its end. Unless it has ended, they may be only half there.
        """
        said = self._heard()
        _, fatal, crash = said.rpartition(_FATAL)
        if fatal:
            return [_trimmed((fatal + crash).partition("\n\nExtension modules:")[0])]
        return [] if self._question is None else _apart(said)

    @guarded("_reading")
    def _heard(self) -> str:
        self._listen()
        return self._stacks

    def last(self) -> str:
        """Return the stacks of a worker that has ended; empty if it had no time to write them."""
        return "".join(self.stacks()[-1:])

    @guarded("_reading")
    def _listen(self) -> None:
        """Read what is there; in one step, so that an interrupt loses nothing of it."""
        for _ in range(0, _MOST, _PIECE):
            try:
                self._pieces.extend(map(os.read, (self.fd,), (_PIECE,)))
            except BlockingIOError:
                break
            except ValueError:  # closed
                self.ended = True
                return
            if not self._pieces[-1]:
                self.ended = True
                break
        if self.heard_server and self._said[-7:] in _SMALL:
            self.ended = True

    @guarded("_reading")
    def watch(self, watched: list[int]) -> bool:
        """Add a descriptor that tells of news, the caller's to close; False if there is none."""
        if self._fd is None:
            return False
        watched.extend(map(os.dup, (self._fd,)))  # one step, as `close_all` is
        return True

    @guarded("_reading")
    def close(self) -> None:
        """Close the pipe, after a last reading. What was read stays readable."""
        self._listen()
        self.abandon()

    def abandon(self) -> None:
        """Close the pipe without a look: a process that was forked from the owner must not read."""
        close_held(self, "_fd")
        theirs = self.lend()
        if theirs is not None:
            theirs.close()


_of_servers: weakref.WeakSet[BlackBox] = weakref.WeakSet()  # those that a server writes to


def _apart(said: str) -> list[str]:
    """Take several stacks apart: threads have an empty line between them, whole stacks have none.

    The end of an earlier answer may come first; what of it has no heading is left out.
    """
    import re

    pieces = re.split(r"(?:(?<!\n)\n|^)(?=Thread 0x|Current thread 0x)", said)
    return [_trimmed(piece) for piece in pieces[1:] if piece]


def _trimmed(stacks: str) -> str:
    """Leave out by which way the worker came to the loop that runs the calls."""
    kept, below = [], False
    for line in stacks.strip("\n").splitlines():
        if not (below and line.startswith("  ")):
            kept.append(line)
            below = _OURS in line
    return "\n".join(kept)


def stacks_of(handles: Iterable[Any]) -> dict[int, str]:
    """Ask workers, all at once, where they are; return it by slot. None of them is stopped.

    Who does not answer in time has an empty text.
    """
    return _asking.run(_stacks_of, handles)


def _stacks_of(handles: Iterable[Any]) -> dict[int, str]:
    from multiprocessing import connection

    deadline = time.monotonic() + PATIENCE
    found: dict[int, str] = {}
    asked: dict[int, tuple[int, BlackBox, object]] = {}
    watched: list[int] = []  # ours to close
    try:
        for handle in handles:
            found[handle.slot] = ""
            question = handle.show(times=2)
            if question is not None and handle.box.watch(watched):
                asked[watched[-1]] = handle.slot, handle.box, question
        while asked:
            left = max(0.0, deadline - time.monotonic())
            ready = set(connection.wait(list(asked), left))
            for fd in [fd for fd in asked if fd in ready or not ready]:
                slot, box, question = asked[fd]
                stacks = box.stacks()
                if len(stacks) > 1 or box.ended or not ready:
                    found[slot] = "".join(stacks[:1])
                    box.take_back(question)
                    del asked[fd]
    finally:
        close_all(watched)
        for _, box, question in asked.values():  # an interrupt came
            box.take_back(question)
    return found


def brief(stacks: str) -> str:
    """Return the few lines that matter: of the thread that runs the calls, those of user code."""
    frames = frames_of(stacks)
    return "\n".join(frames[:_LINES] + ["  ..."] * (len(frames) > _LINES))


def frames_of(stacks: str) -> list[str]:
    """Return the lines of the thread that runs the calls, down to where user code begins."""
    stacks = stacks.partition(_OF_C)[0]
    _, current, lines = stacks.rpartition("Current thread")
    if not current:  # a C library's thread took the signal: the main thread is the last
        lines = stacks.rpartition("hread 0x")[2]
    frames: list[str] = []
    for line in lines.splitlines()[1:]:
        if not line.startswith("  ") or _OURS in line:
            break
        frames.append(line)
    return frames
