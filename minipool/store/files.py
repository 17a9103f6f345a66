"""Files: whether the file at a path may be a store, told without opening it.

POSIX drops all the locks that a process holds on a file when it closes any descriptor of it
(https://www.sqlite.org/howtocorrupt.html, section 2.2). So a file that may be open in this process
is looked at by `os.stat` alone, and read through SQLite, which knows of that.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from typing import Any, Tuple

from ..engine.descriptors import close_all

try:
    import fcntl
except ImportError:  # no such system
    fcntl = None  # type: ignore[assignment]

File = Tuple[int, int]  # device and inode: one file, whatever its name

SIDECARS = ("-wal", "-shm", "-journal")
_NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "gfs",
    "gfs2", "ocfs2", "beegfs", "gpfs", "vboxsf", "virtiofs", "prl_fs", "ncpfs", "coda",
    "fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.ceph", "fuse.davfs",
    "fuse.gcsfuse", "fuse.juicefs", "fuse.grpcfuse", "fuse.vmhgfs-fuse",
}  # fmt: skip
_MAKING_S = 1.0  # how long to wait for others who make a file: that takes no time
_MOUNTS = "/proc/self/mountinfo"


def checked_path(path: Any) -> str:
    """Return a path as an absolute one.

    Raises:
        TypeError: it is no path. ValueError: no file can have that name.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise TypeError(f"the path of a session store is a text, not {path!r}")
    if not text or "\0" in text:
        raise ValueError("no file has such a name")
    if text == ":memory:":
        raise ValueError(
            "it names no file; without a session_store sessions are kept in memory anyway"
        )
    if text.startswith("file:"):
        raise ValueError(f"URIs are not taken; for a file of that name say {'./' + text!r}")
    try:
        os.fsencode(text)
        return os.path.abspath(text)
    except (ValueError, OSError) as problem:  # half a character; the current directory is gone
        raise ValueError(f"it cannot be made absolute: {problem}") from problem


def identity(path: str) -> File | None:
    """Tell which file is at a path; None: there is none, or it cannot be looked at."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def leads_elsewhere(path: str, file: File) -> bool:
    """Tell whether a path leads to another file by now, or to none; False if nobody can tell."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # rights were given up since
        return False
    return (found.st_dev, found.st_ino) != file


def size_of(path: str) -> int:
    """Return the size of a file in bytes; 0 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def ready(path: str) -> File:
    """Make sure that there is a regular file which not everybody can write to.

    One that is made is for its owner alone (0600), whatever the umask; SQLite gives -wal and -shm
    the same rights.

    Raises:
        OSError: none can be made. ValueError: it is no file for a store; it is left as it is.
    """
    if not os.path.lexists(path):
        handles: list[int] = []
        try:
            if _first_in(os.path.dirname(path), handles) and not os.path.lexists(path):
                _clear_away(path)
            with contextlib.suppress(FileExistsError):
                _make(path)
        finally:  # not a context manager: an interrupt as it is entered would keep the lock
            close_all(handles)
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"it is {_kind(found.st_mode)}, not a regular file")
    _refuse_others(path, found)
    for suffix in SIDECARS:
        with contextlib.suppress(FileNotFoundError):
            _refuse_others(path + suffix, os.stat(path + suffix))
    return found.st_dev, found.st_ino


def _first_in(folder: str, handles: list[int]) -> bool:
    """Keep others from making files in a folder until `handles` are closed; False: in vain."""
    if fcntl is None:  # there nobody can delete a file that is open
        return False
    with contextlib.suppress(OSError):  # opened and noted in one step
        handles.extend(map(os.open, [folder], [os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC]))
    return bool(handles) and _locked(handles[0])


def _locked(handle: int) -> bool:
    """Lock a folder against others that make files in it; False: that could not be had in time.

    Another thread waits for the lock, as no wait for it has a deadline. If it gets it too late, its
    call returns with the last reference to what was opened, which gives the lock back.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        pass
    except OSError:  # there are no such locks there
        return False
    got: list[bool] = []

    def wait() -> None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            got.append(True)

    thread = threading.Thread(target=wait, name="minipool-store-file", daemon=True)
    with contextlib.suppress(RuntimeError):  # there can be no more threads
        thread.start()
        thread.join(_MAKING_S)
    return bool(got)


def _clear_away(path: str) -> None:
    """Remove what lies beside a file that there is no more.

    A process may still have the deleted one open. It and those that use the next one would share
    the index of the log, which is found by its name, and so lose each other's commits.
    """
    for suffix in SIDECARS:
        with contextlib.suppress(OSError):
            os.unlink(path + suffix)


def _make(path: str) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFREG)  # opens nothing
    except (AttributeError, PermissionError):  # no such call, or for root only
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    os.chmod(path, 0o600)


def _kind(mode: int) -> str:
    for is_kind, name in (
        (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
    ):  # fmt: skip
        if is_kind(mode):
            return name
    return "something else"


def _refuse_others(path: str, found: os.stat_result) -> None:
    """Refuse a file that anybody can write to: what is read from it is unpickled by workers."""
    if os.name != "posix":
        return
    if found.st_mode & stat.S_IWOTH:
        raise ValueError(
            f"every user can write to {path!r} (mode {stat.S_IMODE(found.st_mode):04o}), and "
            f"whoever writes to it runs code here; if you trust what is in it: chmod o-rwx {path!r}"
        )
    me = os.geteuid()
    if found.st_uid not in (me, 0):
        raise ValueError(
            f"{path!r} belongs to user {found.st_uid}, neither to this process's user {me} nor to "
            f"root, and whoever writes to it runs code here; if you trust what is in it: "
            f"chown {me} {path!r}"
        )


def keep_from_others(path: str) -> None:
    """Take all rights of strangers away; group and owner keep theirs."""
    for name in (path, *(path + suffix for suffix in SIDECARS)):
        with contextlib.suppress(OSError):
            os.chmod(name, stat.S_IMODE(os.stat(name).st_mode) & ~0o007)


def network_filesystem(path: str) -> str | None:
    """Return the type of the file system that a file is on, if other hosts may see it as well."""
    kind, longest = None, -1
    for point, found in _mounts():
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= longest:  # the last one mounted there hides the others
            kind, longest = found, len(point)
    return kind if kind in _NETWORK else None


def _mounts() -> list[tuple[str, str]]:
    """Return mount points and types of what is mounted, as proc(5) tells them."""
    mounts = []
    try:
        with open(_MOUNTS, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                before, _, after = line.partition(" - ")
                words = before.split()
                if len(words) > 4 and after:
                    mounts.append((_unescaped(words[4]), after.split()[0]))
    except OSError:
        pass  # no such system
    return mounts


def _unescaped(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
