"""The Ray Data pipeline: shards in, result rows out."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from batch_inference.config import InferenceConfig, JobConfig
from batch_inference.images.transform import Transform
from batch_inference.inputs.allowlist import Allowlist
from batch_inference.models.batch_size import max_batch_rows
from batch_inference.pipeline.engine import Engine
from batch_inference.pipeline.ray_errors import STUCK_S
from batch_inference.storage.store import Store
from batch_inference.telemetry.context import Telemetry

# An actor that dies while it loads the model (memory, a machine that is taken away) is replaced at most this many times in a row.
_LOADING_DEATHS = 2
# Images in one table from a task to an actor. Each table costs Ray some milliseconds, and one that is no multiple of the
# batch is copied: with 64 in whole batches instead of 54 in split ones an image costs 0.35 ms of CPU instead of 0.57, with
# 256 0.3. On the CPU a table is a second's work, and the last ones must not leave actors idle for long.
_ROWS_ON_CPU, _ROWS_ON_GPU = 64, 256
# Rows of a batch where images keep their own size and inference.batch_size is "auto".
_ROWS_OF_ANY_SIZE = 32


@dataclass(frozen=True)
class PipelineSpec:
    """Everything that a pipeline is built from.

    Attributes:
        store: The output folder.
        config: The job.
        engine: Model or predictor.
        rows: Number of inputs to process, by shard.
        attempt: Identifier of the driver's attempt.
        writers: Ray actors that take the predictions; empty: predictions come back with the rows.
        retry_rows: For a retry, the row numbers to process of each shard, int (n,); empty: all rows of every shard.
        telemetry: Log and metric settings that tasks and actors adopt; None: they report nothing.
    """

    store: Store
    config: JobConfig
    engine: Engine
    rows: Mapping[int, int]
    attempt: str
    writers: Sequence[Any] = ()
    retry_rows: Mapping[int, np.ndarray] = field(default_factory=dict)
    telemetry: Telemetry | None = None


def results(spec: PipelineSpec) -> Generator[pa.Table, None, None]:
    """Run a pipeline and stream its rows.

    Yields:
        Tables of ``RESULT_SCHEMA``, in no particular order.
    """
    yield from build(spec).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)


def build(spec: PipelineSpec) -> Any:
    """Return the lazy Ray dataset that :func:`results` iterates over."""
    import ray
    from ray.data import ActorPoolStrategy

    from batch_inference.pipeline.actor import InferenceActor
    from batch_inference.pipeline.crash_guard import JournalConfig
    from batch_inference.pipeline.datasource import ShardDatasource
    from batch_inference.pipeline.prepare import Preparation

    config, engine, inference = spec.config, spec.engine, spec.config.inference
    sizes = _Sizes.from_config(inference, engine.transform)
    _configure_ray_data(sizes)
    # A task holds a block (4 MiB of pixels and at most one image) and what its threads decode, two images each; an actor and Ray's
    # object store hold MAX_BATCH_BYTES and one image for each call.
    preparation = Preparation(
        config.storage,
        config.preprocess,
        engine.transform,
        sizes.block_bytes,
        Allowlist.from_config(config.input),
        batch_rows=sizes.batch_rows if engine.transform is None else None,
    )
    source = ShardDatasource(
        spec.store, spec.rows, preparation, spec.attempt, retry_rows=spec.retry_rows, telemetry=spec.telemetry
    )
    # The read is never fused into the actors, since a read may change the number of rows and the batch has a size:
    # decoding is not limited to the actors' CPUs even where both ask for the same.
    return ray.data.read_datasource(
        source, num_cpus=config.preprocess.cpus_per_task, override_num_blocks=len(spec.rows)
    ).map_batches(
        InferenceActor,
        fn_constructor_args=(engine.for_images(sum(spec.rows.values()) // inference.actors).factory, spec.writers),
        fn_constructor_kwargs={
            "decoder": engine.decoder,
            "journal_config": JournalConfig(spec.store, spec.attempt, gives_up=not spec.retry_rows),
            "telemetry": spec.telemetry,
            "batch_rows": sizes.batch_rows,
            "device": "gpu" if inference.gpus_per_actor else "cpu",
            "marks_damage": config.preprocess.damaged == "accept",
        },
        batch_size=sizes.batch_rows,
        batch_format="pyarrow",
        num_gpus=inference.gpus_per_actor,
        num_cpus=inference.cpus_per_actor,
        compute=ActorPoolStrategy(size=inference.actors),
    )


@dataclass(frozen=True)
class _Sizes:
    """Sizes of the tables on their way.

    Attributes:
        block_bytes: Bytes of pixels at which a task passes a table on.
        target_bytes: Ray Data's target for a table.
        batch_rows: Rows of one call of an actor.
    """

    block_bytes: int
    target_bytes: int
    batch_rows: int

    @classmethod
    def from_config(cls, inference: InferenceConfig, transform: Transform | None) -> _Sizes:
        """Choose the sizes for images of one size (``transform``), or of any size (None)."""
        from batch_inference.pipeline.prepare import BLOCK_BYTES

        # An actor decides itself how many images it runs at once; tables cut into smaller batches only cost copies.
        if transform is None:
            rows = _ROWS_OF_ANY_SIZE if inference.batch_size == "auto" else inference.batch_size
            return cls(BLOCK_BYTES, BLOCK_BYTES, rows)
        image_bytes = 3 * transform.crop**2
        block_rows = max_batch_rows(_ROWS_ON_GPU if inference.gpus_per_actor else _ROWS_ON_CPU, image_bytes)
        block_bytes = block_rows * image_bytes
        rows = block_rows if inference.batch_size == "auto" else inference.batch_size
        # Ray joins tables below its target and splits those beyond one and a half times it; between the two it passes them
        # on as they are.
        return cls(block_bytes, int(0.8 * block_bytes), max_batch_rows(rows, image_bytes))


def _configure_ray_data(sizes: _Sizes) -> None:
    """Set Ray Data's options for this process's pipelines."""
    from ray.data import DataContext

    from batch_inference.pipeline.backlog import BacklogCallback

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.enable_operator_progress_bars = False
    context.max_errored_blocks = 0  # never drop data without a word
    context.wait_for_min_actors_s = -1  # images are prepared while the actors load the model
    context.execution_no_progress_timeout_s = STUCK_S
    context.max_consecutive_actor_init_deaths = _LOADING_DEATHS
    context.target_max_block_size = sizes.target_bytes
    callbacks: list[Any] = context.custom_execution_callback_classes
    if BacklogCallback not in callbacks:
        callbacks.append(BacklogCallback)
