"""What a whole job will take, from what one actor and one task took."""

from __future__ import annotations

from dataclasses import dataclass

from batch_inference.balance import Load
from batch_inference.config import JobConfig


@dataclass(frozen=True)
class Measured:
    """What one actor and one task took for the samples.

    Attributes:
        images: Images that were decoded.
        fetch_s: Seconds that one image takes to fetch; likewise decode_s.
        decode_s: See fetch_s.
        infer_s: Seconds of an actor for one image, in full batches, after the first.
        load_s: Seconds until the actor had answered for the first time: Ray, weights, warm-up.
        columns: The output's columns with their types.
        tmp_free: Bytes free in the temporary folder of the actor's node; likewise shm_free in shared memory.
        shm_free: See tmp_free.
        actor_bytes: Memory that the actor's process took at most.
        memory_free: Bytes left beside it, of its container or node; memory_total is all of them.
        memory_total: See memory_free.
        gpu_bytes: GPU memory that the actor took at most, 0 without one; gpu_total is its GPU's.
        gpu_total: See gpu_bytes.
    """

    images: int
    fetch_s: float
    decode_s: float
    infer_s: float
    load_s: float
    columns: dict[str, str]
    tmp_free: int
    shm_free: int
    actor_bytes: int = 0
    memory_free: int = 0
    memory_total: int = 0
    gpu_bytes: int = 0
    gpu_total: int = 0


@dataclass(frozen=True)
class Forecast:
    """What the whole job will take, from one actor and one task.

    Attributes:
        images_per_s: Of the whole job; the least of what actors, decoding, fetching and CPUs allow.
        limit: Which of these it is: ``inference``, ``decode``, ``fetch`` or ``cpu``.
        seconds: Until the job is done, start included.
        gpu_hours: GPUs of all actors for that time.
        actor_images_per_s: Of one actor that never waits.
        cpus_per_gpu: CPU cores that decode as fast as one GPU predicts, those of its actors left out; None without GPUs.
    """

    images_per_s: float
    limit: str
    seconds: float
    gpu_hours: float
    actor_images_per_s: float
    cpus_per_gpu: float | None


def forecast(measured: Measured, load: Load, rows: int, config: JobConfig) -> Forecast:
    """Predicts a job from what one actor and one task took; each part is taken to work without waiting for the others.

    Args:
        measured: Of one actor and one task.
        load: What can go on at the same time.
        rows: Inputs that are left to do.
        config: The job.
    """
    section = config.inference
    cpu_s = measured.decode_s + (0.0 if load.on_gpu else measured.infer_s * load.cpus_per_actor)
    rates = {
        "inference": load.actors / max(1e-9, measured.infer_s),
        "decode": load.decode_cpus / max(1e-9, measured.decode_s),
        "fetch": load.fetch_threads / max(1e-9, measured.fetch_s),
        "cpu": load.cpus / max(1e-9, cpu_s),
    }
    limit = min(rates, key=lambda name: rates[name])
    seconds = measured.load_s + rows / rates[limit]
    gpus = section.gpus_per_actor if load.on_gpu else 0.0
    return Forecast(
        images_per_s=rates[limit],
        limit=limit,
        seconds=seconds,
        gpu_hours=seconds * gpus * load.actors / 3600,
        actor_images_per_s=1 / max(1e-9, measured.infer_s),
        cpus_per_gpu=measured.decode_s / max(1e-9, measured.infer_s) / gpus if gpus else None,
    )
