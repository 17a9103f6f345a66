"""The poller: one thread's wait for many pipes and processes, made anew only where they change.

It remembers by number, as `poll` does, and the kernel looks each number up at every wait. So the
number of a closed descriptor may be another's by the next wait: what counts is who has last said
that it is theirs. An epoll would remember the files themselves, which live on in forked children.
"""

from __future__ import annotations

import select
from multiprocessing import connection
from typing import Any, NamedTuple

_TAKEN = (None,)  # nothing that anybody watches: another has the number now


class _Watched(NamedTuple):
    """What one owner waits for. A source is a descriptor, or an object that has one."""

    to_read: tuple[Any, ...]
    to_write: tuple[int, ...]
    keys: tuple[Any, ...]  # descriptors, known while the sources were open


class Poller:
    """Waits for the sources of many owners, each known by a number. Used by one thread.

    Without `poll`, on `connection.wait`, which takes whatever it can wait for and cannot wait for
    room in a pipe.
    """

    def __init__(self) -> None:
        self._poll = select.poll() if hasattr(select, "poll") else None
        self._watched: dict[int, _Watched] = {}
        self._sources: dict[Any, tuple[Any, int]] = {}  # by key; with the owner

    @property
    def owners(self) -> tuple[int, ...]:
        """Those that wait for something."""
        return tuple(self._watched)

    def watch(self, owner: int, to_read: tuple[Any, ...], to_write: tuple[int, ...] = ()) -> None:
        """Wait for these, and for nothing else that this owner waited for until now.

        What another owner waited for under the same number has ended: the number is this one's.
        """
        watched = self._watched.get(owner)
        if watched is not None and watched.to_read == to_read and watched.to_write == to_write:
            return
        self.drop(owner)
        poll, keys = self._poll, []
        for source in to_read:
            key = source if poll is None or isinstance(source, int) else source.fileno()
            if poll is not None:
                poll.register(key, select.POLLIN)
            self._take(key, source, owner)
            keys.append(key)
        for fd in to_write:
            if poll is not None:
                poll.register(fd, select.POLLOUT)
                self._take(fd, fd, owner)
                keys.append(fd)
        self._watched[owner] = _Watched(to_read, to_write, tuple(keys))

    def _take(self, key: Any, source: Any, owner: int) -> None:
        _, other = self._sources.get(key, (None, owner))
        self._sources[key] = source, owner
        if other != owner:  # what it says next is new, though it may say the same
            self._watched[other] = self._watched[other]._replace(to_read=_TAKEN)

    def drop(self, owner: int) -> None:
        """Wait for nothing of this owner's any more; its descriptors may be closed already."""
        watched = self._watched.pop(owner, None)
        for key in watched.keys if watched is not None else ():
            if self._sources.get(key, (None, None))[1] == owner:  # else the number is another's
                del self._sources[key]
                if self._poll is not None:
                    self._poll.unregister(key)

    def wait(self, timeout: float) -> dict[Any, int]:
        """Return the sources that have something to say, each with its owner.

        So are those that have ended, and numbers that no file has.
        """
        if self._poll is None:
            heard = connection.wait(list(self._sources), timeout)
            return {source: self._sources[source][1] for source in heard}
        return dict([self._sources[fd] for fd, _ in self._poll.poll(timeout * 1000)])
