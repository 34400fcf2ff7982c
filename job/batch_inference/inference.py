"""The actor: keeps the model, turns prepared rows into predictions or errors."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_inference import errors as error_classes
from batch_inference.config import JobConfig, PredictorConfig
from batch_inference.errors import BatchInferenceError, RowFailure, SystemFault, UserError
from batch_inference.transform import Transform

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
    ]
)
END_OF_JOB = "END_OF_JOB"
_TOP_K = pa.struct([("class_idx", pa.int32()), ("label", pa.string()), ("confidence", pa.float32())])
CLASSIFIER_SCHEMA = pa.schema(
    [
        ("predicted_class_idx", pa.int32()),
        ("label", pa.string()),
        ("confidence", pa.float32()),
        ("top_k", pa.list_(_TOP_K)),
    ]
)


@dataclass(frozen=True)
class ClassifierFactory:
    """Makes the built-in classifier of ``model`` in the actor's process."""

    config: JobConfig
    transform: Transform
    labels: tuple[str, ...] | None

    def __call__(self) -> Callable[[list[np.ndarray], list[str]], pa.Table]:
        """Loads the model; returns the function that predicts a batch."""
        from batch_inference.predictor import TorchPredictor

        predictor = TorchPredictor.from_config(
            self.config.model, self.config.inference, self.config.storage, self.transform
        )

        def predict(images: list[np.ndarray], uris: list[str]) -> pa.Table:
            return _classifier_table(predictor.classify(np.stack(images)), self.labels)

        return predict


@dataclass(frozen=True)
class CustomFactory:
    """Makes a predictor of the user's in the actor's process.

    Attributes:
        cls: The class; pickled by value where it is not installed, so that workers need no copy of the file.
        spec: Its arguments.
    """

    cls: Any
    spec: PredictorConfig

    def __call__(self) -> Callable[[list[np.ndarray], list[str]], pa.Table]:
        """Constructs the predictor; returns the function that predicts a batch."""
        try:
            predictor = self.cls(*self.spec.args, **self.spec.kwargs)
        except BatchInferenceError:
            raise
        except Exception as exc:
            raise UserError(
                f"predictor {self.spec.path} could not be constructed: {type(exc).__name__}: {exc}",
                "Mend its __init__, or predictor.args and predictor.kwargs.",
            ) from exc
        if not callable(predictor):
            raise UserError(
                f"predictor {self.spec.path} has no __call__", "Give it __call__(self, batch) -> dict of columns."
            )

        def predict(images: list[np.ndarray], uris: list[str]) -> pa.Table:
            batch = {"image": _batch_of(images), "uri": np.array(uris, dtype=object)}
            return _columns_table(predictor(dict(batch)), batch, len(images))

        return predict


class InferenceActor:
    """One member of the actor pool; Ray Data calls it with tables of prepared rows.

    A batch that the predictor fails on is tried again in halves, down to single images, so that one image costs no other
    its prediction.

    Args:
        factory: Makes the predict function; called once.
        writers: Where predictions of any width go by themselves; empty: they return with the rows.
    """

    def __init__(
        self, factory: Callable[[], Callable[[list[np.ndarray], list[str]], pa.Table]], writers: list[Any]
    ) -> None:
        self._writers = writers
        self._failure: BatchInferenceError | None = None
        try:
            self._predict = factory()
        except BatchInferenceError as exc:
            self._failure = exc
        except Exception as exc:
            self._failure = UserError(
                f"the model could not be loaded: {type(exc).__name__}: {exc}", "Check model.* in the configuration."
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
        start = time.perf_counter()
        places, images = _images(table)
        uris = table["uri"].take(pa.array(places, pa.int64())).to_pylist()
        try:
            good, errors, predictions = self._isolate(list(range(len(images))), images, uris)
        except BatchInferenceError as exc:
            return _end_of_job(exc)
        seconds = (time.perf_counter() - start) / max(1, len(images))
        columns = {name: table[name].to_pylist() for name in ("stage", "error_type", "message", "retryable")}
        for index, error in errors.items():
            place = places[index]
            columns["stage"][place], columns["error_type"][place] = error.stage, error.error_type
            columns["message"][place], columns["retryable"][place] = error.message, error.retryable
        infer = np.zeros(table.num_rows, np.float32)
        infer[places] = seconds
        arrays = [
            table["shard"], table["row"],
            *(pa.array(columns[n], RESULT_SCHEMA.field(n).type) for n in columns),
            table["bytes"], table["fetch_s"], table["decode_s"], pa.array(infer), table["retries"],
        ]  # fmt: skip
        result = pa.Table.from_arrays(arrays, schema=RESULT_SCHEMA)
        good_places = np.array([places[i] for i in good], np.int64)
        if self._writers:
            self._send(result.select(["shard", "row"]).take(pa.array(good_places)), predictions)
            return result
        # Every row has a place in the columns of predictions, null where it failed.
        spread = np.full(table.num_rows, -1, np.int64)
        spread[good_places] = np.arange(len(good_places))
        index = pa.array(spread, mask=spread < 0)
        full = predictions if predictions is not None else CLASSIFIER_SCHEMA.empty_table()
        for name in full.column_names:
            result = result.append_column(full.schema.field(name), full[name].combine_chunks().take(index))
        return result

    def _isolate(
        self, indices: list[int], images: list[np.ndarray], uris: list[str]
    ) -> tuple[list[int], dict[int, Any], pa.Table | None]:
        """Predicts the images at ``indices``; halves the batch as long as it fails."""
        if not indices:
            return [], {}, None
        try:
            table = self._predict([images[i] for i in indices], [uris[i] for i in indices])
            return self._checked(indices, table)
        except RowFailure as exc:
            failure = exc
        except BatchInferenceError:
            raise
        except Exception as exc:
            if _is_broken_device(exc):
                raise SystemFault(
                    f"a GPU does not work any more: {exc}", "Look at the node's GPU, then start the same command again."
                ) from exc
            failure = RowFailure("infer", "PREDICTOR_ERROR", f"{type(exc).__name__}: {exc}")
        if len(indices) == 1:
            return [], {indices[0]: failure.error}, None
        middle = len(indices) // 2
        good, errors, left = self._isolate(indices[:middle], images, uris)
        good_right, errors_right, right = self._isolate(indices[middle:], images, uris)
        tables = [t for t in (left, right) if t is not None]
        try:
            whole = pa.concat_tables(tables, promote_options="permissive") if tables else None
        except pa.ArrowException as exc:
            raise UserError(
                f"the predictor's columns differ from batch to batch: {exc}",
                "Return the same columns with the same types for every batch.",
            ) from None
        return good + good_right, errors | errors_right, whole

    @staticmethod
    def _checked(indices: list[int], table: pa.Table) -> tuple[list[int], dict[int, Any], pa.Table]:
        """Turns a confidence that is not a number into an error row."""
        if "confidence" not in table.column_names or not pa.types.is_floating(table.schema.field("confidence").type):
            return indices, {}, table
        finite = np.isfinite(table["confidence"].to_numpy())
        if finite.all():
            return indices, {}, table
        bad = RowFailure("infer", "NOT_FINITE", "the network's output is not a finite number for this image").error
        good = [i for i, ok in zip(indices, finite, strict=True) if ok]
        return good, {i: bad for i, ok in zip(indices, finite, strict=True) if not ok}, table.filter(pa.array(finite))

    def _send(self, place: pa.Table, predictions: pa.Table | None) -> None:
        """Hands predictions to the writer of their shard and waits until it has them."""
        import ray

        if predictions is None:
            return
        table = place
        for name in predictions.column_names:
            table = table.append_column(predictions.schema.field(name), predictions[name])
        shards = table["shard"].to_numpy()
        sent = []
        for shard in np.unique(shards):
            writer = self._writers[int(shard) % len(self._writers)]
            sent.append(writer.add.remote(int(shard), table.filter(pa.array(shards == shard))))
        ray.get(sent)


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


def _images(table: pa.Table) -> tuple[list[int], list[np.ndarray]]:
    """Places of the rows that have pixels, and views of these as (height, width, 3) uint8 arrays."""
    places, images = [], []
    heights, widths = table["height"].to_pylist(), table["width"].to_pylist()
    place = 0
    for chunk in table["pixels"].chunks:
        for value in chunk:
            if value.is_valid:
                flat = np.frombuffer(value.as_buffer(), np.uint8)
                images.append(flat.reshape(heights[place], widths[place], 3))
                places.append(place)
            place += 1
    return places, images


def _batch_of(images: list[np.ndarray]) -> np.ndarray:
    """What Ray Data gives a numpy batch: one array where all sizes are the same, else an array of arrays."""
    if len({i.shape for i in images}) == 1:
        return np.stack(images)
    out = np.empty(len(images), dtype=object)
    for place, image in enumerate(images):
        out[place] = image
    return out


def _classifier_table(found: dict[str, np.ndarray], labels: tuple[str, ...] | None) -> pa.Table:
    names = np.array(labels, dtype=object) if labels else None

    def label(indices: np.ndarray) -> pa.Array:
        return pa.array(names[indices] if names is not None else [None] * indices.size, pa.string())

    index, top, confidence = found["predicted_class_idx"], found["top_k_idx"], found["top_k_confidence"]
    flat = top.reshape(-1)
    structs = pa.StructArray.from_arrays(
        [pa.array(flat, pa.int32()), label(flat), pa.array(confidence.reshape(-1), pa.float32())], fields=list(_TOP_K)
    )
    offsets = pa.array(np.arange(0, flat.size + 1, top.shape[1]), pa.int32())
    return pa.Table.from_arrays(
        [
            pa.array(index, pa.int32()),
            label(index),
            pa.array(found["confidence"], pa.float32()),
            pa.ListArray.from_arrays(offsets, structs),
        ],
        schema=CLASSIFIER_SCHEMA,
    )


def _columns_table(columns: Any, batch: dict[str, np.ndarray], rows: int) -> pa.Table:
    """A predictor's answer as a table, checked to have one value a row in every column."""

    def wrong(message: str) -> RowFailure:
        return RowFailure("postprocess", "OUTPUT_MISMATCH", message)

    if not isinstance(columns, dict):
        raise wrong(f"the predictor returned {type(columns).__name__}, not a dict of columns")
    out: dict[str, pa.Array] = {}
    for name, values in columns.items():
        # Predictors that add to their batch and return it do not mean to store the images.
        if batch.get(name) is values:
            continue
        if name in ("shard", "row", "uri"):
            raise wrong(f"the predictor's column {name!r} has the name of one of the output's own; rename it")
        try:
            out[str(name)] = _array(values)
        except Exception as exc:
            raise wrong(f"the predictor's column {name!r} cannot be stored: {exc}") from exc
        if len(out[str(name)]) != rows:
            raise wrong(f"the predictor's column {name!r} has {len(out[str(name)])} values for {rows} images")
    if not out:
        raise wrong("the predictor returned no columns")
    return pa.table(out)


def _array(values: Any) -> pa.Array:
    """Numbers, texts, lists, numpy arrays or torch tensors of any rank as an Arrow array, first axis first."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    if isinstance(values, np.ndarray) and values.dtype != object:
        if values.ndim == 1:
            return pa.array(values)
        array = pa.array(values.reshape(-1))
        for size in reversed(values.shape[1:]):
            length = len(array) // size if size else len(values)
            array = pa.ListArray.from_arrays(pa.array(np.arange(length + 1) * size, pa.int32()), array)
        return array
    return pa.array([v.tolist() if hasattr(v, "tolist") else v for v in values])


def _is_broken_device(exc: Exception) -> bool:
    """Whether a CUDA error is of the kind after which every later call of the process fails too."""
    text = str(exc)
    return "CUDA error" in text and "out of memory" not in text
