"""The Ray Data pipeline: shards in, result rows out."""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

import numpy as np
import pyarrow as pa

from batch_inference import causes
from batch_inference.batching import rows_within
from batch_inference.cluster import ray_logs
from batch_inference.config import JobConfig
from batch_inference.errors import BatchInferenceError, SystemFault
from batch_inference.identity import Engine
from batch_inference.storage import Store
from batch_inference.telemetry import Telemetry

# Actors that do not come up, or a predictor that never returns: when nothing has moved for so long, the job ends with the reason.
# Clusters that have to start machines first are waited for before (`cluster.connected`).
STUCK_S = 1800
# An actor that dies while it loads the model (memory, a machine that is taken away) is replaced so many times in a row.
_LOADING_DEATHS = 2
# Images in one table from a task to an actor. Each table costs Ray some milliseconds, and one that is no multiple of the
# batch is copied: with 64 in whole batches instead of 54 in split ones an image costs 0.35 ms of CPU instead of 0.57, with
# 256 0.3. On the CPU a table is a second's work, and the last ones must not leave actors idle for long.
_ROWS_ON_CPU, _ROWS_ON_GPU = 64, 256
# What Ray Data puts around whatever a user's function raises.
_WRAPPER = "ray.exceptions.UserCodeException:"
_RAISED = re.compile(r"^\s*((?:[\w.]+\.)?\w*(?:Error|Exception|Fault)\b: .+)$", re.MULTILINE)


def results(
    store: Store,
    config: JobConfig,
    engine: Engine,
    rows: dict[int, int],
    writers: list[Any],
    attempt: str,
    chosen: dict[int, np.ndarray] | None = None,
    telemetry: Telemetry | None = None,
) -> Generator[pa.Table, None, None]:
    """The pipeline: shards in, result rows out, streaming.

    Args:
        store: The output folder.
        config: The job.
        engine: Model or predictor.
        rows: Number of inputs to do of each shard that is to be done.
        writers: Ray actors that take the predictions; empty where they come with the rows.
        attempt: The driver's.
        chosen: Their row numbers, of shards of which these are not all.
        telemetry: Whose log lines and metrics those of tasks and actors are.

    Yields:
        Tables of ``RESULT_SCHEMA``, in no particular order.
    """
    dataset = build(store, config, engine, rows, writers, attempt, chosen, telemetry)
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def build(
    store: Store,
    config: JobConfig,
    engine: Engine,
    rows: dict[int, int],
    writers: list[Any],
    attempt: str,
    chosen: dict[int, np.ndarray] | None = None,
    telemetry: Telemetry | None = None,
) -> Any:
    """The lazy Ray dataset that :func:`results` iterates over."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    from batch_inference.inference import InferenceActor, Keeping
    from batch_inference.prefixes import Prefixes
    from batch_inference.preparation import BLOCK_BYTES, Preparation
    from batch_inference.reporter import QueueLook
    from batch_inference.shards import ShardDatasource

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.max_errored_blocks = 0  # never drop data without a word
    context.wait_for_min_actors_s = -1  # images are prepared while the actors load the model
    context.execution_no_progress_timeout_s = STUCK_S
    context.max_consecutive_actor_init_deaths = _LOADING_DEATHS
    callbacks: list[Any] = context.custom_execution_callback_classes
    if QueueLook not in callbacks:
        callbacks.append(QueueLook)
    section = config.inference
    block_bytes, target, rows_a_block = BLOCK_BYTES, BLOCK_BYTES, 32
    if engine.transform is not None:
        image_bytes = 3 * engine.transform.crop**2
        rows_a_block = rows_within(_ROWS_ON_GPU if section.gpus_per_actor else _ROWS_ON_CPU, image_bytes)
        block_bytes = rows_a_block * image_bytes
        # Ray joins tables below its target and splits those beyond one and a half times it; between the two it passes them
        # on as they are.
        target = int(0.8 * block_bytes)
    context.target_max_block_size = target
    # What an actor runs at once it decides itself; a table cut into smaller batches only costs copies.
    batch_size = rows_a_block if section.batch_size == "auto" else section.batch_size
    if engine.transform is not None:
        batch_size = rows_within(batch_size, image_bytes)
    # A task holds a block (4 MiB of pixels and at most one image) and what its threads decode, two images each; an actor and Ray's
    # object store hold BATCH_BYTES and one image for each call.
    preparation = Preparation(
        config.storage,
        config.preprocess,
        engine.transform,
        block_bytes,
        Prefixes.of(config.input),
        batch_rows=batch_size if engine.transform is None else None,
    )
    source = ShardDatasource(store, list(rows), list(rows.values()), preparation, attempt, chosen, telemetry)
    # The read is never fused into the actors, since a read may change the number of rows and the batch has a size:
    # decoding is not limited to the actors' CPUs even where both ask for the same.
    return ray.data.read_datasource(
        source, num_cpus=config.preprocess.cpus_per_task, override_num_blocks=len(rows)
    ).map_batches(
        InferenceActor,
        fn_constructor_args=(
            engine.for_images(sum(rows.values()) // section.actors).factory,
            writers,
            engine.decoder,
            Keeping(store, attempt, gives_up=not chosen),
            telemetry,
            batch_size,
            "gpu" if section.gpus_per_actor else "cpu",
            config.preprocess.damaged == "accept",
        ),
        batch_size=batch_size,
        batch_format="pyarrow",
        num_gpus=section.gpus_per_actor,
        num_cpus=section.cpus_per_actor,
        compute=ActorPoolStrategy(size=section.actors),
    )


def explain_ray_failure(exc: BaseException) -> BatchInferenceError:
    """Finds what really happened under Ray's layers of exceptions."""
    from ray.exceptions import RayError

    chain: list[BaseException] = []
    queue: list[Any] = [exc]
    while queue:
        item = queue.pop(0)
        if not isinstance(item, BaseException) or any(item is one for one in chain):
            continue
        chain.append(item)
        # Ray raises a task's exception as a class that is both: only the cause is the exception itself.
        if isinstance(item, BatchInferenceError) and not isinstance(item, RayError):
            return item
        queue += [getattr(item, "cause", None), item.__cause__, item.__context__]
    text = " ".join(str(exc).split())
    if type(exc).__name__ == "ExecutionTimeoutError":
        return SystemFault(
            f"nothing has moved for {STUCK_S} s: the actors do not start, or the predictor does not return: {text[:300]}",
            "Look at the actors' logs and at pending pods; then start the same command again, it resumes.",
        )
    # A traceback as text names what was raised at the start of a line of its own; the last is the innermost task's.
    raised = [what for what in _RAISED.findall(str(exc)) if not what.startswith(_WRAPPER)] or [text or "no message"]
    words = f"{type(exc).__name__}: {raised[-1].strip()[:400]}"
    return causes.of_ray(causes.RAY, chain, "Ray failed", words, ray_logs())
