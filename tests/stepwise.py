"""The turnstile's own source, rewritten so that a test decides which thread makes the next step.

There is no second description of the protocol that could drift from the first. `Instrumented`
reads `minipool/engine/turnstile.py`, and rewrites each step on shared memory (a dict operation, a
read or write of a flag, a lock) into a `yield` of that step. What is left is, for each thread, a
generator that asks for one step at a time and is sent its result. The rewriting knows:

    self.idle, waiters, general, current,  any method, truth, `in`, [k] = v, del [k]
        handed, _dirty, _seat
    self.lines, and each line in it        the same; `{}` makes a line
    self.closed                            read and write
    waiter.wants, waiter.taken             read and write
    waiter.outcome, token, closed          read
    waiter.settle                          one step: the first outcome stays
    waiter.wait, waiter.wake               the lock that a waiter sleeps on
    next(tickets), next(iter(d)), list(d)  as CPython runs them; `object()` makes a known name

What it does not know (a new attribute, a lambda, two steps in one expression) it refuses, so a
change of the turnstile is explored or fails the tests.
"""

from __future__ import annotations

import ast
import types
from pathlib import Path
from typing import Any, Callable, Generator, NamedTuple

from minipool.engine import turnstile as real

SOURCE = Path(real.__file__).read_text()
DICTS = ("idle", "waiters", "general", "lines", "current", "handed", "_dirty", "_seat", "_settled")
FLAGS = ("closed", "outcome", "token", "wants", "taken")

Steps = Generator[Any, Any, Any]


class Interrupt(BaseException):
    """The asynchronous exception that strikes threads."""


# -- rewriting the real code ---------------------------------------------------------------------


class _Rewrite(ast.NodeTransformer):
    """Turns methods into generators that yield each step on shared memory."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if node.name == "__init__":
            return _Construct().visit(node)
        node.body = self._visited(node.body)
        node.body.insert(0, ast.parse("yield from ()").body[0])
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        node.args = [self.visit(argument) for argument in node.args]
        assert not node.keywords, "the rewriting knows no keyword arguments"
        function = node.func if isinstance(node.func, ast.Name) else self.visit(node.func)
        return _steps("_call", *_one_steps(function, *node.args))

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        assert not node.keys
        return ast.Constant("a line")

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        node.value = self.visit(node.value)
        if node.attr in FLAGS and isinstance(node.ctx, ast.Load):
            return _steps("_load", node.value, ast.Constant(node.attr))
        return node

    def visit_Assign(self, node: ast.Assign) -> Any:
        (target,) = node.targets
        node.value = self.visit(node.value)
        if isinstance(target, ast.Tuple) and any(isinstance(t, ast.Attribute) for t in target.elts):
            kept = ast.Name("_values", ast.Store())
            found: list[ast.stmt] = [ast.Assign([kept], node.value)]
            for index, each in enumerate(target.elts):
                value = ast.parse(f"_values[{index}]").body[0].value  # type: ignore[attr-defined]
                found.append(self._assigned(each, value))
            return ast.If(ast.Constant(True), found, [])
        return self._assigned(target, node.value)

    def _assigned(self, target: ast.expr, value: ast.expr) -> ast.stmt:
        if isinstance(target, ast.Attribute):
            assert target.attr in FLAGS, f"{target.attr} is shared and not known"
            return ast.Expr(_steps("_store", target.value, ast.Constant(target.attr), value))
        if isinstance(target, ast.Subscript):
            return ast.Expr(_steps("_set", target.value, _index(target), value))
        return ast.Assign([target], value)

    def visit_Delete(self, node: ast.Delete) -> ast.AST:
        (target,) = node.targets
        assert isinstance(target, ast.Subscript)
        return ast.Expr(_steps("_delete", target.value, _index(target)))

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        (operator,), (right,) = node.ops, node.comparators
        if isinstance(operator, (ast.In, ast.NotIn)) and _is_dict(right):
            found = _steps("_contains", right, self.visit(node.left))
            negative = isinstance(operator, ast.NotIn)
            return ast.UnaryOp(ast.Not(), found) if negative else found
        self.generic_visit(node)
        _one_steps(node.left, *node.comparators)
        return node

    def visit_For(self, node: ast.For) -> Any:
        """Keep what is left of a loop in a variable, where it is part of the state."""
        name = f"_left_{node.lineno}"
        start = ast.parse(f"{name} = [*0]").body[0]
        start.value.elts[0].value = self.visit(node.iter)  # type: ignore[attr-defined]
        loop: Any = ast.parse(f"while {name}: _ = {name}.pop(0)").body[0]
        loop.body[0].targets = [node.target]
        loop.body += self._visited(node.body)
        assert not node.orelse
        return [start, loop]

    def visit_If(self, node: Any) -> ast.AST:
        node.test = self._truth(node.test)
        for part in ("body", "orelse"):
            inner = getattr(node, part)
            if isinstance(inner, list):
                setattr(node, part, self._visited(inner))
            else:
                setattr(node, part, self._truth(inner))
        return node

    visit_While = visit_If

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        node.test = self._truth(node.test)
        node.body, node.orelse = self.visit(node.body), self.visit(node.orelse)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        node.values = [self._truth(value) for value in node.values]
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        node.operand = self._truth(node.operand)
        return node

    def _visited(self, body: list[ast.stmt]) -> list[ast.stmt]:
        found: list[ast.stmt] = []
        for statement in body:
            new = self.visit(statement)
            found += new if isinstance(new, list) else [new]
        return found

    def _truth(self, node: ast.expr) -> Any:
        if _is_dict(node):
            return _steps("_call", ast.Attribute(node, "truth", ast.Load()))
        if isinstance(node, (ast.Name, ast.Call)):
            return _steps("_true", self.visit(node))  # it may be a line
        return self.visit(node)

    def visit_AugAssign(self, node: ast.AST) -> ast.AST:
        raise NotImplementedError(f"the rewriting does not know {ast.dump(node)}")

    visit_Lambda = visit_ListComp = visit_GeneratorExp = visit_With = visit_AugAssign
    visit_DictComp = visit_SetComp = visit_NamedExpr = visit_AsyncFunctionDef = visit_AugAssign

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        assert isinstance(node.target, ast.Name) and node.value is not None
        return ast.Assign([ast.Name(node.target.id, ast.Store())], self.visit(node.value))


class _Construct(ast.NodeTransformer):
    """In a constructor: the dicts become shared ones."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if isinstance(node.value, ast.Dict):
            assert isinstance(node.target, ast.Attribute) and node.target.attr in DICTS, (
                f"{ast.dump(node.target)} is shared and not known"
            )
            node.value = _made("_Dict", ast.Constant(node.target.attr))
        return node


def _made(function: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(function, ast.Load()), list(arguments), [])


def _steps(function: str, *arguments: Any) -> Any:
    return ast.YieldFrom(_made(function, *arguments))


def _one_steps(*parts: Any) -> Any:
    """Check that no result of a step waits, where no frame shows it, for another step."""
    stepping = [part for part in parts if any(isinstance(n, ast.YieldFrom) for n in ast.walk(part))]
    assert len(stepping) <= 1, f"two steps in one expression: {[ast.dump(p) for p in stepping]}"
    return parts


def _index(target: ast.Subscript) -> Any:
    inner: Any = target.slice
    return getattr(inner, "value", inner) if type(inner).__name__ == "Index" else inner


def _is_dict(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in DICTS


# -- what the rewritten code calls ---------------------------------------------------------------


class Label:
    """A named object, one for each name: what `object()` makes in a thread."""

    known: dict[str, Label] = {}

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


class Raised(NamedTuple):
    """The result of a step that raises."""

    error: type[BaseException]


class Stopped(Exception):
    """StopIteration, which a generator cannot raise."""


class Ref(NamedTuple):
    """A waiter, as it appears in steps and results."""

    ticket: int
    wants: Any


class Line(NamedTuple):
    """A line, as it appears in steps and results: those of one slot, one after the other."""

    slot: Any
    number: int


def _call(function: Callable[..., Any], *arguments: Any) -> Steps:
    result = function(*arguments)
    if isinstance(result, types.GeneratorType):
        result = yield from result
    return result


class _Closing:
    now = False  # a generator that nobody needs any more is thrown away


def closing(steps: Steps) -> None:
    """Throw away a suspended generator."""
    _Closing.now = True
    steps.close()
    _Closing.now = False


def _step(*step: Any) -> Steps:
    if _Closing.now:
        raise GeneratorExit  # else `except` and `finally` would ask for steps
    result = yield step
    if isinstance(result, Raised):
        raise result.error
    return result


def _true(value: Any) -> Steps:
    return (yield from value.truth()) if isinstance(value, _Dict) else value


def _load(holder: Any, flag: str) -> Steps:
    if hasattr(holder, "ticket"):
        return (yield from _step("wread", holder.ticket, flag))
    return (yield from _step("read", flag.strip("_")))


def _store(holder: Any, flag: str, value: Any) -> Steps:
    if hasattr(holder, "ticket"):
        return (yield from _step("wwrite", holder.ticket, flag, value))
    return (yield from _step("write", flag.strip("_"), value))


class _Dict:
    """Stands for one of the shared dicts; its operations are steps."""

    known: Callable[[Any], Any]  # the waiter or line for which a result stands

    def __init__(self, name: Any) -> None:
        self.name = name.strip("_") if isinstance(name, str) else name

    def _decoded(self, result: Any) -> Any:
        return self.known(result) if isinstance(result, (Ref, Line)) else result

    def pop(self, key: Any, default: Any = None) -> Steps:
        return self._decoded((yield from _step("pop", self.name, key)))

    def popitem(self) -> Steps:
        return (yield from _step("popitem", self.name))

    def get(self, key: Any) -> Steps:
        return self._decoded((yield from _step("get", self.name, key)))

    def setdefault(self, key: Any, value: Any) -> Steps:
        return self._decoded((yield from _step("setdefault", self.name, key, value)))

    def truth(self) -> Steps:
        return (yield from _step("truth", self.name))

    def copy(self) -> Steps:
        pairs = yield from _step("copy", self.name)
        return {key: self._decoded(value) for key, value in pairs}


def _set(shared: _Dict, key: Any, value: Any) -> Steps:
    value = Ref(value.ticket, value.wants) if hasattr(value, "ticket") else value
    return (yield from _step("set", shared.name, key, value))


def _delete(shared: _Dict, key: Any) -> Steps:
    return (yield from _step("delete", shared.name, key))


def _contains(shared: _Dict, key: Any) -> Steps:
    return (yield from _step("contains", shared.name, key))


class _DictIterator(NamedTuple):
    name: Any
    size: int  # CPython raises RuntimeError when the dict has another one


def _iter(shared: _Dict) -> Steps:
    return _DictIterator(shared.name, (yield from _step("size", shared.name)))


def _next(source: Any) -> Steps:
    if isinstance(source, _DictIterator):
        return (yield from _step("first", source.name, source.size))
    return (yield from _step("ticket"))


def _list(shared: _Dict) -> Steps:
    return [key for key, _ in (yield from _step("copy", shared.name))]


class _Gate:
    """Stands for the lock a waiter sleeps on."""

    ticket = -1

    def acquire(self, blocking: bool = True, timeout: float = -1) -> Steps:
        return (yield from _step("acquire", self.ticket, timeout))

    def release(self) -> Steps:
        return (yield from _step("release", self.ticket))


def _settle(waiter: Any, outcome: Any) -> Steps:
    """Stands for `Waiter.settle`, which is one step."""
    return (yield from _step("settle", waiter.ticket, outcome))


def _object() -> Steps:
    return (yield ("object",))


class Instrumented:
    """The turnstile's source, rewritten, with some of its text replaced first (a mutant)."""

    def __init__(self, *replacements: tuple[str, str]) -> None:
        source = SOURCE
        for old, new in replacements:
            assert source.count(old) == 1, f"the turnstile has changed: {old!r} is not in it once"
            source = source.replace(old, new)
        tree = ast.fix_missing_locations(_Rewrite().visit(ast.parse(source)))
        self.namespace: dict[str, Any] = {
            "__name__": "instrumented", "_call": _call, "_true": _true, "_load": _load, "_store": _store,
            "_set": _set, "_delete": _delete, "_contains": _contains, "_Dict": _Dict,
            "iter": _iter, "next": _next, "list": _list, "tuple": _list, "object": _object,
            "StopIteration": Stopped,
        }  # fmt: skip
        exec(compile(tree, "instrumented turnstile", "exec"), self.namespace)
        self.namespace["threading"] = types.SimpleNamespace(Lock=_Gate)
        self.namespace["_looks"] = lambda look: look
        self.namespace["weakref"] = types.SimpleNamespace(ref=lambda waiter: waiter)
        self.namespace["Waiter"].settle = _settle
        self.namespace["time"] = types.SimpleNamespace(monotonic=lambda: 0.0)
        self.closed_error: type[Exception] = self.namespace["Closed"]

    def turnstile(self, strategy: str) -> Any:
        """Return a turnstile whose methods are generators of steps."""
        waiter_class = self.namespace.get("_WaiterClass") or self.namespace["Waiter"]
        self.namespace["_WaiterClass"] = waiter_class
        met: dict[Any, Any] = {}

        def known(name: Any) -> Any:
            key = type(name), name
            if key not in met and isinstance(name, Line):
                met[key] = _Dict(name)
                met[key].known = known
            elif key not in met:
                met[key] = waiter_class(name.ticket, name.wants)
                met[key]._gate.ticket = name.ticket
            return met[key]

        def make(ticket: int, wants: Any = None) -> Steps:
            yield from _step("waiter", ticket, wants)
            return known(Ref(ticket, wants))

        def refused(slot: int, generation: int) -> Steps:
            yield from _step("refused", slot, generation)

        self.namespace["Waiter"] = make
        turnstile = self.namespace["Turnstile"](
            strategy, lambda waiter: None, refused, True
        )  # fmt: skip
        for shared in vars(turnstile).values():
            if isinstance(shared, _Dict):
                shared.known = known
        turnstile.Closed = self.closed_error
        return turnstile


# -- where a thread stands -----------------------------------------------------------------------


def frames(steps: Any) -> list[Any]:
    """Return the frames of a suspended generator and of those it waits for."""
    found = []
    while isinstance(steps, types.GeneratorType):
        found.append(steps.gi_frame)
        steps = steps.gi_yieldfrom
    return found


def placed(frame: Any) -> Any:
    """Return where a frame stands: its instruction and its variables."""
    words = tuple((name, _hashed(value)) for name, value in sorted(frame.f_locals.items()))
    return frame.f_code, frame.f_lasti, words


def _hashed(value: Any) -> Any:
    if value is None or isinstance(value, (int, float, str, Label, BaseException)):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(_hashed, value))
    if isinstance(value, dict):
        return tuple((key, _hashed(each)) for key, each in value.items())
    if hasattr(value, "wants"):
        return "waiter", value.ticket, value.wants
    if isinstance(value, (_Dict, _DictIterator)):
        return type(value).__name__, value.name
    kind = type(value).__name__
    if kind == "SimpleNamespace":
        return kind
    if kind in ("generator", "function", "method", "builtin_function_or_method", "type"):
        return value.__qualname__
    assert kind in ("Turnstile", "_Gate", "count"), f"{value!r} is not known"
    return kind
