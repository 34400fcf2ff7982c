"""The number of CPUs that this process may use: in containers and under schedulers, fewer than the machine has."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROC = Path("/proc/self")


def available_cpus(proc: Path = _PROC) -> int:
    """Return the number of CPUs this process may use, at least 1.

    It is the minimum of the machine's CPUs, the CPU affinity (``taskset``, SLURM, cpusets) and the CPU quota of the cgroup and of
    every cgroup around it (``docker run --cpus``, Kubernetes limits), version 1 or 2. A quota of 1.5 CPUs counts as 2: two
    threads use it up, one does not.

    Args:
        proc: The process's folder in ``/proc``.
    """
    limits: list[float] = [os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    return max(1, math.ceil(min([*limits, *_quotas(proc)])))


def _quotas(proc: Path) -> Iterator[float]:
    """Yield the quotas, in CPUs, of the process's cgroup and of those around it, as far as this process can see them."""
    try:
        mounts = [line.split() for line in (proc / "mountinfo").read_text(errors="replace").splitlines()]
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text(errors="replace").splitlines()]
    except OSError:
        return  # not Linux, or no /proc
    for words in mounts:
        # ID, parent, device, mounted root, mount point, options, …, "-", file system, source, options of the file system.
        if "-" not in words[6:]:
            continue
        file_system, *_, options = words[words.index("-", 6) + 1 :]
        if file_system == "cgroup2":
            controller, read_quota = "", _quota_v2
        elif file_system == "cgroup" and "cpu" in options.split(","):
            controller, read_quota = "cpu", _quota_v1
        else:
            continue
        for _, controllers, path in groups:
            if controller in controllers.split(","):
                for folder in _folders_up(Path(words[4]), words[3], path):
                    quota = read_quota(folder)
                    if quota is not None:
                        yield quota


def _folders_up(mounted: Path, root: str, path: str) -> Iterator[Path]:
    """Yield the folder of the cgroup ``path`` and those around it; ``root`` is the cgroup that ``mounted`` shows."""
    group = PurePosixPath(path)
    try:
        inside = group.relative_to(root)
    except ValueError:
        # In a container without a cgroup namespace, the path is the host's, and the container's own cgroup is mounted.
        inside = PurePosixPath()
    if ".." in inside.parts:
        inside = PurePosixPath()  # outside of the namespace
    for part in (inside, *inside.parents):
        yield mounted / part


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None  # no such file in the root; "max" is no number


def _quota_v1(folder: Path) -> float | None:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None  # -1: no limit
    except (OSError, ValueError, ZeroDivisionError):
        return None
