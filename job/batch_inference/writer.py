"""Closed shards as Parquet files."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_inference import manifest
from batch_inference.collection import count_errors
from batch_inference.errors import CountsDoNotClose, UserError
from batch_inference.generations import Again
from batch_inference.ledger import Commit, DataFile, now, shard_name
from batch_inference.storage import Store

ERRORS_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("stage", pa.string()),
        ("error_type", pa.string()),
        ("message", pa.string()),
        ("retryable", pa.bool_()),
        ("attempts", pa.int32()),
        ("traceback", pa.string()),
    ]
)


class ShardWriter:
    """Gathers the predictions of open shards and writes the files of closed ones.

    The driver has one of its own; outputs of unknown width have some as Ray actors, so that they do not pass through the
    driver. Nothing here decides anything: what it wrote counts only once the driver has committed it.

    Args:
        store: The output folder.
        attempt: Makes file names unique.
        compression: Parquet compression.
    """

    def __init__(self, store: Store, attempt: str, compression: str) -> None:
        self._store = store
        self._attempt = attempt
        self._compression = compression
        self._open: dict[int, list[pa.Table]] = {}

    def add(self, shard: int, predictions: pa.Table) -> None:
        """Keeps predictions of an open shard: ``shard``, ``row``, then the predictor's columns."""
        self._open.setdefault(shard, []).append(predictions)

    def close(self, shard: int, errors: pa.Table, again: Again | None = None) -> Commit:
        """Writes the files of a shard of which every row is known.

        Args:
            shard: Its number.
            errors: Its failed rows: ``row``, ``stage``, ``error_type``, ``message``, ``retryable``, ``traceback``.
            again: The rows that were done, where these were not all; the commit before accounts for the others.

        Returns:
            The commit, not made yet.

        Raises:
            CountsDoNotClose: If the rows at hand are not those of the manifest, each once.
        """
        inputs = manifest.read_shard(self._store, shard)
        predictions = self._predictions(shard)
        if predictions is not None and errors.num_rows:
            # What an actor sent before it died, of a row that failed when its task was done again.
            predictions = predictions.filter(pc.invert(pc.is_in(predictions["row"], errors["row"].combine_chunks())))
        rows = (
            np.concatenate([predictions["row"].to_numpy(), errors["row"].to_numpy()])
            if predictions
            else errors["row"].to_numpy()
        )
        expected = np.arange(inputs.num_rows) if again is None else again.rows
        if not np.array_equal(np.sort(rows), expected):
            raise CountsDoNotClose(
                f"{manifest.shard_name(shard)} has {len(expected)} inputs to do, but {len(rows)} rows came back, "
                f"{len(np.unique(rows))} of them different",
                "This is a defect or a lost writer; the shard is not committed, and running again does it anew.",
            )
        failed = _error_rows(shard, errors, inputs) if errors.num_rows or again else errors
        if again:
            failed = _merged(again, again.errors(self._store), failed)
        generation = again.generation if again else 0
        name = f"{shard_name(shard, generation)}-{self._attempt}.parquet"
        files = [f for f in again.commit.files if f.path.startswith("predictions/")] if again else []
        if predictions is not None and predictions.num_rows:
            files.append(self._write(f"predictions/{name}", _with_inputs(predictions, inputs)))
        if failed.num_rows:
            files.append(self._write(f"errors/{name}", failed))
        return Commit(
            shard,
            inputs.num_rows,
            inputs.num_rows - failed.num_rows,
            failed.num_rows,
            tuple(files),
            self._attempt,
            count_errors(failed),
            now(),
            generation,
        )

    def _predictions(self, shard: int) -> pa.Table | None:
        tables = self._open.pop(shard, [])
        if not tables:
            return None
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as exc:
            raise UserError(
                f"the predictor's columns differ from batch to batch: {exc}",
                "Return the same columns with the same types for every batch.",
            ) from None
        if len(tables) > 1 or table.num_rows:
            # In order of the rows. A rebuilt task sends its rows again; the last of each is as good as the first.
            rows = table["row"].to_numpy()
            if not (np.diff(rows) > 0).all():
                _, from_behind = np.unique(rows[::-1], return_index=True)
                table = table.take(pa.array(len(rows) - 1 - from_behind))
        return table

    def _write(self, path: str, table: pa.Table) -> DataFile:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression=self._compression)
        data = sink.getvalue()
        self._store.put(path, data)
        return DataFile(path, table.num_rows, len(data), hashlib.sha256(data).hexdigest())


def _with_inputs(predictions: pa.Table, inputs: pa.Table) -> pa.Table:
    """Predictions with the manifest's columns around them: place first, passthrough last."""
    mine = inputs.take(predictions["row"])
    out = mine.select(["uri", "shard", "row"])
    for name in predictions.column_names:
        if name not in ("shard", "row"):
            if name in mine.column_names:
                raise UserError(
                    f"the predictor's column {name!r} and the manifest's have the same name", "Rename one of them."
                )
            out = out.append_column(predictions.schema.field(name), predictions[name])
    for name in mine.column_names[3:]:
        out = out.append_column(mine.schema.field(name), mine[name])
    return out


def _error_rows(shard: int, errors: pa.Table, inputs: pa.Table) -> pa.Table:
    errors = errors.sort_by("row")
    count = errors.num_rows
    fixed = {
        "uri": pc.take(inputs["uri"], errors["row"]),
        "shard": pa.array([shard] * count, pa.int32()),
        "attempts": pa.array([1] * count, pa.int32()),
    }
    if "traceback" not in errors.column_names:
        fixed["traceback"] = pa.nulls(count, pa.string())
    table = pa.Table.from_arrays(
        [fixed[f.name] if f.name in fixed else errors[f.name].cast(f.type) for f in ERRORS_SCHEMA], schema=ERRORS_SCHEMA
    )
    for name in inputs.column_names[3:]:
        table = table.append_column(inputs.schema.field(name), inputs[name].take(errors["row"]))
    return table


def _merged(again: Again, before: pa.Table, failed: pa.Table) -> pa.Table:
    """The errors table of a shard after a retry: rows that were left alone, and those that failed once more."""
    mine = pc.is_in(before["row"], pa.array(again.rows, pa.int32()))
    tries = dict(zip(before["row"].to_pylist(), before["attempts"].to_pylist(), strict=True))
    place = failed.column_names.index("attempts")
    attempts = pa.array([tries[row] + 1 for row in failed["row"].to_pylist()], pa.int32())
    failed = failed.set_column(place, failed.schema.field(place), attempts)
    # Errors of an earlier version have no traceback.
    kept = before.filter(pc.invert(mine))
    return pa.concat_tables([kept, failed], promote_options="default").select(failed.column_names).sort_by("row")
