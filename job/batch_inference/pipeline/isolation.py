"""Isolation of the images that a predictor fails on, so that one image costs no other its prediction."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pyarrow as pa

from batch_inference.errors import BatchInferenceError, InfrastructureError, RowError, RowFailure, UserError
from batch_inference.models.batch_size import is_out_of_memory
from batch_inference.models.columns import WrongCountError
from batch_inference.pipeline.factories import Predict
from batch_inference.pipeline.result_rows import join_predictions
from batch_inference.telemetry.metrics import meter
from batch_inference.telemetry.tracebacks import PREDICTOR_EXCEPTIONS, describe_exception, format_traceback


class _MixedBatchError(Exception):
    """An answer to several images that does not say which value belongs to which image."""

    def __init__(self, failure: RowError) -> None:
        super().__init__(failure.error.message)
        self.failure = failure


class IsolatingPredictor:
    """Calls a predict function so that each failure and each value is certain to belong to its image.

    A batch that the function raises on is tried again in halves, down to single images.

    Once the answer to a batch could not be told apart, no answer of this process to several images is accepted: the counts of
    another batch, or of a half, would agree by coincidence only, and a single image cannot be mixed up. That costs speed and no
    rows, and serves a class that only leaves out an image now and then. It does not help where one image has several values: an
    image with none and one with two add up, and batches accepted earlier may hold such rows, here or on other actors. That ends
    the job.

    Args:
        predict: Images and their URIs to one row each.

    Attributes:
        one_at_a_time: Whether answers to several images are no longer accepted.
    """

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self.one_at_a_time = False
        self._accepted_any = False
        # An image that had several values, and the fact; "" as long as there is none.
        self._several_values = ""
        self._note = ""

    def take_note(self) -> str:
        """Return what to tell the driver since the last call; "" for nothing."""
        note, self._note = self._note, ""
        return note

    def predict(self, images: Any, uris: list[str]) -> tuple[dict[int, RowFailure], pa.Table | None]:
        """Predict images.

        Args:
            images: uint8 (n, height, width, 3), or a list of n such arrays.
            uris: Of each image.

        Returns:
            Failures by index of the image; and one row for each other image, in their order, None where all failed.

        Raises:
            UserError: If an image alone has several values while others have one.
            BatchInferenceError: If the predict function ends the job.
        """
        indices = list(range(len(uris)))
        reason = ""
        if not self.one_at_a_time:
            try:
                return self._accepted(*self._isolate(indices, images, uris))
            except _MixedBatchError as exc:
                self.one_at_a_time = True
                reason = exc.failure.error.message
        parts = [self._isolate([index], images, uris) for index in indices]
        failures = {index: failure for part, _ in parts for index, failure in part.items()}
        predictions = join_predictions(table for _, table in parts)
        if reason and predictions is not None:
            self._note = (
                f"from now on an actor predicts each image alone, which is slow: in a batch of {len(uris)}, {reason}"
            )
        return self._accepted(failures, predictions)

    def call(self, images: Any, uris: list[str]) -> pa.Table:
        """Call the predict function once.

        Raises:
            RowError: What the function raises, with its traceback.
            BatchInferenceError: What ends the job.
        """
        try:
            return self._predict(images, uris)
        except (RowError, BatchInferenceError):
            raise
        except PREDICTOR_EXCEPTIONS as exc:
            if _is_broken_device(exc):
                raise InfrastructureError(
                    f"a GPU does not work any more: {exc}", "Look at the node's GPU, then start the same command again."
                ) from exc
            error_type = "OUT_OF_MEMORY" if is_out_of_memory(exc) else "PREDICTOR_ERROR"
            failure = RowError(
                "infer",
                error_type,
                describe_exception(exc),
                error_type == "OUT_OF_MEMORY",
                traceback=format_traceback(exc),
            )
        # Outside of the handler, since the exception's frames hold on to what did not fit.
        if failure.error.error_type == "OUT_OF_MEMORY":
            _free_memory()
        raise failure

    def _accepted(
        self, failures: dict[int, RowFailure], predictions: pa.Table | None
    ) -> tuple[dict[int, RowFailure], pa.Table | None]:
        """Return an answer as it is, unless it proves that values cannot be told apart."""
        self._accepted_any |= predictions is not None and predictions.num_rows > 0
        if self._several_values and self._accepted_any:
            raise UserError(
                f"values of the predictor's columns cannot be told apart: alone, {self._several_values}, while others have one each; "
                "in a batch they would stand beside other images",
                'Return one value for each image, where there are several as a list: {"boxes": [[…], [], […]]}.',
            )
        return failures, predictions

    def _isolate(
        self, indices: list[int], images: Any, uris: list[str]
    ) -> tuple[dict[int, RowFailure], pa.Table | None]:
        """Predict the images at ``indices``, which are consecutive; halve the batch as long as the predictor raises.

        Raises:
            _MixedBatchError: If the answer to several images cannot be told apart, or one image has another number of values.
        """
        if not indices:
            return {}, None
        try:
            if len(indices) == len(uris):
                return _without_infinite(indices, self.call(images, uris))
            part = slice(indices[0], indices[-1] + 1)
            return _without_infinite(indices, self.call(images[part], uris[part]))
        except RowError as exc:
            failure = exc
        if len(indices) == 1:
            if isinstance(failure, WrongCountError):
                if failure.values > 1:
                    self._several_values = self._several_values or f"{uris[indices[0]]}: {failure.error.message}"
                if not self.one_at_a_time:
                    raise _MixedBatchError(failure)  # the counts of a half that was accepted may agree by chance, too
            return {indices[0]: failure.error}, None
        if failure.error.error_type == "OUTPUT_MISMATCH":
            raise _MixedBatchError(failure)
        if failure.error.error_type == "OUT_OF_MEMORY":
            meter.add("out_of_memory_splits")
        middle = len(indices) // 2
        left_failures, left = self._isolate(indices[:middle], images, uris)
        right_failures, right = self._isolate(indices[middle:], images, uris)
        return left_failures | right_failures, join_predictions([left, right])


def _without_infinite(indices: list[int], table: pa.Table) -> tuple[dict[int, RowFailure], pa.Table]:
    """Turn a confidence or an embedding that is not finite into a failure of its image."""
    finite = _finite(table)
    if finite is None or finite.all():
        return {}, table
    failure = RowError("infer", "NOT_FINITE", "the network's output is not a finite number for this image").error
    return {i: failure for i, ok in zip(indices, finite, strict=True) if not ok}, table.filter(pa.array(finite))


def _finite(table: pa.Table) -> np.ndarray | None:
    """Return which rows are finite, bool (n,); None where no column says."""
    if "confidence" in table.column_names and pa.types.is_floating(table.schema.field("confidence").type):
        return _all_finite(table["confidence"].to_numpy(), table.num_rows)
    if "embedding" in table.column_names and _is_vector(table.schema.field("embedding").type):
        column = table["embedding"].combine_chunks()
        finite = np.ones(len(column), bool)
        # A null takes no place in the flattened values.
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        finite[valid] = _all_finite(column.flatten().to_numpy(zero_copy_only=False), int(valid.sum()))
        return finite
    return None


def _is_vector(arrow_type: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(arrow_type) and pa.types.is_floating(arrow_type.value_type))


def _all_finite(values: np.ndarray, rows: int) -> np.ndarray:
    return np.asarray(np.isfinite(values).reshape(rows, -1).all(axis=1))


def _free_memory() -> None:
    """Release the GPU's unused memory; do nothing where the process has no torch."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _is_broken_device(exc: BaseException) -> bool:
    """Return whether an exception is a CUDA error after which every later call of the process fails too."""
    text = describe_exception(exc)
    return "CUDA error" in text and "out of memory" not in text
