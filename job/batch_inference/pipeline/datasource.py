"""Ray Data source of a job's shards: one read task for each shard that has no commit."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import structlog
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from batch_inference.models.batch_size import PADDING_ROW, padding_rows
from batch_inference.output import manifest
from batch_inference.output.journal import StartedMarker
from batch_inference.output.manifest import without_etags
from batch_inference.pipeline.prepare import Preparation
from batch_inference.storage.store import Store
from batch_inference.telemetry.context import Telemetry
from batch_inference.telemetry.metrics import meter

log = structlog.get_logger()


class ShardDatasource(Datasource):
    """Ray Data source that reads and prepares the shards of a job.

    A read task is scheduled, retried and rebuilt by Ray Data as a whole; its blocks stream out as they are ready.

    Args:
        store: The output folder, which holds the manifest.
        rows: Number of inputs to process, by shard; shards are handed out in the order of :func:`spread`.
        preparation: How each image is fetched and decoded.
        attempt: Identifier of the driver's attempt. A task that started in it and left its mark behind was killed by its shard.
        retry_rows: For a retry, the row numbers to process of each shard, int (n,), ascending; empty: all rows. A retry reads objects as
            they are now, even where they were replaced after planning.
        telemetry: Log and metric settings that the tasks adopt; None: they report nothing.
    """

    def __init__(
        self,
        store: Store,
        rows: Mapping[int, int],
        preparation: Preparation,
        attempt: str,
        retry_rows: Mapping[int, np.ndarray] | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rows = rows
        self._retry_rows = retry_rows or {}
        # A hundred thousand tasks share one copy of what they need.
        self._context = ray.put((store, preparation, attempt, telemetry))

    def estimate_inmemory_data_size(self) -> int | None:
        """Return None: the size is unknown before the images are read."""
        return None

    def get_name(self) -> str:
        """Return the name of the stage in Ray's dashboard."""
        return "Shards"

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """Return one task for each shard, whatever parallelism Ray Data has in mind."""
        return [
            ReadTask(
                functools.partial(_read, self._context, shard, self._retry_rows.get(shard), bool(self._retry_rows)),
                BlockMetadata(num_rows=self._rows[shard], size_bytes=None, input_files=None, exec_stats=None),
            )
            for shard in spread(list(self._rows))
        ]


def _read(context: Any, shard: int, retry_rows: np.ndarray | None, is_retry: bool) -> Iterable[pa.Table]:
    """Fetch and prepare one shard, in a task; yield tables of ``PREPARED_SCHEMA``."""
    store, preparation, attempt, telemetry = ray.get(context)
    if telemetry is not None:
        telemetry.set_up()
    started = time.monotonic()
    inputs, locations = manifest.read_with_locations(store, shard)
    if retry_rows is not None:
        inputs, locations = inputs.take(retry_rows), None if locations is None else locations.take(retry_rows)
    if is_retry and locations is not None:
        # A retry is for objects that were fixed since they were listed.
        locations = without_etags(locations)
    # Ray restarts a task without limit when its process has died. The mark tells the next process that this one died of its shard.
    mark = StartedMarker(store, manifest.shard_name(shard), attempt)
    careful = mark.begin()
    if careful:
        meter.add("retries", kind="task")
        log.warning("the shard was begun before, and its process died: each image is decoded alone", shard=shard)
    rows = failed = 0
    for prepared in preparation.rows(shard, inputs["uri"].to_pylist(), locations, careful=careful):
        rows += prepared.num_rows
        failed += prepared.num_rows - prepared["error_type"].null_count
        numbered = prepared if retry_rows is None else _renumbered(prepared, retry_rows)
        yield with_padding_rows(numbered, preparation.batch_rows)
    mark.end()
    if telemetry is not None:
        log.debug("prepared", shard=shard, rows=rows, errors=failed, seconds=round(time.monotonic() - started, 3))


def with_padding_rows(table: pa.Table, batch_rows: int | None) -> pa.Table:
    """Add filler rows, so that a large image counts for several rows of the batch that Ray makes.

    Filler rows have no image, and :data:`PADDING_ROW` as their number; the actor drops them.

    Args:
        table: Rows of :data:`~batch_inference.pipeline.schemas.PREPARED_SCHEMA`.
        batch_rows: Rows of a batch; None: all images have the size that the batch is made for, and nothing is added.
    """
    if batch_rows is None:
        return table
    sizes = pc.fill_null(pc.binary_length(table["pixels"]), 0).to_pylist()
    count = padding_rows(sizes, batch_rows)
    if not count:
        return table
    values = {"shard": table["shard"][0].as_py(), "row": PADDING_ROW}
    # Numeric columns hold 0, like those of a row that failed earlier.
    columns = [
        pa.nulls(count, field.type)
        if pa.types.is_string(field.type) or pa.types.is_large_binary(field.type)
        else pa.array([values.get(field.name, 0)] * count).cast(field.type)
        for field in table.schema
    ]
    return pa.concat_tables([table, pa.Table.from_arrays(columns, schema=table.schema)])


def _renumbered(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Replace positions in ``rows`` by the row numbers in the shard."""
    index = table.column_names.index("row")
    return table.set_column(index, table.schema.field(index), pa.array(rows[table["row"].to_numpy()], pa.int32()))


def spread(shards: Sequence[int]) -> list[int]:
    """Return the shards in an order in which neighbors lie far apart in the list.

    URIs are listed in order, so neighboring shards share a prefix or an archive, and stores limit the requests a second to each
    prefix. The order is the van der Corput sequence (the bits of the index, reversed), which is spread evenly however many tasks run
    at a time.

    >>> spread([0, 1, 2, 3, 4, 5, 6, 7])
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    bits = max(1, (len(shards) - 1).bit_length())
    return [shards[index] for index in sorted(range(len(shards)), key=lambda index: f"{index:0{bits}b}"[::-1])]
