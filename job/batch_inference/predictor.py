"""The classifier: pixels in, class and confidence out; and the network without its last layer, for embeddings."""

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

from batch_inference import allocation
from batch_inference.batching import CPU_BATCH, BatchSize, rows_within
from batch_inference.config import InferenceConfig, ModelConfig, StorageConfig
from batch_inference.cpus import available_cpus
from batch_inference.decisions import Decisions
from batch_inference.errors import UserError
from batch_inference.execution import Execution
from batch_inference.models import load_model, transform_of
from batch_inference.networks import torchvision_weights
from batch_inference.precision import device_name
from batch_inference.transform import Transform

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
        weights: A member of the network's weights enum, or its name such as ``"DEFAULT"``. With a module it only brings
            its transform; None is allowed there.
        transform: Resize, crop, normalize; None: the weights' own, else ImageNet's usual 256 and 224.
        device: Such as ``"cuda"``; None: a GPU if this process sees one, else the CPU.
        precision: ``auto`` and ``float32``: as the weights are; ``bfloat16``, ``float16``: a copy with weights converted.
        compile: Whether to run the network through ``torch.compile``; None: where ``images`` promise that it pays.
        top_k: How many classes :meth:`classify` lists for each image.
        batch_size: Images that go through the network at once; ``auto``: what suits the device; None: all of a call.
        images: About how many images there will be; 0 if that is not known.

    Raises:
        UserError: If model and weights do not fit each other, or the weights are missing.
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
        network, member = _network(model, weights)
        self.transform = transform or (Transform() if member is None else transform_of(member))
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.top_k = top_k
        self.model = network.eval()
        self._execution = Execution(
            self.model,
            self.transform,
            self.device,
            self._best,
            precision="float32" if precision == "auto" else precision,
            compile=compile,
            batch_size=CPU_BATCH if batch_size == "auto" else batch_size,
            images=images,
        )
        self._searches = batch_size == "auto" and self.device.type == "cuda"

    @classmethod
    def from_config(
        cls,
        model: ModelConfig,
        inference: InferenceConfig,
        storage: StorageConfig,
        transform: Transform,
        images: int = 0,
    ) -> TorchPredictor:
        """The predictor of one of the job's actors; sets the process's number of threads.

        Raises:
            UserError: If the weights do not fit, or a GPU is asked for and there is none.
            SystemFault: If a download fails.
        """
        device = actor_device(inference)
        return cls(
            load_model(model, storage),
            None,
            transform=transform,
            device=device,
            precision=inference.precision,
            compile=None if inference.compile == "auto" else inference.compile,
            top_k=inference.top_k,
            batch_size=batch_size_of(inference, transform),
            images=images,
        )

    def prepare(self, decisions: Decisions) -> None:
        """Finds the batch size where that is left to the device, unless the job knows it, and warms up."""
        side = self.transform.crop
        if self._searches:
            name = f"batch-size {device_name(self.device)} {self._execution.precision}"
            known = (decisions.known(name) or {}).get("batch_size")
            if isinstance(known, int) and known > 0:
                self._execution.batch = BatchSize(known)
            else:
                decisions.decide(name, {"batch_size": self._execution.find_batch_size(side)})
        self._execution.warm_up(side)

    def __call__(self, batch: Batch) -> Batch:
        """Classifies images of any size.

        Args:
            batch: ``image`` holds n RGB uint8 arrays: (n, h, w, 3), or n objects of shape (h, w, 3); gray ones of shape
                (h, w) are fine as well.

        Returns:
            ``predicted_class_idx`` int32 (n,) and ``confidence`` float32 (n,): the best class and its softmax. An image
            without pixels gives -1 and NaN.

        Raises:
            TypeError: If an image is not uint8.
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
            pixels[index] = self.transform.pixels(_image(array))
        best = self.classify(pixels)
        idx, confidence = best["predicted_class_idx"], best["confidence"]
        idx[empty] = -1
        confidence[empty] = np.nan
        return {"predicted_class_idx": idx, "confidence": confidence}

    def classify(self, pixels: NDArray[np.uint8]) -> Batch:
        """Classifies images that are at the network's size already.

        Args:
            pixels: uint8 (n, crop, crop, 3).

        Returns:
            ``predicted_class_idx`` int32 (n,), ``confidence`` float32 (n,), ``top_k_idx`` int32 (n, k) and
            ``top_k_confidence`` float32 (n, k), best first, with k the lesser of ``top_k`` and the number of classes.
            Logits that are NaN or plus infinity give a confidence of NaN.
        """
        top_idx, top_confidence = self._execution(pixels)
        return {
            "predicted_class_idx": top_idx[:, 0].copy(),
            "confidence": top_confidence[:, 0].copy(),
            "top_k_idx": top_idx,
            "top_k_confidence": top_confidence,
        }

    def _best(self, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scores = _tensor(output).float().softmax(dim=1)
        # A logit of NaN or plus infinity makes its whole row NaN, and so the confidence.
        confidence, idx = scores.topk(min(self.top_k, scores.shape[1]), dim=1)
        return idx.to(torch.int32), confidence


class TorchEmbedder(TorchPredictor):
    """A network without its classifier: pixels in, features out. Constructed as :class:`TorchPredictor` is.

    Args:
        dtype: ``float32`` or ``float16``, of what :meth:`embed` gives.
    """

    def __init__(self, *args: Any, dtype: str = "float32", **kwargs: Any) -> None:
        self._output = torch.float16 if dtype == "float16" else torch.float32
        super().__init__(*args, **kwargs)

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Embeds images that are at the network's size already.

        Args:
            pixels: uint8 (n, crop, crop, 3).

        Returns:
            ``dtype`` (n, features).
        """
        return self._execution(pixels)[0]

    def _best(self, output: Any) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return (_tensor(output).to(self._output),)


def batch_size_of(inference: InferenceConfig, transform: Transform) -> int | Literal["auto"]:
    """Return the batch size of a configuration, as far as :data:`~batch_inference.batching.BATCH_BYTES` allows it.

    More would never come, and a batch that is not full is filled up on a GPU.
    """
    size = inference.batch_size
    return size if size == "auto" else rows_within(size, 3 * transform.crop**2)


def actor_device(inference: InferenceConfig) -> torch.device:
    """Return the device of an actor. On the CPU it gets as many threads as it has CPUs, which are set here.

    More threads than there are CPUs only wait for each other: an actor on one CPU of a container has one, whatever it asks for.

    Raises:
        UserError: If a GPU is asked for and there is none.
    """
    # Without it every actor would start as many threads as the node has cores.
    torch.set_num_threads(min(available_cpus(), max(1, math.ceil(inference.cpus_per_actor))))
    if inference.gpus_per_actor == 0 or inference.device == "cpu":
        allocation.for_network()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"inference.gpus_per_actor is {inference.gpus_per_actor:g}, but torch finds no usable GPU here",
            "Check the driver and torch's CUDA version, set inference.gpus_per_actor to 0 to run without GPUs, "
            "or inference.device to cpu to try a GPU job's placement without any.",
        )
    # Batches have one shape, so that the fastest kernels are worth a search.
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda")


def _network(model: Callable[..., nn.Module] | str | nn.Module, weights: Any) -> tuple[nn.Module, Any]:
    """The network, and the member of the weights enum if there is one."""
    if isinstance(model, nn.Module):
        # A name means nothing without an enum; the default of the constructor is one.
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
    member = _member(model, weights) if isinstance(weights, str) else weights
    network = model(weights=member)
    if not isinstance(network, nn.Module):
        raise UserError(
            f"the model is a {type(network).__name__}, not a torch.nn.Module", "Give a callable that builds one."
        )
    return network, member if hasattr(member, "transforms") else None


def _member(model: Callable[..., Any], name: str) -> Any:
    from torchvision.models import get_model_weights

    try:
        members = get_model_weights(model).__members__
    except ValueError:
        # A callable of one's own may take names.
        if "weights" in inspect.signature(model).parameters:
            return name
        raise UserError(f"{model!r} takes no weights", "Give a callable like torchvision.models.resnet152.") from None
    short = name.rpartition(".")[2]
    if short not in members:
        raise UserError(
            f"{getattr(model, '__name__', model)} has no weights {name!r}", f"Choose one of {', '.join(members)}."
        )
    return members[short]


def _image(array: NDArray[Any]) -> Image.Image:
    if array.dtype == object:
        # Arrow gives rows of variable shape as nested objects now and then.
        array = np.array(array.tolist(), dtype=np.uint8)
    if array.dtype != np.uint8:
        raise TypeError(f"images are {array.dtype} of shape {array.shape}, not RGB uint8 of shape (height, width, 3)")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _tensor(output: Any) -> torch.Tensor:
    if isinstance(output, Sequence) and output:
        output = output[0]
    return cast(torch.Tensor, getattr(output, "logits", output))
