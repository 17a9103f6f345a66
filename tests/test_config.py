"""PoolConfig: defaults as documented, and everything wrong refused before anything starts."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from typing import Any

import pytest

from minipool import ConfigError, Pool, PoolConfig, cgroup
from minipool.config import MAX_WORKERS, usable_cpus
from workers import Counter

NAN, INF = float("nan"), float("inf")
NO_COUNT = [-1, 1.5, NAN, "4", True, [1]]
NO_SECONDS = [-1, -0.001, NAN, INF, -INF, "1", True, [1.0]]

WRONG: dict[str, list[Any]] = {
    "size": [0, MAX_WORKERS + 1, *NO_COUNT],
    "min_size": NO_COUNT,
    "max_size": [0, MAX_WORKERS + 1, *NO_COUNT],
    "max_overflow": [None, *NO_COUNT],
    "overflow_idle": [None, *NO_SECONDS],
    "max_idle": NO_SECONDS,
    "autoscale": [None, 0, 1, "yes", True],
    "optimization_interval": [None, 0, *NO_SECONDS],
    "lazy": [None, 0, 1, "yes"],
    "strategy": [None, "LIFO", "random", 1, []],
    "init_timeout": NO_SECONDS,
    "checkout_timeout": NO_SECONDS,
    "call_timeout": NO_SECONDS,
    "max_waiting": NO_COUNT,
    "spares": [None, *NO_COUNT],
    "max_calls": [0, *NO_COUNT],
    "max_lifetime": [0, *NO_SECONDS],
    "max_rss": [0, *NO_COUNT],
    "kill_rss": [0, *NO_COUNT],
    "memory_limit": [0, *NO_COUNT],
    "cpu_limit": [0, *NO_SECONDS],
    "open_files": [0, 15, *NO_COUNT],
    "health_check_interval": [0, *NO_SECONDS],
    "health_check_timeout": [None, *NO_SECONDS],
    "max_health_failures": [None, 0, *NO_COUNT],
    "retry": [0, -1, 1.5, "3", True, [1], object()],
    "breaker": [0, 1, "yes", [1], object()],
    "warm_up": ["load", None, 5, [5], [("load", 3)], [("load", (), [])], [()], [("f", (), {}, 1)]],
    "start_method": ["thread", "", 1, []],
    "preload": ["json", None, 5, [1], [None]],
    "startup_batch": [None, 0, *NO_COUNT],
    "worker_env": [5, "A=1", [("A", "1")], {"A": 1}, {1: "A"}, {"A=B": "1"}, {"": "1"},
                   {"A": "1\0"}, {"A\0": "1"}],
    "max_message": [None, 0, 65535, *NO_COUNT],
    "niceness": [None, *NO_COUNT],
    "kill_group": [None, 0, 1, "yes"],
    "codec": [5, "json", math],
    "context": ["json:x", None, 5, [1], ["no colon"]],
    "forward_logs": [None, 0, 1, "yes"],
    "capture_output": [None, 0, 1, "yes"],
    "close_timeout": [None, *NO_SECONDS],
    "lease_timeout": [0, *NO_SECONDS],
    "leak_warn_after": [0, *NO_SECONDS],
    "affinity": [None, "sticky", "", 1, []],
    "affinity_wait": [None, *NO_SECONDS],
    "session_ttl": [None, *NO_SECONDS],
    "max_sessions": [None, 0, *NO_COUNT],
    "strict_sessions": [None, 0, 1, "yes"],
    "session_store": [5, [], object()],
    "name": ["", 5, b"pool", "a\0b", "\udc00"],
}  # fmt: skip


def test_defaults_are_as_documented() -> None:
    """A pool without options is fixed at the usable CPUs, with the documented durations."""
    config = PoolConfig(name="p")

    cpus = usable_cpus()
    assert dataclasses.asdict(config) == {
        "size": cpus, "min_size": cpus, "max_size": cpus,
        "max_overflow": 0, "overflow_idle": 30.0, "max_idle": None,
        "autoscale": False, "optimization_interval": 60.0, "lazy": False, "strategy": "lifo",
        "init_timeout": 30.0, "checkout_timeout": 5.0, "call_timeout": 60.0,
        "affinity": "prefer", "affinity_wait": 0.0,
        "session_ttl": 3600.0, "max_sessions": 10_000,
        "strict_sessions": False, "session_store": None,
        "max_waiting": None,
        "spares": 0, "max_calls": None, "max_lifetime": None, "max_rss": None, "kill_rss": None,
        "memory_limit": None, "cpu_limit": None, "open_files": None,
        "health_check_interval": 30.0, "health_check_timeout": 5.0, "max_health_failures": 3,
        "retry": None, "breaker": True,
        "warm_up": (),
        "start_method": None, "preload": (), "startup_batch": 8,
        "worker_env": None, "niceness": 0, "kill_group": True, "max_message": 4 << 30, "codec": None, "context": (),
        "forward_logs": False, "capture_output": False,
        "close_timeout": 30.0, "lease_timeout": None, "leak_warn_after": None,
        "name": "p",
    }  # fmt: skip


def test_every_option_has_wrong_values_to_refuse() -> None:
    """An option added without bad values in the list above fails here."""
    assert set(WRONG) == {field.name for field in dataclasses.fields(PoolConfig)}


@pytest.mark.parametrize("option", WRONG)
def test_wrong_values_are_refused_with_option_value_and_remedy(option: str) -> None:
    """Each wrong value is a ConfigError that carries both and says what to give instead."""
    for value in WRONG[option]:
        with pytest.raises(ConfigError) as caught:
            PoolConfig.from_options({option: value})

        error = caught.value
        assert isinstance(error, ValueError)
        assert error.option == option
        assert error.value is value
        text = str(error)
        assert text.startswith(f"{option}={value!r}: ")
        assert len(text.partition(": ")[2]) > 10, "says what to do"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("size", 1), ("size", MAX_WORKERS), ("min_size", 0),
        ("max_overflow", 0), ("overflow_idle", 0), ("max_idle", None), ("max_idle", 0),
        ("init_timeout", None), ("checkout_timeout", 0), ("checkout_timeout", None),
        ("call_timeout", 1e300), ("max_waiting", 0), ("health_check_interval", None),
        ("health_check_timeout", 0), ("close_timeout", 0), ("lease_timeout", 0.001),
        ("preload", ["json", "decimal"]), ("worker_env", {"OMP_NUM_THREADS": "1"}),
        ("codec", json), ("start_method", "spawn"), ("name", "påls"),
    ],
)  # fmt: skip
def test_border_value_is_taken(option: str, value: Any) -> None:
    """The outermost right values are right."""
    taken = getattr(PoolConfig.from_options({option: value}), option)

    assert taken == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"min_size": 5, "max_size": 4}, "min_size"),
        ({"size": 2, "min_size": 3}, "size"),
        ({"size": 9, "max_size": 8}, "size"),
        ({"size": 2, "max_size": MAX_WORKERS, "max_overflow": 1}, "max_size"),
        ({"size": 2, "max_size": MAX_WORKERS, "spares": 1}, "max_size"),
        ({"max_rss": 1000, "kill_rss": 1000}, "max_rss"),
        ({"preload": ["json"], "start_method": "fork"}, "preload"),
        ({"preload": ["json"], "start_method": "spawn"}, "preload"),
    ],
)
def test_contradiction_is_refused(options: dict[str, Any], option: str) -> None:
    """Options that are right alone and wrong together are refused, naming one and its partner."""
    with pytest.raises(ConfigError) as caught:
        PoolConfig(**options)

    assert caught.value.option == option
    assert caught.value.value == options[option]
    partner = next(other for other in options if other != option)
    assert partner in str(caught.value) or repr(options[partner]) in str(caught.value)


def test_sizes_complete_each_other() -> None:
    """What is not given of size, min_size and max_size follows from the rest."""

    def sizes(**options: Any) -> tuple[Any, Any, Any]:
        config = PoolConfig(**options)
        return config.size, config.min_size, config.max_size

    assert sizes(size=3) == (3, 3, 3)
    assert sizes(size=3, min_size=1) == (3, 1, 3)
    assert sizes(size=3, max_size=9) == (3, 3, 9)
    assert sizes(min_size=700, max_size=900) == (700, 700, 900)
    assert sizes(max_size=1) == (1, 1, 1)
    assert sizes(min_size=0)[0] == usable_cpus()


def test_lazy_pool_starts_with_its_floor() -> None:
    """What open() starts: all, or with lazy what min_size asks for below size."""
    assert PoolConfig(size=4).initial_size == 4
    assert PoolConfig(size=4, lazy=True).initial_size == 0
    assert PoolConfig(size=4, min_size=1, lazy=True).initial_size == 1
    assert PoolConfig(size=4, min_size=1).initial_size == 4


def test_unknown_option_names_the_nearest() -> None:
    """A misspelt option is refused with the likeliest right one."""
    with pytest.raises(ConfigError, match="did you mean 'checkout_timeout'") as caught:
        Pool(checkout_timeuot=3)

    assert (caught.value.option, caught.value.value) == ("checkout_timeuot", 3)


def test_unknown_option_without_likeness_lists_all() -> None:
    """Where nothing is near, every option is named."""
    with pytest.raises(ConfigError) as caught:
        PoolConfig.from_options({"zzz": 1})

    assert all(field.name in str(caught.value) for field in dataclasses.fields(PoolConfig))


def test_config_is_frozen() -> None:
    """A config that was checked cannot be changed into one that was not."""
    config = PoolConfig(size=1)

    with pytest.raises(dataclasses.FrozenInstanceError):
        config.size = -1  # type: ignore[misc]
    with pytest.raises(ConfigError):
        dataclasses.replace(config, size=-1, min_size=None, max_size=None)


def test_config_and_options_together_are_refused() -> None:
    """Which of the two should win is not guessed."""
    with pytest.raises(ConfigError, match="one or the other") as caught:
        Pool(Counter, config=PoolConfig(size=1), size=2)

    assert caught.value.option == "config"


def test_pools_have_names_of_their_own() -> None:
    """Two pools without a name can be told apart."""
    assert PoolConfig().name != PoolConfig().name


@pytest.mark.parametrize("worker", [5, "nonsense", "module:", ":Class", object()])
def test_worker_that_nothing_can_be_made_of_is_refused(worker: Any) -> None:
    """A worker that is no callable, nor the name of one, is refused by the constructor."""
    with pytest.raises(ConfigError) as caught:
        Pool(worker, size=1)

    assert (caught.value.option, caught.value.value) == ("worker", worker)


@pytest.mark.parametrize("options", [{"args": (1,)}, {"kwargs": {"a": 1}}])
def test_arguments_without_a_worker_are_refused(options: dict[str, Any]) -> None:
    """Arguments that nobody would get are a mistake."""
    with pytest.raises(ConfigError, match="without a worker"):
        Pool(None, **options)


@pytest.mark.parametrize(
    ("option", "value"), [("args", "ab"), ("args", 5), ("kwargs", 5), ("kwargs", [("a", 1)])]
)
def test_wrong_kind_of_arguments_is_refused(option: str, value: Any) -> None:
    """args is a tuple and kwargs a dict; a text is not taken for its letters."""
    with pytest.raises(ConfigError) as caught:
        Pool(Counter, **{option: value})

    assert (caught.value.option, caught.value.value) == (option, value)


def test_worker_that_cannot_travel_is_refused() -> None:
    """A local class, a lambda and an unpicklable argument are refused before any start."""

    class Local:
        pass

    with pytest.raises(ConfigError, match="inside a function"):
        Pool(Local, start_method="spawn")
    with pytest.raises(ConfigError, match="lambda"):
        Pool(lambda: 1, start_method="spawn")
    with pytest.raises(ConfigError, match="cannot be sent"):
        Pool(Counter, args=(lambda: 1,), start_method="spawn")


def test_codec_that_cannot_travel_is_refused() -> None:
    """A codec object of a local class would not arrive in the worker."""

    class Codec:
        @staticmethod
        def dumps(value: Any) -> bytes:
            return b""

        @staticmethod
        def loads(data: bytes) -> Any:
            return None

    with pytest.raises(ConfigError, match="cannot be sent") as caught:
        Pool(codec=Codec())

    assert caught.value.option == "codec"


# -- the environment -----------------------------------------------------------------------------


def test_from_env_reads_every_kind_of_option() -> None:
    """Numbers, seconds, booleans, texts, lists and None, each from its text."""
    environ = {
        "MINIPOOL_SIZE": "3", "MINIPOOL_MAX_SIZE": " 7 ", "MINIPOOL_CALL_TIMEOUT": "2.5",
        "MINIPOOL_CHECKOUT_TIMEOUT": "none", "MINIPOOL_LAZY": "Yes", "MINIPOOL_STRATEGY": "fifo",
        "MINIPOOL_PRELOAD": "json, decimal,", "MINIPOOL_NAME": "From Env",
        "MINIPOOL_MAX_WAITING": "None", "MINIPOOL_PORTABLE": "1", "PATH": "/bin",
    }  # fmt: skip

    config = PoolConfig.from_env(environ)

    assert (config.size, config.max_size, config.call_timeout) == (3, 7, 2.5)
    assert config.checkout_timeout is None
    assert config.lazy is True
    assert (config.strategy, config.preload) == ("fifo", ("json", "decimal"))
    assert (config.name, config.max_waiting) == ("From Env", None)


def test_from_env_reads_this_process_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mapping it is os.environ that is read; options given in code win."""
    monkeypatch.setenv("MINIPOOL_SIZE", "3")
    monkeypatch.setenv("MINIPOOL_LAZY", "0")

    assert PoolConfig.from_env().size == 3
    assert PoolConfig.from_env(size=5).size == 5


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("MINIPOOL_SIZE", "many"), ("MINIPOOL_SIZE", "1.5"), ("MINIPOOL_SIZE", ""),
        ("MINIPOOL_LAZY", "maybe"), ("MINIPOOL_LAZY", "none"),
        ("MINIPOOL_CALL_TIMEOUT", "1s"), ("MINIPOOL_OVERFLOW_IDLE", "none"),
        ("MINIPOOL_CODEC", "json"), ("MINIPOOL_WORKER_ENV", "A=1"),
    ],
)  # fmt: skip
def test_text_that_does_not_fit_names_its_variable(variable: str, text: str) -> None:
    """Bad text in the environment is refused under the variable's name."""
    with pytest.raises(ConfigError, match=variable) as caught:
        PoolConfig.from_env({variable: text})

    assert (caught.value.option, caught.value.value) == (variable, text)


@pytest.mark.parametrize(
    ("variable", "text", "remedy"),
    [
        ("MINIPOOL_SIZE", "abc", 'give a whole number or "none", or unset the variable'),
        ("MINIPOOL_SPARES", "1.5", "give a whole number, or unset the variable"),
        ("MINIPOOL_CALL_TIMEOUT", "1s", 'give a number of seconds or "none", or unset'),
        ("MINIPOOL_CLOSE_TIMEOUT", "none", "give a number of seconds, or unset"),
        ("MINIPOOL_LAZY", "maybe", 'give "true" or "false", or unset'),
        ("MINIPOOL_BREAKER", "maybe", 'give "true" or "false" or "none", or unset'),
        ("MINIPOOL_CODEC", "json", "it cannot be given as a text; unset the variable and set it"),
        ("MINIPOOL_WORKER_ENV", "A=1", "it cannot be given as a text"),
    ],
)
def test_text_that_does_not_fit_is_told_in_plain_words(
    variable: str, text: str, remedy: str
) -> None:
    """What to write, not the name of a type in Python."""
    with pytest.raises(ConfigError) as caught:
        PoolConfig.from_env({variable: text})
    assert str(caught.value).startswith(f"{variable}={text!r}: {remedy}")


@pytest.mark.parametrize(
    ("variable", "text", "option"),
    [("MINIPOOL_SIZE", "-1", "size"), ("MINIPOOL_CALL_TIMEOUT", "nan", "call_timeout"),
     ("MINIPOOL_LEASE_TIMEOUT", "0", "lease_timeout"), ("MINIPOOL_STRATEGY", "LIFO", "strategy")],
)  # fmt: skip
def test_value_from_the_environment_is_checked_as_any(
    variable: str, text: str, option: str
) -> None:
    """What parses may still be wrong."""
    with pytest.raises(ConfigError) as caught:
        PoolConfig.from_env({variable: text})

    assert caught.value.option == option


def test_variable_of_no_option_is_refused() -> None:
    """A misspelt variable is not silently without effect."""
    with pytest.raises(ConfigError, match="did you mean 'size'") as caught:
        PoolConfig.from_env({"MINIPOOL_SIEZ": "4"})

    assert caught.value.value == "4"
    assert "siez" in str(caught.value)


# -- CPUs ----------------------------------------------------------------------------------------


def test_usable_cpus_go_by_affinity_and_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither CPUs that this process may not use nor those beyond its container's quota count."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)

    for quota, expected in [(None, 6), (2.0, 2), (2.5, 3), (0.1, 1), (64.0, 6)]:
        monkeypatch.setattr(cgroup, "cpus", lambda quota=quota: quota)
        assert usable_cpus() == expected


def test_usable_cpus_without_affinity_are_the_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where affinity cannot be asked for, all CPUs count; where even that is unknown, one."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(cgroup, "cpus", lambda: None)

    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert usable_cpus() == 12
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("max_workers", "size"), ("processes", "size"), ("timeout", "call_timeout"),
     ("maxtasksperchild", "max_calls")],
)  # fmt: skip
def test_names_of_other_pools_are_understood(theirs: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{ours}'"):
        PoolConfig.from_options({theirs: 1})


def test_config_that_is_none_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"PoolConfig\(\*\*\.\.\.\)") as caught:
        Pool(config={"size": 2})  # type: ignore[call-overload]
    assert caught.value.option == "config"
