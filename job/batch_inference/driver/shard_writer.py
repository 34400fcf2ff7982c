"""Complete shards as Parquet files."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_inference.errors import AccountingError, UserError
from batch_inference.output import manifest
from batch_inference.output.manifest import shard_name
from batch_inference.output.records import Commit, DataFile, now
from batch_inference.output.retries import RetryShard
from batch_inference.output.schema import (
    OutputSchema,
    fit_table,
    open_columns,
    storable_schema,
    unite_schemas,
    written_schema,
)
from batch_inference.output.tally import count_errors
from batch_inference.pipeline.schemas import ROW_FIELDS
from batch_inference.storage.store import Store

ERRORS_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string()),
        *ROW_FIELDS,
        pa.field("tries", pa.int32()),
        pa.field("traceback", pa.string()),
    ]
)

# Reason why a row does not fit the job's columns, beside these while a shard is written. No predictor has a column of this name.
_REASON = pa.field("\0reason", pa.string())


class ShardWriter:
    """Gathers the predictions of open shards and writes the files of complete ones.

    The driver has one of its own. For predictors whose outputs may be wide, Ray actors do it, so that the outputs do not pass
    through the driver. A writer decides nothing: its files count only once the driver has committed them.

    Args:
        store: The output folder.
        attempt: Makes file names unique.
        compression: Parquet compression.
        tries_column: See :attr:`~batch_inference.output.records.JobRecord.tries_column`.
        generation: Generation of the commits of shards that have none yet.
    """

    def __init__(
        self, store: Store, attempt: str, compression: str, tries_column: str = "tries", generation: int = 0
    ) -> None:
        self._store = store
        self._attempt = attempt
        self._compression = compression
        self._tries_column = tries_column
        self._generation = generation
        self._open: dict[int, list[pa.Table]] = {}
        self._schema = OutputSchema(store)

    def add(self, shard: int, predictions: pa.Table) -> None:
        """Keep predictions of an open shard: ``shard``, ``row``, then the predictor's columns."""
        self._open.setdefault(shard, []).append(predictions)

    def write(self, shard: int, errors: pa.Table, retry_shard: RetryShard | None = None) -> Commit:
        """Write the files of a shard of which every row is known.

        Args:
            shard: Its number.
            errors: Its failed rows: ``row``, ``stage``, ``error_type``, ``message``, ``retryable``, ``traceback``.
            retry_shard: The rows that were done, where these were not all; the commit before accounts for the others.

        Returns:
            The commit, not made yet.

        Raises:
            AccountingError: If the rows at hand are not those of the manifest, each once.
        """
        inputs = manifest.read_shard(self._store, shard)
        # A table without rows says nothing about types.
        tables = [table for table in self._open.pop(shard, []) if table.num_rows]
        untyped: tuple[str, ...] = ()
        predictions = None
        if tables:
            predictions, misfits, untyped = self._predictions(tables, inputs, errors["row"])
            if misfits is not None:
                errors = pa.concat_tables([errors, fit_table(misfits, errors.schema).table])
        _check_complete(
            shard, predictions, errors, np.arange(inputs.num_rows) if retry_shard is None else retry_shard.rows
        )
        failed = _error_rows(shard, errors, inputs, self._tries_column) if errors.num_rows or retry_shard else errors
        generation, files = self._generation, []
        if retry_shard is not None:
            failed = _merge_errors(retry_shard, retry_shard.read_errors(self._store), failed, self._tries_column)
            generation = retry_shard.generation
            files = [file for file in retry_shard.commit.files if file.path.startswith("predictions/")]
        name = f"{shard_name(shard, generation)}-{self._attempt}.parquet"
        if predictions is not None and predictions.num_rows:
            files.append(self._write_file(f"predictions/{name}", _with_inputs(predictions, inputs), untyped))
        if failed.num_rows:
            files.append(self._write_file(f"errors/{name}", failed))
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
            old: Files to be written again; the others stay.
            schema: All columns; every value of the files must fit.
            generation: Of the commit that is to replace ``commit``.

        Returns:
            The new commit, not made yet.

        Raises:
            FileNotFoundError: If a file is gone.
            AccountingError: If a file is not what its commit says.
        """
        parts = []
        for file in old:
            try:
                table = manifest.read_parquet(self._store.get(file.path))
            except pa.ArrowException as exc:
                raise unreadable(file, exc) from None
            known = pa.schema([schema.field(f.name) if f.name in file.open else f for f in table.schema])
            part = fit_table(table, known)
            if part.reasons is not None:
                raise AccountingError(
                    f"{file.path} has values in columns of which its commit says that they have none ({', '.join(file.open)})",
                    f"Delete _commits/{shard_name(commit.shard, commit.generation)}.json and run the same command again.",
                )
            parts.append(part.table)
        name = f"predictions/{shard_name(commit.shard, generation)}-{self._attempt}.parquet"
        new = self._write_file(name, pa.concat_tables(parts).sort_by("row"))
        kept = [file for file in commit.files if file not in old]
        return replace(commit, files=(new, *kept), attempt=self._attempt, committed_at=now(), generation=generation)

    def _predictions(
        self, tables: list[pa.Table], inputs: pa.Table, failed: pa.ChunkedArray
    ) -> tuple[pa.Table, pa.Table | None, tuple[str, ...]]:
        """Return the predictions in the job's columns and in order, errors of rows that do not fit, and columns without a type yet."""
        # The types that a shard fixes must not depend on which of its batches was faster.
        tables.sort(key=lambda table: pc.min(table["row"]).as_py())
        alike = all(table.schema.equals(tables[0].schema) for table in tables)
        own = unite_schemas(storable_schema(table.schema) for table in (tables[:1] if alike else tables))
        schema = self._schema.settle(_around(own, inputs))
        target = pa.schema([own.field("shard"), own.field("row")] + [
            field for field in written_schema(schema) if field.name not in inputs.column_names
        ])  # fmt: skip
        parts = [fit_table(table, target) for table in tables]
        table = pa.concat_tables([part.table for part in parts])
        if any(part.reasons for part in parts):
            reasons = [reason for part in parts for reason in part.reasons or [None] * part.table.num_rows]
            table = table.append_column(_REASON, pa.array(reasons, pa.string()))
        if len(tables) > 1 or table.num_rows:
            # In order of the rows. A rebuilt task sends its rows again; the last of each is as good as the first.
            rows = table["row"].to_numpy()
            if not (np.diff(rows) > 0).all():
                _, from_end = np.unique(rows[::-1], return_index=True)
                table = table.take(pa.array(len(rows) - 1 - from_end))
        if len(failed):
            # Sent by an actor before it died, of a row that failed when its task was done again.
            table = table.filter(pc.invert(pc.is_in(table["row"], failed.combine_chunks())))
        if _REASON.name not in table.column_names:
            return table, None, open_columns(schema)
        misfits = _misfit_errors(table.filter(table[_REASON.name].is_valid()))
        table = table.filter(table[_REASON.name].is_null()).drop_columns([_REASON.name])
        return table, misfits, open_columns(schema)

    def _write_file(self, path: str, table: pa.Table, untyped: tuple[str, ...] = ()) -> DataFile:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression=self._compression)
        data = sink.getvalue()
        self._store.put(path, data)
        return DataFile(path, table.num_rows, len(data), hashlib.sha256(data).hexdigest(), untyped)


def unreadable(file: DataFile, exc: Exception) -> AccountingError:
    """Return what to raise for a committed file that is damaged."""
    return AccountingError(
        f"{file.path} is committed but can't be read: {type(exc).__name__}",
        "Run batch-inference verify; it names what to delete so that it is done again.",
    )


def _check_complete(shard: int, predictions: pa.Table | None, errors: pa.Table, expected: np.ndarray) -> None:
    """Raise AccountingError unless the rows of a shard are the expected ones, each once."""
    rows = errors["row"].to_numpy()
    if predictions:
        rows = np.concatenate([predictions["row"].to_numpy(), rows])
    if not np.array_equal(np.sort(rows), expected):
        raise AccountingError(
            f"{manifest.shard_name(shard)} has {len(expected)} inputs to do, but {len(rows)} rows came back, "
            f"{len(np.unique(rows))} of them different",
            "A writer was lost, or this is a bug. The shard is not committed; running the same command again does it from scratch.",
        )


def _misfit_errors(misfits: pa.Table) -> pa.Table:
    """Return errors for rows that do not fit the job's columns."""
    count = misfits.num_rows
    return pa.table(
        {
            "row": misfits["row"],
            "stage": pa.repeat(pa.scalar("postprocess"), count),
            "error_type": pa.repeat(pa.scalar("OUTPUT_MISMATCH"), count),
            "message": misfits[_REASON.name],
            "retryable": pa.repeat(pa.scalar(False), count),
        }
    )


def _around(own: pa.Schema, inputs: pa.Table) -> pa.Schema:
    """Return the columns of a file of predictions: URI, shard and row, the predictor's, then passthrough."""
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
    """Return predictions with the manifest's columns: URI, shard and row before them, passthrough after them."""
    inputs = inputs.take(predictions["row"])
    schema = _around(predictions.schema, inputs)
    return pa.Table.from_arrays(
        [(inputs if field.name in inputs.column_names else predictions)[field.name] for field in schema], schema=schema
    )


def _error_rows(shard: int, errors: pa.Table, inputs: pa.Table, tries_column: str) -> pa.Table:
    schema = pa.schema([field.with_name(tries_column) if field.name == "tries" else field for field in ERRORS_SCHEMA])
    errors = errors.sort_by("row")
    count = errors.num_rows
    fixed = {
        "uri": pc.take(inputs["uri"], errors["row"]),
        "shard": pa.array([shard] * count, pa.int32()),
        tries_column: pa.array([1] * count, pa.int32()),
    }
    if "traceback" not in errors.column_names:
        fixed["traceback"] = pa.nulls(count, pa.string())
    table = pa.Table.from_arrays(
        [fixed[f.name] if f.name in fixed else errors[f.name].cast(f.type) for f in schema], schema=schema
    )
    for name in inputs.column_names[3:]:
        table = table.append_column(inputs.schema.field(name), inputs[name].take(errors["row"]))
    return table


def _merge_errors(retry_shard: RetryShard, before: pa.Table, failed: pa.Table, tries_column: str) -> pa.Table:
    """Return the errors table of a shard after a retry: rows that were left alone, and those that failed once more."""
    retried = pc.is_in(before["row"], pa.array(retry_shard.rows, pa.int32()))
    tries = dict(zip(before["row"].to_pylist(), before[tries_column].to_pylist(), strict=True))
    index = failed.column_names.index(tries_column)
    new_tries = pa.array([tries[row] + 1 for row in failed["row"].to_pylist()], pa.int32())
    failed = failed.set_column(index, failed.schema.field(index), new_tries)
    # Errors of an earlier version have no traceback.
    kept = before.filter(pc.invert(retried))
    return pa.concat_tables([kept, failed], promote_options="default").select(failed.column_names).sort_by("row")
