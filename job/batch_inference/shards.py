"""Shards as a Ray Data source: one read task for each shard that has no commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import ray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from batch_inference import manifest
from batch_inference.preparation import Preparation
from batch_inference.storage import Store


class ShardDatasource(Datasource):
    """Reads and prepares the shards of a job.

    A read task is scheduled, retried and rebuilt by Ray Data as a whole; its blocks stream out as they are ready.

    Args:
        store: The output folder, which holds the manifest.
        shards: Numbers of the shards to do, in order.
        rows: Number of inputs of each.
        preparation: What to do with each image.
    """

    def __init__(self, store: Store, shards: list[int], rows: list[int], preparation: Preparation) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shards = shards
        self._rows = rows
        # A hundred thousand tasks share one copy of what they need.
        self._context = ray.put((store, preparation))

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
                _reader(self._context, shard),
                BlockMetadata(num_rows=rows, size_bytes=None, input_files=None, exec_stats=None),
            )
            for shard, rows in zip(self._shards, self._rows, strict=True)
        ]


def _reader(context: Any, shard: int) -> Callable[[], Iterable[pa.Table]]:
    def read() -> Iterable[pa.Table]:
        store, preparation = ray.get(context)
        table = manifest.read_shard(store, shard)
        yield from preparation.rows(shard, table["uri"].to_pylist())

    return read
