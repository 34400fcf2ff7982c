"""Shards as a Ray Data source: one read task for each shard that has no commit."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import structlog
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from batch_inference import manifest
from batch_inference.batching import NO_ROW, extra_rows
from batch_inference.containers import without_versions
from batch_inference.marks import Mark
from batch_inference.metrics import meter
from batch_inference.preparation import Preparation
from batch_inference.storage import Store
from batch_inference.telemetry import Telemetry

log = structlog.get_logger()


class ShardDatasource(Datasource):
    """Reads and prepares the shards of a job.

    A read task is scheduled, retried and rebuilt by Ray Data as a whole; its blocks stream out as they are ready.

    Args:
        store: The output folder, which holds the manifest.
        shards: Numbers of the shards to do; handed out as :func:`spread` says.
        rows: Number of inputs of each.
        preparation: What to do with each image.
        attempt: Of the job's driver; a task that was begun in it and did not end has died of its shard.
        chosen: Row numbers to do, in order, of shards of which these are not all: a retry, for which objects are taken as they are then.
        telemetry: Whose log lines and metrics the tasks' are; None: they are nobody's.
    """

    def __init__(
        self,
        store: Store,
        shards: list[int],
        rows: list[int],
        preparation: Preparation,
        attempt: str,
        chosen: dict[int, np.ndarray] | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shards = shards
        self._rows = rows
        self._chosen = chosen or {}
        # A hundred thousand tasks share one copy of what they need.
        self._context = ray.put((store, preparation, attempt, telemetry))

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown before the images are read."""
        return None

    def get_name(self) -> str:
        """Name of the stage in Ray's dashboard."""
        return "Shards"

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        """One task a shard, whatever parallelism Ray Data has in mind."""
        return [
            ReadTask(
                functools.partial(_read, self._context, shard, self._chosen.get(shard), bool(self._chosen)),
                BlockMetadata(num_rows=self._rows[place], size_bytes=None, input_files=None, exec_stats=None),
            )
            for place in spread(range(len(self._shards)))
            for shard in [self._shards[place]]
        ]


def _read(context: Any, shard: int, chosen: np.ndarray | None, again: bool) -> Iterable[pa.Table]:
    store, preparation, attempt, telemetry = ray.get(context)
    if telemetry is not None:
        telemetry.begin()
    begun = time.monotonic()
    table, places = manifest.read_places(store, shard)
    if chosen is not None:
        table, places = table.take(chosen), None if places is None else places.take(chosen)
    if again and places is not None:
        # Objects that were mended since are what a retry is for.
        places = without_versions(places)
    # Ray begins a task anew, as often as it takes, where the process has died. The mark tells the next one.
    mark = Mark(store, manifest.shard_name(shard), attempt)
    careful = mark.begin()
    if careful:
        meter.add("retries", kind="task")
        log.warning("the shard was begun before, and its process died: each image is decoded alone", shard=shard)
    rows = failed = 0
    for prepared in preparation.rows(shard, table["uri"].to_pylist(), places, careful=careful):
        rows += prepared.num_rows
        failed += prepared.num_rows - prepared["error_type"].null_count
        numbered = prepared if chosen is None else _renumbered(prepared, chosen)
        yield weighted(numbered, preparation.batch_rows)
    mark.end()
    if telemetry is not None:
        log.debug("prepared", shard=shard, rows=rows, errors=failed, seconds=round(time.monotonic() - begun, 3))


def weighted(table: pa.Table, batch_rows: int | None) -> pa.Table:
    """Add rows without an image and with :data:`NO_ROW` as their number, so that large images count for several of Ray's batch.

    Args:
        table: Rows of :data:`~batch_inference.preparation.PREPARED_SCHEMA`.
        batch_rows: Rows of a batch; None: images are of one size, which the batch is made for.
    """
    if batch_rows is None:
        return table
    sizes = pc.fill_null(pc.binary_length(table["pixels"]), 0).to_pylist()
    more = extra_rows(sizes, batch_rows)
    if not more:
        return table
    values = {"shard": table["shard"][0].as_py(), "row": NO_ROW}
    # Numbers are numbers, as those of a row that failed before.
    columns = [
        pa.nulls(more, field.type)
        if pa.types.is_string(field.type) or pa.types.is_large_binary(field.type)
        else pa.array([values.get(field.name, 0)] * more).cast(field.type)
        for field in table.schema
    ]
    return pa.concat_tables([table, pa.Table.from_arrays(columns, schema=table.schema)])


def _renumbered(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Places among the chosen rows become their numbers in the shard."""
    place = table.column_names.index("row")
    return table.set_column(place, table.schema.field(place), pa.array(rows[table["row"].to_numpy()], pa.int32()))


def spread(shards: Sequence[int]) -> list[int]:
    """Shards in an order in which any few that follow one another lie far apart in the list.

    URIs are listed in their order, so that neighbouring shards share a prefix or an archive; stores serve so many requests a
    second for each prefix. The van der Corput sequence (bits of the place, reversed) is spread evenly however many are under
    way.

    >>> spread([0, 1, 2, 3, 4, 5, 6, 7])
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    bits = max(1, (len(shards) - 1).bit_length())
    return [shards[place] for place in sorted(range(len(shards)), key=lambda place: f"{place:0{bits}b}"[::-1])]
