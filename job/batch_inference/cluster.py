"""The Ray cluster: joining or starting one, and whether the job fits into it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from batch_inference import causes
from batch_inference.config import InferenceConfig, JobConfig
from batch_inference.cpus import available_cpus
from batch_inference.environment import WAIT_VARIABLE
from batch_inference.errors import SystemFault, UserError
from batch_inference.wording import last_line

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

# Ray's own words go to its log files; the program says what matters itself.
_RAY = {
    # What Ray Data has asked the cluster for stays its share for so long after a driver was killed, and the next job there gets the
    # rest, which may be too little for a single task. A living driver asks every 10 s; Ray's own 180 s are three minutes of nothing.
    "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TQDM": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOGGING_CONFIG": str(Path(__file__).with_name("ray-data-logging.yaml")),
    "RAY_USAGE_STATS_ENABLED": "0",
}


_CONNECT_S = 10.0
# Nodes of a fixed cluster join within seconds of each other.
_NODES_S = 30.0
_SAY_EVERY_S = 60.0
# Ray Client's proxy makes a process for each driver, which ends at once now and then: the proxy forks while its own gRPC threads
# are at work (without GRPC_ENABLE_FORK_SUPPORT=0, as the image has it, in 3 of 8 new clusters on a busy machine).
_CLIENT_TRIES = 4
# How long workers that have joined may take until all of what was asked for is reserved.
_RESERVED_S = 10.0

# A socket's path in the folder of a session, whose name has the time and the process, and how long Linux lets it be.
_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_SOCKET_BYTES = 107

log = structlog.get_logger()


@dataclass(frozen=True)
class Demand:
    """What a job asks Ray for at the same time.

    Attributes:
        actors: Number of actors.
        cpus_per_actor: CPUs of each.
        gpus_per_actor: GPUs of each.
        task_cpus: CPUs of one preparation task, without which the actors would wait for ever.
    """

    actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    task_cpus: float

    @classmethod
    def of(cls, config: JobConfig) -> Demand:
        """The demand of a configuration."""
        section: InferenceConfig = config.inference
        return cls(section.actors, section.cpus_per_actor, section.gpus_per_actor, config.preprocess.cpus_per_task)

    @property
    def actor_cpus(self) -> float:
        """CPUs of all actors."""
        return self.actors * self.cpus_per_actor

    @property
    def actor_gpus(self) -> float:
        """GPUs of all actors."""
        return self.actors * self.gpus_per_actor

    @property
    def bundles(self) -> list[dict[str, float]]:
        """The same, piece by piece: what must lie on one node each."""
        actor = {"CPU": self.cpus_per_actor} | ({"GPU": self.gpus_per_actor} if self.gpus_per_actor else {})
        return [actor] * self.actors + [{"CPU": self.task_cpus}]

    @property
    def cpus(self) -> float:
        """CPUs needed so that actors and at least one task fit together."""
        return self.actor_cpus + self.task_cpus

    def problems(self, cpus: float, gpus: float) -> list[str]:
        """What does not fit into so many CPUs and GPUs, with the numbers."""
        found = []
        if self.actor_gpus > gpus:
            found.append(
                f"the actors need {self.actor_gpus:g} GPUs (inference.actors x gpus_per_actor), there are {gpus:g}: "
                "lower inference.actors, or set inference.gpus_per_actor=0 to run on the CPU"
            )
        if self.cpus > cpus:
            found.append(
                f"{self.cpus:g} CPUs are needed ({self.actor_cpus:g} for the actors and {self.task_cpus:g} for a preparation "
                f"task), there are {cpus:g}: lower inference.actors or inference.cpus_per_actor"
            )
        return found


def local_gpus() -> int:
    """GPUs of this machine that Ray would find."""
    from ray._private.accelerators import get_all_accelerator_managers

    total = 0
    for manager in get_all_accelerator_managers():
        if manager.get_resource_name() == "GPU":
            with contextlib.suppress(Exception):
                total = max(total, manager.get_current_node_num_accelerators())
    return total


def is_client_address(address: str | None) -> bool:
    """Whether an address is one of Ray Client, ``ray://host:10001``."""
    return bool(address and address.startswith("ray://"))


@contextlib.contextmanager
def connected(config: JobConfig, address: str | None, dashboard_host: str | None) -> Iterator[str | None]:
    """Joins the Ray cluster at ``address``, or starts one on this machine and ends it afterwards.

    A Ray that runs in this process already is used as it is.

    Args:
        config: Its demand must fit.
        address: ``host:port``, ``auto``, ``ray://host:port``; None or ``local`` starts one.
        dashboard_host: Address that a started cluster's dashboard listens on; None for no dashboard.

    Yields:
        The dashboard's URL, if there is one.

    Raises:
        UserError: If the job does not fit into this machine, or the cluster refuses.
        SystemFault: If there is no cluster at ``address``.
    """
    os.environ.update({key: value for key, value in _RAY.items() if key not in os.environ})
    import ray

    logging.getLogger("ray").propagate = False
    if ray.is_initialized():
        wait_until_it_fits(Demand.of(config))
        yield None
        return
    ours = not address or address == "local"
    context = _start(config, dashboard_host) if ours else _join(str(address))
    try:
        wait_until_it_fits(Demand.of(config))
        url = getattr(context, "dashboard_url", None)
        yield f"http://{url}" if url else None
    finally:
        if ours:
            _end_autoscaler()
        ray.shutdown()


def _end_autoscaler() -> None:
    """Ends the autoscaler of a Ray on this machine alone, which has nothing to do there.

    Asked to end by Ray itself, it wants to tell the GCS, which has ended before it, and the job's end waits a second for that.
    """
    import ray

    node = getattr(ray._private.worker, "_global_node", None)
    for started in getattr(node, "all_processes", {}).get("monitor", []):
        started.process.kill()


@contextlib.contextmanager
def _stderr_aside() -> Iterator[None]:
    """Keeps what Ray's native code prints while it starts out of the terminal; there is no switch for it."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as aside:
        saved = os.dup(2)
        os.dup2(aside.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


def _start(config: JobConfig, dashboard_host: str | None) -> Any:
    import ray

    demand = Demand.of(config)
    cpus = available_cpus()
    problems = demand.problems(math.inf, local_gpus())
    if problems:
        raise UserError("the job does not fit into this machine: " + "; ".join(problems), "Change these and run again.")
    folder = ray_folder()
    # Without spare CPUs the actors would take them all and wait for tasks that never start. More than there are is
    # harmless here: they only share time.
    try:
        with _stderr_aside():
            return ray.init(
                address="local",
                num_cpus=max(cpus, math.ceil(demand.cpus)),
                include_dashboard=dashboard_host is not None,
                dashboard_host=dashboard_host or "127.0.0.1",
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                configure_logging=False,
                _temp_dir=folder,
            )
    except Exception as exc:
        words = " ".join(str(exc).split())[:300]
        raise causes.of_ray(causes.RAY_START, [exc], "Ray did not start on this machine", words, ray_logs()) from exc


def ray_folder() -> str:
    """Return the folder that a Ray on this machine keeps its sockets and logs in.

    Ray's own choice is ``ray`` in RAY_TMPDIR, TMPDIR or /tmp. It does not do where the path of a socket in it would be longer than
    the operating system takes, or where another user's sessions are.

    Raises:
        UserError: If no other does either.
    """
    from ray._common.utils import get_default_ray_temp_dir

    own: str = get_default_ray_temp_dir()  # type: ignore[no-untyped-call]
    for folder in (own, "/tmp/ray", f"/tmp/ray-{os.geteuid()}"):  # noqa: S108
        if not _unusable(folder):
            return folder
    raise UserError(
        f"Ray cannot keep its sockets in {own}: {_unusable(own)}",
        "Set RAY_TMPDIR to a short folder that you may write to; where it is not set, TMPDIR counts.",
    )


def _unusable(folder: str) -> str | None:
    """Return why Ray cannot have its sockets in a folder, or None if it can."""
    length = len(os.fsencode(folder + _SOCKET))
    if length > _SOCKET_BYTES:
        return f"the paths of its sockets would have {length} bytes, and {_SOCKET_BYTES} is the most"
    me = os.geteuid()
    for name in ("session_latest", "ray_current_cluster"):  # replaced at each start
        with contextlib.suppress(OSError):
            if me not in (0, Path(folder, name).lstat().st_uid):
                return "it has sessions of another user"
    there = Path(folder)
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return f"{there} may not be written to"
    return None


def ray_logs() -> str:
    """Return the folder of the logs of a Ray on this machine."""
    try:
        return f"{ray_folder()}/session_latest/logs"
    except UserError:
        return causes.RAY_LOGS


def _join(address: str) -> Any:
    import ray

    # A cluster may ask for a token; the environment or ~/.ray/auth_token has it where there is one.
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"
    _check_listening(address)
    for left in reversed(range(_CLIENT_TRIES)):
        try:
            with _stderr_aside():
                return ray.init(
                    address=address, log_to_driver=False, logging_level=logging.CRITICAL, configure_logging=False
                )
        except (ConnectionError, TimeoutError, ValueError, RuntimeError, AssertionError, OSError) as exc:
            text = " ".join(str(exc).split())[:300] if "Traceback (most" not in str(exc) else last_line(str(exc))
            # The proxy's own failure, whose traceback it sends, and nothing that the driver's process has said.
            if left and isinstance(exc, ConnectionAbortedError) and "proxier.py" in str(exc):
                log.warning("Ray Client made no process for the driver, trying again: %s", text)
                continue
            # By these words, and not by a traceback, in which names of files stand.
            what = f"cannot join the Ray cluster at {address}"
            raise causes.of_ray(causes.RAY_JOIN, [ConnectionError(text)], what, text) from None
    raise AssertionError("the last try returns or raises")


def wait_until_it_fits(demand: Demand) -> None:
    """Gives the nodes of a cluster time to join, or asks for them where they come on demand.

    Raises:
        UserError: If the job does not fit; Ray itself would wait for ever.
        SystemFault: If the workers that were asked for did not come.
    """
    wait_s = _wait_for_workers_s()
    if not wait_s:
        problems = _missing(demand, _NODES_S)
        if problems:
            raise UserError(
                "the job does not fit into the Ray cluster: " + "; ".join(problems),
                f"Change these, or add nodes. On a cluster that grows on demand set {WAIT_VARIABLE} to the seconds to wait.",
            )
    elif _missing(demand, 0):
        with _asked_for(demand) as reserved:
            problems = _missing(demand, wait_s)
            if not problems:
                # Reserved, workers count as used until now, and are not taken for idle before the actors come.
                reserved.wait(_RESERVED_S)
        if problems:
            raise SystemFault(
                f"the workers did not come within {wait_s:g} s ({WAIT_VARIABLE}): " + "; ".join(problems),
                "Look at pending pods or nodes: quota, capacity and the most workers that the cluster may have; then start the "
                "same command again.",
            )


def _missing(demand: Demand, wait_s: float) -> list[str]:
    """What of a job still does not fit into the cluster after so many seconds; nothing as soon as all does."""
    import ray

    begun = time.monotonic()
    said = 0.0
    while True:
        there = ray.cluster_resources()  # type: ignore[no-untyped-call]
        problems = demand.problems(there.get("CPU", 0.0), there.get("GPU", 0.0))
        waited = time.monotonic() - begun
        if not problems or waited >= wait_s:
            return problems
        if wait_s > _NODES_S and waited >= said:
            log.info("waiting for workers", waited_s=round(waited), at_most_s=wait_s, missing="; ".join(problems))
            said += _SAY_EVERY_S
        time.sleep(0.5)


@contextlib.contextmanager
def _asked_for(demand: Demand) -> Iterator[PlacementGroup]:
    """Makes Ray's autoscaler see what a job needs, before it has actors; afterwards the actors hold it.

    A placement group, and not ``ray.autoscaler.sdk.request_resources``: that would be forgotten if another job asked, and would
    keep GPUs for ever if this process was killed. A placement group goes with its driver, and keeps early workers from being
    taken for idle while the last ones come.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(demand.bundles)
    try:
        yield group
    finally:
        remove_placement_group(group)


def _wait_for_workers_s() -> float:
    text = os.environ.get(WAIT_VARIABLE, "0")
    try:
        return max(0.0, float(text))
    except ValueError:
        raise UserError(
            f"{WAIT_VARIABLE} is {text!r}, not a number of seconds", "Set it to 1800, say, or unset it."
        ) from None


def _check_listening(address: str) -> None:
    """Asks the address once: Ray itself tries for minutes before it says that nobody is there."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and names that Ray resolves itself
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except OSError as exc:
        raise SystemFault(
            f"there is no Ray cluster to be reached at {address}: {exc.strerror or exc}",
            "Check host and port (10001 for ray://, 6379 otherwise) and that the cluster is up.",
        ) from None


def _has_token() -> bool:
    return (
        any(k in os.environ for k in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
        or Path.home().joinpath(".ray/auth_token").exists()
    )
