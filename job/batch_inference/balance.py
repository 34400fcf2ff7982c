"""What limited a run, and which knob to turn: one sentence from measured times."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from batch_inference.config import JobConfig

Limit = Literal["unknown", "inference", "cpu", "decode", "fetch", "commit", "driver", "idle"]

# A part that is busy for so much of the time is what the others wait for. The actors' share is the stricter one: a pool
# that is busy for less can be fed better.
_ACTORS_BUSY = 0.85
_BUSY = 0.7
# Fetching is waiting: threads that wait half of their time for the store have nothing else to wait for but it.
_FETCHING = 0.5
# Below this many seconds start and end of the pipeline weigh more than what lies between.
_LEAST_S = 2.0


@dataclass(frozen=True)
class Load:
    """What a run measured about itself.

    Attributes:
        working_s: Seconds between the first and the last rows that came back.
        fetch_s: Seconds of fetching in this time, added up over all threads; likewise decode_s and infer_s.
        decode_s: See fetch_s.
        infer_s: See fetch_s.
        actors: Number of actors.
        cpus_per_actor: CPUs of each.
        on_gpu: Whether the actors have GPUs.
        decode_cpus: CPUs that tasks could decode with at the same time.
        fetch_threads: Objects that tasks could fetch at the same time.
        cpus: CPUs that there are, the actors' included.
        driver_s: Seconds in which the driver was at work itself and took no rows.
        commit_s: Those of them in which it waited for the output's store.
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
class Balance:
    """What was the limit.

    Attributes:
        limit: The part that the others waited for; ``idle`` where none was busy, ``unknown`` after a short run.
        sentence: The same for people, with the knob to turn.
        actors_busy: Share of the time in which an actor worked, 0 to 1; likewise the others.
        decode_busy: See actors_busy.
        fetch_busy: See actors_busy.
        driver_busy: See actors_busy.
    """

    limit: Limit
    sentence: str
    actors_busy: float = 0.0
    decode_busy: float = 0.0
    fetch_busy: float = 0.0
    driver_busy: float = 0.0


def possible_load(config: JobConfig, shards: int, cpus: float = math.inf) -> Load:
    """What a job could do at the same time in the Ray cluster that this process is connected to; nothing measured yet.

    Args:
        config: The job.
        shards: Shards that are to be done; each is one task.
        cpus: CPUs that there are, where Ray was told of more.
    """
    import ray

    section, task_cpus = config.inference, config.preprocess.cpus_per_task
    told = float(ray.cluster_resources().get("CPU", 1.0)) if ray.is_initialized() else 1.0  # type: ignore[no-untyped-call]
    tasks = max(1, min(shards, int((told - section.actors * section.cpus_per_actor) / task_cpus)))
    return Load(
        working_s=0.0,
        fetch_s=0.0,
        decode_s=0.0,
        infer_s=0.0,
        actors=section.actors,
        cpus_per_actor=section.cpus_per_actor,
        on_gpu=section.gpus_per_actor > 0 and section.device == "auto",
        decode_cpus=min(tasks * max(1, int(task_cpus)), cpus),
        fetch_threads=tasks * config.storage.fetch_concurrency,
        cpus=min(told, cpus),
    )


def balance(load: Load) -> Balance:
    """Finds the limit of a run.

    >>> found = balance(Load(60, 30, 114, 90, actors=4, cpus_per_actor=1, on_gpu=True, decode_cpus=2, fetch_threads=32, cpus=6))
    >>> found.limit, found.actors_busy
    ('decode', 0.375)
    """
    if load.working_s < _LEAST_S:
        return Balance("unknown", "The run was too short to say what limited it.")
    actors = _share(load.infer_s, load.actors * load.working_s)
    decode = _share(load.decode_s, load.decode_cpus * load.working_s)
    fetch = _share(load.fetch_s, load.fetch_threads * load.working_s)
    driver = _share(load.driver_s, load.working_s)
    cpu_s = load.decode_s + (0.0 if load.on_gpu else load.infer_s * load.cpus_per_actor)
    cpus = _share(cpu_s, load.cpus * load.working_s)
    limit = _limit(load, actors, decode, fetch, driver, cpus)
    percent = {
        name: f"{100 * share:.0f} %" for name, share in (("decode", decode), ("fetch", fetch), ("driver", driver))
    }
    who = "GPU actor" if load.on_gpu else "actor"
    who = f"{who} was" if load.actors == 1 else f"{load.actors} {who}s were"
    busy = f"the {who} busy {100 * actors:.0f} % of the time"
    if load.on_gpu:
        more = "raise inference.actors with their GPUs, or lower inference.precision"
    elif load.actors * load.cpus_per_actor < load.cpus:
        more = f"raise inference.actors (there are {load.cpus:g} CPUs), or lower inference.precision"
    else:
        more = f"the actors have all {load.cpus:g} CPUs, so add CPUs, lower inference.precision, or choose a smaller network"
    slow = f"{busy} and waited for pixels"
    sentence = {
        "inference": f"Inference-bound: {busy}; {more}.",
        "cpu": f"CPU-bound: decoding and the network kept {100 * cpus:.0f} % of {load.cpus:g} CPUs busy; add CPUs, lower "
        "inference.precision, or choose a smaller network.",
        "decode": f"Decode-bound: {slow}, decoding kept {percent['decode']} of its {load.decode_cpus:g} CPUs busy; add CPUs "
        "(cpuWorkers.replicas in the chart), or take fewer actors.",
        "fetch": f"Fetch-bound: {slow}, {percent['fetch']} of {load.fetch_threads} fetching threads waited for the input's store; raise "
        "storage.fetch_concurrency, or move the job closer to its store.",
        "commit": f"Write-bound: the driver waited {100 * _share(load.commit_s, load.working_s):.0f} % of the time for the output's store; "
        "raise shard_size, or choose a faster store.",
        "driver": f"Driver-bound: {busy}, the driver {percent['driver']}; raise shard_size, or give the driver's node "
        "(the head) more CPU.",
        "idle": f"No part was busy all the time: {busy}, decoding {percent['decode']}, fetching {percent['fetch']}; with few shards "
        "a part of the cluster has nothing to do, so lower shard_size, or take fewer actors.",
    }[limit]  # fmt: skip
    return Balance(limit, sentence, actors, decode, fetch, driver)


def _limit(load: Load, actors: float, decode: float, fetch: float, driver: float, cpus: float) -> Limit:
    if driver >= _BUSY and actors < _ACTORS_BUSY:
        return "commit" if load.commit_s > load.driver_s / 2 else "driver"
    if actors >= _ACTORS_BUSY:
        return "inference"
    # Where decoding takes most of the CPUs' time, it is what more of them or a faster path would help.
    if not load.on_gpu and cpus >= _ACTORS_BUSY and load.infer_s * load.cpus_per_actor >= load.decode_s / 2:
        return "cpu"
    if decode >= _BUSY:
        return "decode"
    if fetch >= _FETCHING:
        return "fetch"
    return "idle"


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole > 0 else 0.0
