"""Closed shards as Parquet files."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_inference import manifest
from batch_inference.collection import count_errors
from batch_inference.errors import CountsDoNotClose, UserError
from batch_inference.generations import Again
from batch_inference.ledger import Commit, DataFile, now, shard_name
from batch_inference.output_schema import (
    OutputSchema,
    as_written,
    fitted,
    open_columns,
    storable,
    united,
)
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

# Why a row does not fit the job's columns, beside these while a shard is closed. No column of a predictor has this name.
_WHY = pa.field("\0why", pa.string())


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
        self._schema = OutputSchema(store)

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
        # A table without rows says nothing about types.
        tables = [table for table in self._open.pop(shard, []) if table.num_rows]
        unknown: tuple[str, ...] = ()
        predictions = None
        if tables:
            predictions, misfits, unknown = self._predictions(tables, inputs, errors["row"])
            if misfits is not None:
                errors = pa.concat_tables([errors, fitted(misfits, errors.schema).table])
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
            files.append(self._write(f"predictions/{name}", _with_inputs(predictions, inputs), unknown))
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

    def rewrite(self, commit: Commit, old: list[DataFile], schema: pa.Schema, generation: int) -> Commit:
        """Write files of predictions again, as one, with the types that the job has by now.

        Args:
            commit: The commit that names them.
            old: The files; the others stay.
            schema: All columns; every value of the files must fit.
            generation: Of the commit that is to take the place of ``commit``.

        Returns:
            That commit, not made yet.

        Raises:
            FileNotFoundError: If a file is gone.
            CountsDoNotClose: If a file is not what its commit says.
        """
        parts = []
        for file in old:
            try:
                table = manifest.read_parquet(self._store.get(file.path))
            except pa.ArrowException as exc:
                raise unreadable(file, exc) from None
            known = pa.schema([schema.field(f.name) if f.name in file.open else f for f in table.schema])
            part = fitted(table, known)
            if part.reasons is not None:
                raise CountsDoNotClose(
                    f"{file.path} has values in columns of which its commit says that they have none ({', '.join(file.open)})",
                    f"Delete _commits/{shard_name(commit.shard, commit.generation)}.json and run the same command again.",
                )
            parts.append(part.table)
        name = f"predictions/{shard_name(commit.shard, generation)}-{self._attempt}.parquet"
        new = self._write(name, pa.concat_tables(parts).sort_by("row"))
        kept = [file for file in commit.files if file not in old]
        return replace(commit, files=(new, *kept), attempt=self._attempt, committed_at=now(), generation=generation)

    def _predictions(
        self, tables: list[pa.Table], inputs: pa.Table, failed: pa.ChunkedArray
    ) -> tuple[pa.Table, pa.Table | None, tuple[str, ...]]:
        """A shard's predictions in the job's columns and in order; errors of rows that do not fit; columns without a type yet."""
        # Which types a shard fixes must not depend on which of its batches was faster.
        tables.sort(key=lambda table: pc.min(table["row"]).as_py())
        alike = all(table.schema.equals(tables[0].schema) for table in tables)
        own = united(storable(table.schema) for table in (tables[:1] if alike else tables))
        schema = self._schema.settle(_around(own, inputs))
        target = pa.schema([own.field("shard"), own.field("row")] + [
            field for field in as_written(schema) if field.name not in inputs.column_names
        ])  # fmt: skip
        parts = [fitted(table, target) for table in tables]
        table = pa.concat_tables([part.table for part in parts])
        if any(part.reasons for part in parts):
            why = [reason for part in parts for reason in part.reasons or [None] * part.table.num_rows]
            table = table.append_column(_WHY, pa.array(why, pa.string()))
        if len(tables) > 1 or table.num_rows:
            # In order of the rows. A rebuilt task sends its rows again; the last of each is as good as the first.
            rows = table["row"].to_numpy()
            if not (np.diff(rows) > 0).all():
                _, from_behind = np.unique(rows[::-1], return_index=True)
                table = table.take(pa.array(len(rows) - 1 - from_behind))
        if len(failed):
            # What an actor sent before it died, of a row that failed when its task was done again.
            table = table.filter(pc.invert(pc.is_in(table["row"], failed.combine_chunks())))
        misfits = None
        if _WHY.name in table.column_names:
            misfits = table.filter(table[_WHY.name].is_valid())
            table = table.filter(table[_WHY.name].is_null()).drop_columns([_WHY.name])
            misfits = pa.table(
                {
                    "row": misfits["row"],
                    "stage": pa.repeat(pa.scalar("postprocess"), misfits.num_rows),
                    "error_type": pa.repeat(pa.scalar("OUTPUT_MISMATCH"), misfits.num_rows),
                    "message": misfits[_WHY.name],
                    "retryable": pa.repeat(pa.scalar(False), misfits.num_rows),
                }
            )
        return table, misfits, open_columns(schema)

    def _write(self, path: str, table: pa.Table, unknown: tuple[str, ...] = ()) -> DataFile:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression=self._compression)
        data = sink.getvalue()
        self._store.put(path, data)
        return DataFile(path, table.num_rows, len(data), hashlib.sha256(data).hexdigest(), unknown)


def unreadable(file: DataFile, exc: Exception) -> CountsDoNotClose:
    """Return what to raise for a committed file that is damaged."""
    return CountsDoNotClose(
        f"{file.path} is committed but can't be read: {type(exc).__name__}",
        "Run batch-inference verify; it names what to delete so that it is done again.",
    )


def _around(own: pa.Schema, inputs: pa.Table) -> pa.Schema:
    """The columns of a file of predictions: place first, the predictor's, passthrough last."""
    fields = [inputs.schema.field(name) for name in ("uri", "shard", "row")]
    for field in own:
        if field.name not in ("shard", "row"):
            if field.name in inputs.column_names:
                raise UserError(
                    f"the predictor's column {field.name!r} and the manifest's have the same name",
                    "Rename one of them.",
                )
            fields.append(field)
    return pa.schema([*fields, *(inputs.schema.field(name) for name in inputs.column_names[3:])])


def _with_inputs(predictions: pa.Table, inputs: pa.Table) -> pa.Table:
    """Predictions with the manifest's columns around them: place first, passthrough last."""
    mine = inputs.take(predictions["row"])
    schema = _around(predictions.schema, inputs)
    return pa.Table.from_arrays(
        [(mine if field.name in mine.column_names else predictions)[field.name] for field in schema], schema=schema
    )


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
