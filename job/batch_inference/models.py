"""What is known about a network before it runs: its transform, its labels, and what identifies its weights."""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from batch_inference.config import ModelConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.exported import ExportedNetwork
from batch_inference.networks import (
    import_timm,
    load_model,
    timm_config,
    torchvision_weights,
    weights_path,
)
from batch_inference.storage import read_object
from batch_inference.transform import Transform
from batch_inference.weights import file_digest

__all__ = ["IMAGENET", "ModelInfo", "describe_model", "load_model", "transform_of"]

IMAGENET = "imagenet-1k"


@dataclass(frozen=True)
class ModelInfo:
    """A network as the driver sees it.

    Attributes:
        transform: From an image to the network's input.
        labels: Name of each class, in order; None if there are none.
        identity: What tells these weights from any other, as flat texts, for the job's fingerprint.
    """

    transform: Transform
    labels: tuple[str, ...] | None
    identity: dict[str, str]


def describe_model(model: ModelConfig, storage: StorageConfig) -> ModelInfo:
    """Checks the model's configuration and says what is known about it.

    Published weights of torchvision and timm are looked up by name, not downloaded. Those of ``file`` and ``package``
    are loaded and tried on one black image, so that what does not fit shows here and not in every actor.

    Raises:
        UserError: If anything does not fit; the message says what would.
        SystemFault: If a remote weights file cannot be read although it is there.
    """
    if model.source == "torchvision":
        weights = torchvision_weights(model.name, model.weights)
        categories = weights.meta.get("categories")
        if not categories:
            raise UserError(
                f"{weights!r} are weights without a classifier", "Choose another member, such as IMAGENET1K_V1."
            )
        transform = _configured(model) or transform_of(weights)
        identity = {"source": "torchvision", "name": model.name, "weights": repr(weights), "url": weights.url}
        return ModelInfo(transform, _labels(model, storage, len(categories), tuple(categories)), identity)
    if model.source == "timm":
        name, config = timm_config(model.name, model.weights)
        own = _timm_labels(config)
        where = str(config.get("hf_hub_id") or config.get("url") or "")
        identity = {"source": "timm", "name": name.partition(".")[0], "weights": name.partition(".")[2], "url": where}
        transform = _configured(model) or _timm_transform(config, name)
        return ModelInfo(transform, _labels(model, storage, int(config["num_classes"]), own), identity)
    path = weights_path(model, storage)
    network = load_model(model, storage)
    identity = {"source": model.source, "name": model.name, "weights": model.weights or ""}
    if model.source == "package":
        identity.update(args=repr(model.args), package=_distribution(model.name))
    if path is not None:
        # What the file holds counts, not where it lies.
        identity["weights"] = path.name
        identity["sha256"] = model.sha256 or file_digest(path)
        if path.suffix.lower() == ".pt2":
            identity["name"] = ""
    transform = _configured(model) or _default_transform(network)
    classes = _try(network, transform, model)
    return ModelInfo(transform, _labels(model, storage, classes, None), identity)


def transform_of(weights: Any) -> Transform:
    """The transform of a member of a torchvision weights enum.

    Raises:
        UserError: If its preset is not that of image classification.
    """
    preset = weights.transforms()
    try:
        return Transform(
            resize=int(preset.resize_size[0]),
            crop=int(preset.crop_size[0]),
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            interpolation=str(preset.interpolation.value),
        )
    except (AttributeError, TypeError, ValueError) as exc:
        raise UserError(f"{weights!r} are not weights of an image classifier: {exc}", "Give model.transform.") from exc


def _configured(model: ModelConfig) -> Transform | None:
    if model.transform is None:
        return None
    given = model.transform
    return Transform(given.resize, given.crop, given.mean, given.std, given.interpolation)


def _default_transform(network: Any) -> Transform:
    if isinstance(network, ExportedNetwork) and network.size[0] is not None and network.size[0] == network.size[1]:
        # A program that takes one size only says itself what to crop to; 256/224 is the usual margin around it.
        side = network.size[0]
        return Transform(resize=round(side * 256 / 224), crop=side)
    return Transform()


def _timm_transform(config: dict[str, Any], name: str) -> Transform:
    data = import_timm().data.resolve_data_config(pretrained_cfg=config)
    channels, height, width = data["input_size"]
    remedy = "Give model.transform, or choose another network."
    if channels != 3 or height != width:
        raise UserError(f"timm's {name} takes images of shape {(channels, height, width)}, not square RGB", remedy)
    if data["crop_mode"] != "center":
        raise UserError(f"timm's {name} crops in mode {data['crop_mode']!r}, which is not supported", remedy)
    # timm's own rounding.
    return Transform(
        resize=math.floor(height / data["crop_pct"]),
        crop=height,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
    )


def _timm_labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    if config.get("label_names"):
        return tuple(config["label_names"])
    if config["num_classes"] == 1000:
        return _imagenet_labels()
    timm_data = import_timm().data
    subset = timm_data.infer_imagenet_subset(config)
    try:
        return tuple(timm_data.ImageNetInfo(subset).label_descriptions()) if subset else None
    except (AssertionError, KeyError):
        return None


def _imagenet_labels() -> tuple[str, ...]:
    """Torchvision's names of the classes, from a file: importing torchvision for them would take a second."""
    return tuple(Path(__file__).with_name("imagenet-1k.txt").read_text(encoding="utf-8").splitlines())


def _labels(
    model: ModelConfig, storage: StorageConfig, classes: int, own: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    """The configured labels, else the weights' own; as many as there are classes."""
    if model.labels is None:
        labels, where = own, "the weights' labels"
    elif isinstance(model.labels, tuple):
        labels, where = model.labels, "model.labels"
    elif model.labels == IMAGENET:
        labels, where = _imagenet_labels(), IMAGENET
    else:
        labels, where = _read_labels(model.labels, storage), model.labels
    if labels is not None and len(labels) != classes:
        raise UserError(
            f"{where} names {len(labels):,} classes, but the network has {classes:,}",
            "Give one label for each class, in order.",
        )
    return labels


def _read_labels(location: str, storage: StorageConfig) -> tuple[str, ...]:
    try:
        text = read_object(location, storage, "the labels").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(
            f"the labels {location} are not UTF-8 text", "Give a text file with one label a line."
        ) from None
    return tuple(line.strip() for line in text.rstrip().splitlines())


def _try(network: Any, transform: Transform, model: ModelConfig) -> int:
    """Number of classes that the network gives for one black image."""
    image = torch.zeros((1, transform.crop, transform.crop, 3), dtype=torch.uint8)
    try:
        with torch.inference_mode():
            return int(network(transform.normalize(image)).shape[1])
    except UserError:
        raise
    except Exception as exc:
        raise UserError(
            f"the network does not run on an image of {transform.crop} x {transform.crop} pixels: "
            f"{' '.join(str(exc).split())[:300]}",
            "Give the size it expects as model.transform.crop.",
        ) from exc


def _distribution(path: str) -> str:
    """Name and version of the installed package that has a module, or the module where none has."""
    top = path.partition(":")[0].partition(".")[0]
    names = importlib.metadata.packages_distributions().get(top, [])
    if names:
        return f"{names[0]} {importlib.metadata.version(names[0])}"
    module = importlib.import_module(top)
    file = getattr(module, "__file__", None)
    # A module of one's own has no version; its source is its identity.
    return f"{top} {file_digest(Path(file))}" if file else top
