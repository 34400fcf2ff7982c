"""The actor: keeps the model, turns prepared rows into predictions or failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import structlog

from batch_inference.errors import BatchInferenceError, UserError
from batch_inference.models.batch_size import MAX_BATCH_BYTES, PADDING_ROW, split_by_bytes
from batch_inference.output.schema import split_duplicate_columns
from batch_inference.pipeline.checks import Check
from batch_inference.pipeline.crash_guard import CrashGuard, JournalConfig, Predicted
from batch_inference.pipeline.factories import CLASSIFIER_SCHEMA, Predict
from batch_inference.pipeline.independence import FirstBatches
from batch_inference.pipeline.isolation import IsolatingPredictor
from batch_inference.pipeline.result_rows import join_predictions, result_table, with_note
from batch_inference.pipeline.schemas import end_of_job, image_arrays
from batch_inference.telemetry.context import Telemetry
from batch_inference.telemetry.metrics import meter
from batch_inference.telemetry.tracebacks import (
    PREDICTOR_EXCEPTIONS,
    describe_exception,
    format_traceback,
    with_traceback,
)

#: Column of the predictions that says what is wrong with an image, where ``preprocess.damaged: accept`` lets it pass.
DAMAGED = "damaged"


class InferenceActor:
    """One member of the actor pool; Ray Data calls it with tables of prepared rows.

    A failure costs no image but its own (:class:`~batch_inference.pipeline.isolation.IsolatingPredictor`), nor does a crash of
    the process (:class:`~batch_inference.pipeline.crash_guard.CrashGuard`). The first batch of a predictor class is used to check
    that an image's row does not depend on its neighbors (:mod:`~batch_inference.pipeline.independence`).

    Args:
        factory: Makes the predict function; called once.
        writers: Ray actors that take the predictions; empty: predictions come back with the rows.
        decoder: Makes the decoder of the files that tasks have left as they are; called once, after the factory.
        journal_config: Where a restarted process keeps its crash journal; None: no journal.
        telemetry: Log and metric settings to adopt; None: nothing is reported.
        batch_rows: Images that Ray Data puts into one table; None: unknown.
        device: Label of the metrics: ``gpu`` or ``cpu``.
        marks_damage: Whether predictions get a column :data:`DAMAGED`.
    """

    def __init__(
        self,
        factory: Callable[[], Predict],
        writers: Sequence[Any],
        decoder: Callable[[], Callable[[pa.Table], pa.Table]] | None = None,
        journal_config: JournalConfig | None = None,
        telemetry: Telemetry | None = None,
        batch_rows: int | None = None,
        device: str = "cpu",
        marks_damage: bool = False,
    ) -> None:
        self._marks_damage = marks_damage
        self._writers = writers
        self._batch_rows = batch_rows
        self._device = device
        if telemetry is not None:
            telemetry.set_up()
        self._failure: BatchInferenceError | None = None
        # What to tell the driver with the next row that has not failed.
        self._note = ""
        # Columns of predictions, for batches without one; those of the factory before there was any.
        self._columns: pa.Schema = getattr(factory, "columns", CLASSIFIER_SCHEMA)
        self._guard: CrashGuard | None = None
        self._first_batches = FirstBatches(checks_rows=getattr(factory, "checks_rows", False))
        try:
            if journal_config is not None and (journal := journal_config.journal()) is not None:
                self._guard = CrashGuard(journal, self._predict, decodes=decoder is not None)
                if journal_config.gives_up:
                    self._guard.raise_if_hopeless()
            self._predictor = IsolatingPredictor(factory())
            self._decode = decoder() if decoder else None
            meter.add("actor_busy_seconds", 0, device=self._device)
            meter.add("out_of_memory_splits", 0)
        except BatchInferenceError as exc:
            self._failure = exc
        except PREDICTOR_EXCEPTIONS as exc:
            self._failure = UserError(
                f"the model could not be loaded: {with_traceback(describe_exception(exc), format_traceback(exc))}",
                "Check model.* in the configuration.",
            )

    @property
    def rows_check(self) -> Check | None:
        """Result of the check that rows do not depend on their neighbors; None where it was not made."""
        return self._first_batches.result

    def __call__(self, table: pa.Table) -> pa.Table:
        """Predict the rows that have pixels; pass the others on.

        Args:
            table: Rows of ``PREPARED_SCHEMA``.

        Returns:
            As many rows of ``RESULT_SCHEMA``, followed by the columns of the predictions where there are no writers.
        """
        if self._failure is not None:
            return end_of_job(self._failure)
        if table.num_rows:
            structlog.contextvars.bind_contextvars(shard=table["shard"][0].as_py())
        try:
            result, predictions = self._predict_in_parts(table)
            if pc.any(pc.equal(result["row"], PADDING_ROW)).as_py():
                result = result.filter(pc.not_equal(result["row"], PADDING_ROW))
            good = result["error_type"].is_null().to_numpy()
            if predictions is not None:
                self._columns = predictions.schema
                predictions = self._with_damage(predictions, result["image_damage"].filter(pa.array(good)))
        except BatchInferenceError as exc:
            return end_of_job(exc)
        if self._writers:
            self._send(result.select(["shard", "row"]).filter(pa.array(good)), predictions)
            return result
        if predictions is not None and predictions.num_rows == result.num_rows:
            return _with_columns(result, predictions.schema, predictions.columns)
        # Every row has a place in the columns of predictions, null where it failed.
        index = pa.array(np.cumsum(good) - 1, mask=~good)
        if predictions is None:
            predictions = self._with_damage(self._columns.empty_table(), pa.chunked_array([], pa.string()))
        return _with_columns(
            result, predictions.schema, [column.combine_chunks().take(index) for column in predictions.columns]
        )

    def _predict_in_parts(self, table: pa.Table) -> Predicted:
        """Predict a table of any size; the predictor gets at most ``MAX_BATCH_BYTES`` of pixels at a time."""
        sizes = pc.fill_null(pc.binary_length(table["pixels"]), 0).to_numpy()
        # Slices, and no copies.
        parts = [table.slice(part.start, part.stop - part.start) for part in split_by_bytes(sizes.tolist())]
        predict = self._predict if self._guard is None else self._guard.predict
        predicted = [predict(part) for part in parts]
        if len(predicted) == 1:
            return predicted[0]
        return pa.concat_tables([result for result, _ in predicted]), join_predictions(p for _, p in predicted)

    def _predict(self, table: pa.Table) -> Predicted:
        """Decode what the tasks have left, predict, measure, and check the first batches."""
        if self._decode is not None:
            table = self._decode(table)
        start = time.perf_counter()
        indices, images = image_arrays(table)
        uris = table["uri"].take(pa.array(indices, pa.int64())).to_pylist()
        failures, predictions = self._predictor.predict(images, uris)
        self._note = self._predictor.take_note() or self._note
        seconds = (time.perf_counter() - start) / max(1, len(indices))
        if self._first_batches.pending and not self._predictor.one_at_a_time and predictions is not None:
            good = [index for index in range(len(uris)) if index not in failures]
            note = self._first_batches.check(self._predictor.call, images, uris, good, predictions, seconds)
            self._note = note or self._note
        busy = time.perf_counter() - start
        if len(indices):
            meter.add("actor_busy_seconds", busy, device=self._device)
            meter.observe("batch_fill", self._batch_fill(len(indices), table["pixels"]))
        infer_s = np.zeros(table.num_rows, np.float32)
        infer_s[indices] = seconds
        result = result_table(table, {int(indices[index]): failure for index, failure in failures.items()}, infer_s)
        if self._note and len(failures) < len(indices):
            result, self._note = with_note(result, self._note), ""
        return result, predictions

    def _batch_fill(self, images: int, pixels: pa.ChunkedArray) -> float:
        """Return how full a batch is, 0 to 1: of its rows or of its bytes, whichever is more."""
        of_rows = images / max(images, self._batch_rows or 0)
        return max(of_rows, min(1.0, (pc.sum(pc.binary_length(pixels)).as_py() or 0) / MAX_BATCH_BYTES))

    def _with_damage(self, predictions: pa.Table, damage: pa.ChunkedArray) -> pa.Table:
        """Append the column of what is wrong with each image, where ``preprocess.damaged`` lets damaged ones pass."""
        if not self._marks_damage:
            return predictions
        if DAMAGED in predictions.column_names:
            raise UserError(
                f"the predictor's column {DAMAGED!r} has the name of the one that preprocess.damaged: accept adds",
                "Rename it, or set preprocess.damaged=error.",
            )
        return predictions.append_column(pa.field(DAMAGED, pa.string()), damage)

    def _send(self, rows: pa.Table, predictions: pa.Table | None) -> None:
        """Send predictions to the writers of their shards, and wait until these have them.

        Args:
            rows: ``shard`` and ``row`` of each prediction.
            predictions: The predictor's columns.
        """
        import ray

        if predictions is None:
            return
        table = _with_columns(rows, predictions.schema, predictions.columns)
        sent = []
        # Ray does not serialize tables with several columns of one name.
        for part in split_duplicate_columns(table):
            shards = part["shard"].to_numpy()
            for shard in np.unique(shards):
                writer = self._writers[int(shard) % len(self._writers)]
                sent.append(writer.add.remote(int(shard), part.filter(pa.array(shards == shard))))
        ray.get(sent)


def _with_columns(table: pa.Table, schema: pa.Schema, columns: Sequence[pa.Array | pa.ChunkedArray]) -> pa.Table:
    for field, column in zip(schema, columns, strict=True):
        table = table.append_column(field, column)
    return table
