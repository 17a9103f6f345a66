"""The turnstile keeps its promises in every order of steps, and loses one with each line it lacks.

What is explored is `minipool/engine/turnstile.py` itself; see `stepwise` and `model_checker`.
"""

from __future__ import annotations

from typing import Any

import pytest

from model_checker import Explorer, Scenario, close, fence, probe, release, replace, take
from shared_memory import Violation
from stepwise import Instrumented

pytestmark = pytest.mark.timeout(240)  # the largest has 270,000 states

TWO_IDLE = ((0, 1), (1, 1))
A, B = (0, 1), (1, 1)

SCENARIOS: dict[str, Scenario] = {
    "two take and give back, twice": Scenario([[take(), release] * 2] * 2),
    "three on two slots": Scenario([[take(), release]] * 3, idle=TWO_IDLE),
    "three on two slots, fifo": Scenario([[take(), release]] * 3, idle=TWO_IDLE, strategy="fifo"),
    "one may time out": Scenario([[release], [take(0.5), release]], [A], ()),
    "one does not wait, one may time out": Scenario(
        [[take(0), release], [take(0.5), release], [release]], [None, None, A], ()
    ),
    "close while two take": Scenario([[take(), release], [take(), release], [close]]),
    "close while one takes and one gives back": Scenario(
        [[take(), release], [release], [close]], [None, A], ()
    ),
    "close while one times out": Scenario([[take(0.5), release], [release], [close]], [None, A], ()),
    "one wants a slot, one takes any": Scenario(
        [[take(None, 0), release], [take(), release], [release]], [None, None, A], [B]
    ),
    "one wants the only slot, one takes any": Scenario(
        [[take(None, 0), release], [take(), release], [release]], [None, None, A], ()
    ),
    "two want one slot": Scenario(
        [[take(None, 0), release], [take(None, 0)], [release]], [None, None, A], ()
    ),
    "one wants a slot that is fenced": Scenario([[take(None, 0)], [fence(0)]], [None, A], ()),
    "one wants a slot that is replaced": Scenario(
        [[take(None, 0), release], [replace(0, 2)]], [None, A], ()
    ),
    "replaced while leased": Scenario(
        [[release], [take(), release], [replace(0, 2)]], held=[A], idle=()
    ),
    "a signal handler gives back": Scenario([[take(), release]] * 2, handlers=[(0, B)]),
    "a signal handler gives back, one may time out": Scenario(
        [[release], [take(0.5), release]], [A], (), handlers=[(0, B), ]
    ),
    "struck while giving back": Scenario(
        [[release], [take(), release]], [A], (), strikes=[0], sweeps=3, fair=False
    ),
    "struck while taking": Scenario(
        [[take(), release], [take(), release]], strikes=[0], sweeps=3, fair=False
    ),
    "struck while it waits": Scenario(
        [[release], [take(), release]], [A], (), strikes=[1], struck_at=["acquire"]
    ),
    "struck while giving back to one who may time out": Scenario(
        [[release], [take(0.5), release]], [A], (), strikes=[0], sweeps=3, fair=False
    ),
    "struck while it is closed": Scenario(
        [[take()], [release], [close]], [None, A], (), strikes=[0, 1], sweeps=3, fair=False
    ),
}  # fmt: skip

# What it explores is the same on every Python; these have more states than the others together.
MANY = {
    "three on two slots", "three on two slots, fifo", "one does not wait, one may time out",
    "one wants a slot, one takes any", "one wants the only slot, one takes any",
    "two want one slot", "replaced while leased", "struck while it is closed",
}  # fmt: skip

LARGE: dict[str, Scenario] = {
    "one wants a slot and may time out": Scenario(
        [[take(0.5, 0), release], [take(), release], [release]], [None, None, A], ()
    ),
    "struck while giving back, as another does": Scenario(
        [[release], [take(), take()], [release]],
        [A, None, B], (), strikes=[0], sweeps=3, fair=False,
    ),
    "probed while two take": Scenario([[take(), release], [take(), release], [probe(0, 1)]]),
    "three take and give back": Scenario([[take(), release]] * 3),
    "three take and give back, fifo": Scenario([[take(), release]] * 3, strategy="fifo"),
    "two may time out": Scenario([[release], [take(0.5), release], [take(0.5), release]], [A], ()),
    "replaced while idle": Scenario([[take(), release], [take(0.5), release], [replace(0, 2)]]),
    "struck while two take": Scenario(
        [[release], [take(), release], [take(0.5), release]],
        [A], (), strikes=[0], sweeps=2, fair=False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def code() -> Instrumented:
    return Instrumented()


def explored(name: str, scenario: Scenario, code: Instrumented) -> Explorer:
    explorer = Explorer(scenario, code).run()
    print(f"{name}: {explorer.states} states, {explorer.steps} steps, {explorer.ends} ends")
    return explorer


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in MANY else ()) for name in SCENARIOS],
)
def test_promises_hold_in_every_order_of_steps(name: str, code: Instrumented) -> None:
    """No order of steps, timeouts and accidents breaks a promise; every one comes to an end."""
    explorer = explored(name, SCENARIOS[name], code)

    assert explorer.ends > 0


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_promises_hold_in_every_order_of_many_steps(name: str, code: Instrumented) -> None:
    """The same with more threads at once."""
    explorer = explored(name, LARGE[name], code)

    assert explorer.ends > 0


ENQUEUE_CHECKS_CLOSE = """        if self.closed or (waiter.key is not None and waiter.key not in self.current):
            self._settle_closed(waiter)  # else whoever fences that slot dismisses this waiter
        elif self.idle:
"""
TIMEOUT = (
    "        if waiter.settle(_LEFT):\n            self._remove(waiter)\n            return None"
)
TRY_TAKE_CHECK = """            if self.current.get(token[0]) is token[1]:
                return token
"""
OFFER = """        if offer(slot, generation) is not generation:
            return self._publish_again(slot, generation)
"""
AFTER_OFFER = "        if self.waiters and (self.general or self.lines.get(slot)):\n"
PUT_BACK = "            waiter = self._next_for(token[0])\n        self.publish(*token)\n"
WANTED = "            if slot is None:\n                waiter = self._next_for(token[0])"
SWEEP = "        if self.waiters and self.idle:\n            for slot"
LEAVE = "            waiter.taken = True\n            self.publish(*token)"
FINISH = "            if waiter.outcome is not None:\n                self._finish(waiter)\n"
NOTE = "            self.handed[token[0]] = weakref.ref(waiter)\n"
SETTLE = "            won = waiter.settle(token)\n            self._finish(waiter)\n"
SAME_LINE = "            if self.lines.get(waiter.key) is line:\n"

# What is left out: the scenario that finds it, the promise it breaks, the text and its replacement.
MUTANTS: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "no re-check of idle after enqueue": (
        "two take and give back, twice",
        "sleeps though slot 0 is idle",
        [("        elif self.idle:\n            self.pump(waiter.key)\n", "")],
    ),
    "no look at the line after offering": (
        "two take and give back, twice",
        "sleeps though slot 0 is idle",
        [(AFTER_OFFER, "        if False:\n")],
    ),
    "no dirty re-check after leaving the seat": (
        "three take and give back, fifo",
        "sleeps though slot 0 is idle",
        [("        while self._dirty:\n", "        if self._dirty:\n")],
    ),
    "timeout not arbitrated": (
        "one may time out",
        "is lost",
        [(TIMEOUT, "        if waiter.outcome is None:\n"
                   "            self._remove(waiter)\n            return None")],
    ),
    "put-back does not re-check close": (
        "close while one times out",
        "stays idle in a closed turnstile",
        [(PUT_BACK, PUT_BACK.replace("self.publish(*token)", "self.idle[token[0]] = token[1]"))],
    ),
    "release does not re-check close": (
        "close while one takes and one gives back",
        "stays idle in a closed turnstile",
        [("        if self.closed and self.idle.pop(slot, None) is not None:", "        if False:")],
    ),
    "enqueue does not re-check close": (
        "close while two take",
        "sleeps though the turnstile is closed",
        [(ENQUEUE_CHECKS_CLOSE, "        if self.idle:\n")],
    ),
    "no generation check in try_take": (
        "replaced while leased",
        "under an old generation",
        [(TRY_TAKE_CHECK, "            return token\n")],
    ),
    "no generation check in the match": (
        "replaced while leased",
        "under an old generation",
        [("            if token is None or self.current.get(token[0]) == token[1]:\n",
          "            if True:\n")],
    ),
    "a token replaces another": (
        "replaced while leased",
        "is lost",
        [(OFFER, "        self.idle[slot] = generation\n")],
    ),
    "who wants one slot is passed by": (
        "one wants the only slot, one takes any",
        "is overtaken",
        [(WANTED, WANTED.replace("slot is None", "False"))],
    ),
    "a newcomer does not look at the line": (
        "three take and give back, fifo",
        "is overtaken",
        [("        while not self.waiters and not self.closed:", "        while not self.closed:")],
    ),
    "who leaves keeps what he was given": (
        "struck while it waits",
        "is lost",
        [(LEAVE, "                pass")],
    ),
    "the sweep does not finish a broken match": (
        "struck while giving back",
        "sleeps though slot 0 is idle",
        [(SWEEP, "        if False:\n            for slot")],
    ),
    "the sweep leaves a forgotten seat taken": (
        "struck while giving back, as another does",
        "sleeps though slot 1 is idle",
        [("        if holder is not None and holder is seen:", "        if False:")],
    ),
    "the sweep does not wake whoever was settled": (
        "struck while giving back",
        "nobody will wake it",
        [(FINISH, "            pass\n")],
    ),
    "a waiter is settled that was settled before": (
        "one may time out",
        "is lost",
        [(SETTLE, SETTLE.replace("won = waiter.settle(token)", "won = True; waiter.settle(token)"))],
    ),
    "a hand-over is not noted": (
        "two take and give back, twice",
        "noted nowhere",
        [(NOTE, "")],
    ),
    "a hand-over is noted after it": (
        "struck while giving back",
        "noted nowhere",
        [(NOTE + SETTLE, SETTLE + NOTE)],
    ),
    "the line of a slot is not looked at after offering": (
        "two want one slot",
        "sleeps though slot 0 is idle",
        [(AFTER_OFFER, "        if self.waiters and self.general:\n")],
    ),
    "the line of a slot that is fenced is not dismissed": (
        "one wants a slot that is fenced",
        "sleeps though slot 0 is no more",
        [("        self.dismiss(slot)\n", "")],
    ),
    "a line that was dismissed is joined": (
        "one wants a slot that is replaced",
        "sleeps though slot 0 is idle",
        [(SAME_LINE, "            if True:\n")],
    ),
    "a matcher waits for the seat": (
        "a signal handler gives back",
        "spin",
        [("                    return  # its holder", "                    continue  # its holder")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_protocol_without_one_of_its_steps_breaks_a_promise(name: str) -> None:
    """Each step of the protocol is needed: without it the checker finds what goes wrong."""
    scenario, promise, replacements = MUTANTS[name]

    with pytest.raises(Violation, match=promise) as broken:
        Explorer({**SCENARIOS, **LARGE}[scenario], Instrumented(*replacements)).run()
    print(f"{name}: {broken.value}")


def test_wait_that_goes_on_is_where_it_was(code: Instrumented) -> None:
    """To be given more time changes nothing: the same state again, explored with the others."""
    given = take(0.5, None, lambda: 0.5)

    with pytest.raises(Violation, match="all this can happen again and again") as broken:
        Explorer(Scenario([[release], [given, release]], [A], ()), code).run()
    assert str(broken.value).splitlines()[-1].strip() == "1: 0.5 s are over"


def test_unknown_shared_state_is_refused() -> None:
    """A new word of shared memory cannot slip by the rewriting."""
    dirty = "        self._dirty[slot] = True\n        while"

    with pytest.raises(AssertionError, match="_hints is shared and not known"):
        Instrumented((dirty, "        self._hints = 1\n" + dirty))
    with pytest.raises(NotImplementedError, match="does not know"):
        Instrumented((dirty, "        self.closed |= True\n" + dirty))
    with pytest.raises(AssertionError, match="two steps in one expression"):
        Instrumented((dirty, "        same = self.idle.pop(1) == self.idle.pop(2)\n" + dirty))


def test_checker_finds_two_owners() -> None:
    """The checker itself: a slot that is offered while it is leased has two owners."""
    again: list[Any] = [take(), replace(0, 1)]

    with pytest.raises(Violation, match="offered while somebody owns it"):
        Explorer(Scenario([again, [take()]]), Instrumented()).run()
