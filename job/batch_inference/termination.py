"""What a pod of a Ray cluster does before it is ended: the preStop hook of head and workers.

Run: python -m batch_inference.termination head|worker SECONDS

Kubernetes sends SIGTERM to a pod's first process only, which is the shell that ``ray start`` runs in; without this a driver would
never hear of it, and a worker would be given new tasks until it is killed.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROC = Path("/proc")
_STEP_S = 0.2


def main(args: list[str]) -> int:
    """Ends within the seconds given, whatever happens; Kubernetes makes an event of what it prints where it returns 1 or 2."""
    try:
        end = {"head": end_drivers, "worker": drain}[args[0]]
        seconds = float(args[1])
    except (LookupError, ValueError):
        print("usage: python -m batch_inference.termination head|worker SECONDS", file=sys.stderr)
        return 2
    return end(time.monotonic() + seconds)


def end_drivers(deadline: float) -> int:
    """Sends SIGTERM to the drivers in this container, which commit what is complete, and waits for them.

    Args:
        deadline: By ``time.monotonic()``.

    Returns:
        0, or 1 if there are some left at the end.
    """
    found = _processes(_is_driver)
    for process in found:
        _signal(process, signal.SIGTERM)
    if _until(lambda: not set(found) & set(_processes(_is_driver)), deadline):
        return 0
    left = len(set(found) & set(_processes(_is_driver)))
    print(f"{left} drivers have not ended in time; what they have not committed is done again", file=sys.stderr)
    return 1


def drain(deadline: float) -> int:
    """Has Ray give this node no more tasks, waits for those that run, and ends it.

    A node that is drained ends by itself as soon as nothing holds a part of it. Actors do as long as they live, so that a node
    with actors stays until the deadline while its job goes on, and goes at once where the job has ended.

    Args:
        deadline: By ``time.monotonic()``.

    Returns:
        0: whatever is cut off here is done again elsewhere.
    """
    drained = False
    try:
        drained = _ask_gcs_to_drain(max(1.0, deadline - time.monotonic()))
    except Exception as exc:  # a GCS that went before its workers, a token that is not valid any more
        print(f"the node is ended without being drained: {exc}", file=sys.stderr)
    if not (drained and _until(lambda: not _processes(_is_raylet), deadline)):
        for process in _processes(_is_raylet):
            _signal(process, signal.SIGTERM)
    return 0


def _ask_gcs_to_drain(seconds: float) -> bool:
    # What `ray drain-node` does, which wants the node's identifier; neither module has types.
    gcs, reasons = (importlib.import_module(name) for name in ("ray._raylet", "ray.core.generated.autoscaler_pb2"))
    client = gcs.GcsClient(address=os.environ["RAY_ADDRESS"])
    mine = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    accepted = False
    for node, info in client.get_all_node_info(timeout=5).items():
        if info.node_manager_address in mine and info.state == 0:  # alive
            deadline_ms = int(1000 * (time.time() + seconds))
            reason = reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            accepted, _ = client.drain_node(node.hex(), reason, "the pod is being ended", deadline_ms)
    return accepted


def _is_driver(command: list[str]) -> bool:
    return any(Path(a).name == "batch-inference" and b in ("run", "retry") for a, b in itertools.pairwise(command))


def _is_raylet(command: list[str]) -> bool:
    return Path(command[0]).name == "raylet"


def _processes(wanted: Callable[[list[str]], bool]) -> list[int]:
    found = []
    for folder in PROC.iterdir():
        if folder.name.isdigit():
            try:
                command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if command[0] and wanted(command):
                found.append(int(folder.name))
    return found


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _until(condition: Callable[[], bool], deadline: float) -> bool:
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_STEP_S)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
