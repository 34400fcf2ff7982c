"""What a job would do, without doing any of it."""

from __future__ import annotations

import datetime
import json
import zoneinfo
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from batch_inference.capacity import Capacity, Cluster, capacity
from batch_inference.cluster import Demand, local_gpus
from batch_inference.config import JobConfig, read_yaml
from batch_inference.cpus import available_cpus
from batch_inference.destination import check_output
from batch_inference.errors import UserError
from batch_inference.identity import check_columns, resolve_engine
from batch_inference.manifest import find_inputs
from batch_inference.scheduler import filled_in
from batch_inference.unreadable import Unreadable

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Cost:
    """What the GPUs of a job cost.

    Attributes:
        gpus: GPUs that are paid for, those that no actor uses included.
        gpu_hour_price: Price of one GPU for an hour, in any currency.
        per_hour: Price of all of them for an hour.
        hours: Hours from the first image to the last, None where no rate was given. Start-up comes on top.
        total: Price of that time, None where no rate was given.
    """

    gpus: float
    gpu_hour_price: float
    per_hour: float
    hours: float | None = None
    total: float | None = None

    @classmethod
    def of(cls, found: Plan, gpu_hour_price: float, images_per_s: float | None = None) -> Cost:
        """Args: a plan, the price, and images a second that one actor does, as ``preflight`` measures it."""
        gpus = float(found.kubernetes.total("gpus")) if found.kubernetes else found.gpus
        hours = found.inputs / (images_per_s * found.actors) / 3600 if images_per_s else None
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
        skipped: Files left out, by ending or kind.
        duplicates: Inputs listed more than once, done once.
        repeated: Manifest lines that share their URI with another.
        unreadable: Inputs whose URIs say that they can't be read, by reason; they end as failed rows.
        notes: What is worth a warning about where the output lies.
        passthrough: Manifest columns that go to the output.
        engine: Parts of the fingerprint that say what would run.
        actors: Size of the actor pool.
        gpus: GPUs of all actors.
        cpus: CPUs of all actors and one preparation task.
        available: ``{"cpus": ..., "gpus": ...}`` of this machine.
        problems: What does not fit into this machine, each with its numbers and the remedy.
        kubernetes: Pods that the chart makes for the job, and what it refuses; None where the job joins a cluster that is up.
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
    unreadable: tuple[Unreadable, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For ``plan --json``."""
        return asdict(self)


def read_values(paths: Sequence[str]) -> dict[str, Any]:
    """Reads files of values for the ``rayjob`` chart; a later one wins, key by key, as with ``helm --values``.

    Raises:
        UserError: If one can't be read, or is no values file.
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
    """A job of a schedule, as its run is that starts now."""
    try:
        now = datetime.datetime.now(zoneinfo.ZoneInfo(zone))
    except (zoneinfo.ZoneInfoNotFoundError, ValueError):
        raise UserError(
            f"schedule.timeZone is {zone!r}, which is no time zone", "Write one such as Europe/Berlin."
        ) from None
    return json.loads(filled_in(json.dumps(job), now))


def preset(name: str) -> str:
    """Returns the file of values for the GPU nodes of a platform, such as ``gke-spot``.

    Raises:
        UserError: If there is none of that name.
    """
    names = sorted(file.stem for file in PRESETS.glob("*.yaml"))
    if name not in names:
        raise UserError(
            f"there is no preset {name}", f"Take one of {', '.join(names)}; or a file of yours with --values."
        )
    return str(PRESETS / f"{name}.yaml")


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in top.items()
    }
    return {**base, **both}


def pods(config: JobConfig, values: Mapping[str, Any]) -> Capacity | None:
    """The pods that the ``rayjob`` chart makes for a job, and what it refuses, in the chart's own words.

    Args:
        config: The job.
        values: The chart's values; keys left out have the chart's defaults, keys that no size follows from are not looked at.

    Returns:
        None where the job joins a cluster that is up, which is not for it to size.

    Raises:
        UserError: If a value is not of its type or out of its bounds.
    """
    return None if values.get("clusterSelector") else capacity(Cluster.of(config, values))


def plan(config: JobConfig, values: Mapping[str, Any] | None = None) -> Plan:
    """Lists the inputs, counts, and compares what the job asks for with this machine and with Kubernetes. Writes nothing.

    Args:
        config: The job.
        values: Values of the ``rayjob`` chart beside the job, None for its defaults.

    Raises:
        UserError: If the input, the model or the values are not as they must be.
    """
    notes = check_output(config)
    kubernetes = pods(config, values or {})
    engine = resolve_engine(config)
    found = find_inputs(config)
    check_columns(config, found.table.column_names)
    demand = Demand.of(config)
    cpus, gpus = float(available_cpus()), float(local_gpus())
    # One machine shares its CPUs among more processes than it has; only GPUs can't be shared beyond what is asked.
    problems = demand.problems(float("inf"), gpus)
    rows = found.table.num_rows
    return Plan(
        inputs=rows,
        shards=-(-rows // config.shard_size),
        shard_size=config.shard_size,
        first=tuple(pc.take(found.table["uri"], list(range(min(3, rows)))).to_pylist()),
        skipped=found.skipped,
        duplicates=found.duplicates,
        repeated=found.repeated,
        passthrough=found.passthrough,
        engine=engine.identity,
        actors=config.inference.actors,
        gpus=demand.actor_gpus,
        cpus=demand.cpus,
        available={"cpus": cpus, "gpus": gpus},
        problems=tuple(problems),
        kubernetes=kubernetes,
        unreadable=found.unreadable,
        notes=tuple(notes),
    )
