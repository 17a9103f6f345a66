"""Programs: made in one worker, executed in any, kept with their session."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import minipool
from minipool import (
    CallMismatch,
    CallTimeout,
    ConfigError,
    Field,
    Pool,
    ProgramExists,
    ProgramMismatch,
    ProgramNotFound,
    Programs,
    SessionNotFound,
    Signature,
    WorkerDied,
)
from minipool.signatures import FIELD_TYPES, misfit_of
from scripts import environment, run
from workers import kill_self

EXAMPLE = Path(__file__).parent.parent / "examples" / "programs.py"


class Scale:
    """A program with a method `execute`."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.worker = minipool.current_worker()

    def execute(self, value: float) -> dict[str, Any]:
        return {"value": value * self.factor, "pid": os.getpid()}

    def __call__(self, **inputs: Any) -> None:
        raise AssertionError("execute() comes first")


class Tally:
    """A program that is called, and keeps a count where it outlives its worker."""

    def __call__(self, step: int = 1, fail: bool = False) -> int:
        session = minipool.current_session()
        session["tally"] = session.get("tally", 0) + step
        if fail:
            raise LookupError("not this time")
        return int(session["tally"])


class Returns:
    def __init__(self, result: Any) -> None:
        self.result = result

    def execute(self) -> Any:
        minipool.current_session()["ran"] = True
        return self.result


class Dies:
    def execute(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class WaitsForEver:
    def execute(self) -> None:
        threading.Event().wait()


class MadeOnce:
    """Can be made as often as the file says; then its factory raises."""

    def __init__(self, path: str) -> None:
        left = int(Path(path).read_text())
        if not left:
            raise OSError("no more")
        Path(path).write_text(str(left - 1))

    def execute(self) -> str:
        return "made"


def raises(*args: Any) -> None:
    raise ZeroDivisionError("in the factory")


def makes_no_program() -> int:
    return 7


@pytest.fixture
def pool() -> Any:
    with Pool(size=2) as opened:
        yield opened


@pytest.fixture
def programs(pool: Pool[None]) -> Programs:
    return Programs(pool)


def kill_worker_of(pool: Pool[Any], session: str) -> int:
    """Kill the worker that has the session, and wait for its end."""
    with pool.checkout(session=session) as w, pytest.raises(WorkerDied) as caught:
        w.call(kill_self)
    assert caught.value.pid is not None
    return int(caught.value.pid)


# -- making and executing ------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [Scale, "test_programs:Scale"])
def test_program_executes_where_it_was_made(programs: Programs, factory: Any) -> None:
    """With a factory or the name of one; it stays warm, so nothing is made again."""
    programs.create("double", factory, 2)
    pids = set()
    for value in range(5):
        result = programs.execute("double", {"value": value})
        assert result["value"] == value * 2
        pids.add(result["pid"])
    assert len(pids) == 1
    assert programs.info("double").rebuilds == 0


def test_program_executes_in_another_worker_than_made_it(
    pool: Pool[None], programs: Programs
) -> None:
    """The worker that made it is busy: the session moves, and the other makes it again."""
    programs.create("double", Scale, 2)
    first = programs.execute("double", {"value": 1})["pid"]
    busy = pool.checkout(session="other")
    if busy.pid != first:
        wanted, busy2 = busy, pool.checkout()
        wanted.release()
        busy = busy2
    assert busy.pid == first
    with busy:
        result = programs.execute("double", {"value": 4})
        assert result["value"] == 8
        assert result["pid"] != first
        assert programs.execute("double", {"value": 5})["pid"] == result["pid"]
    assert programs.info("double").rebuilds == 1


def test_program_survives_the_death_of_its_worker(pool: Pool[None], programs: Programs) -> None:
    """Each death costs one rebuild, which is counted, and no recipe."""
    programs.create("double", Scale, 2)
    for deaths in range(1, 4):
        killed = kill_worker_of(pool, programs.session)
        result = programs.execute("double", {"value": deaths})
        assert result["value"] == deaths * 2
        assert result["pid"] != killed
        assert programs.info("double").rebuilds == deaths


def test_what_a_program_keeps_in_its_session_survives(pool: Pool[None], programs: Programs) -> None:
    """What a failed execution did to it does not count."""
    programs.create("tally", Tally)
    assert programs.execute("tally") == 1
    with pytest.raises(LookupError, match="not this time"):
        programs.execute("tally", {"step": 50, "fail": True})
    kill_worker_of(pool, programs.session)
    assert programs.execute("tally", {"step": 2}) == 3


def test_failing_program_is_not_made_again_each_time(pool: Pool[None], programs: Programs) -> None:
    """After a death the rebuild counts once, though the execution that needed it raised."""
    programs.create("tally", Tally)
    kill_worker_of(pool, programs.session)
    for _ in range(3):
        with pytest.raises(LookupError):
            programs.execute("tally", {"fail": True})
    assert programs.info("tally").rebuilds == 1


def test_program_that_kills_its_worker_harms_no_other(pool: Pool[None], programs: Programs) -> None:
    programs.create("dies", Dies)
    programs.create("double", Scale, 2)
    with pytest.raises(WorkerDied) as caught:
        programs.execute("dies")
    assert caught.value.started
    assert programs.execute("double", {"value": 3})["value"] == 6


def test_execution_that_takes_too_long_is_ended(programs: Programs) -> None:
    programs.create("waits", WaitsForEver)
    with pytest.raises(CallTimeout):
        programs.execute("waits", timeout=0.3)
    assert programs.list() == ["waits"]
    programs.create("double", Scale, 2, timeout=20)
    assert programs.execute("double", {"value": 3}, timeout=20)["value"] == 6
    assert programs.execute("double", {"value": 3}, timeout=None)["value"] == 6
    with pytest.raises(ValueError, match="timeout=-1"):
        programs.execute("double", {"value": 3}, timeout=-1)


def test_error_of_a_rebuild_arrives_as_itself(pool: Pool[None], tmp_path: Path) -> None:
    """The program is still there, and works as soon as its factory does."""
    path = tmp_path / "left"
    path.write_text("1")
    programs = Programs(pool)
    programs.create("once", MadeOnce, str(path))
    assert programs.execute("once") == "made"
    kill_worker_of(pool, programs.session)
    for _ in range(2):
        with pytest.raises(OSError, match="no more"):
            programs.execute("once")
    path.write_text("1")
    assert programs.execute("once") == "made"
    assert programs.info("once").rebuilds == 1


def test_programs_execute_under_every_start_method(start_method: str) -> None:
    with Pool(size=1, start_method=start_method) as pool:
        programs = Programs(pool)
        programs.create("double", Scale, 2)
        kill_worker_of(pool, programs.session)
        assert programs.execute("double", {"value": 2})["value"] == 4


def test_programs_work_with_a_codec_that_takes_no_bytes() -> None:
    with Pool(size=1, codec=json) as pool:
        programs = Programs(pool)
        programs.create("double", Scale, 2)
        assert programs.execute("double", {"value": 2})["value"] == 4
        kill_worker_of(pool, programs.session)
        assert programs.execute("double", {"value": 3})["value"] == 6


def test_programs_work_in_a_pool_with_workers_of_its_own() -> None:
    with Pool(Returns, args=("mine",), size=1) as pool:
        programs = Programs(pool)
        programs.create("double", Scale, 2)
        assert programs.execute("double", {"value": 2})["value"] == 4
        assert pool.call(Returns.__init__, "other") is None


# -- creating ------------------------------------------------------------------------------------


def test_error_of_the_factory_arrives_as_itself_and_creates_nothing(programs: Programs) -> None:
    with pytest.raises(ZeroDivisionError, match="in the factory"):
        programs.create("bad", raises)
    assert programs.list() == []
    programs.create("bad", Scale, 3)
    assert programs.execute("bad", {"value": 1})["value"] == 3


@pytest.mark.parametrize(
    "factory, args, match",
    [
        (makes_no_program, (), "made a int, which can neither be called nor has a method"),
        (lambda: None, (), "recipe of program 'bad' cannot be kept"),
        (Scale, (threading.Lock(),), "recipe of program 'bad' cannot be kept"),
        (7, (), "give a class, a function, or the name of one"),
        ("test_programs.Scale", (), "name it as 'package.module:Class'"),
    ],
    ids=["no_program", "lambda", "lock", "number", "name"],
)
def test_recipe_that_makes_no_program_is_refused(
    programs: Programs, factory: Any, args: tuple[Any, ...], match: str
) -> None:
    with pytest.raises(CallMismatch, match=match):
        programs.create("bad", factory, *args)
    assert programs.list() == []


def test_name_that_leads_nowhere_is_an_error_of_the_factory(programs: Programs) -> None:
    with pytest.raises(ModuleNotFoundError):
        programs.create("bad", "no_such_module:Thing")
    with pytest.raises(AttributeError):
        programs.create("bad", "test_programs:NoSuchThing")
    with pytest.raises(AttributeError, match="did you mean 'Scale'"):
        programs.create("bad", "test_programs:Scal")
    assert programs.list() == []


def test_second_program_of_an_id_is_refused_and_the_first_stays(programs: Programs) -> None:
    programs.create("double", Scale, 2)
    with pytest.raises(ProgramExists, match="delete it first") as caught:
        programs.create("double", Scale, 200)
    assert (caught.value.program_id, caught.value.session_id) == ("double", programs.session)
    assert programs.execute("double", {"value": 1})["value"] == 2


def test_of_threads_racing_to_create_one_wins(programs: Programs) -> None:
    """All others hear that it exists; what is executed is the winner's."""
    won: list[int] = []
    lost: list[ProgramExists] = []
    start = threading.Barrier(6)

    def create(factor: int) -> None:
        start.wait()
        try:
            programs.create("one", Scale, factor, timeout=20)
            won.append(factor)
        except ProgramExists as error:
            lost.append(error)

    threads = [threading.Thread(target=create, args=(factor,)) for factor in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(won), len(lost)) == (1, 5)
    assert programs.execute("one", {"value": 10})["value"] == 10 * won[0]


@pytest.mark.parametrize("program_id", ["", None, 3])
def test_id_must_be_a_text(programs: Programs, program_id: Any) -> None:
    with pytest.raises(TypeError, match="a program's id is a text"):
        programs.create(program_id, Scale, 2)


# -- finding and deleting ------------------------------------------------------------------------


def test_unknown_program_is_told_from_all_else(programs: Programs) -> None:
    with pytest.raises(ProgramNotFound, match="has no program 'nope'") as caught:
        programs.execute("nope")
    assert caught.value.program_id == "nope"
    with pytest.raises(ProgramNotFound):
        programs.info("nope")
    assert programs.list() == []


def test_deleted_program_is_gone_and_deleting_twice_is_no_error(programs: Programs) -> None:
    programs.create("double", Scale, 2)
    assert programs.delete("double") is True
    assert programs.delete("double") is False
    with pytest.raises(ProgramNotFound):
        programs.execute("double", {"value": 1})


def test_program_with_the_id_of_a_deleted_one_is_the_new_one(
    pool: Pool[None], programs: Programs
) -> None:
    """Also in workers that still have the old one in memory."""
    programs.create("scale", Scale, 2)
    programs.execute("scale", {"value": 1})
    with pool.checkout(session=programs.session) as w:  # as another process would: nobody is told
        del w.state["program:scale"], w.state["program-recipe:scale"]
    programs.create("scale", Scale, 5)
    assert programs.execute("scale", {"value": 1})["value"] == 5
    programs.delete("scale")
    programs.create("scale", Scale, 7)
    assert programs.execute("scale", {"value": 1})["value"] == 7


def test_sessions_keep_their_programs_apart(pool: Pool[None], programs: Programs) -> None:
    """Each has its own ids; with the session its programs end."""
    for factor, session in enumerate(["a", "b"], start=2):
        programs.create("scale", Scale, factor, session=session)
    assert programs.execute("scale", {"value": 1}, session="a")["value"] == 2
    assert programs.execute("scale", {"value": 1}, session="b")["value"] == 3
    assert programs.list() == []
    assert programs.list("a") == ["scale"]
    pool.end_session("a")
    assert programs.list("a") == []
    with pytest.raises(ProgramNotFound):
        programs.execute("scale", {"value": 1}, session="a")


def test_asking_begins_no_session(pool: Pool[None], programs: Programs) -> None:
    assert programs.list("x") == []
    assert programs.delete("p", session="x") is False
    with pytest.raises(ProgramNotFound):
        programs.info("p", session="x")
    assert pool.sessions() == []


def test_info_tells_what_was_created(programs: Programs) -> None:
    signature = Signature([Field("value", "number")], [Field("value", "number"), Field("pid")])
    programs.create("b", Scale, 2, signature=signature)
    programs.create("a", "test_programs:Scale", 2, session="s")
    info = programs.info("b")
    assert (info.program_id, info.session_id) == ("b", programs.session)
    assert (info.factory, info.signature, info.rebuilds) == ("test_programs:Scale", signature, 0)
    assert info.recipe_bytes > 20 and info.created > 1_700_000_000
    assert programs.info("a", session="s").factory == "test_programs:Scale"
    assert programs.info("a", session="s").signature is None


def test_strict_pool_keeps_programs_in_their_own_session_only() -> None:
    with Pool(size=1, strict_sessions=True) as pool:
        programs = Programs(pool)
        with pytest.raises(ProgramNotFound):
            programs.execute("double", {"value": 1})
        programs.create("double", Scale, 2)
        assert programs.execute("double", {"value": 1})["value"] == 2
        with pytest.raises(SessionNotFound):
            programs.create("double", Scale, 2, session="unknown")


# -- signatures ----------------------------------------------------------------------------------

FITTING = {
    "string": ["", "text"],
    "integer": [0, -5, 1 << 70],
    "number": [0, 1.5, float("inf")],
    "boolean": [True, False],
    "list": [[], [1, "a"], (1, 2)],
    "object": [{}, {"a": 1}],
    "any": [None, 1, "a", [], {}, True],
}
UNFIT = {
    "string": [1, None, b"bytes", ["a"]],
    "integer": [1.0, True, "1", None],
    "number": ["1", True, None, 1j],
    "boolean": [0, 1, None, "True"],
    "list": ["abc", {}, {1}, None],
    "object": [[], "a", None, [("a", 1)]],
    "any": [],
}


def test_types_take_what_they_say() -> None:
    assert set(FITTING) == set(UNFIT) == set(FIELD_TYPES)
    for kind in FITTING:
        fields = (Field("x", kind),)
        assert [v for v in FITTING[kind] if misfit_of(fields, {"x": v})] == []
        assert [v for v in UNFIT[kind] if not misfit_of(fields, {"x": v})] == []


def test_everything_wrong_is_reported_at_once_and_nothing_sent(
    pool: Pool[None], programs: Programs
) -> None:
    signature = Signature(
        [Field("question", "string"), Field("k", "integer"), Field("note", "string", False)]
    )
    programs.create("qa", Returns, {}, signature=signature)
    before = sum(worker.calls for worker in pool.workers())
    with pytest.raises(CallMismatch) as caught:
        programs.execute("qa", {"k": "three", "note": 4, "colour": "red", "size": 1})
    error = caught.value
    assert error.missing == ["question"]
    assert error.unknown == ["colour", "size"]
    assert error.wrong == {"k": "str, not integer", "note": "int, not string"}
    for part in ("'question'", "'colour', 'size'", "str, not integer", "nothing was sent"):
        assert part in str(error)
    assert sum(worker.calls for worker in pool.workers()) == before
    assert "ran" not in pool.session_state(programs.session)


def test_optional_input_may_be_left_out_or_none(programs: Programs) -> None:
    signature = Signature(
        [Field("step", "integer", required=False), Field("fail", "boolean", False)]
    )
    programs.create("tally", Tally, signature=signature)
    assert programs.execute("tally") == 1
    assert programs.execute("tally", {"fail": None}) == 2


def test_inputs_must_be_a_mapping_of_names(programs: Programs) -> None:
    programs.create("tally", Tally)
    with pytest.raises(CallMismatch, match="not a list"):
        programs.execute("tally", [("step", 1)])  # type: ignore[arg-type]
    with pytest.raises(CallMismatch, match="unknown") as caught:
        programs.execute("tally", {1: 1})  # type: ignore[dict-item]
    assert caught.value.unknown == ["1"]


@pytest.mark.parametrize(
    "result, missing, unknown, wrong",
    [
        ({"score": "high", "extra": 1}, ["answer"], ["extra"], {"score": "str, not number"}),
        ({}, ["answer"], [], {}),
        ("an answer", ["answer"], [], {}),
        (None, ["answer"], [], {}),
    ],
)
def test_outputs_that_do_not_fit_are_an_error_and_commit_nothing(
    pool: Pool[None], programs: Programs, result: Any, missing: Any, unknown: Any, wrong: Any
) -> None:
    outputs = [Field("answer", "string"), Field("score", "number", required=False)]
    programs.create("qa", Returns, result, signature=Signature(outputs=outputs))
    with pytest.raises(ProgramMismatch, match="answer: string, score: number") as caught:
        programs.execute("qa")
    error = caught.value
    assert (error.missing, error.unknown, error.wrong) == (missing, unknown, wrong)
    assert (error.program_id, error.session_id) == ("qa", programs.session)
    assert "ran" not in pool.session_state(programs.session)


def test_outputs_that_fit_come_back(programs: Programs) -> None:
    outputs = [Field("answer", "string"), Field("score", "number", required=False)]
    programs.create("qa", Returns, {"answer": "42"}, signature=Signature(outputs=outputs))
    assert programs.execute("qa") == {"answer": "42"}


@pytest.mark.parametrize(
    "fields, match",
    [
        ([Field("a", "text")], "is the type of 'a'; give one of string, integer"),
        ([Field("a"), Field("a")], "is there twice"),
        ([Field("")], "is no name"),
        (["a"], "is no Field"),
    ],
)
def test_wrong_signature_is_refused_when_it_is_written(fields: Any, match: str) -> None:
    for which in ("inputs", "outputs"):
        with pytest.raises(ConfigError, match=f"{which}: .*{match}"):
            Signature(**{which: fields})


# -- store and example ---------------------------------------------------------------------------


def test_programs_in_a_store_outlive_the_application(tmp_path: Path) -> None:
    """A process creates a program and is killed; the next one executes it."""
    store = str(tmp_path / "sessions.sqlite")
    code, out, err = run(
        tmp_path,
        """
        import os, signal, sys
        from minipool import Field, Pool, Programs, Signature
        from test_programs import Scale

        if __name__ == "__main__":
            pool = Pool(size=1, session_store=sys.argv[1]).open()
            programs = Programs(pool)
            programs.create("double", Scale, 2, signature=Signature([Field("value", "number")]))
            print(programs.execute("double", {"value": 4})["value"], flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """,
        store,
    )
    assert (code, out) == (-signal.SIGKILL, "8\n"), err
    with Pool(size=1, session_store=store) as pool:
        programs = Programs(pool)
        assert programs.list() == ["double"]
        assert programs.execute("double", {"value": 5})["value"] == 10
        with pytest.raises(CallMismatch):
            programs.execute("double", {"value": "5"})
        assert programs.info("double").rebuilds == 1


def test_workers_that_die_all_the_time_lose_no_program(pool: Pool[None]) -> None:
    """Every execution succeeds, or says that its worker died; none finds its program gone."""
    programs = Programs(pool)
    programs.create("double", Scale, 2)
    done = 0
    for value in range(30):
        if value % 3 == 0:
            kill_worker_of(pool, programs.session)
        assert programs.execute("double", {"value": value}, timeout=20)["value"] == value * 2
        done += 1
    assert done == 30
    assert programs.info("double").rebuilds == 10


def test_example_runs_with_nothing_installed(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(EXAMPLE)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=40,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "missing 'text'" in done.stdout and "unknown 'txt'" in done.stdout, done.stdout
    assert lines[-1].startswith("rebuilds: 1"), done.stdout
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []
