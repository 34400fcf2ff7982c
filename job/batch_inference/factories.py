"""What the actors run: the classifier, embeddings, or a predictor of the user's, made in the actor's process."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from batch_inference.columns import Batch, columns_table
from batch_inference.config import JobConfig, PredictorConfig
from batch_inference.errors import BatchInferenceError, RowFailure, UserError
from batch_inference.storage import Store
from batch_inference.tracebacks import FAULTS, named, told, with_place
from batch_inference.transform import Transform

if TYPE_CHECKING:
    from batch_inference.decisions import Decisions
    from batch_inference.precision import Trial
    from batch_inference.predictor import TorchPredictor

#: Images, one array where all have the same shape, and their URIs, to one row each.
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
        images: About how many images each actor will get; 0 if that is not known.
    """

    config: JobConfig
    transform: Transform
    labels: tuple[str, ...] | None
    images: int = 0

    def __call__(self) -> Predict:
        """Loads the model; returns the function that predicts a batch."""
        from batch_inference.predictor import actor_device

        decisions, names = _decisions(self.config), _label_array(self.labels)
        trial = self._trial(decisions, actor_device(self.config.inference))
        if trial is None or trial.decided is not None:
            predictor = self._predictor(decisions, "float32" if trial is None else str(trial.decided))
            return lambda images, uris: _classifier_table(predictor.classify(_stacked(images)), names)
        return _Undecided(self, trial, decisions, names)

    def _trial(self, decisions: Decisions, device: Any) -> Trial | None:
        """What decides on the precision; None where float32 is the only choice, or the configuration's."""
        from batch_inference.precision import LEAST_IMAGES, NAME, Trial, supports_bfloat16

        if self.config.inference.precision != "auto" or not supports_bfloat16(device):
            return None
        if 0 < self.images < LEAST_IMAGES and decisions.known(NAME) is None:
            return None
        return Trial(decisions, device)

    def _predictor(self, decisions: Decisions, precision: str) -> TorchPredictor:
        from batch_inference.predictor import TorchPredictor

        section = self.config.inference
        if section.precision == "auto":
            section = section.model_copy(update={"precision": precision})
        predictor = TorchPredictor.from_config(
            self.config.model, section, self.config.storage, self.transform, self.images
        )
        predictor.prepare(decisions)
        return predictor


class _Undecided:
    """Predicts in float32 and compares with bfloat16 until that is decided, then goes on with what was."""

    def __init__(self, factory: ClassifierFactory, trial: Trial, decisions: Decisions, names: pa.Array | None) -> None:
        self._trial = trial
        self._names = names
        self._predictor = factory._predictor(decisions, "float32")
        self._lower: TorchPredictor | None = factory._predictor(decisions, "bfloat16")

    def __call__(self, images: Any, uris: list[str]) -> pa.Table:
        pixels = _stacked(images)
        found = self._predictor.classify(pixels)
        if self._lower is not None:
            self._trial.add(found["predicted_class_idx"], self._lower.classify(pixels)["predicted_class_idx"])
            if self._trial.decided is not None:
                if self._trial.decided == "bfloat16":
                    self._predictor = self._lower
                self._lower = None
        return _classifier_table(found, self._names)


@dataclass(frozen=True)
class EmbedderFactory:
    """Makes ``task: embed``: the network of ``model`` without its classifier."""

    config: JobConfig
    transform: Transform
    images: int = 0

    @property
    def columns(self) -> pa.Schema:
        """None before the network has run: how many numbers an embedding has is not known."""
        return pa.schema([])

    def __call__(self) -> Predict:
        """Loads the model; returns the function that embeds a batch."""
        from batch_inference.networks import load_features
        from batch_inference.predictor import TorchEmbedder, actor_device, batch_size_of

        section = self.config.inference
        device = actor_device(section)
        embedder = TorchEmbedder(
            load_features(self.config.model, self.config.storage, self.transform.crop),
            None,
            transform=self.transform,
            device=device,
            precision=section.precision,
            compile=None if section.compile == "auto" else section.compile,
            batch_size=batch_size_of(section, self.transform),
            images=self.images,
            dtype=section.embedding_dtype,
        )
        embedder.prepare(_decisions(self.config))

        def predict(images: Any, uris: list[str]) -> pa.Table:
            features = embedder.embed(_stacked(images))
            column = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
            return pa.table({"embedding": column})

        return predict


@dataclass(frozen=True)
class CustomFactory:
    """Makes a predictor of the user's in the actor's process.

    Attributes:
        cls: The class, or a function; pickled by value where it is not installed, so that workers need no copy of the file.
        spec: Its arguments.
        passthrough: Columns of the input that the output has beside the predictor's, which may have none of their names.
    """

    cls: Any
    spec: PredictorConfig
    passthrough: tuple[str, ...] = ()

    @property
    def checks_rows(self) -> bool:
        """Whether an image's row has to be the same whatever else is in its batch."""
        return not self.spec.depends_on_batch

    def __call__(self) -> Predict:
        """Construct the predictor; return the function that predicts a batch.

        Raises:
            UserError: If its constructor fails, or it cannot be called with a batch.
        """
        predictor = self._made()
        if not callable(predictor):
            raise not_callable(self.spec.path, self.cls)
        worked = False

        def predict(images: Any, uris: list[str]) -> pa.Table:
            nonlocal worked
            batch = Batch(image=_batch_of(images), uri=np.array(uris, dtype=object))
            try:
                answer = predictor(Batch(batch))
            except (RowFailure, BatchInferenceError):
                raise
            except Exception as exc:
                if worked or not _is_network(predictor):
                    raise
                fault = with_place(named(exc), told(exc))
            else:
                worked = True
                return columns_table(answer, batch, len(images), self.passthrough)
            raise UserError(
                f"predictor {self.spec.path} is a torch.nn.Module, and its forward does not take a batch, a dict of numpy arrays: {fault}",
                "Run a network itself by `--set predictor=null --set model.source=package --set model.weights=null "
                f"--model {self.spec.path}`, or write a class whose __call__(self, batch) makes tensors of "
                'batch["image"], calls the network, and returns a dict of columns.',
            )

        return predict

    def _made(self) -> Any:
        """The predictor: an instance, or a function with its arguments."""
        args, kwargs = self.spec.args, self.spec.kwargs
        if _takes_batch(self.cls, args, kwargs):
            return lambda batch: self.cls(batch, *args, **kwargs)
        try:
            return self.cls(*args, **kwargs)
        except BatchInferenceError:
            raise
        except FAULTS as exc:
            fault = with_place(named(exc), told(exc))
        raise UserError(
            f"predictor {self.spec.path} could not be constructed: {fault}",
            "Fix its __init__, or predictor.args and predictor.kwargs, such as --set predictor.kwargs.path=weights.pt.",
        )


def not_callable(path: str, cls: Any) -> UserError:
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


def _takes_batch(found: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a function is itself what predicts a batch, rather than what makes a predictor."""
    if inspect.isclass(found):
        return False
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # built in
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return True
    return False


def _is_network(predictor: Any) -> bool:
    """Whether it is a torch module that is called as such, by its forward."""
    torch = sys.modules.get("torch")
    return torch is not None and type(predictor).__call__ is torch.nn.Module.__call__


def _decisions(config: JobConfig) -> Decisions:
    from batch_inference.decisions import Decisions

    return Decisions(Store(config.output.uri, config.storage) if config.output.uri else None)


def _stacked(images: Any) -> np.ndarray:
    return images if isinstance(images, np.ndarray) else np.stack(images)


def _label_array(labels: tuple[str, ...] | None) -> pa.Array | None:
    return pa.array(labels, pa.string()) if labels else None


def _batch_of(images: Any) -> np.ndarray:
    """What Ray Data gives a numpy batch: one array where all sizes are the same, else an array of arrays."""
    if isinstance(images, np.ndarray):
        return images
    if len({i.shape for i in images}) == 1:
        return np.stack(images)
    out = np.empty(len(images), dtype=object)
    for place, image in enumerate(images):
        out[place] = image
    return out


def _classifier_table(found: dict[str, np.ndarray], names: pa.Array | None) -> pa.Table:
    def label(indices: np.ndarray) -> pa.Array:
        return pa.nulls(indices.size, pa.string()) if names is None else names.take(pa.array(indices))

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
