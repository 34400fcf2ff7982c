"""Bottleneck of a run: the part that limited it and the setting to change, from measured times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from batch_inference.config import JobConfig

Limit = Literal["unknown", "inference", "cpu", "decode", "fetch", "commit", "driver", "idle"]

# Share of the time from which on a part counts as busy, so that the others wait for it. The actors' share is higher: a pool
# that is busy for less can be fed better.
_ACTORS_BUSY = 0.85
_BUSY = 0.7
# Fetching is waiting: threads that wait for the store half of their time have nothing else to wait for.
_FETCHING = 0.5
# In shorter runs the start and the end of the pipeline outweigh what lies between.
_MIN_WORKING_S = 2.0


@dataclass(frozen=True)
class RunTimings:
    """Measured times of a run, and how much it could do in parallel.

    Attributes:
        working_s: Seconds between the first and the last rows that came back.
        fetch_s: Seconds of fetching in this time, summed over all threads.
        decode_s: Seconds of decoding, summed likewise.
        infer_s: Seconds of inference, summed over all actors.
        actors: Number of actors.
        cpus_per_actor: CPUs of each.
        on_gpu: Whether the actors have GPUs.
        decode_cpus: CPUs that tasks could decode with at the same time.
        fetch_threads: Objects that tasks could fetch at the same time.
        cpus: CPUs in all, the actors' included.
        driver_s: Seconds in which the driver was at work itself and took no rows.
        commit_s: Seconds of ``driver_s`` in which it waited for the output's store.
    """

    working_s: float
    fetch_s: float
    decode_s: float
    infer_s: float
    actors: int
    cpus_per_actor: float
    on_gpu: bool
    decode_cpus: float
    fetch_threads: int
    cpus: float
    driver_s: float = 0.0
    commit_s: float = 0.0


@dataclass(frozen=True)
class Bottleneck:
    """The part that limited a run, and how busy each part was.

    Attributes:
        limit: The part that the others waited for; ``idle`` where none was busy, ``unknown`` after a short run.
        sentence: The same in words, with the setting to change.
        actors_busy: Share of the time in which an actor worked, 0 to 1.
        decode_busy: Share of the time in which a CPU for decoding worked, 0 to 1.
        fetch_busy: Share of the time in which a fetching thread waited for the input's store, 0 to 1.
        driver_busy: Share of the time in which the driver worked itself, 0 to 1.
    """

    limit: Limit
    sentence: str
    actors_busy: float = 0.0
    decode_busy: float = 0.0
    fetch_busy: float = 0.0
    driver_busy: float = 0.0


def planned_timings(config: JobConfig, shards: int, cpus: float = math.inf) -> RunTimings:
    """Return timings without measurements: how much a job can do in parallel in the connected Ray cluster.

    Args:
        config: The job.
        shards: Number of shards to process; each is one task.
        cpus: CPUs that really exist, where Ray was told of more.
    """
    import ray

    inference, task_cpus = config.inference, config.preprocess.cpus_per_task
    ray_cpus = float(ray.cluster_resources().get("CPU", 1.0)) if ray.is_initialized() else 1.0  # type: ignore[no-untyped-call]
    tasks = max(1, min(shards, int((ray_cpus - inference.actors * inference.cpus_per_actor) / task_cpus)))
    return RunTimings(
        working_s=0.0,
        fetch_s=0.0,
        decode_s=0.0,
        infer_s=0.0,
        actors=inference.actors,
        cpus_per_actor=inference.cpus_per_actor,
        on_gpu=inference.gpus_per_actor > 0 and inference.device == "auto",
        decode_cpus=min(tasks * max(1, int(task_cpus)), cpus),
        fetch_threads=tasks * config.storage.fetch_concurrency,
        cpus=min(ray_cpus, cpus),
    )


def find_bottleneck(timings: RunTimings) -> Bottleneck:
    """Find the part that limited a run.

    >>> timings = RunTimings(60, 30, 114, 90, 4, cpus_per_actor=1, on_gpu=True, decode_cpus=2, fetch_threads=32, cpus=6)
    >>> bottleneck = find_bottleneck(timings)
    >>> bottleneck.limit, bottleneck.actors_busy
    ('decode', 0.375)
    """
    if timings.working_s < _MIN_WORKING_S:
        return Bottleneck("unknown", "The run was too short to say what limited it.")
    actors = _share(timings.infer_s, timings.actors * timings.working_s)
    decode = _share(timings.decode_s, timings.decode_cpus * timings.working_s)
    fetch = _share(timings.fetch_s, timings.fetch_threads * timings.working_s)
    driver = _share(timings.driver_s, timings.working_s)
    cpu_s = timings.decode_s + (0.0 if timings.on_gpu else timings.infer_s * timings.cpus_per_actor)
    cpus = _share(cpu_s, timings.cpus * timings.working_s)
    limit = _limit(timings, actors, decode, fetch, driver, cpus)
    commit = _share(timings.commit_s, timings.working_s)
    shares = {"decode": decode, "fetch": fetch, "driver": driver, "commit": commit}
    percent = {part: f"{100 * share:.0f} %" for part, share in shares.items()}
    name = "GPU actor" if timings.on_gpu else "actor"
    subject = f"{name} was" if timings.actors == 1 else f"{timings.actors} {name}s were"
    busy = f"the {subject} busy {100 * actors:.0f} % of the time"
    if timings.on_gpu:
        remedy = "raise inference.actors with their GPUs, or lower inference.precision"
    elif timings.actors * timings.cpus_per_actor < timings.cpus:
        remedy = f"raise inference.actors (there are {timings.cpus:g} CPUs), or lower inference.precision"
    else:
        remedy = f"the actors have all {timings.cpus:g} CPUs, so add CPUs, lower inference.precision, or choose a smaller network"
    waited = f"{busy} and waited for pixels"
    sentence = {
        "inference": f"Inference-bound: {busy}; {remedy}.",
        "cpu": f"CPU-bound: decoding and the network kept {100 * cpus:.0f} % of {timings.cpus:g} CPUs busy; add CPUs, lower "
        "inference.precision, or choose a smaller network.",
        "decode": f"Decode-bound: {waited}, decoding kept {percent['decode']} of its {timings.decode_cpus:g} CPUs busy; add CPUs "
        "(cpuWorkers.replicas in the chart), or take fewer actors.",
        "fetch": f"Fetch-bound: {waited}, {percent['fetch']} of {timings.fetch_threads} fetching threads waited for the input's store; "
        "raise storage.fetch_concurrency, or move the job closer to its store.",
        "commit": f"Write-bound: the driver waited {percent['commit']} of the time for the output's store; "
        "raise shard_size, or choose a faster store.",
        "driver": f"Driver-bound: {busy}, the driver {percent['driver']}; raise shard_size, or give the driver's node "
        "(the head) more CPU.",
        "idle": f"No part was busy all the time: {busy}, decoding {percent['decode']}, fetching {percent['fetch']}; with few shards "
        "a part of the cluster has nothing to do, so lower shard_size, or take fewer actors.",
    }[limit]  # fmt: skip
    return Bottleneck(limit, sentence, actors, decode, fetch, driver)


def _limit(timings: RunTimings, actors: float, decode: float, fetch: float, driver: float, cpus: float) -> Limit:
    if driver >= _BUSY and actors < _ACTORS_BUSY:
        return "commit" if timings.commit_s > timings.driver_s / 2 else "driver"
    if actors >= _ACTORS_BUSY:
        return "inference"
    # Where decoding takes most of the CPUs' time, more CPUs or a faster decoder would help, so decoding is the limit.
    if not timings.on_gpu and cpus >= _ACTORS_BUSY and timings.infer_s * timings.cpus_per_actor >= timings.decode_s / 2:
        return "cpu"
    if decode >= _BUSY:
        return "decode"
    if fetch >= _FETCHING:
        return "fetch"
    return "idle"


def _share(seconds: float, total: float) -> float:
    return min(1.0, seconds / total) if total > 0 else 0.0
