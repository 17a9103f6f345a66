"""Programs: objects with a name, made in the workers from recipes that a session keeps.

A program is made by a factory, in a worker, and stays there, warm. Its recipe (the factory and
its arguments) is part of the session's state, so any worker can make it again: after a move, after
a death, and with a session store after the end of the whole application. That is a *rebuild*,
and it is counted. What a program shall remember beyond that belongs into `current_session()`.

    programs = Programs(pool)
    programs.create("qa", "myapp.answers:Answerer", "gpt", signature=Signature(
        inputs=[Field("question", "string")], outputs=[Field("answer", "string")]))
    programs.execute("qa", {"question": "Why?"})["answer"]

The first half of this module runs in the caller, the second, as plain functions, in a worker. A
session's state has two keys for each program: its *card* (small: what the caller wants to know)
and its *recipe*. The made objects are in the session's `local`, each with the mark of the
card it was made for, so that one of an earlier program with the same id is never taken for it.
"""

from __future__ import annotations

import base64
import contextlib
import pickle
import time
import uuid
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

from .deadline import Deadline
from .engine import wire
from .errors import (
    CallMismatch,
    ProgramExists,
    ProgramMismatch,
    ProgramNotFound,
    SessionExists,
    SessionNotFound,
    WorkerDied,
    answered,
)
from .lease import ATTEMPTS, seconds
from .nearness import checked_key
from .retry import Attempts
from .signatures import Field, Misfit, Signature, listed, misfit_of

if TYPE_CHECKING:
    from .lease import Lease
    from .pool import Pool

_CARD, _RECIPE = "program:", "program-recipe:"  # what a session's keys begin with
_LOCAL = "minipool.programs"
_DEFAULT = "call_timeout"  # the option's name stands for its value


class ProgramInfo(NamedTuple):
    """One program, as its session knows it."""

    program_id: str
    session_id: str
    factory: str
    signature: Optional[Signature]
    created: float  #: seconds since the epoch
    rebuilds: int  #: how often it was made again: its session had moved, or its worker was lost
    recipe_bytes: int


class Programs:
    """The programs of a pool's sessions. Any thread may use it; it holds nothing itself.

    Programs live in sessions and end with them (`session_ttl`, `end_session()`). Without a
    `session` they live in one that is for nothing else, the same for every `Programs` of a pool,
    also after a restart with a session store. A session's programs run one at a time, because
    sessions are serial: for programs that shall run at once give each a session.
    """

    def __init__(self, pool: Pool[Any], session: str = "minipool.programs") -> None:
        self.session = checked_key(session)  #: where programs live that are given no other
        self._pool = pool

    def __repr__(self) -> str:
        return f"<Programs of {self._pool.config.name}, session {self.session!r}>"

    def create(
        self,
        program_id: str,
        factory: Any,
        *args: Any,
        signature: Signature | None = None,
        session: str | None = None,
        timeout: float | None | str = _DEFAULT,
    ) -> None:
        """Make a program in a worker, and keep its recipe in the session.

        Args:
            factory: makes the program as `factory(*args)`: a class or function at the top of a
                module, its name ("package.module:Class"), or anything that can be pickled
                (`functools.partial(Class, key=word)`). What it makes must have a method
                `execute(**inputs)`, which is taken if there is one, or be callable itself.
            signature: what `execute` checks; without one it checks nothing.
            timeout: seconds for checkout and call together; None waits for ever.

        Raises:
            ProgramExists: the session has one of that id. It is as it was.
            CallMismatch: factory or arguments cannot be sent, or what was made is no program.
            Exception: whatever the factory raised. Nothing was created.
        """
        where = self._checked(program_id, session)
        card = {
            "mark": uuid.uuid4().hex,
            "factory": factory if isinstance(factory, str) else _name_of(factory),
            "signature": None if signature is None else signature.as_lists(),
            "created": time.time(),
            "rebuilds": 0,
        }
        # Under a codec of the user's own, bytes may be what cannot travel, and text is what can.
        recipe: Any = _packed(program_id, factory, args)
        packed: Any = pickle.dumps(card)
        if self._pool.config.codec is not None:
            recipe, packed = base64.b64encode(recipe).decode(), base64.b64encode(packed).decode()
        call = _Calls(self._pool, where, timeout, begin=where == self.session)
        with call.lease() as lease:
            if _CARD + program_id in lease.state:
                raise ProgramExists(
                    f"session {where!r} has a program {program_id!r} already; delete it first, or "
                    f"take another id",
                    program_id=program_id,
                    session_id=where,
                )
            call.make(lease, _create, program_id, packed, recipe)

    def execute(
        self,
        program_id: str,
        inputs: Mapping[str, Any] | None = None,
        *,
        session: str | None = None,
        timeout: float | None | str = _DEFAULT,
    ) -> Any:
        """Run a program with its inputs as keywords, and return what it returns.

        A worker that does not have it makes it first. `timeout` is in seconds, for checkout and
        calls together (None: for ever; by default each has the pool's own).

        Raises:
            ProgramNotFound: the session has none of that id.
            CallMismatch: the inputs do not fit the signature: all that is missing, unknown and
                wrong. Nothing was sent.
            ProgramMismatch: the outputs do not. Nothing was committed.
            Exception: whatever the program, or its factory in a rebuild, raised.
        """
        where = self._checked(program_id, session)
        calls, attempts = _Calls(self._pool, where, timeout), Attempts(ATTEMPTS)
        while True:
            with calls.lease(missing=program_id) as lease:
                card = lease.state.get(_CARD + program_id)
                if card is None:
                    raise _not_found(program_id, where)
                given = _checked_inputs(program_id, card, inputs)
                first = True
                try:
                    made, result = calls.make(lease, _execute, program_id, card["mark"], given)
                    if not made:
                        first = False
                        calls.make(lease, _rebuild, program_id)
                        _, result = calls.make(lease, _execute, program_id, card["mark"], given)
                    return result
                except WorkerDied as death:
                    # If the last call had not begun, those before left nothing that counts.
                    if answered(death) or death.started or first:
                        raise
                    attempts.note(death)
                    attempts.told(death)
                    if attempts.over:
                        raise

    def list(self, session: str | None = None) -> List[str]:
        """Return the ids of a session's programs, in alphabetical order."""
        start = len(_CARD)
        return sorted(key[start:] for key in self._state(session) if key.startswith(_CARD))

    def info(self, program_id: str, session: str | None = None) -> ProgramInfo:
        """Return what is known of a program.

        Raises:
            ProgramNotFound: the session has none of that id.
        """
        where = self._checked(program_id, session)
        state = self._state(session)
        card = state.get(_CARD + program_id)
        if card is None:
            raise _not_found(program_id, where)
        return ProgramInfo(
            program_id=program_id,
            session_id=where,
            factory=card["factory"],
            signature=_signature_of(card),
            created=card["created"],
            rebuilds=card["rebuilds"],
            recipe_bytes=len(state[_RECIPE + program_id]),
        )

    def delete(
        self,
        program_id: str,
        session: str | None = None,
        timeout: float | None | str = _DEFAULT,
    ) -> bool:
        """Forget a program. Return whether there was one; doing it twice is no error."""
        where = self._checked(program_id, session)
        if _CARD + program_id not in self._state(session):
            return False  # and no session is begun by asking
        calls = _Calls(self._pool, where, timeout)
        with calls.lease() as lease:
            return bool(calls.make(lease, _delete, program_id))

    def _state(self, session: str | None) -> Mapping[str, Any]:
        """Return a session's state, of which only what is asked for is unpickled.

        The other values are the user's: of classes, maybe, that only the workers can import.
        """
        self._pool._opened()
        try:
            return self._pool._sessions.state(self.session if session is None else session)
        except SessionNotFound:
            return {}

    def _checked(self, program_id: Any, session: str | None) -> str:
        if not isinstance(program_id, str) or not program_id:
            raise TypeError(
                f"program_id={program_id!r}: a program's id is a text that is not empty"
            )
        return self.session if session is None else checked_key(session)


class _Calls:
    """The calls of one operation, in one session and within one timeout."""

    def __init__(
        self, pool: Pool[Any], session: str, timeout: float | None | str, begin: bool = False
    ) -> None:
        self._pool, self._session, self._timeout, self._begin = pool, session, timeout, begin
        self._deadline: Deadline | None = None

    def lease(self, missing: str | None = None) -> Lease[Any]:
        """Take the session and a worker. `missing` is the program that must be there."""
        try:
            return self._checkout()
        except SessionNotFound as problem:  # the pool is strict about sessions
            if missing is not None:
                raise _not_found(missing, self._session) from problem
            if not self._begin:
                raise
        with contextlib.suppress(SessionExists):  # another thread was faster
            self._pool.create_session(self._session)
        return self._checkout()

    def _checkout(self) -> Lease[Any]:
        if self._timeout == _DEFAULT:
            return self._pool.checkout(session=self._session)
        if self._deadline is None:
            whole = seconds(self._timeout, "timeout")
            if whole is None:
                return self._pool.checkout(session=self._session, timeout=None)
            self._deadline = Deadline(self._pool, whole)
        left = max(0.0, self._deadline.end - time.monotonic())
        lease: Lease[Any] = self._deadline.checkout(left, self._session)
        return lease

    def make(self, lease: Lease[Any], function: Any, *args: Any) -> Any:
        """Make one call, in what is left of the time."""
        if self._timeout == _DEFAULT:
            return lease.call(function, *args)
        left = None if self._deadline is None else self._deadline.left()
        return lease.options(timeout=left).call(function, *args)


def _signature_of(card: Mapping[str, Any]) -> Signature | None:
    if card["signature"] is None:
        return None
    inputs, outputs = ([Field(*words) for words in fields] for fields in card["signature"])
    return Signature(inputs, outputs)


def _checked_inputs(program_id: str, card: Mapping[str, Any], inputs: Any) -> dict[str, Any]:
    """Return the inputs as a dict.

    Raises:
        CallMismatch: they do not fit.
    """
    if inputs is None:
        inputs = {}
    if not isinstance(inputs, Mapping):
        raise CallMismatch(
            f"program {program_id!r}: inputs are a mapping of names to values, not a "
            f"{type(inputs).__name__}; nothing was sent"
        )
    signature = _signature_of(card)
    if signature is None:
        odd = [repr(name) for name in inputs if not isinstance(name, str)]
        misfit = Misfit([], odd, {}) if odd else None
    else:
        misfit = misfit_of(signature.inputs, inputs)
    if misfit is not None:
        takes = "keywords" if signature is None else str(signature)
        raise CallMismatch(
            f"program {program_id!r} takes {takes}: {misfit}; nothing was sent; correct the inputs",
            target=program_id,
            signature=takes,
            **misfit._asdict(),
        )
    return dict(inputs)


def _not_found(program_id: str, session: str) -> ProgramNotFound:
    return ProgramNotFound(
        f"session {session!r} has no program {program_id!r}; create it, or name the session it is "
        f"in; programs end with their session",
        program_id=program_id,
        session_id=session,
    )


def _name_of(factory: Any) -> str:
    name = getattr(factory, "__qualname__", None)
    return repr(factory)[:200] if name is None else f"{factory.__module__}:{name}"


def _packed(program_id: str, factory: Any, args: Tuple[Any, ...]) -> bytes:
    """Pickle a recipe.

    Raises:
        CallMismatch: no worker could do anything with it.
    """
    if isinstance(factory, str):
        module, _, name = factory.partition(":")
        if not module or not name:
            raise CallMismatch(f"factory={factory!r}: name it as 'package.module:Class'")
    elif not callable(factory):
        raise CallMismatch(f"factory={factory!r}: give a class, a function, or the name of one")
    try:
        return pickle.dumps((factory, args), 5)
    except Exception as problem:
        raise CallMismatch(
            f"the recipe of program {program_id!r} cannot be kept: {problem}; nothing was created; "
            f"give a class or function at the top of a module, or its name, and plain arguments"
        ) from problem


# -- in a worker ---------------------------------------------------------------------------------


class _Made(NamedTuple):
    mark: str
    run: Any
    outputs: Tuple[Field, ...]


def _programs_here() -> Tuple[Any, Dict[str, _Made]]:
    from . import current_session

    session = current_session()
    return session, session.local.setdefault(_LOCAL, {})


def _make(program_id: str, card: Mapping[str, Any], recipe: bytes) -> _Made:
    """Follow a recipe.

    Raises:
        CallMismatch: what it makes is no program. Exception: what the factory raises.
    """
    factory, args = pickle.loads(recipe)
    if isinstance(factory, str):
        factory = wire.find(factory)
    made = factory(*args)
    run = getattr(made, "execute", made)
    if not callable(run):
        raise CallMismatch(
            f"the factory of program {program_id!r} made a {type(made).__name__}, which can "
            f"neither be called nor has a method execute(); give it one"
        )
    signature = _signature_of(card)
    return _Made(card["mark"], run, () if signature is None else signature.outputs)


def _create(program_id: str, packed: Any, recipe: Any) -> None:
    if isinstance(recipe, str):
        packed, recipe = base64.b64decode(packed), base64.b64decode(recipe)
    session, here = _programs_here()
    card = pickle.loads(packed)
    made = _make(program_id, card, recipe)
    session[_CARD + program_id], session[_RECIPE + program_id] = card, recipe
    here[program_id] = made


def _rebuild(program_id: str) -> None:
    session, here = _programs_here()
    card = session[_CARD + program_id]
    here[program_id] = _make(program_id, card, session[_RECIPE + program_id])
    card["rebuilds"] += 1


def _execute(program_id: str, mark: str, inputs: Dict[str, Any]) -> Tuple[bool, Any]:
    """Run a program; return whether it is here, and what it returned."""
    session, here = _programs_here()
    made = here.get(program_id)
    if made is None or made.mark != mark:
        return False, None
    result = made.run(**inputs)
    if made.outputs:
        _check_outputs(program_id, session.id, made.outputs, result)
    return True, result


def _check_outputs(
    program_id: str, session_id: str, outputs: Tuple[Field, ...], result: Any
) -> None:
    misfit: Misfit | None
    if isinstance(result, Mapping):
        misfit = misfit_of(outputs, result)
        if misfit is None:
            return
        what = str(misfit)
    else:
        misfit = Misfit([field.name for field in outputs if field.required], [], {})
        what = f"a {type(result).__name__}, which is no mapping of names to values"
    raise ProgramMismatch(
        f"program {program_id!r} shall return {listed(outputs)}, but returned {what}; nothing of "
        f"this call was committed; correct the program or its signature",
        program_id=program_id,
        session_id=session_id,
        **misfit._asdict(),
    )


def _delete(program_id: str) -> bool:
    session, here = _programs_here()
    here.pop(program_id, None)
    session.pop(_RECIPE + program_id, None)
    return session.pop(_CARD + program_id, None) is not None
