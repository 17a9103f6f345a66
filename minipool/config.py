"""PoolConfig: every option of a pool, checked once, frozen afterwards.

Durations are float seconds, sizes are counts or bytes. What is unknown, wrong or contradictory is
refused here, before anything is started, with the value seen and the remedy.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Mapping

from .errors import ConfigError

if TYPE_CHECKING:
    from .breaker import CircuitBreaker
    from .retry import RetryPolicy

MAX_WORKERS = 2048  # twice as many rows are in the table: old ones may end while new ones start
AFFINITIES = ("prefer", "strict", "any")
STORE_METHODS = ("open", "create", "has", "read", "commit", "delete", "close")  # see store.py
START_METHODS = ("forkserver", "spawn", "fork")
#: What other pools call an option.
_PEERS = {
    "max_workers": "size", "workers": "size", "processes": "size", "n_jobs": "size",
    "timeout": "call_timeout", "max_tasks_per_child": "max_calls",
    "maxtasksperchild": "max_calls", "mp_context": "start_method",
}  # fmt: skip
_SWITCHES = (
    "lazy", "strict_sessions", "kill_group", "autoscale", "forward_logs", "capture_output",
)  # fmt: skip
_WEIGH_EVERY = 0.25  # seconds, where there is a kill_rss
_LEAST_FILES = 16  # or a worker could not even start
_pool_numbers = itertools.count(1)


@dataclass(frozen=True)
class PoolConfig:
    """The options of a `Pool`, each with its default. See README for the prose.

    Raises:
        ConfigError: an option is wrong; its attributes `option` and `value` say which.
    """

    #: How many workers the pool keeps (None: the usable CPUs), and the bounds of `resize()` and
    #: of growth on demand (None: as `size`, that is, a fixed pool).
    size: int | None = None
    min_size: int | None = None
    max_size: int | None = None
    #: Extra workers while callers queue at full size; retired when idle for `overflow_idle` s.
    max_overflow: int = 0
    overflow_idle: float = 30.0
    #: A worker above `min_size` that was idle for so long is retired, one per `max_idle` seconds.
    max_idle: float | None = None
    #: Fit the size to the load, between `min_size` and `max_size`: once in each
    #: `optimization_interval` it is decided by what was seen in the last one, or the last five.
    autoscale: bool = False
    optimization_interval: float = 60.0
    #: Start workers when they are first needed (from `min_size`, if given, up to `size`).
    lazy: bool = False
    #: Which idle worker is next: the last used ("lifo", its caches are warm) or the first.
    strategy: str = "lifo"
    #: Bytes that one request or reply may have.
    max_message: int = 4 << 30
    #: Seconds for a worker to become ready; to wait for a worker; for one call. None: for ever.
    init_timeout: float | None = 30.0
    checkout_timeout: float | None = 5.0
    call_timeout: float | None = 60.0
    #: More callers than this in the queue are turned away with `TooManyWaiters`. None: no limit.
    max_waiting: int | None = None
    #: Workers that are ready and out of service, to take a dead one's place at once.
    spares: int = 0
    #: A worker is replaced, once another is ready, after so many calls, so many seconds (give or
    #: take a tenth) or when it uses so many bytes of memory. None: no limit.
    max_calls: int | None = None
    max_lifetime: float | None = None
    max_rss: int | None = None
    #: A worker that uses more bytes of memory is killed, whatever it does. None: no limit.
    kill_rss: int | None = None
    #: What the kernel lets a worker have: bytes of memory of its own, seconds of processor time in
    #: its life, open files. None: as this process.
    memory_limit: int | None = None
    cpu_limit: float | None = None
    open_files: int | None = None
    #: How often an idle worker is probed (None: never), how long its answer may take, and how
    #: many failures in a row replace it.
    health_check_interval: float | None = 30.0
    health_check_timeout: float = 5.0
    max_health_failures: int = 3
    #: How idempotent calls of `Pool.options` are made again: a policy, or how many attempts there
    #: may be. None: when the worker dies, on another one at once.
    retry: int | RetryPolicy | None = None
    #: Whether to stop starting workers for 30 s when that failed five times in a row, and to raise
    #: CircuitOpen when none is left; or a breaker with other limits. False or None: never.
    breaker: bool | CircuitBreaker | None = True
    #: Calls that each worker makes before it is offered, within `init_timeout`: a list of targets
    #: or (target, args, kwargs). One that raises is a failed start.
    warm_up: tuple[Any, ...] = ()
    #: "forkserver", "spawn" or "fork"; None: the first of these that this system offers.
    start_method: str | None = None
    #: Modules the fork server imports once, for all workers to share.
    preload: tuple[str, ...] = ()
    #: How many workers may be starting at once.
    startup_batch: int = 8
    #: Environment variables set in each worker before your code is imported there.
    worker_env: Mapping[str, str] | None = None
    #: Added to each worker's niceness: busy workers leave this process the processor time it
    #: wants. Not on Windows.
    niceness: int = 0
    #: Whether what a worker has started ends with it. Not on Windows.
    kill_group: bool = True
    #: Anything with `dumps` and `loads` for arguments and results. None: pickle, protocol 5.
    codec: Any = None
    #: Context variables (or their names, "module:name") whose values travel with each call: they
    #: are set in the worker while it runs.
    context: tuple[Any, ...] = ()
    #: The workers' log records go to this process's handlers; so does, line by line, what they
    #: write to standard output and standard error. Not on Windows.
    forward_logs: bool = False
    capture_output: bool = False
    #: How long `close()` lets leases finish, and a retiring worker its `close()`.
    close_timeout: float = 30.0
    #: A lease older than this is revoked and its worker killed. None: never.
    lease_timeout: float | None = None
    #: A lease older than this is logged once, with the stack that took it. None: never.
    leak_warn_after: float | None = None
    #: Which worker a session's lease gets: "prefer" the one that has it warm (waiting up to
    #: `affinity_wait` s for that one), "strict": that one or SessionLost, or "any".
    affinity: str = "prefer"
    affinity_wait: float = 0.0
    #: A session unused for so long is ended; beyond `max_sessions` the longest unused one is.
    session_ttl: float = 3600.0
    max_sessions: int = 10_000
    #: With True a session must be begun with create_session(); else its first use begins it.
    strict_sessions: bool = False
    #: Where sessions are kept: None: in memory; a path: in that SQLite file; or a store object.
    session_store: str | Any | None = None
    #: Shown in process, thread and memory names, errors and metrics. None: "pool-1" and so on.
    name: str | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        for name in (
            "overflow_idle",
            "health_check_timeout",
            "close_timeout",
            "affinity_wait",
        ):
            self._check_seconds(name, none=False)
        for name in ("session_ttl", "optimization_interval"):
            self._check_seconds(name, none=False, zero=False)
        for name in ("max_idle", "init_timeout", "checkout_timeout", "call_timeout"):
            self._check_seconds(name, none=True)
        for name in ("health_check_interval", "lease_timeout", "leak_warn_after",
                     "max_lifetime", "cpu_limit"):  # fmt: skip
            self._check_seconds(name, none=True, zero=False)
        self._check_limits()
        self._check_choices()
        self._check_policies()
        self._check_preload_and_env()
        self._check_context()
        if self.name is None:
            self._set("name", f"pool-{next(_pool_numbers)}")
        elif not _is_text(self.name):
            self._refuse("name", "give a non-empty string without NUL or lone surrogates")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> PoolConfig:
        """Build a config from keyword options, naming the nearest one for a misspelt name."""
        known = [field.name for field in fields(cls)]
        for name, value in options.items():
            if name not in known:
                import difflib

                near = (
                    [_PEERS[name]] if name in _PEERS else difflib.get_close_matches(name, known, 1)
                )
                hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
                raise ConfigError(
                    f"unknown option {name!r} (value {value!r}); {hint}", option=name, value=value
                )
        return cls(**options)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **options: Any) -> PoolConfig:
        """Read `MINIPOOL_SIZE`, `MINIPOOL_CALL_TIMEOUT` and so on; `options` given here win.

        "none" stands for None, booleans are 1/0, true/false, yes/no; `preload` is separated by
        commas. `worker_env` and `codec` cannot be given this way.

        Raises:
            ConfigError: a variable names no option, or its text does not fit.
        """
        kinds = {field.name: str(field.type) for field in fields(cls)}
        found: dict[str, Any] = {}
        for variable, text in (os.environ if environ is None else environ).items():
            if variable.startswith("MINIPOOL_") and variable not in _OTHER_VARIABLES:
                name = variable[len("MINIPOOL_") :].lower()
                kind = kinds.get(name)
                found[name] = text if kind is None else _parse(variable, text, kind)
        return cls.from_options({**found, **options})

    @property
    def initial_size(self) -> int:
        """How many workers `open()` starts."""
        assert self.size is not None and self.min_size is not None
        if not self.lazy:
            return self.size
        return self.min_size if self.min_size < self.size else 0

    @property
    def limits(self) -> dict[str, float]:
        """What the kernel is to enforce in each worker."""
        names = ("memory_limit", "cpu_limit", "open_files")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def tick(self) -> float:
        """Seconds between two looks of the manager when nothing happens."""
        limits = [self.lease_timeout, self.leak_warn_after, self.max_idle, self.overflow_idle]
        limits += [self.health_check_interval, self.health_check_timeout, self.session_ttl]
        limits += [None if self.kill_rss is None else 4 * _WEIGH_EVERY]
        return max(0.01, min([1.0] + [limit / 4 for limit in limits if limit is not None]))

    # -- checks ------------------------------------------------------------------------------

    def _check_sizes(self) -> None:
        for name in ("size", "min_size", "max_size", "max_waiting"):
            self._check_count(
                name, least=0 if name in ("min_size", "max_waiting") else 1, none=True
            )
        for name in ("startup_batch", "max_health_failures", "max_sessions"):
            self._check_count(name, least=1, none=False)
        self._check_count("max_overflow", least=0, none=False)
        self._check_count("spares", least=0, none=False)
        self._check_count("niceness", least=0, none=False)
        self._check_count("max_message", least=1 << 16, none=False)
        low, high = self.min_size, self.max_size
        if low is not None and high is not None and low > high:
            self._refuse("min_size", f"it is larger than max_size={high}; exchange them")
        if self.size is None:
            self._set("size", max(low or 1, min(high or MAX_WORKERS, usable_cpus())))
        assert self.size is not None
        if low is not None and self.size < low:
            self._refuse("size", f"it is below min_size={low}; raise it or lower min_size")
        if high is not None and self.size > high:
            self._refuse("size", f"it is above max_size={high}; lower it or raise max_size")
        self._set("min_size", self.size if low is None else low)
        self._set("max_size", self.size if high is None else high)
        assert self.max_size is not None
        if self.max_size + self.max_overflow + self.spares > MAX_WORKERS:
            name = "size" if high is None else "max_size"
            self._refuse(name, f"with max_overflow and spares it may be {MAX_WORKERS} at most")

    def _check_limits(self) -> None:
        for name, least in (("max_calls", 1), ("max_rss", 1), ("kill_rss", 1),
                            ("memory_limit", 1), ("open_files", _LEAST_FILES)):  # fmt: skip
            self._check_count(name, least, none=True)
        if None not in (self.max_rss, self.kill_rss) and self.max_rss >= self.kill_rss:  # type: ignore[operator]
            self._refuse("max_rss", f"it is not below kill_rss={self.kill_rss}; lower it")
        for name in self.limits:
            if sys.platform == "win32":
                self._refuse(name, "this system has no such limits; leave it out")

    def _check_count(self, name: str, least: int, none: bool) -> None:
        value = getattr(self, name)
        if value is None and none:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self._refuse(name, f"give a whole number, {least} or more{', or None' * none}")

    def _check_seconds(self, name: str, none: bool, zero: bool = True) -> None:
        value = getattr(self, name)
        if value is None and none:
            return
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not right or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            least = "0 or more" if zero else "more than 0"
            self._refuse(name, f"give seconds as a number, {least}{', or None' * none}")

    def _check_choices(self) -> None:
        if self.strategy not in ("lifo", "fifo"):
            self._refuse("strategy", 'give "lifo" or "fifo"')
        if self.start_method is not None and self.start_method not in START_METHODS:
            self._refuse("start_method", f"give one of {START_METHODS}, or None")
        if self.affinity not in AFFINITIES:
            self._refuse("affinity", f"give one of {AFFINITIES}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "give True or False")
        if self.autoscale and self.min_size == self.max_size:
            self._refuse("autoscale", f"min_size and max_size are both {self.max_size}; it needs "
                         f"room between them")  # fmt: skip
        for name in ("forward_logs", "capture_output"):
            if getattr(self, name) and sys.platform == "win32":
                self._refuse(name, "Windows has no pipes for it; leave it out there")
        self._check_store()
        if self.codec is not None:
            for function in ("dumps", "loads"):
                if not callable(getattr(self.codec, function, None)):
                    self._refuse("codec", f"it has no function {function!r}; give a module or "
                                 f"object with dumps and loads, such as json")  # fmt: skip
        if self.preload and self.start_method in ("spawn", "fork"):
            self._refuse("preload", f"start method {self.start_method!r} has no server that "
                         f'could import it once; use "forkserver"')  # fmt: skip

    def _check_policies(self) -> None:
        from .commands import commands_of

        try:
            self._set("warm_up", commands_of(self.warm_up))
        except ValueError as problem:
            self._refuse("warm_up", str(problem))
        if isinstance(self.retry, int):
            self._check_count("retry", least=1, none=True)
        elif self.retry is not None:
            from .retry import RetryPolicy

            if not isinstance(self.retry, RetryPolicy):
                self._refuse("retry", "give how many attempts, a RetryPolicy, or None")
        if self.breaker is not None and not isinstance(self.breaker, bool):
            from .breaker import CircuitBreaker

            if not isinstance(self.breaker, CircuitBreaker):
                self._refuse("breaker", "give True, False, or a CircuitBreaker")

    def _check_store(self) -> None:
        store = self.session_store
        if isinstance(store, os.PathLike):
            store = store.__fspath__()
        if store is None or (isinstance(store, str) and _is_text(store)):
            return
        lacking = [name for name in STORE_METHODS if not callable(getattr(store, name, None))]
        if isinstance(store, (str, bytes)) or lacking:
            self._refuse("session_store", f"give the path of a file as a text, or an object with "
                         f"the methods {', '.join(STORE_METHODS)}; or None")  # fmt: skip

    def _check_preload_and_env(self) -> None:
        names = self.preload
        if not isinstance(names, (tuple, list)) or not all(isinstance(n, str) for n in names):
            self._refuse("preload", "give a list of module names")
        self._set("preload", tuple(names))
        if self.worker_env is not None and not isinstance(self.worker_env, Mapping):
            self._refuse("worker_env", "give a dict of texts")
        for key, value in (self.worker_env or {}).items():
            if not _is_text(key) or "=" in key or not (value == "" or _is_text(value)):
                self._refuse("worker_env", f"no variable can be set to {key!r}: {value!r}")

    def _check_context(self) -> None:
        variables = self.context
        if not isinstance(variables, (tuple, list)) or not all(
            isinstance(variable, ContextVar) or (isinstance(variable, str) and ":" in variable)
            for variable in variables
        ):
            self._refuse("context", 'give a list of ContextVars, or of names, "module:name"')
        self._set("context", tuple(variables))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _refuse(self, name: str, remedy: str) -> None:
        value = getattr(self, name)
        raise ConfigError(f"{name}={value!r}: {remedy}", option=name, value=value)


def _is_text(value: object) -> bool:
    """Tell whether a value can be passed to the system as a text that is not empty."""
    if not isinstance(value, str) or not value or "\0" in value:
        return False
    try:
        os.fsencode(value)
        return True
    except UnicodeEncodeError:
        return False


_OTHER_VARIABLES = ("MINIPOOL_PORTABLE",)
#: By how a type begins, what the text of a variable is to be; "none" is added where it will do.
_WANTED = {"bool": '"true" or "false"', "int": "a whole number", "float": "a number of seconds"}


def _parse(variable: str, text: str, kind: str) -> Any:
    word = text.strip().lower()
    if word == "none" and "None" in kind:
        return None
    try:
        if kind.startswith("bool"):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[
                word
            ]
        if kind.startswith("int"):
            return int(word)
        if kind.startswith("float"):
            return float(word)
        if kind.startswith("tuple"):
            return tuple(part.strip() for part in text.split(",") if part.strip())
        if kind.startswith("str"):
            return text
    except (KeyError, ValueError):
        pass
    wanted = next((words for begin, words in _WANTED.items() if kind.startswith(begin)), None)
    if wanted is None:
        remedy = "it cannot be given as a text; unset the variable and set it in the program"
    else:
        none = ' or "none"' if "None" in kind else ""
        remedy = f"give {wanted}{none}, or unset the variable"
    raise ConfigError(f"{variable}={text!r}: {remedy}", option=variable, value=text)


def usable_cpus() -> int:
    """Return how many CPUs this process may use: its affinity, and its container's quota."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = _cgroup_cpus()
    return max(1, count if quota is None else min(count, math.ceil(quota)))


def _cgroup_cpus() -> float | None:
    """Return the CPU quota of the control group (version 2, else 1), or None."""
    for quota_file, period_file in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            with open(quota_file) as file:
                words = file.read().split()
            if period_file is not None:
                with open(period_file) as file:
                    words += file.read().split()
            quota, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):
            continue
        return quota / period if quota > 0 and period > 0 else None
    return None
