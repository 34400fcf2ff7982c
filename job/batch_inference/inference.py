"""The actor: keeps the model, turns prepared rows into predictions or errors."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import structlog

from batch_inference import errors as error_classes
from batch_inference import independence
from batch_inference.batching import BATCH_BYTES, NO_ROW, is_out_of_memory, parts_within
from batch_inference.checks import Check
from batch_inference.columns import WrongCount
from batch_inference.errors import BatchInferenceError, RowError, RowFailure, SystemFault, UserError
from batch_inference.factories import CLASSIFIER_SCHEMA, Predict
from batch_inference.marks import Journal
from batch_inference.metrics import meter
from batch_inference.output_schema import beside, distinct_columns
from batch_inference.storage import Store
from batch_inference.telemetry import Telemetry
from batch_inference.tracebacks import FAULTS, named, told, with_place

# What travels from the actors to the driver for each row; the built-in classifier's columns come behind these.
RESULT_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("stage", pa.string()),
        ("error_type", pa.string()),
        ("message", pa.string()),
        ("retryable", pa.bool_()),
        ("bytes", pa.int64()),
        ("fetch_s", pa.float32()),
        ("decode_s", pa.float32()),
        ("infer_s", pa.float32()),
        ("retries", pa.int32()),
        ("image_damage", pa.string()),
        ("traceback", pa.string()),
    ]
)
#: Column of the predictions that says what is wrong with an image, where ``preprocess.damaged: accept`` lets it pass.
DAMAGED = "damaged"
END_OF_JOB = "END_OF_JOB"
# An image alone may have been the victim of a node that was lost, or of a neighbour's memory, so that it gets another chance.
_TRIES_ALONE = 2
# So many images that each kill the process, with none between them that does not, are not a matter of single images any more.
_HOPELESS_CRASHES = 4
_BATCHES_TO_CHECK = 8


class _Mixed(Exception):  # noqa: N818
    """An answer to several images that does not say which value is whose."""

    def __init__(self, failure: RowFailure) -> None:
        super().__init__(failure.error.message)
        self.failure = failure


@dataclass(frozen=True)
class Keeping:
    """Where an actor keeps its journal, once a process of its has died.

    Attributes:
        store: The output folder.
        attempt: Of the job's driver.
        gives_up: Whether images that kill the process one after the other end the job; those that are done again are
            known to fail.
    """

    store: Store
    attempt: str
    gives_up: bool = True

    def journal(self) -> Journal | None:
        """The journal of this actor; None in its first process."""
        import ray

        context = ray.get_runtime_context()
        try:
            if not context.was_current_actor_reconstructed:
                return None
        except Exception as exc:  # who can't be asked just now; a journal too many does no harm
            structlog.get_logger().warning("unknown whether this actor had a process before", error=str(exc))
        return Journal(self.store, str(context.get_actor_id()), self.attempt, _TRIES_ALONE)


def with_failures(table: pa.Table, failures: dict[int, RowError]) -> dict[str, pa.Array]:
    """The columns of a table that say why a row failed, with more failures in them, by place in the table."""
    columns = {name: table[name] for name in ("stage", "error_type", "message", "retryable")}
    if failures:
        for name, column in columns.items():
            values = column.to_pylist()
            for place, error in failures.items():
                values[place] = getattr(error, name)
            columns[name] = pa.array(values, RESULT_SCHEMA.field(name).type)
    return columns


class InferenceActor:
    """One member of the actor pool; Ray Data calls it with tables of prepared rows.

    A batch that the predictor raises on is tried again in halves, down to single images, so that one image costs no other
    its prediction; one whose answer has not one value an image is tried again image by image. A predictor class is checked in
    the first batch: an image's row may not depend on its neighbors. A batch that a process has died of is done image by image,
    and an image that two processes die of alone is a failed row: Ray starts a process again, and gives it what it had, as often
    as it takes.

    Args:
        factory: Makes the predict function; called once.
        writers: Where predictions of any width go by themselves; empty: they return with the rows.
        decoder: Makes what decodes the files that tasks have left as they are; called once, after the factory.
        keeping: Where a process that was started again keeps what it has begun; None: nowhere.
        telemetry: Whose log lines and metrics this process's are; None: they are nobody's.
        batch_size: Images that Ray Data puts into one table; None if that is not known.
        device: What metrics call it: ``gpu`` or ``cpu``.
        marks_damage: Whether predictions have a column :data:`DAMAGED`.
    """

    def __init__(
        self,
        factory: Callable[[], Predict],
        writers: list[Any],
        decoder: Callable[[], Callable[[pa.Table], pa.Table]] | None = None,
        keeping: Keeping | None = None,
        telemetry: Telemetry | None = None,
        batch_size: int | None = None,
        device: str = "cpu",
        marks_damage: bool = False,
    ) -> None:
        self._marks_damage = marks_damage
        self._writers = writers
        self._batch_size = batch_size
        self._device = device
        if telemetry is not None:
            telemetry.begin()
        self._journal: Journal | None = None
        self._failure: BatchInferenceError | None = None
        # Whether answers to several images are not accepted any more, whether any was so far, and an image of several values.
        self._alone, self._accepted, self._several = False, False, ""
        # What the driver should tell.
        self._note = ""
        # Columns of predictions, for batches without one; those of the factory before there was any.
        self._columns: pa.Schema = getattr(factory, "columns", CLASSIFIER_SCHEMA)
        # Batches that may still be looked at for images to check the class's rows with: those of the first ones may all be alike.
        self._checks_left = _BATCHES_TO_CHECK if getattr(factory, "checks_rows", False) else 0
        self.rows_check: Check | None = None
        try:
            self._journal = keeping.journal() if keeping else None
            if keeping and self._journal and self._journal.fatal >= _HOPELESS_CRASHES and keeping.gives_up:
                raise SystemFault(
                    f"the process that runs the predictor died of {self._journal.fatal} images one after the other, each alone, on "
                    f"node {platform.node()}",
                    "Look in the actors' logs for what it died of: a GPU that does not work, or too little memory, ends with the "
                    "node, and the same command resumes; a fault of the predictor's own, such as os._exit, has to be fixed in the class.",
                )
            self._predict = factory()
            self._decode = decoder() if decoder else None
            meter.add("actor_busy_seconds", 0, device=self._device)
            meter.add("out_of_memory_splits", 0)
        except BatchInferenceError as exc:
            self._failure = exc
        except FAULTS as exc:
            self._failure = UserError(
                f"the model could not be loaded: {with_place(named(exc), told(exc))}",
                "Check model.* in the configuration.",
            )

    def __call__(self, table: pa.Table) -> pa.Table:
        """Predicts the rows that have pixels; passes the others on.

        Args:
            table: Rows of ``PREPARED_SCHEMA``.

        Returns:
            As many rows of :data:`RESULT_SCHEMA`, with the classifier's columns where there are no writers.
        """
        if self._failure is not None:
            return _end_of_job(self._failure)
        if table.num_rows:
            structlog.contextvars.bind_contextvars(shard=table["shard"][0].as_py())
        try:
            result, predictions = self._in_parts(table)
            if pc.any(pc.equal(result["row"], NO_ROW)).as_py():
                result = result.filter(pc.not_equal(result["row"], NO_ROW))
            good = result["error_type"].is_null().to_numpy()
            if predictions is not None:
                self._columns = predictions.schema
                predictions = self._marked(predictions, result["image_damage"].filter(pa.array(good)))
        except BatchInferenceError as exc:
            return _end_of_job(exc)
        if self._writers:
            self._send(result.select(["shard", "row"]).filter(pa.array(good)), predictions)
            return result
        if predictions is not None and predictions.num_rows == result.num_rows:
            for field, column in zip(predictions.schema, predictions.columns, strict=True):
                result = result.append_column(field, column)
            return result
        # Every row has a place in the columns of predictions, null where it failed.
        index = pa.array(np.cumsum(good) - 1, mask=~good)
        full = predictions
        if full is None:
            full = self._marked(self._columns.empty_table(), pa.chunked_array([], pa.string()))
        for field, column in zip(full.schema, full.columns, strict=True):
            result = result.append_column(field, column.combine_chunks().take(index))
        return result

    def _marked(self, predictions: pa.Table, damage: pa.ChunkedArray) -> pa.Table:
        """Add what is wrong with each image, where ``preprocess.damaged`` lets damaged ones pass."""
        if not self._marks_damage:
            return predictions
        if DAMAGED in predictions.column_names:
            raise UserError(
                f"the predictor's column {DAMAGED!r} has the name of the one that preprocess.damaged: accept adds",
                "Rename it, or set preprocess.damaged=error.",
            )
        return predictions.append_column(pa.field(DAMAGED, pa.string()), damage)

    def _in_parts(self, table: pa.Table) -> tuple[pa.Table, pa.Table | None]:
        """The same for a table of any size, of which the predictor gets at most ``BATCH_BYTES`` of pixels at once."""
        sizes = pc.fill_null(pc.binary_length(table["pixels"]), 0).to_numpy()
        # Slices, and no copies.
        parts = [table.slice(part.start, part.stop - part.start) for part in parts_within(sizes.tolist())]
        done = [self._carefully(part, self._journal) if self._journal else self._predicted(part) for part in parts]
        if len(done) == 1:
            return done[0]
        return pa.concat_tables([result for result, _ in done]), _joined([predictions for _, predictions in done])

    def _predicted(self, table: pa.Table) -> tuple[pa.Table, pa.Table | None]:
        """Rows of ``RESULT_SCHEMA``, and the predictions of those without an error, in their order."""
        if self._decode is not None:
            table = self._decode(table)
        start = time.perf_counter()
        places, images = _images(table)
        uris = table["uri"].take(pa.array(places, pa.int64())).to_pylist()
        errors, predictions = self._attributed(images, uris)
        seconds = (time.perf_counter() - start) / max(1, len(places))
        if self._checks_left and not self._alone and predictions is not None and predictions.num_rows > 1:
            good = [place for place in range(len(uris)) if place not in errors]
            self._check_rows(images, uris, good, predictions, seconds)
        busy = time.perf_counter() - start
        if len(places):
            meter.add("actor_busy_seconds", busy, device=self._device)
            meter.observe("batch_fill", self._fill(len(places), table["pixels"]))
        infer = np.zeros(table.num_rows, np.float32)
        infer[places] = seconds
        result = _result(table, {int(places[index]): error for index, error in errors.items()}, infer)
        if self._note and len(errors) < len(places):
            result, self._note = _with_note(result, self._note), ""
        return result, predictions

    def _fill(self, images: int, pixels: pa.ChunkedArray) -> float:
        """How full a batch is, of its rows or of its bytes, whichever it has more of."""
        by_rows = images / max(images, self._batch_size or 0)
        return max(by_rows, min(1.0, (pc.sum(pc.binary_length(pixels)).as_py() or 0) / BATCH_BYTES))

    def _carefully(self, table: pa.Table, journal: Journal) -> tuple[pa.Table, pa.Table | None]:
        """The same, in a way that a process which dies of it leaves word.

        A task may be begun again with batches that are done, so that what is known of them is kept.
        """
        if not table.num_rows:
            return self._predicted(table)
        # By its first row with a number.
        first = pc.index(pc.not_equal(table["row"], NO_ROW), True).as_py()
        if first < 0:
            return self._predicted(table)
        batch = f"batch {table['shard'][first]} {table['row'][first]} {table.num_rows}"
        if journal.deaths(batch):
            return self._one_by_one(table, journal)
        journal.begin(batch)
        done = self._predicted(table)
        journal.went_well()
        return done

    def _one_by_one(self, table: pa.Table, journal: Journal) -> tuple[pa.Table, pa.Table | None]:
        """The same, image by image."""
        results, predictions = [], []
        for place in range(table.num_rows):
            row = table.slice(place, 1)
            if self._decode is None and not row["pixels"][0].is_valid:
                results.append(self._predicted(row)[0])  # it has failed before, and nobody looks at it
                continue
            image = f"image {row['shard'][0]} {row['row'][0]}"
            if journal.deaths(image) < _TRIES_ALONE:
                journal.begin(image)
                result, prediction = self._predicted(row)
                journal.went_well()
                predictions.append(prediction)
            else:
                message = (
                    f"the process that runs the predictor died of this image {_TRIES_ALONE} times, when it was alone"
                )
                crash = RowFailure("infer", "PREDICTOR_CRASH", message).error
                result = _result(row, {0: crash}, np.zeros(1, np.float32))
            results.append(result)
        return pa.concat_tables(results), _joined(predictions)

    def _attributed(self, images: Any, uris: list[str]) -> tuple[dict[int, RowError], pa.Table | None]:
        """Predict images so that each value is certain to be that of its image.

        Once a batch's answer could not be told apart, no answer of this process to several images is accepted: that the counts
        of another batch, or of a half, agree would be a coincidence, and alone there is nothing to mix up. That costs speed and
        no rows, and a class that only leaves out an image now and then is served. It does not help where images have several
        values: 0 of one and 2 of another agree, and batches accepted before may hold such rows, here or on other actors. That
        ends the job.

        Raises:
            UserError: If an image alone has several values, and others had one.
        """
        every = list(range(len(uris)))
        reason = ""
        if not self._alone:
            try:
                return self._judged(*self._isolate(every, images, uris))
            except _Mixed as exc:
                self._alone = True
                reason = exc.failure.error.message
        parts = [self._isolate([place], images, uris) for place in every]
        errors = {place: error for part, _ in parts for place, error in part.items()}
        predictions = _joined([table for _, table in parts])
        if reason and predictions is not None:
            self._note = (
                f"from now on an actor predicts each image alone, which is slow: in a batch of {len(uris)}, {reason}"
            )
        return self._judged(errors, predictions)

    def _judged(
        self, errors: dict[int, RowError], predictions: pa.Table | None
    ) -> tuple[dict[int, RowError], pa.Table | None]:
        self._accepted |= predictions is not None and predictions.num_rows > 0
        if self._several and self._accepted:
            raise UserError(
                f"values of the predictor's columns cannot be told apart: alone, {self._several}, while others have one each; in a batch "
                "they would stand beside other images",
                'Return one value for each image, where there are several as a list: {"boxes": [[…], [], […]]}.',
            )
        return errors, predictions

    def _call(self, images: Any, uris: list[str]) -> pa.Table:
        """Predict; raise RowFailure for what the predictor raises, with its traceback, or what ends the job."""
        try:
            return self._predict(images, uris)
        except (RowFailure, BatchInferenceError):
            raise
        except FAULTS as exc:
            if _is_broken_device(exc):
                raise SystemFault(
                    f"a GPU does not work any more: {exc}", "Look at the node's GPU, then start the same command again."
                ) from exc
            kind = "OUT_OF_MEMORY" if is_out_of_memory(exc) else "PREDICTOR_ERROR"
            failure = RowFailure("infer", kind, named(exc), kind == "OUT_OF_MEMORY", traceback=told(exc))
        # Here, since the exception's frames hold on to what did not fit.
        if failure.error.error_type == "OUT_OF_MEMORY":
            _free_memory()
        raise failure

    def _isolate(self, indices: list[int], images: Any, uris: list[str]) -> tuple[dict[int, RowError], pa.Table | None]:
        """Predict the images at ``indices``; halve the batch as long as the predictor raises.

        Raises:
            _Mixed: If it answers several images with what cannot be told apart, or one with another number of values.
        """
        if not indices:
            return {}, None
        try:
            if len(indices) == len(uris):
                return self._checked(indices, self._call(images, uris))
            # Indices are neighbours.
            part = slice(indices[0], indices[-1] + 1)
            return self._checked(indices, self._call(images[part], uris[part]))
        except RowFailure as exc:
            failure = exc
        if len(indices) == 1:
            if isinstance(failure, WrongCount):
                if failure.values > 1:
                    self._several = self._several or f"{uris[indices[0]]}: {failure.error.message}"
                if not self._alone:
                    raise _Mixed(failure)  # of a half that was accepted, too, the counts may agree by chance
            return {indices[0]: failure.error}, None
        if failure.error.error_type == "OUTPUT_MISMATCH":
            raise _Mixed(failure)
        if failure.error.error_type == "OUT_OF_MEMORY":
            meter.add("out_of_memory_splits")
        middle = len(indices) // 2
        errors, left = self._isolate(indices[:middle], images, uris)
        errors_right, right = self._isolate(indices[middle:], images, uris)
        return errors | errors_right, _joined([left, right])

    def _check_rows(self, images: Any, uris: list[str], good: list[int], predictions: pa.Table, seconds: float) -> None:
        """Compare rows of a few images alone and in batches, once in a process.

        Raises:
            UserError: If they depend on their neighbors.
        """
        some = independence.chosen(images, good, seconds)
        self._checks_left -= 1
        if len(some) < 2:
            return
        self._checks_left = 0
        found = self.rows_check = independence.check(
            self._call,
            [images[i] for i in some],
            [uris[i] for i in some],
            predictions.take(pa.array([good.index(i) for i in some])),
            len(uris),
        )
        if found.state == "FAIL":
            raise UserError(found.finding, found.remedy)
        if found.state == "WARN":
            self._note = f"rows of the predictor: {found.finding}"

    @staticmethod
    def _checked(indices: list[int], table: pa.Table) -> tuple[dict[int, RowError], pa.Table]:
        """Turns a confidence or an embedding that is not finite into an error row."""
        finite = _finite(table)
        if finite is None or finite.all():
            return {}, table
        bad = RowFailure("infer", "NOT_FINITE", "the network's output is not a finite number for this image").error
        return {i: bad for i, ok in zip(indices, finite, strict=True) if not ok}, table.filter(pa.array(finite))

    def _send(self, place: pa.Table, predictions: pa.Table | None) -> None:
        """Hands predictions to the writer of their shard and waits until it has them."""
        import ray

        if predictions is None:
            return
        table = place
        for field, column in zip(predictions.schema, predictions.columns, strict=True):
            table = table.append_column(field, column)
        sent = []
        # Ray does not serialize tables with several columns of one name.
        for part in distinct_columns(table):
            shards = part["shard"].to_numpy()
            for shard in np.unique(shards):
                writer = self._writers[int(shard) % len(self._writers)]
                sent.append(writer.add.remote(int(shard), part.filter(pa.array(shards == shard))))
        ray.get(sent)


def _result(table: pa.Table, failures: dict[int, RowError], infer_s: np.ndarray) -> pa.Table:
    """Prepared rows as rows of :data:`RESULT_SCHEMA`, with what has failed here, by place, and seconds of each, float32 (n,)."""
    arrays = [
        table["shard"], table["row"],
        *with_failures(table, failures).values(),
        table["bytes"], table["fetch_s"], table["decode_s"], pa.array(infer_s), table["retries"],
        table["image_damage"],
        _tracebacks(table.num_rows, failures),
    ]  # fmt: skip
    return pa.Table.from_arrays(arrays, schema=RESULT_SCHEMA)


def _with_note(result: pa.Table, note: str) -> pa.Table:
    """Rows of :data:`RESULT_SCHEMA` with a note for the driver in the message of the first one without an error."""
    messages = result["message"].to_pylist()
    good = pc.and_(result["error_type"].is_null(), pc.not_equal(result["row"], NO_ROW))
    messages[pc.index(good, True).as_py()] = note
    place = RESULT_SCHEMA.get_field_index("message")
    return result.set_column(place, RESULT_SCHEMA.field(place), pa.array(messages, pa.string()))


def notes(table: pa.Table) -> list[str]:
    """Return what actors have to say to the driver besides rows of :data:`RESULT_SCHEMA`."""
    if table["message"].null_count == table["error_type"].null_count:
        return []
    said: list[str] = table["message"].filter(table["error_type"].is_null()).drop_null().to_pylist()
    return said


def _tracebacks(rows: int, failures: dict[int, RowError]) -> pa.Array:
    if not any(error.traceback for error in failures.values()):
        return pa.nulls(rows, pa.string())
    return pa.array([failures[row].traceback if row in failures else None for row in range(rows)], pa.string())


def _joined(tables: list[pa.Table | None]) -> pa.Table | None:
    """Predictions of parts of a batch, one behind the other; None where there are none.

    Columns whose types differ stand beside each other: which of them is the job's is known where the shard is closed.
    """
    some = [t for t in tables if t is not None]
    return beside(some) if some else None


def _end_of_job(exc: BatchInferenceError) -> pa.Table:
    """A failure of the whole job as a row: what a task raises reaches the driver without its reason."""
    name = exc.__class__.__name__
    row = dict.fromkeys(RESULT_SCHEMA.names) | {
        "error_type": END_OF_JOB,
        "message": json.dumps([name, exc.message, exc.remedy]),
    }
    return pa.Table.from_pylist([row], RESULT_SCHEMA)


def raise_end_of_job(table: pa.Table) -> None:
    """Raises, in the driver, the failure that an actor has put into a row."""
    # Ray Data puts what several batches gave into one block, good rows first.
    place = pc.index(table["error_type"], END_OF_JOB).as_py()
    if place >= 0:
        name, message, remedy = json.loads(table["message"][place].as_py())
        raise getattr(error_classes, name)(message, remedy)


def _images(table: pa.Table) -> tuple[np.ndarray, Any]:
    """Places of the rows that have pixels, and their images without a copy where that is possible.

    Returns:
        int64 (n,); and uint8 (n, height, width, 3), or a list of n such arrays where shapes differ.
    """
    pixels = table["pixels"]
    places = np.flatnonzero(pixels.is_valid().to_numpy())
    heights, widths = table["height"].to_numpy()[places], table["width"].to_numpy()[places]
    alike = len(places) > 0 and (heights == heights[0]).all() and (widths == widths[0]).all()
    if alike:
        shape = (-1, int(heights[0]), int(widths[0]), 3)
        # Rows without pixels take no bytes, so those of the others lie one behind the other.
        parts = [_bytes_of(chunk).reshape(shape) for chunk in pixels.chunks if len(chunk) > chunk.null_count]
        return places, parts[0] if len(parts) == 1 else np.concatenate(parts)
    flat = [np.frombuffer(value.as_buffer(), np.uint8) for chunk in pixels.chunks for value in chunk if value.is_valid]
    return places, [f.reshape(h, w, 3) for f, h, w in zip(flat, heights.tolist(), widths.tolist(), strict=True)]


def _bytes_of(chunk: pa.Array) -> np.ndarray:
    """All bytes of a ``large_binary`` array without its offsets."""
    _, offsets, data = chunk.buffers()
    ends = np.frombuffer(offsets, np.int64)
    return np.frombuffer(data, np.uint8)[ends[chunk.offset] : ends[chunk.offset + len(chunk)]]


def _finite(table: pa.Table) -> np.ndarray | None:
    """Which rows are finite; None where there is nothing to judge by."""
    if "confidence" in table.column_names and pa.types.is_floating(table.schema.field("confidence").type):
        return _all_finite(table["confidence"].to_numpy(), table.num_rows)
    if "embedding" in table.column_names and _is_vector(table.schema.field("embedding").type):
        column = table["embedding"].combine_chunks()
        finite = np.ones(len(column), bool)
        # The values of a null are left out.
        there = column.is_valid().to_numpy(zero_copy_only=False)
        finite[there] = _all_finite(column.flatten().to_numpy(zero_copy_only=False), int(there.sum()))
        return finite
    return None


def _is_vector(kind: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type))


def _all_finite(values: np.ndarray, rows: int) -> np.ndarray:
    return np.asarray(np.isfinite(values).reshape(rows, -1).all(axis=1))


def _free_memory() -> None:
    """Gives the GPU's unused memory back; does nothing where the process has no torch."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _is_broken_device(exc: BaseException) -> bool:
    """Whether a CUDA error is of the kind after which every later call of the process fails too."""
    text = named(exc)
    return "CUDA error" in text and "out of memory" not in text
