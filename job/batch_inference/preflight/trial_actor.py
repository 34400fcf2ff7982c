"""The actor of a trial, which predicts like an actor of the job and measures itself."""

from __future__ import annotations

import contextlib
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.models.batch_size import split_by_bytes
from batch_inference.output.schema import (
    fit_table,
    split_duplicate_columns,
    storable_schema,
    unite_schemas,
    written_schema,
)
from batch_inference.pipeline.actor import InferenceActor
from batch_inference.pipeline.checks import Check
from batch_inference.pipeline.schemas import RESULT_SCHEMA, raise_if_fatal
from batch_inference.preflight.forecast import TrialMeasurements

# Column of a row's index while the columns of a table are split. No column of a predictor has this name.
_INDEX_COLUMN = "\0index"
_CGROUP = Path("/sys/fs/cgroup")


class TrialActor:
    """An actor like those of the job, which measures itself."""

    def __init__(self, factory: Any, decoder: Any, marks_damage: bool = False) -> None:
        self._actor = InferenceActor(factory, [], decoder, marks_damage=marks_damage)

    def predict(self, rows: pa.Table, batch: int | None) -> tuple[pa.Table, pa.Table]:
        """Predict a batch of rows.

        Args:
            rows: Prepared rows.
            batch: Size of the batch; rows are repeated if there are fewer. None predicts all rows once.

        Returns:
            Rows of ``RESULT_SCHEMA``, and the columns of their predictions.
        """
        return _split_result(self._actor(rows if batch is None else _full_batch(rows, batch)))

    def rows_check(self) -> Check | None:
        """Return the check that rows do not depend on their neighbors; None if it was not made."""
        return self._actor.rows_check

    def measure(self, rows: pa.Table, batch: int, seconds: float) -> TrialMeasurements:
        """Predict the same batch for some seconds and return the measurements; raise the exception that would end a job."""
        table = _full_batch(rows, batch)
        started = time.perf_counter()
        rounds = 0
        while not rounds or time.perf_counter() - started < seconds:
            raise_if_fatal(_split_result(self._actor(table))[0])
            rounds += 1
        infer_s = (time.perf_counter() - started) / (rounds * table.num_rows)
        shm = Path("/dev/shm")  # noqa: S108 - used by Ray; only its size is read
        (free, total), (gpu_bytes, gpu_total) = available_memory(), _gpu_memory()
        return TrialMeasurements(
            images=table.num_rows,
            fetch_s=0.0,
            decode_s=0.0,
            infer_s=infer_s,
            load_s=0.0,
            columns={},
            tmp_free=shutil.disk_usage(tempfile.gettempdir()).free,
            shm_free=shutil.disk_usage(shm).free if shm.exists() else 0,
            actor_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            memory_free=free,
            memory_total=total,
            gpu_bytes=gpu_bytes,
            gpu_total=gpu_total,
        )


def _split_result(result: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Split a result into rows of ``RESULT_SCHEMA`` and the predictor's columns.

    The predictor's columns may have names of ``RESULT_SCHEMA``, and one name may occur with several types. Such columns are merged, as
    in the files of a job, since Ray does not serialize tables with several columns of one name.
    """
    count = len(RESULT_SCHEMA)
    rows = result.select(list(range(count)))
    columns = result.select(list(range(count, result.num_columns)))
    if len(set(columns.column_names)) == columns.num_columns:
        return rows, columns
    columns = columns.append_column(_INDEX_COLUMN, pa.array(range(columns.num_rows), pa.int64()))
    parts = split_duplicate_columns(columns)
    schema = written_schema(unite_schemas(storable_schema(part.schema) for part in parts))
    columns = pa.concat_tables(fit_table(part, schema).table for part in parts).sort_by(_INDEX_COLUMN)
    return rows, columns.drop_columns([_INDEX_COLUMN])


def _full_batch(rows: pa.Table, batch: int) -> pa.Table:
    """Return a batch of at most ``batch`` rows and ``MAX_BATCH_BYTES`` of pixels, repeating rows if there are fewer."""
    indices = np.arange(batch) % rows.num_rows
    sizes = pc.binary_length(rows["pixels"]).to_numpy()[indices]
    return rows.take(pa.array(indices[split_by_bytes(sizes.tolist())[0]]))


def available_memory() -> tuple[int, int]:
    """Return (available, total) memory in bytes, taking the container's cgroup limit into account."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(meminfo[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    # memory.current includes cached files, which the kernel drops when memory is needed.
    with contextlib.suppress(OSError, ValueError, KeyError):
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
        limit = int((_CGROUP / "memory.max").read_text())
        free, total = min(free, limit - used), min(total, limit)
    return max(0, free), total


def _gpu_memory() -> tuple[int, int]:
    """Return (peak use of this process, total) of the GPU's memory in bytes; (0, 0) without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0, 0
    return int(torch.cuda.max_memory_reserved()), int(torch.cuda.mem_get_info()[1])
