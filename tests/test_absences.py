"""What a worker does not have that its parent has: told as such, with what helps."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest

import scripts
from minipool import CallMismatch, Pool, RemoteError

GUARDED = """
import sys
from minipool import Pool
if __name__ == "__main__":
    def work(x):
        return x
    class Model:
        def f(self):
            return 1
    method = sys.argv[1]
    try:
        if sys.argv[2] == "function":
            Pool(size=1, start_method=method).call(work, 1)
        else:
            Pool(Model, size=1, start_method=method).open()
    except Exception as error:
        print(type(error).__name__, error, repr(error.__cause__))
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize(("what", "kind"), [("function", "CallMismatch"), ("class", "PoolStart")])
def test_what_is_defined_under_the_guard_is_told_so(
    what: str, kind: str, method: str, tmp_path: Path
) -> None:
    code, out, err = scripts.run(tmp_path, GUARDED, method, what)
    assert code == 0, err
    assert out.startswith(kind), out
    assert f"'{'work' if what == 'function' else 'Model'}' in `__main__`: define it above" in out
    assert "correct that name" not in out and "__mp_main__" not in out
    assert "Traceback" not in out, "nothing of the user's is in it"


LATE = """
import sys
from minipool import Pool
if __name__ == "__main__":
    with Pool(size=1, start_method=sys.argv[1]) as pool:
        pool.call(abs, -1)
        {make}
        try:
            print(pool.call(late))
        except TypeError as error:
            print(type(error).__name__, error)
        with pool.checkout() as worker:
            print(worker.call(abs, -4))
"""


def test_function_defined_after_the_fork_is_told_so(tmp_path: Path) -> None:
    script = LATE.format(make="def late(): return 5")
    code, out, err = scripts.run(tmp_path, script, "fork")
    assert code == 0, err
    assert "CallMismatch the worker has no function 'late' in `__main__`: it was forked" in out
    assert "`pool.drain()`" in out and out.endswith("4\n")


@pytest.mark.parametrize("stays", [True, False], ids=["added", "left-behind"])
def test_module_that_came_onto_the_path_later_is_told_so(stays: bool, tmp_path: Path) -> None:
    folder = tmp_path / "plugins"
    folder.mkdir()
    (folder / "plugin_late.py").write_text("def late(): return 5\n")
    make = f"sys.path.insert(0, {str(folder)!r}); from plugin_late import late"
    script = LATE.format(make=make if stays else f"{make}; sys.path.pop(0)")
    code, out, err = scripts.run(tmp_path, script, "forkserver")
    assert code == 0, err
    assert "CallMismatch the worker has no function 'late': No module named 'plugin_late'" in out
    assert ("`pool.drain()`" in out) == stays, out
    assert (f"has imported it from {str(folder)!r}" in out) != stays, out
    assert out.endswith("4\n")


def importer() -> None:
    import there_is_no_such_module_at_all  # noqa: F401


class Model:
    name = "m"

    def __init__(self) -> None:
        self.n = 1

    @property
    def prop(self) -> int:
        return 5

    def raises_not_callable(self) -> object:
        return self.n()  # type: ignore[operator]

    def raises_needy(self) -> None:
        raise Needy("a", "t")

    def raises_local(self) -> None:
        class Local(Exception):
            pass

        raise Local

    async def later(self) -> int:
        return 1


class Needy(Exception):
    def __init__(self, key: str, table: str) -> None:
        super().__init__(f"no {key} in {table}")


@pytest.fixture
def pool() -> Iterator[Pool[Model]]:
    with Pool(Model, size=1) as pool:
        yield pool


def test_error_of_the_function_itself_stays_what_it_is(pool: Pool[Model]) -> None:
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module_at_all"):
        pool.call(importer)


@pytest.mark.parametrize("name", ["n", "name", "prop"])
@pytest.mark.parametrize("args", [(), (1,), (1, 2)])
def test_attribute_is_no_method(pool: Pool[Model], name: str, args: tuple[int, ...]) -> None:
    with pytest.raises(CallMismatch, match=rf"^Model\.{name} is not a method, but .*'(int|str)'"):
        pool.call(name, *args)


def test_method_that_calls_what_cannot_be_called_raises_that(pool: Pool[Model]) -> None:
    with pytest.raises(TypeError, match="'int' object is not callable") as caught:
        pool.call("raises_not_callable")
    assert not isinstance(caught.value, CallMismatch)


def test_exception_that_cannot_be_made_again_is_told_with_the_remedy(pool: Pool[Model]) -> None:
    with pytest.raises(RemoteError) as caught:
        pool.call("raises_needy")
    text = str(caught.value)
    assert "cannot be made again from its pickle (TypeError: " in text and "'table'" in text
    assert "`super().__init__()`" in text and "`__reduce__`" in text
    assert "cannot be pickled" not in text and "it said: 'no a in t'" in text


def test_exception_that_cannot_be_pickled_is_told_with_the_reason(pool: Pool[Model]) -> None:
    with pytest.raises(RemoteError, match=r"cannot be pickled \(.*<locals>.*top of a module"):
        pool.call("raises_local")


def test_coroutine_function_is_told_so_without_a_warning(
    tmp_path: Path,
) -> None:
    script = """
import sys
from minipool import Pool
class Model:
    async def later(self):
        return 1
class Own(Exception):
    def __init__(self, a, b):
        super().__init__("x")
def fail():
    raise Own(1, 2)
if __name__ == "__main__":
    with Pool(Model, size=1) as pool:
        for target in ("later", fail):
            try:
                pool.call(target)
            except Exception as error:
                print(type(error).__name__, error)
"""
    code, out, err = scripts.run(tmp_path, script)
    assert code == 0, err
    first, second = out.splitlines()
    assert first.startswith("RemoteError the call returned a coroutine, of which nothing has run")
    assert second.startswith("RemoteError __main__.Own raised in the worker cannot be made again")
    assert "never awaited" not in err
