"""The preStop hook of the head's pod: stop the drivers before Kubernetes stops Ray.

Run: batch-inference prestop SECONDS

Kubernetes sends SIGTERM only to a pod's first process, which is Ray. The driver is a descendant of it and would be killed without
a signal. Workers need no hook: Ray drains a node that gets SIGTERM.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import time
from pathlib import Path

PROC = Path("/proc")
_STEP_S = 0.2


def main(args: list[str]) -> int:
    """Return the hook's exit code; Kubernetes makes an event of any other than 0."""
    try:
        (seconds,) = map(float, args)
    except ValueError:
        print("usage: batch-inference prestop SECONDS", file=sys.stderr)
        return 2
    remaining = stop_drivers(seconds)
    if remaining:
        print(
            f"{remaining} drivers have not ended within {seconds:g} s; the rows that they have not committed are processed again",
            file=sys.stderr,
        )
    return 1 if remaining else 0


def stop_drivers(seconds: float) -> int:
    """Send SIGTERM to the drivers in this container, which then commit complete shards, and wait for them.

    Args:
        seconds: Longest time to wait.

    Returns:
        Number of drivers that are still running.
    """
    deadline = time.monotonic() + seconds
    drivers = _running_drivers()
    for process in drivers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    while drivers & _running_drivers() and time.monotonic() < deadline:
        time.sleep(_STEP_S)
    return len(drivers & _running_drivers())


def _running_drivers() -> set[int]:
    drivers = set()
    for folder in PROC.iterdir():
        # Processes come and go, and a zombie has no command line.
        with contextlib.suppress(OSError, ValueError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(Path(a).name == "batch-inference" and b in ("run", "retry") for a, b in itertools.pairwise(words)):
                drivers.add(int(folder.name))
    return drivers
