"""Health policy: rows and a clock in, actions out. Pure: no process, no thread, no waiting.

The manager makes one `Row` of each live worker, asks `plan` what to do, and does it. Everything
that depends on time is decided here, so it is tested with a clock that tests turn by hand.
"""

# The types are no text here, as `typing` would compile that of every field at every import.
from typing import TYPE_CHECKING, NamedTuple, Optional, Sequence

from .states import WorkerState as S

if TYPE_CHECKING:
    from ..config import PoolConfig

SECOND_NS = 1_000_000_000
SENT_SIGTERM = "it was sent SIGTERM"
NOT_READY = "not ready within"  # and its limit, of a worker whose start takes too long
DYING_NS = SECOND_NS // 4  # from the end of a worker's pipe to the end of its process
QUIET_NS = 10 * SECOND_NS  # a look is due at last, whatever the reasons to skip it


class Tenure(NamedTuple):
    """One ownership of a slot. What was decided about it is not done to the next one."""

    lease: int  # the number of the slot's last lease
    since_ns: int  # when that began; once it is over, when the slot was offered


class Row(NamedTuple):
    """What `plan` knows of one worker. Times are monotonic nanoseconds."""

    slot: int
    generation: int
    state: S
    since_ns: int  # when that state began; for IDLE, when the last lease or probe ended
    idle: bool = False  # in the turnstile's idle set this moment
    leased_since_ns: Optional[int] = None  # there is a live lease, and since when
    probed_ns: int = 0
    probe_failures: int = 0
    tenure: Tenure = Tenure(0, 0)
    lost: bool = False  # neither idle nor leased, nor on its way to somebody, for two sweeps
    leak_warned: bool = False
    leaving: bool = False  # was sent SIGTERM, and goes on until it is told to stop
    left: bool = False  # was sent SIGTERM, and is ending
    worn: bool = False  # known to be so
    expires_ns: int = 0  # when it reaches its max_lifetime; 0: never
    rss_bytes: int = 0
    cpu_ns: int = 0


class Limits(NamedTuple):
    """The options `plan` goes by, in nanoseconds; None: no limit."""

    init_ns: Optional[int] = None
    probe_every_ns: Optional[int] = None
    probe_timeout_ns: int = 5 * SECOND_NS
    max_probe_failures: int = 3
    stop_ns: int = 30 * SECOND_NS
    lease_ns: Optional[int] = None
    leak_ns: Optional[int] = None
    overflow_idle_ns: int = 30 * SECOND_NS
    max_idle_ns: Optional[int] = None
    max_rss: Optional[int] = None
    kill_rss: Optional[int] = None
    cpu_ns: Optional[int] = None


def limits_of(config: "PoolConfig") -> Limits:
    """Return the options that `plan` goes by."""

    def ns(seconds: Optional[float]) -> Optional[int]:
        return None if seconds is None else int(seconds * SECOND_NS)

    return Limits(
        init_ns=ns(config.init_timeout),
        probe_every_ns=ns(config.health_check_interval),
        probe_timeout_ns=ns(config.health_check_timeout) or 1,
        max_probe_failures=config.max_health_failures,
        stop_ns=ns(config.close_timeout) or 0,
        lease_ns=ns(config.lease_timeout),
        leak_ns=ns(config.leak_warn_after),
        overflow_idle_ns=ns(config.overflow_idle) or 0,
        max_idle_ns=ns(config.max_idle),
        max_rss=config.max_rss,
        kill_rss=config.kill_rss,
        cpu_ns=ns(None if config.cpu_limit is None else 0.9 * config.cpu_limit),
    )


class Action:
    """What to do about one worker. Two are equal when they are of one kind and say the same."""

    def __init__(self, slot: int, reason: str = "", tenure: Optional[Tenure] = None) -> None:
        self.slot = slot
        self.reason = reason
        self.tenure = tenure  # the only one it is about, where it is about one

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    def __hash__(self) -> int:
        return hash((type(self), self.slot, self.reason))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.slot}, {self.reason!r})"


class Probe(Action):
    """Claim the idle worker and ask whether it is well."""


class CountFailure(Action):
    """The probe under way got no answer in time: one failure more, and keep waiting."""


class Replace(Action):
    """Kill the worker; the fleet starts another."""


class Recycle(Action):
    """Replace the worker as soon as another is ready to take its place."""


class Retire(Action):
    """Claim the idle worker, or spare, that ends by itself."""


class Revoke(Action):
    """Take the worker away from the lease that was looked at."""


class WarnLeak(Action):
    """Log the lease that was looked at, with the stack that took it."""


class Lost(Action):
    """Neither idle nor leased at this look. It is revoked once nobody can be holding it."""


def plan(rows: Sequence[Row], now: int, limits: Limits) -> list[Action]:
    """Return what to do about each worker, in the order of the rows."""
    actions: list[Action] = []
    for row in rows:
        action = _plan_row(row, now, limits) or _plan_wear(row, now, limits)
        if action is not None:
            actions.append(action)
    actions += _plan_probes(rows, now, limits)
    return actions


def due_in(rows: Sequence[Row], now: int, limits: Limits) -> Optional[int]:
    """Return after how many ns the first of them is overdue or worn; None if none will be."""
    dues = []
    for row in rows:
        if row.state is S.STARTING and limits.init_ns is not None:
            dues.append(row.since_ns + limits.init_ns)
        elif row.state is S.PROBING:
            dues.append(row.since_ns + limits.probe_timeout_ns)
        elif row.state is S.STOPPING:
            dues.append(row.since_ns + limits.stop_ns)
        elif row.state is S.LOST and now - row.since_ns <= DYING_NS:
            dues.append(row.since_ns + DYING_NS)
        if row.expires_ns and not row.worn and row.state not in (S.STOPPING, S.LOST):
            dues.append(row.expires_ns + 1)
    return max(0, min(dues) - now) if dues else None


def quiet_until(rows: Sequence[Row], now: int, limits: Limits, last_shrink_ns: int = 0) -> int:
    """Return until when there is nothing to do, if there is nothing now and only time goes on.

    `now` if that is not known: one of them is not at rest, or may grow while it is.
    """
    if limits.kill_rss is not None:
        return now
    dues = [now + QUIET_NS]
    for row in rows:
        if (
            row.worn
            or row.leaving
            or row.left
            or not (row.state is S.SPARE or (row.state is S.IDLE and row.idle))
        ):
            return now
        dues += (row.since_ns + limits.overflow_idle_ns, row.expires_ns)
        if limits.probe_every_ns is not None:
            dues.append(row.probed_ns + _probe_after(row, limits))
        if limits.max_idle_ns is not None:
            dues += (row.since_ns + limits.max_idle_ns, last_shrink_ns + limits.max_idle_ns)
    return min(due for due in dues if due >= now)


def _plan_row(row: Row, now: int, limits: Limits) -> Optional[Action]:
    age = now - row.since_ns
    if row.state is S.STARTING:
        if limits.init_ns is not None and age > limits.init_ns:
            return Replace(row.slot, f"{NOT_READY} {limits.init_ns / SECOND_NS:g} s")
    elif row.state is S.PROBING:
        if age > limits.probe_timeout_ns:
            return _failed_probe(row, limits)
    elif row.state is S.STOPPING:
        if age > limits.stop_ns:
            return Replace(row.slot, f"did not stop within {limits.stop_ns / SECOND_NS:g} s")
    elif row.state is S.LOST:
        if age > DYING_NS:
            return Replace(row.slot, "its pipe ended, but not its process")
    elif row.state is S.IDLE and not row.idle:
        return _plan_lease(row, now, limits)
    elif row.left and row.state in (S.IDLE, S.SPARE):
        return Retire(row.slot, SENT_SIGTERM)
    return None


def _failed_probe(row: Row, limits: Limits) -> Action:
    failures = row.probe_failures + 1
    if failures >= limits.max_probe_failures:
        return Replace(row.slot, f"failed {failures} health checks in a row")
    return CountFailure(row.slot)


def _plan_lease(row: Row, now: int, limits: Limits) -> Optional[Action]:
    if row.leased_since_ns is None:
        if row.lost:
            reason = "neither idle nor leased: its lease was lost"
            return Revoke(row.slot, reason, tenure=row.tenure)
        return Lost(row.slot, tenure=row.tenure)
    held = now - row.leased_since_ns
    if limits.lease_ns is not None and held > limits.lease_ns:
        reason = f"held for more than lease_timeout={limits.lease_ns / SECOND_NS:g} s"
        return Revoke(row.slot, reason, tenure=row.tenure)
    if limits.leak_ns is not None and held > limits.leak_ns and not row.leak_warned:
        return WarnLeak(row.slot, tenure=row.tenure)
    return None


def _plan_wear(row: Row, now: int, limits: Limits) -> Optional[Action]:
    if row.state in (S.STOPPING, S.LOST):
        return None
    if limits.kill_rss is not None and row.rss_bytes > limits.kill_rss:
        return Replace(row.slot, f"it uses {_mb(row.rss_bytes)}, over kill_rss={limits.kill_rss}")
    if row.worn:
        return None
    if row.leaving:
        return Recycle(row.slot, SENT_SIGTERM)
    if row.expires_ns and now > row.expires_ns:
        return Recycle(row.slot, "it has reached its max_lifetime")
    if limits.max_rss is not None and row.rss_bytes > limits.max_rss:
        return Recycle(row.slot, f"it uses {_mb(row.rss_bytes)}, over max_rss={limits.max_rss}")
    if limits.cpu_ns is not None and row.cpu_ns > limits.cpu_ns:
        return Recycle(row.slot, "its cpu_limit is nearly used up")
    return None


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def _plan_probes(rows: Sequence[Row], now: int, limits: Limits) -> list[Action]:
    """Probe idle workers and spares that are due, the longest unprobed first, never all at once."""
    if limits.probe_every_ns is None:
        return []
    idle = [row for row in rows if row.state is S.SPARE or (row.state is S.IDLE and row.idle)]
    due = [row for row in idle if now - row.probed_ns > _probe_after(row, limits)]
    probing = sum(row.state is S.PROBING for row in rows)
    room = max(1, len(rows) // 2) - probing
    due.sort(key=lambda row: row.probed_ns)
    return [Probe(row.slot) for row in due[: max(0, room)]]


def _probe_after(row: Row, limits: Limits) -> int:
    """A worker that failed its last probe is asked again sooner."""
    assert limits.probe_every_ns is not None
    if row.probe_failures:
        return min(limits.probe_every_ns, limits.probe_timeout_ns)
    return limits.probe_every_ns
