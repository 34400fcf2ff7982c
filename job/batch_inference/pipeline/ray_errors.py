"""Causes of Ray's failures: what Ray reports, how a job ends that meets it, and what to do about it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from batch_inference.errors import BatchInferenceError, InfrastructureError, UserError
from batch_inference.storage.causes import (
    START_AGAIN,
    Condition,
    FailureCause,
    any_of,
    infrastructure_cause,
    user_cause,
)
from batch_inference.storage.failures import gather_facts

#: Seconds without any progress after which a job ends: actors that do not start, or a predictor that never returns. Clusters that
#: have to start machines first are waited for before that (:func:`~batch_inference.pipeline.cluster.connected`).
STUCK_S = 1800
RAY_LOGS = "/tmp/ray/session_latest/logs"  # noqa: S108
# Prefix that Ray Data puts before any exception of a user's function.
_WRAPPER = "ray.exceptions.UserCodeException:"
_RAISED = re.compile(r"^\s*((?:[\w.]+\.)?\w*(?:Error|Exception|Fault)\b: .+)$", re.MULTILINE)
# Path of a socket in a session's folder, whose name has the time and the process; and the longest path that Linux accepts.
_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_MAX_SOCKET_BYTES = 107
_LOGS = "Ray's logs are in {logs}."
_JOIN_TOKEN = "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or ~/.ray/auth_token) to the cluster's token."  # noqa: S105 - no token
_FOLDER = "Set RAY_TMPDIR to a short folder that you may write to, such as /tmp/ray-$USER."

#: How Ray fails to start on this machine.
RAY_START: tuple[FailureCause, ...] = (
    user_cause(
        "the folder of Ray's sockets has too long a name",
        _FOLDER,
        Condition(pattern=r"AF_UNIX|validate_socket_filename|path too long"),
    ),
    infrastructure_cause(
        "there is no room for Ray on the disk or in /dev/shm",
        "Make room (df -h /tmp /dev/shm), or set RAY_TMPDIR to a short folder on a larger disk; then start the same command again.",
        Condition(errnos=any_of(errno.ENOSPC, errno.EDQUOT)),
        Condition(pattern=r"no space left|ENOSPC|disk quota"),
    ),
    user_cause("Ray's folder may not be written to", _FOLDER, Condition(exceptions=any_of("PermissionError"))),
    user_cause(
        "the file system of Ray's folder is read-only",
        _FOLDER,
        Condition(errnos=any_of(errno.EROFS)),
        Condition(pattern=r"read-only file system"),
    ),
    user_cause(
        "the memory or /dev/shm is too small for Ray's object store",
        "Give the container more shared memory: docker run --shm-size=4g, in Kubernetes an emptyDir with medium Memory on /dev/shm.",
        Condition(pattern=r"object store memory|object_store_memory|/dev/shm|plasma"),
    ),
    infrastructure_cause(
        "a port that Ray needs is in use",
        "End the Ray that runs here already (ray stop), or take --dashboard-host none; then start the same command again.",
        Condition(errnos=any_of(errno.EADDRINUSE)),
        Condition(pattern=r"address already in use|failed to (?:listen|bind)|port .*(?:in use|occupied)"),
    ),
    user_cause(
        "this machine has no such address",
        "Set --dashboard-host to an address of this machine, or to none.",
        Condition(errnos=any_of(errno.EADDRNOTAVAIL)),
        Condition(exceptions=any_of("gaierror")),
        Condition(pattern=r"cannot assign requested address|name or service not known"),
    ),
    user_cause(
        "the system allows no more processes or open files",
        "Raise the limits (ulimit -u, ulimit -n; in a container the runtime's pids limit), then start the same command again.",
        Condition(errnos=any_of(errno.EAGAIN, errno.EMFILE, errno.ENFILE)),
        Condition(
            pattern=r"resource temporarily unavailable|can't start new thread|too many open files|pthread_create"
        ),
    ),
    infrastructure_cause(
        "Ray did not come up in time",
        f"The machine is busy or out of memory: start the same command again. {_LOGS}",
        Condition(pattern=r"timed out|timeout"),
    ),
    infrastructure_cause(
        "",
        f"Check --dashboard-host, free space in /tmp and /dev/shm, and start the same command again. {_LOGS}",
        Condition(),
    ),
)

#: How joining a Ray cluster fails.
RAY_JOIN: tuple[FailureCause, ...] = (
    user_cause(
        "the cluster has another version of Ray or Python",
        "Install the cluster's versions here, or use this program's image for its nodes.",
        Condition(pattern=r"version mismatch|versions? .{0,80}(?:differ|mismatch|incompatible|does not match)"),
    ),
    user_cause("the cluster refused the connection", _JOIN_TOKEN, Condition(pattern=r"auth|token")),
    infrastructure_cause(
        "",
        "Check the address and the port (10001 for ray://, 6379 otherwise), that versions are equal, and that the cluster's token is in "
        "RAY_AUTH_TOKEN or ~/.ray/auth_token if it asks for one.",
        Condition(),
    ),
)

#: How Ray fails while a job runs.
RAY: tuple[FailureCause, ...] = (
    infrastructure_cause(
        "a node ran out of memory, and Ray ended a process to save the node",
        "Lower inference.actors or inference.batch_size, run fewer tasks at a time (--set preprocess.cpus_per_task=2), or give the nodes "
        f"more memory; then {START_AGAIN}",
        Condition(exceptions=any_of("ray.exceptions.OutOfMemoryError")),
        Condition(pattern=r"NODE_OUT_OF_MEMORY|ray\.exceptions\.OutOfMemoryError|running low on memory"),
    ),
    infrastructure_cause(
        "a disk of the cluster is full",
        f"Make room where Ray keeps its objects and logs (df -h {{logs}}), then {START_AGAIN}",
        Condition(exceptions=any_of("OutOfDiskError")),
    ),
    infrastructure_cause(
        "Ray's object store is full",
        f"Give the nodes more memory and shared memory (/dev/shm), or lower inference.batch_size; then {START_AGAIN}",
        Condition(exceptions=any_of("ObjectStoreFullError")),
    ),
    user_cause(
        "the predictor ended its own process",
        "Remove sys.exit, os._exit or ray.actor.exit_actor from the predictor: it would end so each time.",
        Condition(
            exceptions=any_of("RayActorError", "WorkerCrashedError"),
            pattern=r"INTENDED_USER_EXIT|exit_actor|SystemExit|sys\.exit",
        ),
        Condition(exceptions=any_of("AsyncioActorExit")),
    ),
    infrastructure_cause(
        "a node of the cluster was lost",
        f"Look at the nodes (spot capacity, kubectl get nodes, OOMKilled pods), then {START_AGAIN}",
        Condition(exceptions=any_of("NodeDiedError", "LocalRayletDiedError")),
        Condition(pattern=r"\bnode (?:has )?(?:died|was lost|is dead)|node it was running on|raylet (?:has )?died"),
    ),
    infrastructure_cause(
        "data in Ray's memory was lost with its process or node",
        f"Look for OOMKilled pods and lost nodes, then {START_AGAIN}",
        Condition(exceptions=any_of("ObjectLostError", "PlasmaObjectNotAvailable")),
    ),
    user_cause(
        "the environment of the workers could not be made",
        "A package or file that the cluster's runtime_env names is not there: correct it.",
        Condition(exceptions=any_of("RuntimeEnvSetupError")),
    ),
    user_cause(
        "no node of the cluster can run what the job asks for",
        "Compare inference.* and preprocess.cpus_per_task with what ray status shows; add such nodes, or ask for less.",
        Condition(exceptions=any_of("TaskUnschedulableError", "ActorUnschedulableError")),
    ),
    user_cause("the cluster refused the connection", _JOIN_TOKEN, Condition(exceptions=any_of("AuthenticationError"))),
    infrastructure_cause(
        "a task was canceled",
        f"Something outside of the job stopped it, or the predictor raised KeyboardInterrupt: look at the class. Then {START_AGAIN}",
        Condition(exceptions=any_of("TaskCancelledError")),
    ),
    user_cause(
        "workers cannot import what the job needs",
        "Install the same packages, and the predictor's module, on every node (in Kubernetes: in the image).",
        Condition(exceptions=any_of("ModuleNotFoundError")),
        Condition(pattern=r"ModuleNotFoundError: No module named"),
    ),
    infrastructure_cause(
        "a process of the job died",
        "Native code crashed, or the system ended it for its memory (dmesg, OOMKilled). Start the same command again: it resumes, and "
        f"finds the image if one is the cause. {_LOGS}",
        Condition(exceptions=any_of("RayActorError", "WorkerCrashedError")),
    ),
    infrastructure_cause(
        "Ray itself failed",
        f"Start the same command again; it resumes. {_LOGS}",
        Condition(exceptions=any_of("RaySystemError", "RpcError", "ray.exceptions.GetTimeoutError")),
    ),
    infrastructure_cause(
        "",
        f"Start the same command again; it resumes. If it ends so each time, please report it with what the logs say. {_LOGS}",
        Condition(),
    ),
)


def explain_ray_failure(exc: BaseException) -> BatchInferenceError:
    """Return the failure that lies under Ray's layers of exceptions."""
    from ray.exceptions import RayError

    chain: list[BaseException] = []
    queue: list[Any] = [exc]
    while queue:
        item = queue.pop(0)
        if not isinstance(item, BaseException) or any(item is known for known in chain):
            continue
        chain.append(item)
        # Ray raises a task's exception as an instance of both classes: only its cause is the exception itself.
        if isinstance(item, BatchInferenceError) and not isinstance(item, RayError):
            return item
        queue += [getattr(item, "cause", None), item.__cause__, item.__context__]
    text = " ".join(str(exc).split())
    if type(exc).__name__ == "ExecutionTimeoutError":
        return InfrastructureError(
            f"nothing has moved for {STUCK_S} s: the actors do not start, or the predictor does not return: {text[:300]}",
            "Look at the actors' logs and at pending pods; then start the same command again, it resumes.",
        )
    # In a traceback as text, the line that starts with an exception names what was raised; the last one is the innermost task's.
    raised = [line for line in _RAISED.findall(str(exc)) if not line.startswith(_WRAPPER)] or [text or "no message"]
    words = f"{type(exc).__name__}: {raised[-1].strip()[:400]}"
    return ray_failure(RAY, chain, "Ray failed", words, ray_logs())


def ray_failure(
    causes: Sequence[FailureCause], chain: Iterable[BaseException], what: str, words: str, logs: str = RAY_LOGS
) -> BatchInferenceError:
    """Return the exception that ends the job after a failure of Ray.

    Args:
        causes: :data:`RAY_START`, :data:`RAY_JOIN` or :data:`RAY`.
        chain: The exception and those under it.
        what: Start of the message ("Ray failed").
        words: Ray's own words, for the end of the message.
        logs: Folder of Ray's logs.
    """
    known = [gather_facts(exc) for exc in chain]
    cause = next(cause for cause in causes if any(cause.matches(facts) for facts in known))
    message = ": ".join(part for part in (what, cause.fact, words) if part)
    return cause.error_class(message, cause.remedy.replace("{logs}", logs))


def ray_folder() -> str:
    """Return the folder that a Ray on this machine keeps its sockets and logs in.

    Ray's default is ``ray`` in RAY_TMPDIR, TMPDIR or /tmp. It cannot be used if the path of a socket in it would be too long for the
    operating system, or if it holds another user's sessions.

    Raises:
        UserError: If no folder can be used.
    """
    from ray._common.utils import get_default_ray_temp_dir

    default: str = get_default_ray_temp_dir()  # type: ignore[no-untyped-call]
    for folder in (default, "/tmp/ray", f"/tmp/ray-{os.geteuid()}"):  # noqa: S108
        if not _unusable(folder):
            return folder
    raise UserError(
        f"Ray cannot keep its sockets in {default}: {_unusable(default)}",
        "Set RAY_TMPDIR to a short folder that you may write to; where it is not set, TMPDIR counts.",
    )


def ray_logs() -> str:
    """Return the folder of the logs of a Ray on this machine."""
    try:
        return f"{ray_folder()}/session_latest/logs"
    except UserError:
        return RAY_LOGS


def _unusable(folder: str) -> str | None:
    """Return why Ray cannot have its sockets in a folder, or None if it can."""
    length = len(os.fsencode(folder + _SOCKET))
    if length > _MAX_SOCKET_BYTES:
        return f"the paths of its sockets would have {length} bytes, and {_MAX_SOCKET_BYTES} is the most"
    me = os.geteuid()
    for name in ("session_latest", "ray_current_cluster"):  # Ray replaces these at each start
        with contextlib.suppress(OSError):
            if me not in (0, Path(folder, name).lstat().st_uid):
                return "it has sessions of another user"
    existing = Path(folder)
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return f"{existing} may not be written to"
    return None
