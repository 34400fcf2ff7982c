"""What a job would do, without doing any of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc

from batch_inference.cluster import Demand, local_gpus
from batch_inference.config import JobConfig
from batch_inference.identity import check_columns, resolve_engine
from batch_inference.manifest import find_inputs


@dataclass(frozen=True)
class Plan:
    """The figures of a job before it starts.

    Attributes:
        inputs: Number of images.
        shards: Number of shards.
        shard_size: Inputs of a shard.
        first: The first inputs, as examples.
        skipped: Files left out, by ending.
        duplicates: Inputs listed more than once, done once.
        repeated: Manifest lines that share their URI with another.
        passthrough: Manifest columns that go to the output.
        engine: Parts of the fingerprint that say what would run.
        actors: Size of the actor pool.
        gpus: GPUs of all actors.
        cpus: CPUs of all actors and one preparation task.
        available: ``{"cpus": ..., "gpus": ...}`` of this machine.
        problems: What does not fit into this machine, each with its numbers and the remedy.
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

    def to_dict(self) -> dict[str, Any]:
        """For ``plan --json``."""
        return dict(vars(self))


def plan(config: JobConfig) -> Plan:
    """Lists the inputs, counts, and compares what the job asks for with this machine. Writes nothing.

    Raises:
        UserError: If the input or the model is not as configured.
    """
    engine = resolve_engine(config)
    found = find_inputs(config)
    check_columns(config, found.table.column_names)
    demand = Demand.of(config)
    cpus, gpus = float(os.cpu_count() or 1), float(local_gpus())
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
        passthrough=tuple(found.table.column_names[1:]),
        engine=engine.identity,
        actors=config.inference.actors,
        gpus=demand.actor_gpus,
        cpus=demand.cpus,
        available={"cpus": cpus, "gpus": gpus},
        problems=tuple(problems),
    )
