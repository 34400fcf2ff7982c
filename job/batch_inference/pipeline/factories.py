"""Factories of the predict function, called in the actor's process: classifier, embeddings, or a predictor class."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from batch_inference.config import JobConfig, PredictorConfig
from batch_inference.errors import BatchInferenceError, RowError, UserError
from batch_inference.images.transform import Transform
from batch_inference.models.columns import Batch, predictions_table
from batch_inference.storage.store import Store
from batch_inference.telemetry.tracebacks import (
    PREDICTOR_EXCEPTIONS,
    describe_exception,
    format_traceback,
    with_traceback,
)

if TYPE_CHECKING:
    from batch_inference.models.precision import PrecisionTrial
    from batch_inference.models.predictor import TorchPredictor
    from batch_inference.output.decisions import Decisions

#: Predicts a batch: images (one uint8 array (n, height, width, 3) if all have the same shape, else a list of arrays) and their
#: URIs to a table with one row for each image.
Predict = Callable[[Any, list[str]], pa.Table]

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
    """Makes the built-in classifier of ``model``.

    Attributes:
        config: The job.
        transform: Resize and crop that the tasks have applied.
        labels: Name of each class; None: the model has none.
        images: About how many images each actor will get; 0: unknown.
    """

    config: JobConfig
    transform: Transform
    labels: tuple[str, ...] | None
    images: int = 0

    def __call__(self) -> Predict:
        """Load the model; return the function that predicts a batch."""
        from batch_inference.models.predictor import set_up_actor_device

        decisions, names = _decisions(self.config), _label_array(self.labels)
        trial = self._trial(decisions, set_up_actor_device(self.config.inference))
        if trial is None or trial.decided is not None:
            predictor = self._predictor(decisions, "float32" if trial is None else str(trial.decided))
            return lambda images, uris: _classifier_table(predictor.classify(_stacked(images)), names)
        return PrecisionComparison(self, trial, decisions, names)

    def _trial(self, decisions: Decisions, device: Any) -> PrecisionTrial | None:
        """Return the trial that chooses the precision; None if there is no choice, or the configuration makes it."""
        from batch_inference.models.precision import DECISION_NAME, MIN_JOB_IMAGES, PrecisionTrial, supports_bfloat16

        if self.config.inference.precision != "auto" or not supports_bfloat16(device):
            return None
        if 0 < self.images < MIN_JOB_IMAGES and decisions.known(DECISION_NAME) is None:
            return None
        return PrecisionTrial(decisions, device)

    def _predictor(self, decisions: Decisions, precision: str) -> TorchPredictor:
        from batch_inference.models.predictor import TorchPredictor

        inference = self.config.inference
        if inference.precision == "auto":
            inference = inference.model_copy(update={"precision": precision})
        predictor = TorchPredictor.from_config(
            self.config.model, inference, self.config.storage, self.transform, self.images
        )
        predictor.prepare(decisions)
        return predictor


class PrecisionComparison:
    """Predicts in float32 and compares with bfloat16 until the trial has decided, then predicts in the chosen precision."""

    def __init__(
        self, factory: ClassifierFactory, trial: PrecisionTrial, decisions: Decisions, names: pa.Array | None
    ) -> None:
        self._trial = trial
        self._names = names
        self._predictor = factory._predictor(decisions, "float32")
        self._lower: TorchPredictor | None = factory._predictor(decisions, "bfloat16")

    def __call__(self, images: Any, uris: list[str]) -> pa.Table:
        """Predict images, in both precisions while the comparison lasts."""
        pixels = _stacked(images)
        classes = self._predictor.classify(pixels)
        if self._lower is not None:
            self._trial.add(classes["predicted_class_idx"], self._lower.classify(pixels)["predicted_class_idx"])
            if self._trial.decided is not None:
                if self._trial.decided == "bfloat16":
                    self._predictor = self._lower
                self._lower = None
        return _classifier_table(classes, self._names)


@dataclass(frozen=True)
class EmbedderFactory:
    """Makes the embedder of ``task: embed``: the network of ``model`` without its classifier.

    Attributes: as those of :class:`ClassifierFactory`.
    """

    config: JobConfig
    transform: Transform
    images: int = 0

    @property
    def columns(self) -> pa.Schema:
        """Columns of the predictions: none before the network has run, since the length of an embedding is not known."""
        return pa.schema([])

    def __call__(self) -> Predict:
        """Load the model; return the function that embeds a batch."""
        from batch_inference.models.networks import load_features
        from batch_inference.models.predictor import TorchEmbedder, configured_batch_size, set_up_actor_device

        inference = self.config.inference
        device = set_up_actor_device(inference)
        embedder = TorchEmbedder(
            load_features(self.config.model, self.config.storage, self.transform.crop),
            None,
            transform=self.transform,
            device=device,
            precision=inference.precision,
            compile=None if inference.compile == "auto" else inference.compile,
            batch_size=configured_batch_size(inference, self.transform),
            images=self.images,
            dtype=inference.embedding_dtype,
        )
        embedder.prepare(_decisions(self.config))

        def predict(images: Any, uris: list[str]) -> pa.Table:
            features = embedder.embed(_stacked(images))
            column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
            return pa.table({"embedding": column})

        return predict


@dataclass(frozen=True)
class CustomFactory:
    """Makes a user's predictor.

    Attributes:
        cls: The class, or a function; pickled by value if it is not installed, so that workers need no copy of the file.
        spec: Its path and arguments.
        passthrough: Columns of the input that the output has, too; the predictor's columns must have other names.
    """

    cls: Any
    spec: PredictorConfig
    passthrough: tuple[str, ...] = ()

    @property
    def checks_rows(self) -> bool:
        """Whether an image's row must be the same whatever else is in its batch."""
        return not self.spec.depends_on_batch

    def __call__(self) -> Predict:
        """Construct the predictor; return the function that predicts a batch.

        Raises:
            UserError: If its constructor fails, or it cannot be called with a batch.
        """
        predictor = self._construct()
        if not callable(predictor):
            raise not_callable_error(self.spec.path, self.cls)
        has_worked = False

        def predict(images: Any, uris: list[str]) -> pa.Table:
            nonlocal has_worked
            batch = Batch(image=_batch_of(images), uri=np.array(uris, dtype=object))
            try:
                answer = predictor(Batch(batch))
            except (RowError, BatchInferenceError):
                raise
            except Exception as exc:
                if has_worked or not _is_network(predictor):
                    raise
                fault = with_traceback(describe_exception(exc), format_traceback(exc))
            else:
                has_worked = True
                return predictions_table(answer, batch, len(images), self.passthrough)
            raise UserError(
                f"predictor {self.spec.path} is a torch.nn.Module, and its forward does not take a batch, a dict of numpy arrays: {fault}",
                "Run a network itself by `--set predictor=null --set model.source=package --set model.weights=null "
                f"--model {self.spec.path}`, or write a class whose __call__(self, batch) makes tensors of "
                'batch["image"], calls the network, and returns a dict of columns.',
            )

        return predict

    def _construct(self) -> Any:
        """Return the predictor: an instance, or a function with its arguments bound."""
        args, kwargs = self.spec.args, self.spec.kwargs
        if _takes_batch(self.cls, args, kwargs):
            return lambda batch: self.cls(batch, *args, **kwargs)
        try:
            return self.cls(*args, **kwargs)
        except BatchInferenceError:
            raise
        except PREDICTOR_EXCEPTIONS as exc:
            fault = with_traceback(describe_exception(exc), format_traceback(exc))
        raise UserError(
            f"predictor {self.spec.path} could not be constructed: {fault}",
            "Fix its __init__, or predictor.args and predictor.kwargs, such as --set predictor.kwargs.path=weights.pt.",
        )


def not_callable_error(path: str, cls: Any) -> UserError:
    """Return the error for a class without ``__call__``, with the lines to add where it has a method of another name."""
    fact, remedy = f"predictor {path} has no __call__", "Give it __call__(self, batch) -> dict of columns"
    method = next((name for name in ("predict_batch", "predict", "forward", "infer") if hasattr(cls, name)), None)
    if method is None:
        return UserError(fact, f"{remedy}.")
    lines = (
        "    def __call__(self, batch):",
        "        # RGB uint8 arrays of shape (height, width, 3)",
        "        from PIL import Image",
        '        images = [Image.fromarray(image) for image in batch["image"]]',
        f"        results = self.{method}(images)",
        '        return {"prediction": list(results)}  # one value for each image',
    )
    return UserError(
        "\n".join([f"{fact}; around its {method} it might be:", *lines]), f"{remedy}, such as the lines above."
    )


def _takes_batch(predictor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a function predicts a batch itself, rather than making a predictor."""
    if inspect.isclass(predictor):
        return False
    try:
        signature = inspect.signature(predictor)
    except (TypeError, ValueError):  # built in
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return True
    return False


def _is_network(predictor: Any) -> bool:
    """Return whether a predictor is a torch module whose call is that of torch, by its ``forward``."""
    torch = sys.modules.get("torch")
    return torch is not None and type(predictor).__call__ is torch.nn.Module.__call__


def _decisions(config: JobConfig) -> Decisions:
    from batch_inference.output.decisions import Decisions

    return Decisions(Store(config.output.uri, config.storage) if config.output.uri else None)


def _stacked(images: Any) -> np.ndarray:
    return images if isinstance(images, np.ndarray) else np.stack(images)


def _label_array(labels: tuple[str, ...] | None) -> pa.Array | None:
    return pa.array(labels, pa.string()) if labels else None


def _batch_of(images: Any) -> np.ndarray:
    """Return images as Ray Data would: one uint8 array (n, height, width, 3) if all sizes are equal, else an object array (n,)."""
    if isinstance(images, np.ndarray):
        return images
    if len({image.shape for image in images}) == 1:
        return np.stack(images)
    batch = np.empty(len(images), dtype=object)
    for index, image in enumerate(images):
        batch[index] = image
    return batch


def _classifier_table(classes: dict[str, np.ndarray], names: pa.Array | None) -> pa.Table:
    """Return the classifier's arrays as rows of :data:`CLASSIFIER_SCHEMA`.

    Args:
        classes: ``predicted_class_idx`` (n,), ``confidence`` (n,), ``top_k_idx`` (n, k), ``top_k_confidence`` (n, k).
        names: Label of each class; None: labels are null.
    """

    def label(indices: np.ndarray) -> pa.Array:
        return pa.nulls(indices.size, pa.string()) if names is None else names.take(pa.array(indices))

    index, top, confidence = classes["predicted_class_idx"], classes["top_k_idx"], classes["top_k_confidence"]
    flat = top.reshape(-1)
    structs = pa.StructArray.from_arrays(
        [pa.array(flat, pa.int32()), label(flat), pa.array(confidence.reshape(-1), pa.float32())], fields=list(_TOP_K)
    )
    offsets = pa.array(np.arange(0, flat.size + 1, top.shape[1]), pa.int32())
    return pa.Table.from_arrays(
        [
            pa.array(index, pa.int32()),
            label(index),
            pa.array(classes["confidence"], pa.float32()),
            pa.ListArray.from_arrays(offsets, structs),
        ],
        schema=CLASSIFIER_SCHEMA,
    )
