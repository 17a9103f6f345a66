"""Control groups: the smallest limit on the path counts, wherever the process sits below it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Iterator

import pytest

from minipool import cgroup, recommended_size
from minipool.config import usable_cpus, usable_memory
from minipool.observe import optimizer

GB = 1 << 30


class Machine:
    """What a process is told of its control groups: folders and files of the test's own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.proc = folder / "proc"
        self.proc.mkdir()
        self.tell([], [])
        monkeypatch.setattr(cgroup, "_PROC", str(self.proc))
        monkeypatch.setattr(cgroup, "_USUAL_PLACE", str(folder / "usual"))

    def tell(self, groups: list[str], mounts: list[str]) -> None:
        (self.proc / "cgroup").write_text("".join(f"{line}\n" for line in groups))
        (self.proc / "mountinfo").write_text("".join(f"{line}\n" for line in mounts))

    def limit(self, path: str, **files: str) -> None:
        place = self.folder / path
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (place / name.replace("_of_", ".")).write_text(text)

    def mount_2(self, name: str, root: str = "/") -> str:
        place = str(self.folder / name).replace(" ", "\\040")
        return f"30 20 0:20 {root} {place} rw shared:1 - cgroup2 cgroup2 rw"

    def mount_1(self, name: str, controllers: str, root: str = "/") -> str:
        return f"31 20 0:21 {root} {self.folder / name} rw - cgroup cgroup rw,{controllers}"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"": "max 100000", "a": "100000 100000", "a/b": "max 100000", "a/b/c": ""}, 1.0),
        ({"a": "400000 100000", "a/b": "150000 100000", "a/b/c": "300000 100000"}, 1.5),
        ({"": "50000 100000", "a/b/c": "max 100000"}, 0.5),
        ({"a/b/c": "garbage", "a/b": "max 100000", "beside": "1 100000"}, None),
        ({"a/b/c": "-1 100000", "a/b": "1 0"}, None),
        ({}, None),
    ],
)
def test_smallest_quota_on_the_path_counts(
    quotas: dict[str, str], expected: float | None, machine: Machine
) -> None:
    machine.tell(["0::/a/b/c"], [machine.mount_2("unified")])
    for path, text in quotas.items():
        machine.limit(f"unified/{path}", cpu_of_max=text)
    assert cgroup.cpus() == expected


def test_quotas_of_version_1_count_on_the_whole_path(machine: Machine) -> None:
    """Its hierarchies may be joined and each have a path of its own."""
    machine.tell(
        ["4:memory:/m", "3:cpu,cpuacct:/a/b", "1:name=systemd:/elsewhere"],
        [machine.mount_1("cpu,cpuacct", "cpu,cpuacct"), machine.mount_1("memory", "memory")],
    )
    machine.limit("cpu,cpuacct/a/b", cpu_of_cfs_quota_us="-1", cpu_of_cfs_period_us="100000")
    machine.limit("cpu,cpuacct/a", cpu_of_cfs_quota_us="250000", cpu_of_cfs_period_us="100000")
    machine.limit("memory/m", memory_of_limit_in_bytes="9223372036854771712")
    machine.limit("memory", memory_of_limit_in_bytes=str(3 * GB))
    assert cgroup.cpus() == 2.5
    assert cgroup.memory() == 3 * GB


def test_both_versions_side_by_side(machine: Machine) -> None:
    machine.tell(
        ["3:cpu:/x", "0::/y"], [machine.mount_1("cpu", "cpu"), machine.mount_2("unified dir")]
    )
    machine.limit("cpu/x", cpu_of_cfs_quota_us="300000", cpu_of_cfs_period_us="100000")
    machine.limit("unified dir/y", cpu_of_max="200000 100000", memory_of_max=str(GB))
    assert cgroup.cpus() == 2.0
    assert cgroup.memory() == GB


@pytest.mark.parametrize(
    ("group", "root"),
    [
        ("/", "/"),  # a namespace of its own
        ("/docker/abc", "/docker/abc"),  # none, and the group itself is mounted
        ("/../other", "/"),  # outside of the namespace
        ("/elsewhere", "/docker/abc"),
    ],
)
def test_container_s_group_is_found_where_it_is_mounted(
    group: str, root: str, machine: Machine
) -> None:
    machine.tell([f"0::{group}"], [machine.mount_2("unified", root)])
    machine.limit("unified", cpu_of_max="100000 100000", memory_of_max=str(GB))
    assert (cgroup.cpus(), cgroup.memory()) == (1.0, GB)


def test_group_below_the_mounted_one_is_looked_for_from_there(machine: Machine) -> None:
    machine.tell(["0::/docker/abc/mine"], [machine.mount_2("unified", "/docker/abc")])
    machine.limit("unified/mine", cpu_of_max="200000 100000", memory_of_max="max")
    machine.limit("unified", cpu_of_max="400000 100000", memory_of_max=str(GB))
    assert (cgroup.cpus(), cgroup.memory()) == (2.0, GB)


def test_usual_place_is_looked_at_where_nothing_is_told_of_mounts(machine: Machine) -> None:
    machine.limit("usual", cpu_of_max="300000 100000")
    assert cgroup.cpus() == 3.0
    machine.limit("usual/memory", memory_of_limit_in_bytes=str(GB))
    assert cgroup.memory() == GB


def test_limits_of_processes_are_told_of_each_group(machine: Machine) -> None:
    machine.tell(["0::/a/b"], [machine.mount_2("unified")])
    machine.limit("unified/a/b", pids_of_max="max", pids_of_current="5")
    machine.limit("unified/a", pids_of_max="50", pids_of_current="49")
    assert cgroup.pids() == [(49, 50)]


def test_recommended_size_goes_by_what_the_groups_allow(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    machine.tell(["0::/a/b"], [machine.mount_2("unified")])
    assert recommended_size("mixed") == 16
    machine.limit("unified/a", cpu_of_max="100000 100000", memory_of_max=str(GB // 1024))
    assert usable_cpus() == 1
    assert usable_memory() == GB // 1024
    assert recommended_size("mixed") == 2
    assert recommended_size("mixed", GB // 1536) == 1
    assert recommended_size("io", GB // 10240) == 3
    assert recommended_size("io", GB) == 1, "one at least"


@pytest.mark.parametrize("wrong", [0, -5, True])
def test_worker_bytes_that_are_none_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match="worker_bytes"):
        optimizer.recommended_size("cpu", wrong)


# -- real ones -----------------------------------------------------------------------------------


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A group of half a CPU, and one below it that says nothing of its own."""
    for place, quota in (
        (Path("/sys/fs/cgroup/cpu"), ("cpu.cfs_quota_us", "50000")),
        (Path("/sys/fs/cgroup"), ("cpu.max", "50000 100000")),
    ):
        outer = place / f"minipool-test-{os.getpid()}"
        try:
            outer.mkdir()
        except OSError:
            continue
        inner = outer / "inner"
        try:
            (outer / quota[0]).write_text(quota[1])
            inner.mkdir()
            yield inner
            return
        except OSError:
            continue
        finally:
            for group in (inner, outer):
                if group.exists():
                    group.rmdir()
    pytest.skip("no control group can be made here")


def test_process_below_a_limited_group_has_what_that_has(limited_group: Path) -> None:
    program = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()));"
        "import minipool; from minipool.config import usable_cpus;"
        "print(usable_cpus(), minipool.recommended_size('io'))"
    )
    command = [sys.executable, "-c", program, str(limited_group / "cgroup.procs")]
    assert subprocess.check_output(command, text=True).split() == ["1", "3"]
