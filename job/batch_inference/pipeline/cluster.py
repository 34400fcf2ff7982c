"""The Ray cluster: joins or starts one, and checks that the job fits into it."""

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

from batch_inference.config import JobConfig
from batch_inference.environment import WAIT_VARIABLE
from batch_inference.errors import InfrastructureError, UserError
from batch_inference.pipeline import ray_errors
from batch_inference.pipeline.ray_errors import ray_folder, ray_logs
from batch_inference.system.cpus import available_cpus
from batch_inference.text import last_line

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

# Environment of Ray's processes. Ray's own messages go to its log files; the program itself says what matters.
_RAY_ENVIRONMENT = {
    # After a driver was killed, the resources that its Ray Data has requested stay reserved for this long, and the next job gets the
    # rest, which may be too little for a single task. A living driver requests every 10 s; Ray's default is 180 s.
    "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30",
    "RAY_DEDUP_LOGS": "1",
    "RAY_TQDM": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOGGING_CONFIG": str(Path(__file__).with_name("ray-data-logging.yaml")),
    "RAY_USAGE_STATS_ENABLED": "0",
}

_CONNECT_TIMEOUT_S = 10.0
# Nodes of a fixed cluster join within seconds of each other.
_JOIN_TIMEOUT_S = 30.0
_LOG_INTERVAL_S = 60.0
# Ray Client's proxy starts a process for each driver, which sometimes ends at once: the proxy forks while its own gRPC threads
# are at work (without GRPC_ENABLE_FORK_SUPPORT=0, as the image has it, in 3 of 8 new clusters on a busy machine).
_CLIENT_TRIES = 4
# Time for the placement group to be reserved once all workers have joined.
_RESERVE_TIMEOUT_S = 10.0

log = structlog.get_logger()


@dataclass(frozen=True)
class ResourceRequest:
    """Resources that a job needs from Ray at the same time.

    Attributes:
        actors: Number of actors.
        cpus_per_actor: CPUs of each.
        gpus_per_actor: GPUs of each.
        task_cpus: CPUs of one preparation task; without it the actors would wait forever.
    """

    actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    task_cpus: float

    @classmethod
    def of(cls, config: JobConfig) -> ResourceRequest:
        """Return the request of a configuration."""
        inference = config.inference
        return cls(
            inference.actors, inference.cpus_per_actor, inference.gpus_per_actor, config.preprocess.cpus_per_task
        )

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
        """Resources of each actor, and of one task; each bundle must fit on one node."""
        actor = {"CPU": self.cpus_per_actor} | ({"GPU": self.gpus_per_actor} if self.gpus_per_actor else {})
        return [actor] * self.actors + [{"CPU": self.task_cpus}]

    @property
    def cpus(self) -> float:
        """CPUs of all actors and of one task."""
        return self.actor_cpus + self.task_cpus

    def problems(self, cpus: float, gpus: float) -> list[str]:
        """Return what does not fit into this many CPUs and GPUs, with the numbers and the settings to change; empty if all fits."""
        problems = []
        if self.actor_gpus > gpus:
            problems.append(
                f"the actors need {self.actor_gpus:g} GPUs (inference.actors x gpus_per_actor), there are {gpus:g}: "
                "lower inference.actors, or set inference.gpus_per_actor=0 to run on the CPU"
            )
        if self.cpus > cpus:
            problems.append(
                f"{self.cpus:g} CPUs are needed ({self.actor_cpus:g} for the actors and {self.task_cpus:g} for a preparation "
                f"task), there are {cpus:g}: lower inference.actors or inference.cpus_per_actor"
            )
        return problems


def local_gpus() -> int:
    """Return the number of GPUs that Ray would detect on this machine."""
    from ray._private.accelerators import get_all_accelerator_managers

    total = 0
    for manager in get_all_accelerator_managers():
        if manager.get_resource_name() == "GPU":
            with contextlib.suppress(Exception):
                total = max(total, manager.get_current_node_num_accelerators())
    return total


def is_client_address(address: str | None) -> bool:
    """Return whether an address is one of Ray Client, such as ``ray://host:10001``."""
    return bool(address and address.startswith("ray://"))


@contextlib.contextmanager
def connected(config: JobConfig, address: str | None, dashboard_host: str | None) -> Iterator[str | None]:
    """Join the Ray cluster at ``address``, or start one on this machine and stop it afterwards.

    If Ray is already initialized in this process, it is used as it is.

    Args:
        config: The job, which must fit into the cluster.
        address: ``host:port``, ``auto`` or ``ray://host:port``; None or ``local`` starts a cluster.
        dashboard_host: Address that a started cluster's dashboard listens on; None for no dashboard.

    Yields:
        The dashboard's URL; None without one.

    Raises:
        UserError: If the job does not fit into this machine, or the cluster refuses.
        InfrastructureError: If there is no cluster at ``address``.
    """
    os.environ.update({key: value for key, value in _RAY_ENVIRONMENT.items() if key not in os.environ})
    import ray

    logging.getLogger("ray").propagate = False
    if ray.is_initialized():
        wait_until_it_fits(ResourceRequest.of(config))
        yield None
        return
    starts_own = not address or address == "local"
    context = _start(config, dashboard_host) if starts_own else _join(str(address))
    try:
        wait_until_it_fits(ResourceRequest.of(config))
        url = getattr(context, "dashboard_url", None)
        yield f"http://{url}" if url else None
    finally:
        if starts_own:
            _end_autoscaler()
        ray.shutdown()


def _end_autoscaler() -> None:
    """Kill the autoscaler of a Ray on this machine alone, where it has nothing to do.

    When Ray itself stops it, it reports to the GCS, which has stopped before it, and the end of the job waits a second for that.
    """
    import ray

    node = getattr(ray._private.worker, "_global_node", None)
    for monitor in getattr(node, "all_processes", {}).get("monitor", []):
        monitor.process.kill()


@contextlib.contextmanager
def _stderr_discarded() -> Iterator[None]:
    """Discard what Ray's native code prints to stderr while it starts; Ray has no option for that."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as sink:
        saved = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)


def _start(config: JobConfig, dashboard_host: str | None) -> Any:
    import ray

    request = ResourceRequest.of(config)
    cpus = available_cpus()
    problems = request.problems(math.inf, local_gpus())
    if problems:
        raise UserError("the job does not fit into this machine: " + "; ".join(problems), "Change these and run again.")
    folder = ray_folder()
    # Without spare CPUs the actors would take them all and wait for tasks that never start. More CPUs than the machine has
    # are harmless here: processes only share time.
    try:
        with _stderr_discarded():
            return ray.init(
                address="local",
                num_cpus=max(cpus, math.ceil(request.cpus)),
                include_dashboard=dashboard_host is not None,
                dashboard_host=dashboard_host or "127.0.0.1",
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                configure_logging=False,
                _temp_dir=folder,
            )
    except Exception as exc:
        text = " ".join(str(exc).split())[:300]
        raise ray_errors.ray_failure(
            ray_errors.RAY_START, [exc], "Ray did not start on this machine", text, ray_logs()
        ) from exc


def _join(address: str) -> Any:
    import ray

    # A cluster may ask for a token; the environment or ~/.ray/auth_token has it where there is one.
    if "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"
    _check_listening(address)
    for tries_left in reversed(range(_CLIENT_TRIES)):
        try:
            with _stderr_discarded():
                return ray.init(
                    address=address, log_to_driver=False, logging_level=logging.CRITICAL, configure_logging=False
                )
        except (ConnectionError, TimeoutError, ValueError, RuntimeError, AssertionError, OSError) as exc:
            text = " ".join(str(exc).split())[:300] if "Traceback (most" not in str(exc) else last_line(str(exc))
            # Only a failure of the proxy itself, which sends its traceback; not one of the driver's process.
            if tries_left and isinstance(exc, ConnectionAbortedError) and "proxier.py" in str(exc):
                log.warning("Ray Client made no process for the driver, trying again: %s", text)
                continue
            # Classified by this text only: a traceback also holds file names, which may match.
            what = f"cannot join the Ray cluster at {address}"
            raise ray_errors.ray_failure(ray_errors.RAY_JOIN, [ConnectionError(text)], what, text) from None
    raise AssertionError("the last try returns or raises")


def wait_until_it_fits(request: ResourceRequest) -> None:
    """Wait until the nodes that a job needs have joined the cluster; request them if it grows on demand.

    Raises:
        UserError: If the job does not fit; Ray itself would wait forever.
        InfrastructureError: If the requested workers did not join in time.
    """
    wait_s = _wait_for_workers_s()
    if not wait_s:
        problems = _missing(request, _JOIN_TIMEOUT_S)
        if problems:
            raise UserError(
                "the job does not fit into the Ray cluster: " + "; ".join(problems),
                f"Change these, or add nodes. On a cluster that grows on demand set {WAIT_VARIABLE} to the seconds to wait.",
            )
    elif _missing(request, 0):
        with _requested(request) as group:
            problems = _missing(request, wait_s)
            if not problems:
                # Reserved workers do not count as idle before the actors arrive.
                group.wait(_RESERVE_TIMEOUT_S)
        if problems:
            raise InfrastructureError(
                f"the workers did not come within {wait_s:g} s ({WAIT_VARIABLE}): " + "; ".join(problems),
                "Look at pending pods or nodes: quota, capacity and the most workers that the cluster may have; then start the "
                "same command again.",
            )


def _missing(request: ResourceRequest, wait_s: float) -> list[str]:
    """Return what still does not fit into the cluster after ``wait_s``; return an empty list as soon as all fits."""
    import ray

    start = time.monotonic()
    next_log_s = 0.0
    while True:
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        problems = request.problems(resources.get("CPU", 0.0), resources.get("GPU", 0.0))
        waited_s = time.monotonic() - start
        if not problems or waited_s >= wait_s:
            return problems
        if wait_s > _JOIN_TIMEOUT_S and waited_s >= next_log_s:
            log.info("waiting for workers", waited_s=round(waited_s), at_most_s=wait_s, missing="; ".join(problems))
            next_log_s += _LOG_INTERVAL_S
        time.sleep(0.5)


@contextlib.contextmanager
def _requested(request: ResourceRequest) -> Iterator[PlacementGroup]:
    """Request a job's resources from Ray's autoscaler before the job has actors; the actors hold them afterwards.

    The request is a placement group, not ``ray.autoscaler.sdk.request_resources``: that one is forgotten when another job requests,
    and keeps GPUs forever if this process is killed. A placement group ends with its driver, and keeps early workers from counting as
    idle while the last ones join.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(request.bundles)
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
    """Connect to the address once: Ray itself retries for minutes before it reports that nothing listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and names that Ray resolves itself
    try:
        socket.create_connection((host, int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError as exc:
        raise InfrastructureError(
            f"there is no Ray cluster to be reached at {address}: {exc.strerror or exc}",
            "Check host and port (10001 for ray://, 6379 otherwise) and that the cluster is up.",
        ) from None


def _has_token() -> bool:
    return (
        any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
        or Path.home().joinpath(".ray/auth_token").exists()
    )
