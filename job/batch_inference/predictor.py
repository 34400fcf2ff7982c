"""The classifier: pixels in, class and confidence out."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from batch_inference.config import InferenceConfig, ModelConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.models import load_model, transform_of
from batch_inference.networks import torchvision_weights
from batch_inference.transform import Transform

Batch = dict[str, NDArray[Any]]

_PRECISIONS = {"auto": None, "float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        precision: ``auto`` and ``float32``: as the weights are; ``bfloat16``, ``float16``: autocast.
        compile: Whether to run the network through ``torch.compile``.
        top_k: How many classes :meth:`classify` lists for each image.

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
        compile: bool = False,
        top_k: int = 5,
    ) -> None:
        if precision not in _PRECISIONS:
            raise UserError(f"precision is {precision!r}", f"Choose one of {', '.join(_PRECISIONS)}.")
        network, member = _network(model, weights)
        self.transform = transform or (Transform() if member is None else transform_of(member))
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.top_k = top_k
        self._autocast = _PRECISIONS[precision]
        self.model: Callable[[torch.Tensor], Any] = network.eval().to(self.device)
        if compile:
            self.model = cast(Callable[[torch.Tensor], Any], torch.compile(self.model))

    @classmethod
    def from_config(
        cls, model: ModelConfig, inference: InferenceConfig, storage: StorageConfig, transform: Transform
    ) -> TorchPredictor:
        """The predictor of one of the job's actors; sets the process's number of threads.

        Raises:
            UserError: If the weights do not fit, or a GPU is asked for and there is none.
            SystemFault: If a download fails.
        """
        device = "cpu"
        if inference.gpus_per_actor > 0 and inference.device == "auto":
            if not torch.cuda.is_available():
                raise UserError(
                    f"inference.gpus_per_actor is {inference.gpus_per_actor:g}, but torch finds no usable GPU here",
                    "Check the driver and torch's CUDA version, set inference.gpus_per_actor to 0 to run without GPUs, "
                    "or inference.device to cpu to try a GPU job's placement without any.",
                )
            device = "cuda"
        # Without it every actor would start as many threads as the node has cores.
        torch.set_num_threads(max(1, math.ceil(inference.cpus_per_actor)))
        return cls(
            load_model(model, storage),
            None,
            transform=transform,
            device=device,
            precision=inference.precision,
            compile=inference.compile is True,
            top_k=inference.top_k,
        )

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
        if not pixels.flags.writeable:
            # Ray's arrays are views of its shared memory; torch warns of them although nothing is written here.
            pixels = pixels.copy()
        with torch.inference_mode():
            batch = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)
            with self._precision():
                logits = _tensor(self.model(self.transform.normalize(batch)))
            scores = logits.float().softmax(dim=1)
            # A logit of NaN or plus infinity makes its whole row NaN, and so the confidence.
            confidence, idx = scores.topk(min(self.top_k, scores.shape[1]), dim=1)
            top_idx = idx.to(torch.int32).cpu().numpy()
            top_confidence = confidence.cpu().numpy()
        return {
            "predicted_class_idx": top_idx[:, 0].copy(),
            "confidence": top_confidence[:, 0].copy(),
            "top_k_idx": top_idx,
            "top_k_confidence": top_confidence,
        }

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._autocast)


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
