"""What every worker of a pool is started with: checked once, in the parent, before the first.

A worker that cannot be pickled or imported, a directory that is missing, a main module without
its guard: each is found here, as one clear error, and not as a row of dying processes.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
from multiprocessing import process
from typing import TYPE_CHECKING, Any, Callable

from ..errors import CallMismatch, ConfigError, PoolStartError
from . import child, forked_locks, mainmodule, shortage, wire  # noqa: F401 - locks: at a fork
from .assignment import Assignment, Setup
from .lifeline import Lifeline
from .nesting import Opening, refusal, silence
from .popen import main_module

if TYPE_CHECKING:
    from ..commands import Command
    from ..config import PoolConfig
    from .baggage import Baggage


class Launcher:
    """Knows how to start a worker of one pool.

    Raises:
        ConfigError: `worker` is nothing that a worker process could make an object of.
    """

    def __init__(
        self, worker: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, config: PoolConfig
    ) -> None:
        self.config = config
        self.method = config.start_method or _default_method()
        self.portable = _portable()
        _check_worker(worker, args, kwargs)
        self.worker = worker
        spec = (worker, tuple(args), dict(kwargs or {}))
        packed: Any = spec if self.method == "fork" else _pickled(spec, worker)
        self.baggage: Baggage | None = None
        if config.context:
            from .baggage import baggage_of  # by those who use it, as below

            self.baggage = baggage_of(config.context, self.method == "fork")
        self.assignment = Assignment(
            packed,
            pool=config.name,
            codec=None if config.codec is None else _packed_codec(config.codec),
            warm_up=_packed_warm_up(worker, config, self.method == "fork"),
            preload=config.preload,
            env=dict(config.worker_env or {}),
            limits=config.limits,
            baggage=self.baggage,
            places=(),
            importing=(),
        )
        self.context: Any = None
        self.lifeline: Lifeline | None = None
        self.opening: Opening | None = None

    def open(self) -> None:
        """Check the environment and prepare for the first start.

        Raises:
            PoolStartError: no worker could be started here, and why; nothing was started.
        """
        self.opening = _checked_opening()
        self.assignment.places = (*child.places, self.opening.place)
        self.assignment.importing = self.opening.importing
        shortage.expect_descriptors(self.config)
        if self.method != "fork":
            _check_main()
            _check_executable()
            _check_preload(self.config.preload)
        if self.method == "forkserver" and not _tempdir():
            if self.config.start_method is not None:
                raise _no_tempdir()
            self.method = "spawn"  # the fork server listens on a socket in a temporary directory
        if isinstance(self.worker, str):
            _check_importable(self.worker)
        try:
            self.context = multiprocessing.get_context(self.method)
        except ValueError as error:
            raise PoolStartError(f"start method {self.method!r}: {error}") from None
        if self.method == "forkserver":
            from .fork_server import preload  # where there is one

            preload(self.context, preloaded_name(), self.config.preload, self.config.init_timeout)
        self.lifeline = Lifeline()

    def close(self) -> None:
        """Give back what `open` took."""
        if self.lifeline is not None:
            self.lifeline.close()

    def setup(self, slot: int, generation: int, table_fd: int | None) -> Setup:
        """Return what the process of one worker is told.

        Raises:
            PoolStartError: the program has been removed since the pool was opened.
        """
        if self.method != "fork":
            _check_main()
        fd = None if self.portable else table_fd
        lifeline = self.lifeline.read_fd if self.lifeline else None
        return Setup(
            table=None if fd is None else wire.Descriptor(fd),  # which any start method can pass
            lifeline=None if lifeline is None else wire.Descriptor(lifeline),
            slot=slot,
            generation=generation,
            niceness=self.config.niceness,
            kill_group=self.config.kill_group,
            max_message=self.config.max_message,
            portable=self.portable,
            main=None if self.method == "fork" else main_module(),
            voice=None,
        )


def _portable() -> bool:
    import select

    return os.environ.get("MINIPOOL_PORTABLE") == "1" or not hasattr(select, "poll")


def _default_method() -> str:
    offered = multiprocessing.get_all_start_methods()
    return "forkserver" if "forkserver" in offered else "spawn"


def _check_worker(worker: Any, args: Any, kwargs: Any) -> None:
    if not isinstance(args, (tuple, list)):
        raise ConfigError(f"args={args!r}: give a tuple", option="args", value=args)
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ConfigError(f"kwargs={kwargs!r}: give a dict", option="kwargs", value=kwargs)
    if worker is None:
        if args or kwargs:
            raise ConfigError(
                f"args={args!r}, kwargs={kwargs!r} without a worker: there is nothing to give them "
                f"to; pass a class or factory as the first argument",
                option="args",
                value=args,
            )
        return
    if isinstance(worker, str):
        module, _, name = worker.partition(":")
        if not module or not name:
            raise _bad_worker(worker, 'a worker is named "package.module:Class"')
    elif not callable(worker):
        raise _bad_worker(worker, "it is not callable; give a class, a factory, or the name of one")


def _bad_worker(worker: Any, why: str) -> ConfigError:
    return ConfigError(f"worker={worker!r}: {why}", option="worker", value=worker)


def _pickled(spec: tuple[Any, ...], worker: Any) -> bytes:
    why = None if worker is None else wire.why_unreachable(worker, starts_by_fork=False)
    if why is not None:
        raise _bad_worker(worker, why)
    try:
        return pickle.dumps(spec, 5)
    except Exception as problem:
        raise _bad_worker(
            worker,
            f"it or its arguments cannot be sent to a worker process: {problem}; define the class "
            f"at the top of a module and pass plain data",
        ) from problem


def packed_command(targets: wire.Targets, codec: Any, command: Command) -> tuple[int, bytes, bytes]:
    """Return kind, name and body of a call, as a worker reads them.

    Raises:
        CallMismatch: there is no such target, or the arguments do not fit or cannot be sent.
    """
    target, args, kwargs = command
    kind, name, counts, shape, _ = targets.resolve(target)
    if kwargs or len(args) not in counts:
        shape.check(args, kwargs)
    words: Any = args
    if kind == wire.SHIPPED:
        words = command
    elif kwargs:
        kind, words = kind | wire.KEYWORDS, (args, kwargs)
    dumps = wire.functions_of(codec)[0]
    try:
        return kind, name, dumps(tuple(words), 5)
    except Exception as problem:
        raise wire.explain_unpicklable(problem, dumps, target, args, kwargs) from problem


def _packed_warm_up(worker: Any, config: PoolConfig, forks: bool) -> list[tuple[int, bytes, bytes]]:
    targets = wire.Targets(worker, forks, config.codec is not None)
    try:
        return [packed_command(targets, config.codec, command) for command in config.warm_up]
    except CallMismatch as problem:
        raise ConfigError(
            f"warm_up={config.warm_up!r}: {problem}", option="warm_up", value=config.warm_up
        ) from problem


def _packed_codec(codec: Any) -> bytes:
    try:
        return wire.pack_codec(codec)
    except Exception as problem:
        raise ConfigError(
            f"codec={codec!r}: it cannot be sent to a worker process: {problem}; give a module, "
            f"or an object of a class at the top of a module",
            option="codec",
            value=codec,
        ) from problem


def _checked_opening() -> Opening:
    """Return what opens the pool now; refuse it where every worker would come to do so again."""
    opening = Opening()
    why = refusal(opening)
    if why is not None:
        child.refused = why
        silence(why, preloaded_name())
        raise PoolStartError(why)
    return opening


def _check_main() -> None:
    """Refuse where each worker would look in vain for the file of the main module."""
    main: Any = sys.modules["__main__"]
    if not hasattr(main, "__spec__"):
        main.__spec__ = None  # pdb, before CPython 3.13, takes all away that a script's has
    path = mainmodule.file()
    if path is not None and not os.path.exists(path):
        raise PoolStartError(
            f"the main module's file {path!r} does not exist, and every worker would import it; "
            f'save the program as a file, run it with `python -c`, or use start_method="fork"'
        )


def _check_executable() -> None:
    """Refuse where there is no interpreter that multiprocessing could start."""
    from multiprocessing import spawn  # by those who use it: a forked worker pays for each page

    path = spawn.get_executable()
    if not path or shutil.which(path) is None:
        raise PoolStartError(
            f"sys.executable is {sys.executable!r}, and multiprocessing would start "
            f"{os.fsdecode(path or '')!r}, which is no program; name a Python interpreter by "
            f'`multiprocessing.set_executable()`, or use start_method="fork"'
        )


def _check_preload(modules: tuple[str, ...]) -> None:
    """Refuse what cannot be found; what fails as it is imported, the first worker tells."""
    for name in modules:
        package = name.partition(".")[0]
        try:
            found = package in sys.modules or importlib.util.find_spec(package) is not None
        except (ImportError, ValueError) as problem:
            raise _no_preload(name, f"{type(problem).__name__}: {problem}") from problem
        if not found:
            raise _no_preload(name, f"there is no module {package!r} on sys.path")


def _no_preload(name: str, why: str) -> PoolStartError:
    return PoolStartError(
        f"preload: cannot import {name!r}: {why}; install it, or correct the name"
    )


def _tempdir() -> str | None:
    """Return where the fork server's socket is, or will be; None: nowhere."""
    config: Any = process.current_process()._config  # type: ignore[attr-defined]
    try:
        return config.get("tempdir") or tempfile.gettempdir()
    except OSError:
        return None


def _no_tempdir() -> PoolStartError:
    return PoolStartError(
        'start_method="forkserver": the fork server listens on a socket in a temporary directory, '
        'and there is none that can be written to; name one by TMPDIR, or use start_method="spawn"'
    )


def _check_importable(worker: str) -> None:
    module = worker.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as problem:
        raise PoolStartError(f"worker {worker!r}: cannot import {module!r}: {problem}") from problem
    if found is None:
        raise PoolStartError(
            f"worker {worker!r}: there is no module {module!r} on sys.path; install it, or correct "
            f"the name"
        )


def preloaded_name() -> str:
    """Return the name of the module that the fork server imports before all else."""
    return f"{main_name().rpartition('.')[0]}.preloaded"


def main_name() -> str:
    """Return the name of the module that workers run, wherever this package was copied to."""
    target: Callable[..., Any] = child.main
    return target.__module__
