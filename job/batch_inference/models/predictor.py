"""Predictors: a classifier (pixels in, class and confidence out), and an embedder (a network without its last layer)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from batch_inference.config import InferenceConfig, ModelConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.images import malloc
from batch_inference.images.transform import Transform
from batch_inference.models.batch_size import CPU_BATCH_SIZE, BatchSize, max_batch_rows
from batch_inference.models.execution import Execution
from batch_inference.models.info import load_model, weights_transform
from batch_inference.models.networks import torchvision_weights
from batch_inference.models.precision import device_name
from batch_inference.output.decisions import Decisions
from batch_inference.system.cpus import available_cpus

Batch = dict[str, NDArray[Any]]

_PRECISIONS = ("auto", "float32", "bfloat16", "float16")


class TorchPredictor:
    """A PyTorch image classifier that Ray Data calls with batches.

    >>> from torchvision.models import resnet152, ResNet152_Weights
    >>> dataset.map_batches(
    ...     TorchPredictor, fn_constructor_args=(resnet152, ResNet152_Weights.DEFAULT), batch_size=32,
    ...     num_gpus=1, compute=ray.data.ActorPoolStrategy(size=4))  # doctest: +SKIP

    Args:
        model: A callable like ``torchvision.models.resnet152``, called as ``model(weights=weights)``; the name of a
            torchvision classification network; or a ``torch.nn.Module`` with its weights loaded.
        weights: A member of the network's weights enum, or its name such as ``"DEFAULT"``. With a module, only the transform of
            the member is used, and None is allowed.
        transform: Resize, crop and normalization; None uses that of the weights, or else ImageNet's usual 256 and 224 pixels.
        device: Device such as ``"cuda"``; None uses a GPU if this process sees one, else the CPU.
        precision: ``auto`` and ``float32`` leave the weights as they are; ``bfloat16`` and ``float16`` use a converted copy.
        compile: Whether to use ``torch.compile``; None uses it if ``images`` are enough work for it to pay.
        top_k: Number of classes that :meth:`classify` returns per image.
        batch_size: Images that go through the network at once. ``auto`` uses what suits the device, None all images of a call.
        images: Approximate number of images in total; 0 if unknown.

    Raises:
        UserError: If model and weights do not fit each other, or the weights are missing.
        InfrastructureError: If a download fails.
    """

    def __init__(
        self,
        model: Callable[..., nn.Module] | str | nn.Module = "resnet152",
        weights: Any = "DEFAULT",
        *,
        transform: Transform | None = None,
        device: str | torch.device | None = None,
        precision: str = "auto",
        compile: bool | None = False,
        top_k: int = 5,
        batch_size: int | Literal["auto"] | None = None,
        images: int = 0,
    ) -> None:
        if precision not in _PRECISIONS:
            raise UserError(f"precision is {precision!r}", f"Choose one of {', '.join(_PRECISIONS)}.")
        network, member = _build_network(model, weights)
        self.transform = transform or (Transform() if member is None else weights_transform(member))
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.top_k = top_k
        self.model = network.eval()
        self._execution = Execution(
            self.model,
            self.transform,
            self.device,
            self._postprocess,
            precision="float32" if precision == "auto" else precision,
            compile=compile,
            batch_size=CPU_BATCH_SIZE if batch_size == "auto" else batch_size,
            images=images,
        )
        self._finds_batch_size = batch_size == "auto" and self.device.type == "cuda"

    @classmethod
    def from_config(
        cls,
        model: ModelConfig,
        inference: InferenceConfig,
        storage: StorageConfig,
        transform: Transform,
        images: int = 0,
    ) -> TorchPredictor:
        """Return the predictor of an actor of a job, and set the number of threads of this process.

        Args:
            model: Configuration of the network.
            inference: Device, precision and batch size.
            storage: Options to reach remote weights.
            transform: Transform of the job.
            images: Approximate number of images of this actor; 0 if unknown.

        Raises:
            UserError: If the weights do not fit, or a GPU is requested and there is none.
            InfrastructureError: If a download fails.
        """
        device = set_up_actor_device(inference)
        return cls(
            load_model(model, storage),
            None,
            transform=transform,
            device=device,
            precision=inference.precision,
            compile=None if inference.compile == "auto" else inference.compile,
            top_k=inference.top_k,
            batch_size=configured_batch_size(inference, transform),
            images=images,
        )

    def prepare(self, decisions: Decisions) -> None:
        """Warm up. With ``batch_size="auto"`` on a GPU, first find the batch size, or use the one that the job has decided on."""
        side = self.transform.crop
        if self._finds_batch_size:
            name = f"batch-size {device_name(self.device)} {self._execution.precision}"
            known = (decisions.known(name) or {}).get("batch_size")
            if isinstance(known, int) and known > 0:
                self._execution.batch_size = BatchSize(known)
            else:
                decisions.decide(name, {"batch_size": self._execution.find_batch_size(side)})
        self._execution.warm_up(side)

    def __call__(self, batch: Batch) -> Batch:
        """Classify images of any size.

        Args:
            batch: ``image`` holds n RGB uint8 arrays: one array (n, h, w, 3), or n arrays of shape (h, w, 3). Gray images of
                shape (h, w) are accepted, too.

        Returns:
            ``predicted_class_idx`` int32 (n,) and ``confidence`` float32 (n,): the best class and its softmax, from 0 to 1. An
            image without pixels gets -1 and NaN.

        Raises:
            TypeError: If an image is not uint8.
            RowError: ``infer OUT_OF_MEMORY`` if a single image does not fit into the device's memory.
        """
        images = batch["image"]
        crop = self.transform.crop
        pixels = np.zeros((len(images), crop, crop, 3), np.uint8)
        empty = np.zeros(len(images), bool)
        for index, image in enumerate(images):
            array = np.asarray(image)
            if array.size == 0:
                empty[index] = True
                continue
            pixels[index] = self.transform.pixels(_to_rgb_image(array))
        columns = self.classify(pixels)
        idx, confidence = columns["predicted_class_idx"], columns["confidence"]
        idx[empty] = -1
        confidence[empty] = np.nan
        return {"predicted_class_idx": idx, "confidence": confidence}

    def classify(self, pixels: NDArray[np.uint8]) -> Batch:
        """Classify images that have the network's input size already.

        Args:
            pixels: RGB images, uint8 (n, crop, crop, 3).

        Returns:
            ``predicted_class_idx`` int32 (n,), ``confidence`` float32 (n,), ``top_k_idx`` int32 (n, k) and
            ``top_k_confidence`` float32 (n, k), best first; k is ``top_k`` or the number of classes, whichever is smaller.
            Logits that are NaN or plus infinity give a confidence of NaN.

        Raises:
            RowError: ``infer OUT_OF_MEMORY`` if a single image does not fit into the device's memory.
        """
        top_idx, top_confidence = self._execution(pixels)
        return {
            "predicted_class_idx": top_idx[:, 0].copy(),
            "confidence": top_confidence[:, 0].copy(),
            "top_k_idx": top_idx,
            "top_k_confidence": top_confidence,
        }

    def _postprocess(self, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return index and softmax of the best classes, (n, k) each, best first."""
        scores = _output_tensor(output).float().softmax(dim=1)
        # A logit of NaN or plus infinity makes all scores of its row NaN, and with them the confidence.
        confidence, idx = scores.topk(min(self.top_k, scores.shape[1]), dim=1)
        return idx.to(torch.int32), confidence


class TorchEmbedder(TorchPredictor):
    """A network without its classifier: pixels in, features out. Its arguments are those of :class:`TorchPredictor`.

    Args:
        dtype: Type of the embeddings: ``float32`` or ``float16``.
    """

    def __init__(self, *args: Any, dtype: str = "float32", **kwargs: Any) -> None:
        self._output_dtype = torch.float16 if dtype == "float16" else torch.float32
        super().__init__(*args, **kwargs)

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Embed images that have the network's input size already.

        Args:
            pixels: RGB images, uint8 (n, crop, crop, 3).

        Returns:
            Embeddings of type ``dtype`` (n, features).

        Raises:
            RowError: ``infer OUT_OF_MEMORY`` if a single image does not fit into the device's memory.
        """
        return self._execution(pixels)[0]

    def _postprocess(self, output: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return (_output_tensor(output).to(self._output_dtype),)


def configured_batch_size(inference: InferenceConfig, transform: Transform) -> int | Literal["auto"]:
    """Return the configured batch size, at most what fits into :data:`~batch_inference.models.batch_size.MAX_BATCH_BYTES`.

    Larger batches never arrive, and on a GPU a smaller batch would be padded for nothing.
    """
    size = inference.batch_size
    return size if size == "auto" else max_batch_rows(size, 3 * transform.crop**2)


def set_up_actor_device(inference: InferenceConfig) -> torch.device:
    """Set up torch for an actor and return its device.

    The process gets ``inference.cpus_per_actor`` threads, at most the available CPUs: more threads would only wait for each other.

    Raises:
        UserError: If a GPU is requested and there is none.
    """
    # By default every actor would start as many threads as the node has cores.
    torch.set_num_threads(min(available_cpus(), max(1, math.ceil(inference.cpus_per_actor))))
    if inference.gpus_per_actor == 0 or inference.device == "cpu":
        malloc.keep_activation_memory()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"inference.gpus_per_actor is {inference.gpus_per_actor:g}, but torch finds no usable GPU here",
            "Check the driver and torch's CUDA version, set inference.gpus_per_actor to 0 to run without GPUs, "
            "or inference.device to cpu to try a GPU job's placement without any.",
        )
    # All batches have one shape, so the search for the fastest kernels pays.
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda")


def _build_network(model: Callable[..., nn.Module] | str | nn.Module, weights: Any) -> tuple[nn.Module, Any]:
    """Return the network, and the member of its weights enum or None."""
    if isinstance(model, nn.Module):
        # A module has no enum to look a name up in, and the constructor's default is a name.
        return model, None if isinstance(weights, str) else weights
    if isinstance(model, str):
        name = weights if isinstance(weights, str) or weights is None else weights.name
        member = torchvision_weights(model, name)
        config = ModelConfig(source="torchvision", name=model, weights=name)
        return load_model(config, StorageConfig()), member
    if weights is None:
        raise UserError(
            "weights is None, so the network would predict with random weights",
            "Give a member of its weights enum or its name, or a torch.nn.Module with its weights loaded.",
        )
    member = _weights_member(model, weights) if isinstance(weights, str) else weights
    network = model(weights=member)
    if not isinstance(network, nn.Module):
        raise UserError(
            f"the model is a {type(network).__name__}, not a torch.nn.Module", "Give a callable that builds one."
        )
    return network, member if hasattr(member, "transforms") else None


def _weights_member(model: Callable[..., Any], name: str) -> Any:
    """Return the member of the weights enum of a builder; the name itself if the builder has no enum but takes names."""
    from torchvision.models import get_model_weights

    try:
        members = get_model_weights(model).__members__
    except ValueError:
        # The user's own builder may take names.
        if "weights" in inspect.signature(model).parameters:
            return name
        raise UserError(f"{model!r} takes no weights", "Give a callable like torchvision.models.resnet152.") from None
    short = name.rpartition(".")[2]
    if short not in members:
        raise UserError(
            f"{getattr(model, '__name__', model)} has no weights {name!r}", f"Choose one of {', '.join(members)}."
        )
    return members[short]


def _to_rgb_image(array: NDArray[Any]) -> Image.Image:
    if array.dtype == object:
        # Arrow sometimes returns rows of variable shape as nested objects.
        array = np.array(array.tolist(), dtype=np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"images are {array.dtype} of shape {array.shape}, not RGB uint8 of shape (height, width, 3)")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _output_tensor(output: Any) -> torch.Tensor:
    if isinstance(output, Sequence) and output:
        output = output[0]
    return cast(torch.Tensor, getattr(output, "logits", output))
