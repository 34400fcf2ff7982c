"""What the head's pod does before it is ended: its preStop hook.

Run: python -m batch_inference.termination SECONDS

Kubernetes sends SIGTERM to a pod's first process, which is Ray; the driver, some processes further down, would be killed without
having heard of it. Workers need nothing of the kind: Ray drains a node that gets SIGTERM.
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
    """Kubernetes makes an event of it where this returns anything but 0."""
    try:
        (seconds,) = map(float, args)
    except ValueError:
        print("usage: python -m batch_inference.termination SECONDS", file=sys.stderr)
        return 2
    left = end_drivers(seconds)
    if left:
        print(
            f"{left} drivers have not ended within {seconds:g} s; what they have not committed is done again",
            file=sys.stderr,
        )
    return 1 if left else 0


def end_drivers(seconds: float) -> int:
    """Sends SIGTERM to the drivers in this container, which commit what is complete, and waits for them.

    Args:
        seconds: To wait at most.

    Returns:
        How many are left.
    """
    deadline = time.monotonic() + seconds
    found = _drivers()
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    while found & _drivers() and time.monotonic() < deadline:
        time.sleep(_STEP_S)
    return len(found & _drivers())


def _drivers() -> set[int]:
    found = set()
    for folder in PROC.iterdir():
        # Processes come and go, and a zombie has no command line.
        with contextlib.suppress(OSError, ValueError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(Path(a).name == "batch-inference" and b in ("run", "retry") for a, b in itertools.pairwise(words)):
                found.add(int(folder.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
