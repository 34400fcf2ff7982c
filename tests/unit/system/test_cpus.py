from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from batch_inference.driver import execute, planner
from batch_inference.pipeline import cluster
from batch_inference.preflight import preflight
from batch_inference.system.cpus import available_cpus

MANY = 64


@pytest.fixture(autouse=True)
def large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: MANY)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(MANY)), raising=False)


def container(
    folder: Path, files: dict[str, str], *, group: str, kind: str = "cgroup2", options: str = "rw", root: str = "/"
) -> Path:
    """Write a process's /proc/self and mounted cgroups; return the former. ``files`` are below the mount."""
    mounted = folder / "mounted"
    for name, text in files.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(text)
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(f"4:memory:/elsewhere\n{group}\n")
    (proc / "mountinfo").write_text(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"31 22 0:28 {root} {mounted} ro,nosuid - {kind} cgroup {options}\n"
    )
    return proc


@pytest.mark.parametrize(
    ("files", "group", "cpus"),
    [
        ({"cpu.max": "400000 100000\n"}, "/", 4),
        ({"cpu.max": "max 100000\n"}, "/", MANY),
        ({"cpu.max": "150000 100000\n"}, "/", 2),
        ({"cpu.max": "10000 100000\n"}, "/", 1),
        ({"cpu.max": "9900000 100000\n"}, "/", MANY),
        # The minimum along the path counts; folders without the file have no limit.
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "800000 100000"}, "/a/b/c", 3),
        ({"a/cpu.max": "max 100000", "a/b/c/cpu.max": "500000 100000"}, "/a/b/c", 5),
        ({"a/x/cpu.max": "100000 100000"}, "/a/b", MANY),
        ({"cpu.max": "nonsense"}, "/", MANY),
        ({"cpu.max": "100000 0"}, "/", MANY),
        ({}, "/", MANY),
        ({"cpu.max": "200000 100000"}, "/../outside", 2),
    ],
)
def test_quota_of_version_2_counts(files: dict[str, str], group: str, cpus: int, tmp_path: Path) -> None:
    assert available_cpus(container(tmp_path, files, group=f"0::{group}")) == cpus


@pytest.mark.parametrize(
    ("quota", "period", "cpus"), [("250000", "100000", 3), ("-1", "100000", MANY), ("50000", "50000", 1)]
)
def test_quota_of_version_1_counts(quota: str, period: str, cpus: int, tmp_path: Path) -> None:
    files = {"job/cpu.cfs_quota_us": quota, "job/cpu.cfs_period_us": period, "job/step/cpu.cfs_quota_us": "-1\n"}
    files["job/step/cpu.cfs_period_us"] = "100000\n"
    proc = container(tmp_path, files, group="5:cpu,cpuacct:/job/step", kind="cgroup", options="rw,cpu,cpuacct")
    assert available_cpus(proc) == cpus


def test_quota_of_version_1_counts_in_a_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    """Without a cgroup namespace the path is the host's, and the container's own group is mounted."""
    files = {"cpu.cfs_quota_us": "300000", "cpu.cfs_period_us": "100000"}
    for number, root in enumerate(("/docker/0123", "/")):
        (tmp_path / str(number)).mkdir()
        proc = container(
            tmp_path / str(number), files, group="5:cpu:/docker/0123", kind="cgroup", options="rw,cpu", root=root
        )
        assert available_cpus(proc) == 3


def test_other_controllers_and_a_missing_proc_are_ignored(tmp_path: Path) -> None:
    files = {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": "100000"}
    proc = container(tmp_path, files, group="5:cpuset:/", kind="cgroup", options="rw,cpuset")
    assert available_cpus(proc) == MANY
    assert available_cpus(tmp_path / "nowhere") == MANY


def test_affinity_counts_if_it_is_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 9})
    assert available_cpus(container(tmp_path, {"cpu.max": "400000 100000"}, group="0::/")) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus(tmp_path / "nowhere") == 1


def test_process_bound_to_one_cpu_has_one() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "from batch_inference.system.cpus import available_cpus; print(available_cpus())",
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1\n"


@pytest.mark.parametrize("module", [cluster, execute, planner, preflight])
def test_no_module_counts_the_cpus_of_the_machine(module: object) -> None:
    """The machine's number of CPUs, told to Ray or to the user, is more than a container has."""
    text = Path(str(module.__file__)).read_text(encoding="utf-8")  # type: ignore[attr-defined]
    assert "cpu_count" not in text
    assert "available_cpus()" in text
