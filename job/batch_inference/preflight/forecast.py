"""The forecast of a job's speed and duration, from measurements of one actor and one task."""

from __future__ import annotations

from dataclasses import dataclass

from batch_inference.config import JobConfig
from batch_inference.pipeline.bottleneck import RunTimings


@dataclass(frozen=True)
class TrialMeasurements:
    """Measurements of one actor and one task on the samples.

    Attributes:
        images: Number of images that were decoded.
        fetch_s: Mean seconds to fetch an image.
        decode_s: Mean seconds to decode an image.
        infer_s: Seconds of the actor per image, in full batches, without the first batch.
        load_s: Seconds until the first answer of the actor: start of Ray, weights, warm-up.
        columns: Columns of the output with their types.
        tmp_free: Free bytes in the temporary folder of the actor's node.
        shm_free: Free bytes in the shared memory of the actor's node.
        actor_bytes: Peak memory of the actor's process in bytes.
        memory_free: Available memory in bytes beside the actor, of its container or node.
        memory_total: Total memory in bytes of its container or node.
        gpu_bytes: Peak GPU memory of the actor in bytes; 0 without a GPU.
        gpu_total: Total memory of its GPU in bytes; 0 without a GPU.
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
    """The predicted speed and duration of a job.

    Attributes:
        images_per_s: Speed of the job: the minimum of what actors, decoding, fetching and CPUs allow.
        limit: The part that determines it: ``inference``, ``decode``, ``fetch`` or ``cpu``.
        seconds: Duration of the job, including its start.
        gpu_hours: Duration times the GPUs of all actors.
        actor_images_per_s: Speed of one actor that never waits.
        cpus_per_gpu: CPU cores that decode as fast as one GPU predicts, without the cores of actors; None without GPUs.
    """

    images_per_s: float
    limit: str
    seconds: float
    gpu_hours: float
    actor_images_per_s: float
    cpus_per_gpu: float | None


def forecast(measured: TrialMeasurements, parallel: RunTimings, rows: int, config: JobConfig) -> Forecast:
    """Predict speed and duration of a job, as if no part of it waited for another.

    Args:
        measured: Measurements of one actor and one task.
        parallel: Number of actors, CPUs and threads that work at the same time.
        rows: Number of inputs left to do.
        config: Configuration of the job.
    """
    cpu_s = measured.decode_s + (0.0 if parallel.on_gpu else measured.infer_s * parallel.cpus_per_actor)
    rates = {
        "inference": parallel.actors / max(1e-9, measured.infer_s),
        "decode": parallel.decode_cpus / max(1e-9, measured.decode_s),
        "fetch": parallel.fetch_threads / max(1e-9, measured.fetch_s),
        "cpu": parallel.cpus / max(1e-9, cpu_s),
    }
    limit = min(rates, key=lambda name: rates[name])
    seconds = measured.load_s + rows / rates[limit]
    gpus = config.inference.gpus_per_actor if parallel.on_gpu else 0.0
    return Forecast(
        images_per_s=rates[limit],
        limit=limit,
        seconds=seconds,
        gpu_hours=seconds * gpus * parallel.actors / 3600,
        actor_images_per_s=1 / max(1e-9, measured.infer_s),
        cpus_per_gpu=measured.decode_s / max(1e-9, measured.infer_s) / gpus if gpus else None,
    )
