"""Visits every state that threads at the turnstile can bring about, and checks its promises.

The threads run the turnstile's own code, one step at a time (see `stepwise`). Where a thread
stands follows from the results it was sent. So a state is: the shared memory, an immutable tuple;
and for each thread the node of a graph of results, grown once by running the real code and then
only walked. Two nodes are one if the frames stand at the same instructions with the same
variables. States are hashed and visited once.

Time is a choice: a wait with a timeout may end at any moment at which its lock is not free. The
manager looks when no other thread can move; its look, once begun, goes on among the steps of the
others.

An asynchronous exception is a choice too, at each step, the private ones included: before it, or
after it and before its result is stored. So is a signal handler: it runs between two steps.

To read a flag that no thread of a scenario writes is no step: it commutes with everything.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Sequence

from shared_memory import (
    Memory,
    Shared,
    Violation,
    check_noted,
    check_order,
    lost_tokens,
    value_of,
    waiting,
)
from stepwise import (
    Instrumented,
    Interrupt,
    Label,
    Steps,
    closing,
    frames,
    placed,
)

# -- what threads do -----------------------------------------------------------------------------

Phase = Callable[[Any, Any], Steps]


def take(
    timeout: float | None = None,
    wants: int | None = None,
    more: Callable[[], float] | None = None,
) -> Phase:
    """Take a slot; it is the thread's from then on."""

    def phase(turnstile: Any, held: Any) -> Steps:
        yield ("begin",)
        try:
            token = yield from turnstile.take(timeout, wants, None, more)
        except turnstile.Closed:
            return None
        yield ("end", token)
        return token

    phase.wants = wants  # type: ignore[attr-defined]
    return phase


def release(turnstile: Any, held: Any) -> Steps:
    """Give back the slot, if there is one."""
    if held is not None:
        yield ("disown", held)
        yield from turnstile.publish(*held)
    return None


def close(turnstile: Any, held: Any) -> Steps:
    """Close the turnstile."""
    tokens = yield from turnstile.close()
    yield ("returned", tuple(tokens))
    return held


def replace(slot: int, generation: int) -> Phase:
    """Do as the manager when a worker dies: fence the slot, then offer the next worker."""

    def phase(turnstile: Any, held: Any) -> Steps:
        yield from turnstile.fence(slot)
        yield from turnstile.admit(slot, generation)
        yield from turnstile.publish(slot, generation)
        return held

    return phase


def fence(slot: int) -> Phase:
    """Do as the manager when a worker dies."""

    def phase(turnstile: Any, held: Any) -> Steps:
        yield from turnstile.fence(slot)
        return held

    return phase


def probe(slot: int, generation: int) -> Phase:
    """Do as the manager when it probes an idle worker: claim it, then offer it again."""

    def phase(turnstile: Any, held: Any) -> Steps:
        if (yield from turnstile.claim(slot, generation)):
            yield ("end", (slot, generation))
            yield ("disown", (slot, generation))
            yield from turnstile.publish(slot, generation)
        return held

    return phase


def sweep(turnstile: Any, seen: Any) -> Steps:
    """Do as the manager at each look: free a forgotten seat, fence what is nowhere twice."""
    seat, lost_before = seen or (None, ())
    seat = yield from turnstile.sweep(seat)
    closing, lost = yield ("lost",)
    if closing:
        yield from close(turnstile, None)
    for slot, generation in lost:
        if (slot, generation) in lost_before:
            yield from turnstile.fence(slot)
            if not closing:
                yield from turnstile.admit(slot, generation + 10)
                yield from turnstile.publish(slot, generation + 10)
    return seat, lost


class Scenario(NamedTuple):
    """Threads, each a sequence of phases, and what may happen to them."""

    threads: Sequence[Sequence[Phase]]
    held: Sequence[Any] = ()  # token each thread begins with
    idle: Sequence[tuple[int, int]] = ((0, 1),)
    strategy: str = "lifo"
    strikes: Sequence[int] = ()  # threads that one asynchronous exception strikes, somewhere
    struck_at: Sequence[str] = ()  # kinds of steps where it may strike; empty: anywhere
    handlers: Sequence[tuple[int, tuple[int, int]]] = ()  # thread, token its handler gives back
    sweeps: int = 0  # looks of the manager, when nothing else moves
    fair: bool = True  # check first come, first served


# -- exploring -----------------------------------------------------------------------------------


class Node:
    """Where one operation of one thread stands, after some results: its next step, or its end."""

    __slots__ = ("children", "depth", "ended", "label", "parent", "result", "step")

    def __init__(self, parent: Node | None, label: Any) -> None:
        self.parent, self.label = parent, label
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.children: dict[Any, Node] = {}
        self.step: Any = None
        self.ended = False
        self.result: Any = None

    def path(self) -> list[Any]:
        labels = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            labels.append(node.label)
            node = node.parent
        return labels[::-1]


_STRUCK = "an exception strikes"
_PRIVATE = {"end", "disown", "returned", "refused", "lost", "ticket", "waiter"}


class Thread(NamedTuple):
    """One thread: the phase it is in, what it holds, where it stands, and its handler."""

    phase: int
    held: Any
    node: Any  # None: at its end
    before: tuple[int, ...] = ()  # who was in the line when its `take` began
    dead: frozenset[tuple[int, int]] = frozenset()  # tokens fenced before that
    handler: Any = None  # node; None: none, or done; else it runs, or may begin any time
    running: bool = False  # the handler


class State(NamedTuple):
    """A moment of the whole."""

    shared: Shared
    threads: tuple[Thread, ...]
    strikes: int  # not yet happened
    sweeping: bool  # the manager is in the middle of a look


class Explorer:
    """Visits every state of a scenario once, and checks each promise in each."""

    def __init__(self, scenario: Scenario, code: Instrumented) -> None:
        self.scenario, self.code = scenario, code
        self.memory = Memory(scenario.fair)
        self.roots: dict[Any, Node] = {}
        self.nodes: dict[Any, Node] = {}
        self.programs: list[Sequence[Phase]] = list(scenario.threads)
        self.sweeper = len(self.programs)
        self.programs.append([sweep] * scenario.sweeps)
        self.states = self.steps = self.ends = 0
        self.constant = self._constant_flags()

    def _constant_flags(self) -> set[str]:
        """Return what no thread of the scenario writes: to look at it commutes with everything."""
        names = {
            getattr(phase, "__qualname__", "") for program in self.programs for phase in program
        }
        constant: set[str] = set() if "close" in names else {"closed"}
        wanted = any(
            getattr(phase, "wants", None) is not None for each in self.programs for phase in each
        )
        if not wanted and not self.scenario.sweeps:
            constant.add("lines")
        fenced = any(name.startswith(("replace", "fence")) for name in names)
        if not self.scenario.sweeps and not fenced:
            constant.add("current")
        return constant

    # the tree of one operation

    def root(self, index: int, phase: Any, held: Any) -> Node:
        key = (index, phase, held)
        if key not in self.roots:
            self.roots[key] = self._grown(Node(None, key))
        return self.roots[key]

    def child(self, node: Node, label: Any) -> Node:
        found = node.children.get(label)
        if found is None:
            found = node.children[label] = self._grown(Node(node, label))
        return found

    def _grown(self, node: Node) -> Node:
        """Run the real code along the path of results to a node, and note what it asks next."""
        top = node
        while top.parent is not None:
            top = top.parent
        index, phase, held = top.label
        operation = release if phase == "handler" else self.programs[index][phase]
        steps = operation(self.code.turnstile(self.scenario.strategy), held)
        labels = iter(node.path())
        struck = False  # so far
        try:
            step = next(steps)
            while True:
                if step[0] == "object":
                    name = f"seat {index} {phase} {len(frames(steps))} {struck}"
                    step = steps.send(Label.known.setdefault(name, Label(name)))
                    continue
                label = next(labels, self)
                if label is self:
                    break
                if label is _STRUCK:
                    struck = True
                    step = steps.throw(Interrupt())
                else:
                    step = steps.send(label)
            node.step = step
            place: Any = (struck, *map(placed, frames(steps)))
        except StopIteration as end:
            node.ended, node.result = True, end.value
            place = end.value
        except Interrupt:
            node.ended, node.result = True, _STRUCK
            place = _STRUCK
        finally:
            closing(steps)
        return self.nodes.setdefault((top.label, node.step, place), node)

    # moves

    def begin(self) -> State:
        scenario = self.scenario
        held = list(scenario.held) + [None] * (len(self.programs) - len(scenario.held))
        handled = dict(scenario.handlers)
        tokens = {token for token in held if token} | set(handled.values())
        shared = Shared(
            idle=tuple(scenario.idle), waiters=(), general=(), lines=(), queues=(), handed=(),
            current=tuple(sorted(tokens | set(scenario.idle))), seat=(), closed=False,
            dirty=(), info=(), owned=frozenset(tokens), refused=frozenset(), fenced=frozenset(),
        )  # fmt: skip
        threads = []
        for index, program in enumerate(self.programs):
            node = self.root(index, 0, held[index]) if program else None
            handler = self.root(index, "handler", handled[index]) if index in handled else None
            threads.append(Thread(0, held[index], node, handler=handler))
        state = State(shared, tuple(threads), len(scenario.strikes[:1]), False)
        for index in range(len(threads)):
            state = self._settled(state, index)
        return state

    def _settled(self, state: State, index: int) -> State:
        """Run the private steps of a thread, which nobody else can tell from no step at all."""
        while True:
            thread = state.threads[index]
            node = thread.handler if thread.running else thread.node
            if node is None:
                return state
            if node.ended:
                state = self._ended(state, index, node.result)
                continue
            if not self._private(state, index, node.step):
                return state
            state = self._ran(state, index, node)

    def _private(self, state: State, index: int, step: Any) -> bool:
        if state.strikes and index in self.scenario.strikes and not self.scenario.struck_at:
            return False  # may be struck there
        kind = step[0]
        if kind == "wwrite" and step[2] == "taken":
            return True
        if kind == "wread":  # what is known stays: the place in the line, the first outcome
            return step[2] == "wants" or state.shared.info[step[1]].outcome is not None
        if kind == "set" and step[1] == "handed":
            return not self.scenario.sweeps  # else it matters who notes last, and what was struck
        return kind in _PRIVATE or (kind in ("read", "get") and step[1] in self.constant)

    def _ended(self, state: State, index: int, result: Any) -> State:
        thread = state.threads[index]
        if thread.running:
            return self._with(state, index, thread._replace(handler=None, running=False))
        phase = thread.phase + 1
        if result is _STRUCK or phase >= len(self.programs[index]):
            return self._with(state, index, thread._replace(phase=phase, held=None, node=None))
        node = self.root(index, phase, result)
        thread = Thread(phase, result, node, handler=thread.handler)
        return self._with(state, index, thread)

    def _ran(self, state: State, index: int, node: Node, struck: bool = False) -> State:
        """Carry out the next step of a thread, and send it the result."""
        self.steps += 1
        thread, step = state.threads[index], node.step
        if step[0] == "begin":
            line = tuple(ticket for ticket, _ in waiting(state.shared))
            thread = thread._replace(before=line, dead=state.shared.fenced)
        elif step[0] == "end" and step[1] is not None:
            if step[1] in thread.dead:
                raise Violation(f"slot {step[1][0]} is taken under an old generation")
            if self.scenario.fair:
                check_order(state.shared, thread.before, step[1][0])
        elif step[0] in ("write", "set") and step[1] in self.constant:
            raise AssertionError(f"{step[1]} was taken for constant in this scenario")
        shared, result = self.memory.run(state.shared, step)
        after = self.child(node, _STRUCK if struck else result)
        thread = thread._replace(**{"handler" if thread.running else "node": after})
        threads = state.threads[:index] + (thread,) + state.threads[index + 1 :]
        return State(shared, threads, state.strikes - struck, state.sweeping)

    @staticmethod
    def _with(state: State, index: int, thread: Thread) -> State:
        threads = state.threads[:index] + (thread,) + state.threads[index + 1 :]
        return state._replace(threads=threads)

    def moves(self, state: State) -> list[tuple[str, State]]:
        """Return every state that may come next, and what leads to it."""
        found: list[tuple[str, State]] = []
        patient: list[tuple[str, State]] = []
        for index, thread in enumerate(state.threads):
            if index != self.sweeper:
                self._moves_of(state, index, thread, found)
        sweeper = state.threads[self.sweeper]
        if sweeper.node is not None:  # a look that has begun goes on while others move
            found_by = found if state.sweeping else patient
            self._moves_of(state, self.sweeper, sweeper, found_by)
        return found or patient

    def _moves_of(self, state: State, index: int, thread: Thread, found: list[Any]) -> None:
        node = thread.handler if thread.running else thread.node
        if thread.handler is not None and not thread.running:
            running = self._with(state, index, thread._replace(running=True))
            if node is None:
                found.append((f"{index}: handler", self._settled(running, index)))
                return
            found.append((f"{index}: handler", self._settled(running, index)))
        if node is None:
            return
        name = f"{index}: {' '.join(map(str, node.step))}"
        strikes = state.strikes and index in self.scenario.strikes and not thread.running
        strikes = strikes and node.step[0] in (self.scenario.struck_at or node.step)
        may_run = True
        if node.step[0] == "acquire" and not state.shared.info[node.step[1]].awake:
            may_run = False
            self._expiry(state, index, node, found)
        if may_run:
            found.append((name, self._moved(state, index, node)))
        if strikes:
            before = self.child(node, _STRUCK)
            struck = self._with(state, index, thread._replace(node=before))
            struck = struck._replace(strikes=state.strikes - 1)
            found.append((f"{name}: struck before", self._settled(struck, index)))
            if may_run:
                after = self._ran(state, index, node, struck=True)
                found.append((f"{name}: struck after", self._settled(after, index)))

    def _moved(self, state: State, index: int, node: Node) -> State:
        after = self._ran(state, index, node)
        if index == self.sweeper:
            after = after._replace(sweeping=not after.threads[index].node.ended)
        return self._settled(after, index)

    def _expiry(self, state: State, index: int, node: Node, found: list[Any]) -> None:
        """Let a wait end because its time is over."""
        timeout = node.step[2]
        if timeout < 0:
            return
        thread = state.threads[index]
        which = "handler" if thread.running else "node"
        after = self._with(state, index, thread._replace(**{which: self.child(node, False)}))
        found.append((f"{index}: {timeout} s are over", self._settled(after, index)))

    # the search

    def run(self) -> Explorer:
        """Visit everything; raise Violation with the schedule that leads to it."""
        state = self.begin()
        seen, above = {state}, {state}
        path = [("begin", state, iter(self._checked(state)))]
        try:
            while path:
                label, state = next(path[-1][2], ("", None))
                if state is None:
                    above.discard(path.pop()[1])
                elif state in above:
                    path.append((label, state, iter(())))
                    raise Violation("threads spin: all this can happen again and again")
                elif state not in seen:
                    seen.add(state)
                    above.add(state)
                    path.append((label, state, iter(())))
                    path[-1] = (label, state, iter(self._checked(state)))
        except Violation as violation:
            schedule = "\n  ".join(name for name, _, _ in path)
            raise Violation(f"{violation}, after\n  {schedule}") from None
        self.states = len(seen)
        return self

    def _checked(self, state: State) -> list[tuple[str, State]]:
        self._check_notes(state)
        moves = self.moves(state)
        if not moves:
            self.ends += 1
            self._check_end(state)
        return moves

    def _check_notes(self, state: State) -> None:
        """Nobody is on its way: so what was handed over must be noted, or it is taken for lost."""
        sleeping = []
        for index, thread in enumerate(state.threads):
            node = thread.handler if thread.running else thread.node
            if node is None or (index == self.sweeper and not state.sweeping):
                continue
            if node.step[0] != "acquire":
                return
            sleeping.append(node.step[1])
        for ticket in sleeping:
            check_noted(state.shared, ticket)

    def _check_end(self, state: State) -> None:
        """Nothing moves any more: nobody sleeps in vain, and every slot is somewhere."""
        shared = state.shared
        for index, thread in enumerate(state.threads):
            if thread.node is None:
                continue
            kind, ticket = thread.node.step[:2]
            assert kind == "acquire", f"thread {index} does not move, at {thread.node.step}"
            wants = shared.info[ticket].wants
            if shared.closed:
                raise Violation(f"thread {index} sleeps though the turnstile is closed")
            if shared.info[ticket].outcome is not None or value_of(shared.waiters, ticket) is None:
                raise Violation(f"thread {index} sleeps, and nobody will wake it")
            if wants is not None and value_of(shared.current, wants) is None:
                raise Violation(f"thread {index} sleeps though slot {wants} is no more")
            for token in shared.idle:
                if token in shared.current and wants in (None, token[0]):
                    raise Violation(f"thread {index} sleeps though slot {token[0]} is idle")
        for token in lost_tokens(shared):
            raise Violation(f"slot {token[0]} is lost")
        for token in shared.current:
            places = [token in shared.idle, token in shared.owned, token in shared.refused]
            if sum(places) > 1:
                raise Violation(f"slot {token[0]} is in {sum(places)} places")
        if shared.closed and any(token in shared.current for token in shared.idle):
            raise Violation("a slot stays idle in a closed turnstile")
