"""Sizing: how many workers there should be, and the steps from here to there. Pure.

The manager describes which workers there are, what is wanted and how many callers wait; `plan`
says which are let go, called up from the reserve, exchanged and started. No process, no thread, no
clock: so it is tested with tables and random walks. `Wish` is the one place that holds the number
wanted; the configuration is only its first value.

* A worker counts as living until its end is wanted (it is `leaving`) or under way. One that is
  leaving may still be leased; it is neither counted on nor chosen a second time.
* The reserve holds spares, stand-ins for workers that are worn, and worn ones that wait for their
  successor. Whatever service lacks is taken from there first; what the reserve lacks is started
  when service is complete.
* A worn worker serves on until a stand-in is ready. One that has made its `max_calls` is set
  aside at once, and called up again only if starting others fails.
"""

# The types are no text here, as `typing` would compile that of every field at every import.
import operator
from typing import List, NamedTuple, Optional, Sequence, Tuple

from .states import WorkerState as S

SMALLER = "the pool was made smaller"
WORN = "it is worn, and its place taken"
UNLOADED = "the pool has more workers than its load needs"


def nearly_used_up(max_calls: int) -> int:
    """Return after how many calls a stand-in is raised: before the worker has made them all."""
    return max(1, max_calls - max(1, max_calls // 10))


class Wish(NamedTuple):
    """How many workers are wanted, and its bounds: the last word of whoever had a say in it."""

    target: int  # wanted now
    full: int  # up to here the queue raises the target at once, beyond it one by one
    floor: int  # idleness does not lower the target below it
    ceiling: int  # the queue does not raise the target above it
    overflow: int = 0  # so many more than `ceiling` while callers queue; never in the target

    @property
    def most(self) -> int:
        """How many workers there may be in service."""
        return self.ceiling + self.overflow

    def resized(self, size: int) -> "Wish":
        """Return the wish for `size` workers. The bounds of a fixed pool move along."""
        if self.floor == self.ceiling:
            return self._replace(target=size, full=size, floor=size, ceiling=size)
        return self._replace(target=size, full=size)


class Member(NamedTuple):
    """What `plan` knows of one worker."""

    slot: int
    state: S
    idle: bool = False  # free this moment: nobody has it
    idle_ns: int = 0  # for how long
    reserve: bool = False  # out of service
    leaving: bool = False  # its end is wanted: it goes when it is given back, if it is leased
    unfit: bool = False  # must not be used again: it is replaced when it is given back
    worn: bool = False  # to be replaced as soon as another can take its place
    used_up: bool = False  # has made its max_calls
    nearly_used_up: bool = False
    warm: bool = False  # has sessions

    @property
    def settled(self) -> bool:
        """Whether it is in service, leased or not, and nothing is known against that.

        Who is idle matters only to a plan for a line of callers, an order or a surplus, or by the
        clock. For any other plan it is enough to count the settled: see `Situation.others`.
        """
        bound = self.unfit or self.worn or self.used_up or self.nearly_used_up
        return self.state is S.IDLE and not (self.reserve or self.leaving or bound)


class Situation(NamedTuple):
    """All that the plan depends on. Durations and times are nanoseconds."""

    members: Sequence[Member]
    wish: Wish
    waiting: int = 0  # callers in the line that any worker could serve
    asked: bool = False  # somebody wanted a worker, found none and did not wait
    resize: Optional[int] = None  # an order: so many from now on
    gentle: bool = False  # with it: only idle workers without a session may go for it
    spares: int = 0
    startup_batch: int = 8
    room: int = 1 << 30  # free slots
    dying: int = 0  # workers whose slots will be free in a moment
    may_start: bool = True  # the pause after a failed start is over
    may_raise: bool = True  # nobody was called up a moment ago
    failing: bool = False  # the last start failed
    overflow_idle_ns: int = 0
    max_idle_ns: Optional[int] = None
    since_change_ns: int = 1 << 62  # since the target last changed
    others: int = 0  # so many more that are settled


class LetGo(NamedTuple):
    """One worker that is to end."""

    slot: int
    reason: str
    if_idle: bool = False  # only if nobody has taken it meanwhile
    shrink: bool = False  # the target sinks with it


class Plan(NamedTuple):
    """What to do, in this order."""

    wish: Wish
    let_go: Tuple[LetGo, ...]
    call_up: Tuple[int, ...]  # from the reserve into service
    exchange: Tuple[Tuple[int, int], ...]  # worn workers in service, each with its stand-in
    dismiss: Tuple[LetGo, ...]  # from the reserve; one that was to be exchanged only if it was
    start: int
    reserve: bool  # what is started is for the reserve


def plan(situation: Situation) -> Plan:
    """Return the steps from what there is to what there should be."""
    draft = _Draft(situation)
    draft.obey()
    draft.shrink()
    draft.grow()
    draft.fill()
    draft.exchange()
    draft.trim()
    start, reserve = draft.start()
    return Plan(
        draft.wish,
        tuple(draft.let_go),
        tuple([member.slot for member in draft.called_up]),
        tuple([(old.slot, new.slot) for old, new in draft.exchanged]),
        tuple(draft.dismissed),
        start,
        reserve,
    )


_IDLE_NS = operator.attrgetter("idle_ns")


class _Draft:
    """A plan in the making: each step sees the workers as the steps before will leave them."""

    def __init__(self, situation: Situation) -> None:
        self.given = situation
        self.wish = situation.wish
        self.let_go: List[LetGo] = []
        self.dismissed: List[LetGo] = []
        self.called_up: List[Member] = []
        self.exchanged: List[Tuple[Member, Member]] = []
        self.service: List[Member] = []  # living, in service or booting for it
        self.ready: List[Member] = []  # in the reserve, and fit
        self.raised: List[Member] = []  # booting for the reserve
        self.set_aside: List[Member] = []  # worn, in the reserve
        self.probed = self.booting = self.stopping = 0
        for member in situation.members:
            state = member.state
            if state is S.STARTING:
                self.booting += 1
            elif state is S.STOPPING or state is S.LOST:
                self.stopping += state is S.STOPPING
                continue
            if member.leaving:
                continue
            if member.reserve:
                self._stand_by(member)
            else:
                self.service.append(member)
        self.wanted = self.wish.target

    def _stand_by(self, member: Member) -> None:
        if member.worn:
            if member.state is S.SPARE:
                self.set_aside.append(member)
        elif member.state is S.SPARE:
            self.ready.append(member)
        elif member.state is S.STARTING:
            self.raised.append(member)
        else:
            self.probed += 1

    @property
    def _living(self) -> int:
        return len(self.service) + self.given.others

    @property
    def _starting(self) -> int:
        booting = S.STARTING
        return len([1 for member in self.service if member.state is booting])

    def _idle(self) -> List[Member]:
        """Return the workers that nobody has, the longest idle first."""
        idle = [member for member in self.service if member.idle]
        idle.sort(key=_IDLE_NS, reverse=True)
        return idle

    def _dismiss(self, members: Sequence[Member], letting: LetGo) -> None:
        gone = {member.slot for member in members}
        self.let_go += [letting._replace(slot=member.slot) for member in members]
        self.service = [member for member in self.service if member.slot not in gone]

    # -- fewer -------------------------------------------------------------------------------

    def obey(self) -> None:
        """Carry out an order to have another size."""
        size = self.given.resize
        if size is None:
            return
        surplus = max(0, len(self.service) - size)
        if self.given.gentle and size < self.wish.target:
            cold = [member for member in self._idle() if not member.warm]
            self._dismiss(cold[:surplus], LetGo(0, UNLOADED, if_idle=True))
            size = max(size, min(self.wish.target, len(self.service)))
        else:
            going = sorted(self.service, key=_how_easily_spared)[:surplus]
            self._dismiss(going, LetGo(0, SMALLER))
        self.wish = self.wish.resized(size)

    def shrink(self) -> None:
        """Let go what has been idle for too long."""
        given, wish = self.given, self.wish
        surplus = self._living - wish.target
        if given.waiting or given.resize is not None:
            return
        if surplus > 0:
            over = [member for member in self._idle() if member.idle_ns > given.overflow_idle_ns]
            self._dismiss(over[:surplus], LetGo(0, "overflow no longer needed", if_idle=True))
            return
        longest = given.max_idle_ns
        if longest is None or wish.target <= wish.floor or self._starting:
            return  # what is starting was wanted a moment ago
        idle = self._idle()
        if idle and idle[0].idle_ns > longest and given.since_change_ns > longest:
            self._dismiss(idle[:1], LetGo(0, "idle for max_idle", if_idle=True, shrink=True))

    # -- more --------------------------------------------------------------------------------

    def grow(self) -> None:
        """Raise the number wanted by what the line asks for."""
        given, wish = self.given, self.wish
        self.wanted = wish.target - sum(letting.shrink for letting in self.let_go)
        if not (given.waiting or given.asked):
            return
        living, starting = self._living, self._starting
        idle = len(self._idle())  # those in the line are about to get them
        unmet = max(given.waiting, given.asked) - idle
        if unmet > starting and wish.target < wish.full:
            target = max(wish.target, living - starting + unmet)
            self.wish = wish._replace(target=min(wish.full, target))
            self.wanted = self.wish.target
        elif given.waiting > idle and starting == 0 and given.dying == 0:
            self._grow_by_one(living)

    def _grow_by_one(self, living: int) -> None:
        """Want one more than now, if the bounds allow: a spike is over before it is there."""
        wish = self.wish
        if living < wish.target:
            return
        if living < wish.ceiling:
            self.wish = wish._replace(target=living + 1)
        self.wanted = max(wish.target, min(living + 1, wish.most))

    def fill(self) -> None:
        """Take into service what it lacks, ready workers before booting ones."""
        missing = self.wanted - self._living
        if missing <= 0:
            return
        able = [*self.ready, *(member for member in self.set_aside if not member.used_up)]
        if self.given.failing:  # rather too many calls than nobody to make them
            able += [member for member in self.set_aside if member.used_up]
        for member in [*able, *self.raised][:missing]:
            self._call_up(member)
            self.called_up.append(member)

    def _call_up(self, member: Member) -> None:
        for group in (self.ready, self.set_aside, self.raised):
            if member in group:
                group.remove(member)
        state = S.STARTING if member.state is S.STARTING else S.IDLE
        self.service.append(member._replace(state=state, reserve=False))

    # -- the reserve -------------------------------------------------------------------------

    def _worn(self) -> List[Member]:
        return [member for member in self.service if member.worn]

    def _to_replace(self) -> int:
        """Count the workers in service that a stand-in is, or will soon be, needed for."""
        return len(self._worn()) + self._soon_used_up()

    def _soon_used_up(self) -> int:
        return len([1 for member in self.service if member.nearly_used_up and not member.worn])

    def exchange(self) -> None:
        """Take one worn worker out of service for each stand-in that is ready. Spares stay."""
        worn = self._worn()
        if not worn:
            return
        staying = [member for member in worn if not member.unfit]
        promised = len(worn) - len(staying)  # to those that go when they are given back
        free = len(self.ready) - self.given.spares - self._soon_used_up() - promised
        for old in staying[: max(0, free)]:
            new = self.ready[-1]
            self._call_up(new)
            self.service.remove(old)
            self.set_aside.append(old._replace(state=S.SPARE, reserve=True))
            self.exchanged.append((old, new))

    def trim(self) -> None:
        """Let go the worn, once service is complete, and stand-ins for nobody."""
        spares = self.given.spares
        if self._living >= self.wanted and not self._starting:
            kept = max(0, spares - len(self.ready))
            self.dismissed += [LetGo(member.slot, WORN) for member in self.set_aside[kept:]]
        standing_by = [*self.ready, *self.raised]
        for member in standing_by[spares + self._to_replace() :]:
            self.dismissed.append(LetGo(member.slot, "nobody is left to be replaced"))
            (self.raised if member.state is S.STARTING else self.ready).remove(member)

    def start(self) -> Tuple[int, bool]:
        """Return how many to start, and whether they are for the reserve."""
        given = self.given
        missing = self.wanted - self._living
        reserve = missing <= 0
        if reserve and not self._starting:  # service comes first
            hurry = given.may_raise and not self.called_up
            missing = self._missing_in_reserve() if hurry else 0
        room = min(given.startup_batch - self.booting, given.room)
        count = min(missing - given.dying, room)
        return (count if given.may_start and count > 0 else 0), reserve

    def _missing_in_reserve(self) -> int:
        """Count what the reserve lacks. Old workers that are still stopping hold others up."""
        room = max(0, self.given.startup_batch - self.stopping)
        wanted = self.given.spares + min(self._to_replace(), room)
        return wanted - len(self.ready) - len(self.raised) - self.probed


def _how_easily_spared(member: Member) -> Tuple[int, int]:
    """Order the workers of which some must go: unfit, booting, idle, probed, leased ones."""
    if member.unfit:
        kind = 0
    elif member.state is S.STARTING:
        kind = 1
    elif member.state is S.IDLE and member.idle:
        kind = 2 if member.worn else 4 if member.warm else 3
    elif member.state is S.PROBING:
        kind = 5
    else:
        kind = 6 if member.worn else 7
    return kind, -member.idle_ns
