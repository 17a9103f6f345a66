"""The poller: what it waits for is what was last asked of it, whatever the numbers mean by then."""

from __future__ import annotations

import os
import select
from multiprocessing import connection
from typing import Iterator

import pytest

from minipool.engine.poller import Poller


class Pipes:
    """Pipes by number, and a poller."""

    def __init__(self) -> None:
        self.poller = Poller()
        self._open: set[int] = set()

    def pipe(self) -> tuple[int, int]:
        ends = os.pipe()
        self._open.update(ends)
        return ends

    def close(self, *fds: int) -> None:
        for fd in fds:
            self._open.remove(fd)
            os.close(fd)

    def pipe_like(self, fd: int) -> int:
        """Return the other end of a pipe whose reading end has this number, which was free."""
        reader, writer = self.pipe()
        if reader != fd:
            assert fd not in self._open
            os.dup2(reader, fd)
            self._open.add(fd)
            self.close(reader)
        return writer

    def heard(self) -> dict[object, int]:
        return self.poller.wait(0)

    def close_all(self) -> None:
        self.close(*self._open)


@pytest.fixture
def pipes() -> Iterator[Pipes]:
    pipes = Pipes()
    yield pipes
    pipes.close_all()


def test_each_source_is_heard_with_its_owner_until_it_is_read(pipes: Pipes) -> None:
    (first, to_first), (second, to_second) = pipes.pipe(), pipes.pipe()
    pipes.poller.watch(1, (first,))
    pipes.poller.watch(2, (second,))
    assert pipes.heard() == {}
    os.write(to_second, b"x")
    assert pipes.heard() == {second: 2}
    os.write(to_first, b"x")
    assert pipes.heard() == pipes.heard() == {first: 1, second: 2}
    os.read(second, 1)
    assert pipes.heard() == {first: 1}


def test_what_an_owner_no_longer_asks_for_is_not_heard(pipes: Pipes) -> None:
    (first, to_first), (second, to_second) = pipes.pipe(), pipes.pipe()
    os.write(to_first, b"x")
    os.write(to_second, b"x")
    pipes.poller.watch(1, (first, second))
    assert pipes.heard() == {first: 1, second: 1}
    pipes.poller.watch(1, (second,))
    assert pipes.heard() == {second: 1}
    pipes.poller.watch(1, ())
    assert pipes.heard() == {}
    pipes.poller.watch(1, (first,))
    pipes.poller.drop(1)
    pipes.poller.drop(1)
    assert pipes.heard() == {} and pipes.poller.owners == ()


def test_only_what_has_changed_is_registered(pipes: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = []

    class Poll:
        def __init__(self) -> None:
            self.real = real()
            self.poll, self.unregister = self.real.poll, self.real.unregister

        def register(self, fd: int, events: int) -> None:
            registered.append(fd)
            self.real.register(fd, events)

    real = select.poll
    monkeypatch.setattr(select, "poll", Poll)
    poller = Poller()
    (first, _), (second, _), (third, _) = pipes.pipe(), pipes.pipe(), pipes.pipe()
    for _ in range(3):
        poller.watch(1, (first,))
        poller.watch(2, (second,))
    assert registered == [first, second]
    poller.watch(2, (third,))
    assert registered == [first, second, third]


def test_hang_up_is_heard(pipes: Pipes) -> None:
    reader, writer = pipes.pipe()
    pipes.poller.watch(1, (reader,))
    pipes.close(writer)
    assert pipes.heard() == {reader: 1}


def test_full_pipe_is_heard_when_it_has_room(pipes: Pipes) -> None:
    reader, writer = pipes.pipe()
    os.set_blocking(writer, False)
    size = os.write(writer, bytes(1 << 20))
    pipes.poller.watch(1, (), (writer,))
    assert pipes.heard() == {}
    while size > 0:
        size -= len(os.read(reader, size))
    assert pipes.heard() == {writer: 1}
    pipes.poller.watch(1, ())
    assert pipes.heard() == {}


@pytest.mark.parametrize("dropped", ["before", "after", "never"])
def test_number_of_a_closed_descriptor_is_its_next_owners(pipes: Pipes, dropped: str) -> None:
    """In whatever order the old owner lets go of it and the new one takes it."""
    number, writer = pipes.pipe()
    pipes.poller.watch(1, (number,))
    pipes.close(number, writer)
    if dropped == "before":
        pipes.poller.drop(1)
    writer = pipes.pipe_like(number)
    pipes.poller.watch(2, (number,))
    if dropped == "after":
        pipes.poller.drop(1)
    assert pipes.heard() == {}
    os.write(writer, b"x")
    assert pipes.heard() == {number: 2}


def test_number_comes_back_to_an_owner_that_says_what_it_said_before(pipes: Pipes) -> None:
    number, writer = pipes.pipe()
    pipes.poller.watch(1, (number,))
    pipes.poller.watch(2, (number,))
    pipes.poller.drop(2)
    assert pipes.heard() == {}
    pipes.poller.watch(1, (number,))
    os.write(writer, b"x")
    assert pipes.heard() == {number: 1}


def test_same_number_of_the_same_owner_is_heard_after_it_was_closed_and_reused(
    pipes: Pipes,
) -> None:
    number, writer = pipes.pipe()
    pipes.poller.watch(1, (number,))
    pipes.close(number, writer)
    writer = pipes.pipe_like(number)
    pipes.poller.watch(1, (number,))
    assert pipes.heard() == {}
    pipes.close(writer)
    assert pipes.heard() == {number: 1}


def test_number_that_no_file_has_is_heard(pipes: Pipes) -> None:
    """Somebody else closed it: its owner sees to that."""
    number, writer = pipes.pipe()
    pipes.poller.watch(1, (number,))
    pipes.close(number, writer)
    assert pipes.heard() == {number: 1}
    pipes.poller.drop(1)
    assert pipes.heard() == {}


@pytest.mark.parametrize("has_poll", [True, False])
def test_connections_are_heard_as_such(has_poll: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_poll:
        monkeypatch.delattr(select, "poll")
    poller = Poller()
    ours, theirs = connection.Pipe()
    poller.watch(-1, (ours,))
    assert poller.wait(0) == {}
    theirs.send_bytes(b"x")
    assert poller.wait(0) == {ours: -1}
    ours.close()
    poller.drop(-1)
    assert poller.wait(0) == {}
    theirs.close()
