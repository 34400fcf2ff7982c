"""Predictors as users write them, outside the package."""

from __future__ import annotations

import os
import time

import numpy as np
from PIL import Image


class MeanColor:
    """A trivial predictor: no network, so that tests measure everything but a network."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.delay_s:
            time.sleep(self.delay_s)
        means = np.array([image.mean() for image in batch["image"]], np.float32)
        return {"mean": means, "pid": np.full(len(means), os.getpid())}


class DiesOfWhite(MeanColor):
    """Ends its process at a white image, as a bug in native code does."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if any(image.min() > 250 for image in batch["image"]):
            os.abort()
        return super().__call__(batch)


class ArticlePredictor:
    """The tutorial's class with a small network in place of ResNet-152: PIL inside, two columns out."""

    def __init__(self, classes: int = 10) -> None:
        import torch
        from torchvision import transforms

        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
            torch.nn.Linear(8, classes),
        ).eval().to(self.device)  # fmt: skip
        self.transform = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(56), transforms.ToTensor()])

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        images = [Image.fromarray(array).convert("RGB") for array in batch["image"]]
        tensors = torch.stack([self.transform(image) for image in images]).to(self.device)
        with torch.inference_mode():
            probabilities = torch.nn.functional.softmax(self.model(tensors), dim=1)
            confidence, index = torch.max(probabilities, dim=1)
        return {"predicted_class_idx": index.cpu().numpy(), "confidence": confidence.cpu().numpy()}


class Embedding:
    """Wide output: 512 numbers an image."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"embedding": np.stack([np.resize(image.astype(np.float32), 512) for image in batch["image"]])}


class FailsOnEverything:
    """A predictor with a mistake in it."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise KeyError("pixels")


class Flattened:
    """Puts the boxes of a batch into one list, which has as many as there are images: two of each, then the first of these."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[list[float]]]:
        boxes = [[float(image.mean()), float(number)] for image in batch["image"] for number in range(2)]
        return {"box": boxes[: max(2, len(batch["image"]))]}


class CannotStart:
    """A predictor whose constructor fails."""

    def __init__(self) -> None:
        raise FileNotFoundError("weights.bin")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {}


class SlowStart(MeanColor):
    """Takes its time before it answers, so that a test can interrupt it."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(0.5)
        return super().__call__(batch)


class FirstPixel:
    """Costs nothing whatever the size of the images, so that decoding them is what takes the time."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"first": np.array([int(image[0, 0, 0]) for image in batch["image"]])}


class NoMemoryForMany(MeanColor):
    """Takes its time, and finds no memory for more than four images at once, as a GPU that is too small does."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        if len(batch["image"]) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        time.sleep(0.5)
        return super().__call__(batch)


class TypesDrift:
    """Columns whose types depend on what is in a batch, as Python's lists have them."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, object]:
        count = len(batch["image"])
        numbers = [int(str(uri)[-10:-4]) for uri in batch["uri"]]
        early = max(numbers) < 4
        return {
            "number": numbers,
            "label": [None] * count if early else [f"t{n}" for n in numbers],
            "boxes": [[] if early else [[n + 0.5, 1.0]] * (n % 3) for n in numbers],
            "size": np.array(numbers, np.int32) if early else np.array(numbers, np.int64),
        }


class TypesExclude(TypesDrift):
    """Return two columns as well that no type holds."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, object]:
        out = super().__call__(batch)
        numbers = out["size"]
        assert isinstance(numbers, np.ndarray)
        early = numbers.dtype == np.int32
        out["mixed"] = numbers if early else [f"s{n}" for n in numbers]
        if not early:
            out["late"] = numbers
        return out


class TypesWithin:
    """A number for some images and a text for others, in the same list."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, object]:
        numbers = [int(str(uri)[-10:-4]) for uri in batch["uri"]]
        return {"number": numbers, "mixed": [f"s{n}" if n % 3 else n for n in numbers]}
