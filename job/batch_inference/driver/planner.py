"""The plan of a job that is not started: what would run, what does not fit, what it would cost."""

from __future__ import annotations

import datetime
import json
import zoneinfo
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from batch_inference.config import JobConfig, read_yaml
from batch_inference.errors import UserError
from batch_inference.inputs.find import find_inputs
from batch_inference.inputs.unreadable import UnreadableInputs
from batch_inference.kubernetes.capacity import Capacity, ClusterValues, size_cluster
from batch_inference.kubernetes.schedule import fill_in_times
from batch_inference.output.destination import check_output
from batch_inference.pipeline.cluster import ResourceRequest, local_gpus
from batch_inference.pipeline.engine import resolve_engine
from batch_inference.pipeline.fingerprint import check_columns
from batch_inference.system.cpus import available_cpus

PRESETS = Path(__file__).parents[1] / "kubernetes/presets"


@dataclass(frozen=True)
class Cost:
    """Cost of the GPUs of a job.

    Attributes:
        gpus: GPUs that are paid for, including those that no actor uses.
        gpu_hour_price: Price of one GPU for an hour, in any currency.
        per_hour: Price of all of them for an hour.
        hours: Hours from the first image to the last, None if no rate was given. Start-up comes on top.
        total: Price of that time, None if no rate was given.
    """

    gpus: float
    gpu_hour_price: float
    per_hour: float
    hours: float | None = None
    total: float | None = None

    @classmethod
    def of(cls, plan: Plan, gpu_hour_price: float, images_per_s: float | None = None) -> Cost:
        """Return the cost of a plan; ``images_per_s`` is the rate of one actor, as ``preflight`` measures it."""
        gpus = float(plan.kubernetes.total("gpus")) if plan.kubernetes else plan.gpus
        hours = plan.inputs / (images_per_s * plan.actors) / 3600 if images_per_s else None
        per_hour = gpus * gpu_hour_price
        return cls(gpus, gpu_hour_price, per_hour, hours, None if hours is None else hours * per_hour)


@dataclass(frozen=True)
class Plan:
    """The figures of a job before it starts.

    Attributes:
        inputs: Number of images.
        shards: Number of shards.
        shard_size: Inputs of a shard.
        first: The first inputs, as examples.
        skipped: Number of files left out, by ending.
        duplicates: Inputs listed more than once, done once.
        repeated: Manifest lines that share their URI with another.
        unreadable: Inputs whose URIs say that they can't be read, by reason; they become failed rows.
        notes: Warnings about the location of the output.
        passthrough: Manifest columns that go to the output.
        engine: Parts of the fingerprint that describe model or predictor.
        actors: Size of the actor pool.
        gpus: GPUs of all actors.
        cpus: CPUs of all actors and one preparation task.
        available: ``{"cpus": ..., "gpus": ...}`` of this machine.
        problems: Requests that do not fit into this machine, each with its numbers and the remedy.
        kubernetes: Pods that the chart makes for the job, and its refusals; None if the job joins an existing cluster.
    """

    inputs: int
    shards: int
    shard_size: int
    first: tuple[str, ...]
    skipped: dict[str, int]
    duplicates: int
    repeated: int
    passthrough: tuple[str, ...]
    engine: dict[str, str]
    actors: int
    gpus: float
    cpus: float
    available: dict[str, float]
    problems: tuple[str, ...] = field(default_factory=tuple)
    kubernetes: Capacity | None = None
    unreadable: tuple[UnreadableInputs, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``plan --json``."""
        return asdict(self)


def read_values(paths: Sequence[str]) -> dict[str, Any]:
    """Read files of values for the ``rayjob`` chart; a later one wins, key by key, as with ``helm --values``.

    Raises:
        UserError: If one can't be read, or is not a values file.
    """
    values: dict[str, Any] = {}
    for path in paths:
        values = _merged(values, read_yaml(path, "--values", "job:"))
    if not isinstance(values.get("job", {}), dict):
        raise UserError(
            f"job is {values['job']!r} in the values, not keys and values", "Put the configuration under it."
        )
    schedule = values.get("schedule")
    if isinstance(schedule, dict) and schedule.get("cron") and "job" in values:
        values["job"] = _as_if_now(values["job"], str(schedule.get("timeZone", "UTC")))
    return values


def _as_if_now(job: Any, zone: str) -> Any:
    """Return the job of a schedule as its run has it that starts now."""
    try:
        now = datetime.datetime.now(zoneinfo.ZoneInfo(zone))
    except (zoneinfo.ZoneInfoNotFoundError, ValueError):
        raise UserError(
            f"schedule.timeZone is {zone!r}, which is no time zone", "Write one such as Europe/Berlin."
        ) from None
    return json.loads(fill_in_times(json.dumps(job), now))


def preset(name: str) -> str:
    """Return the path of the values file for the GPU nodes of a platform, such as ``gke-spot``.

    Raises:
        UserError: If there is no preset of that name.
    """
    names = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    if name not in names:
        raise UserError(
            f"there is no preset {name}", f"Take one of {', '.join(names)}; or a file of yours with --values."
        )
    return str(PRESETS / f"{name}.yaml")


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in top.items()
    }
    return {**base, **merged}


def pods(config: JobConfig, values: Mapping[str, Any]) -> Capacity | None:
    """Return the pods that the ``rayjob`` chart makes for a job, and its refusals, in the chart's own words.

    Args:
        config: The job.
        values: The chart's values; missing keys have the chart's defaults, keys that change no size are ignored.

    Returns:
        None if the job joins an existing cluster, whose size is not the job's to choose.

    Raises:
        UserError: If a value has a wrong type or is out of bounds.
    """
    return None if values.get("clusterSelector") else size_cluster(ClusterValues.of(config, values))


def plan(config: JobConfig, values: Mapping[str, Any] | None = None) -> Plan:
    """List and count the inputs, and compare the job's requests with this machine and with Kubernetes. Write nothing.

    Args:
        config: The job.
        values: Values of the ``rayjob`` chart beside the job, None for its defaults.

    Raises:
        UserError: If the input, the model or the values are invalid.
    """
    notes = check_output(config)
    kubernetes = pods(config, values or {})
    engine = resolve_engine(config)
    inputs = find_inputs(config)
    check_columns(config, inputs.table.column_names)
    request = ResourceRequest.of(config)
    cpus, gpus = float(available_cpus()), float(local_gpus())
    # A machine shares its CPUs among more processes than it has CPUs; GPUs are not shared beyond the request.
    problems = request.problems(float("inf"), gpus)
    rows = inputs.table.num_rows
    return Plan(
        inputs=rows,
        shards=-(-rows // config.shard_size),
        shard_size=config.shard_size,
        first=tuple(pc.take(inputs.table["uri"], list(range(min(3, rows)))).to_pylist()),
        skipped=inputs.skipped,
        duplicates=inputs.duplicates,
        repeated=inputs.repeated,
        passthrough=inputs.passthrough,
        engine=engine.fingerprint_parts,
        actors=config.inference.actors,
        gpus=request.actor_gpus,
        cpus=request.cpus,
        available={"cpus": cpus, "gpus": gpus},
        problems=tuple(problems),
        kubernetes=kubernetes,
        unreadable=inputs.unreadable,
        notes=tuple(notes),
    )
