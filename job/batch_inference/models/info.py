"""Facts about a network before it runs: its transform, its labels, and the identity of its weights."""

from __future__ import annotations

import importlib.metadata
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from batch_inference.config import ModelConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.images.transform import Transform
from batch_inference.models.exported import ExportedNetwork
from batch_inference.models.networks import find_timm_config, import_timm, load_model, torchvision_weights, weights_path
from batch_inference.models.weights import file_digest
from batch_inference.storage.store import read_object

__all__ = ["IMAGENET_LABELS", "ModelInfo", "describe_model", "load_model", "weights_transform"]

#: Value of ``model.labels`` that stands for torchvision's names of the 1,000 ImageNet classes.
IMAGENET_LABELS = "imagenet-1k"


@dataclass(frozen=True)
class ModelInfo:
    """The facts about a network that the driver needs.

    Attributes:
        transform: Transform from an image to the network's input.
        labels: Name of each class, in order; None if the network has no labels.
        identity: Source, name and version of the weights as flat texts; they are part of the job's fingerprint.
    """

    transform: Transform
    labels: tuple[str, ...] | None
    identity: dict[str, str]


def describe_model(model: ModelConfig, storage: StorageConfig) -> ModelInfo:
    """Check the model's configuration and describe the network.

    Published weights of torchvision and timm are looked up by name, not downloaded. Weights of ``file`` and ``package`` are
    loaded and tried on one black image, so that an error shows here and not in every actor.

    Args:
        model: Configuration of the network.
        storage: Options to reach remote weights and labels.

    Raises:
        UserError: If network, weights, transform or labels do not fit each other; the message says what would.
        InfrastructureError: If a remote weights file exists but cannot be read.
    """
    if model.source == "torchvision":
        weights = torchvision_weights(model.name, model.weights)
        categories = weights.meta.get("categories")
        if not categories:
            raise UserError(
                f"{weights!r} are weights without a classifier", "Choose another member, such as IMAGENET1K_V1."
            )
        transform = _configured_transform(model) or weights_transform(weights)
        identity = {"source": "torchvision", "name": model.name, "weights": repr(weights), "url": weights.url}
        return ModelInfo(transform, _labels(model, storage, len(categories), tuple(categories)), identity)
    if model.source == "timm":
        name, config = find_timm_config(model.name, model.weights)
        own_labels = _timm_labels(config)
        url = str(config.get("hf_hub_id") or config.get("url") or "")
        identity = {"source": "timm", "name": name.partition(".")[0], "weights": name.partition(".")[2], "url": url}
        transform = _configured_transform(model) or _timm_transform(config, name)
        return ModelInfo(transform, _labels(model, storage, int(config["num_classes"]), own_labels), identity)
    path = weights_path(model, storage)
    network = load_model(model, storage)
    identity = {"source": model.source, "name": model.name, "weights": model.weights or ""}
    if model.source == "package":
        identity.update(args=repr(model.args), package=_package_version(model.name))
    if path is not None:
        # The content of the file counts, not its location.
        identity["weights"] = path.name
        identity["sha256"] = model.sha256 or file_digest(path)
        if path.suffix.lower() == ".pt2":
            identity["name"] = ""
    transform = _configured_transform(model) or _default_transform(network)
    classes = _count_classes(network, transform, model)
    return ModelInfo(transform, _labels(model, storage, classes, None), identity)


def weights_transform(weights: Any) -> Transform:
    """Return the transform of a member of a torchvision weights enum.

    Raises:
        UserError: If its preset is not one of image classification.
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


def _configured_transform(model: ModelConfig) -> Transform | None:
    if model.transform is None:
        return None
    given = model.transform
    return Transform(given.resize, given.crop, given.mean, given.std, given.interpolation)


def _default_transform(network: Any) -> Transform:
    if isinstance(network, ExportedNetwork) and network.size[0] is not None and network.size[0] == network.size[1]:
        # A program for one size determines the crop; 256/224 is ImageNet's usual ratio of resize to crop.
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
    # timm rounds down, too.
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
    """Return torchvision's names of the classes from a file, since importing torchvision for them would take a second."""
    return tuple(Path(__file__).with_name("imagenet-1k.txt").read_text(encoding="utf-8").splitlines())


def _labels(
    model: ModelConfig, storage: StorageConfig, classes: int, own_labels: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    """Return the configured labels, or else those of the weights; raise UserError unless there is one per class."""
    if model.labels is None:
        labels, origin = own_labels, "the weights' labels"
    elif isinstance(model.labels, tuple):
        labels, origin = model.labels, "model.labels"
    elif model.labels == IMAGENET_LABELS:
        labels, origin = _imagenet_labels(), IMAGENET_LABELS
    else:
        labels, origin = _read_labels(model.labels, storage), model.labels
    if labels is not None and len(labels) != classes:
        raise UserError(
            f"{origin} names {len(labels):,} classes, but the network has {classes:,}",
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


def _count_classes(network: Any, transform: Transform, model: ModelConfig) -> int:
    """Return the number of classes, by running the network on one black image."""
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


def _package_version(path: str) -> str:
    """Return name and version of the package that installed a module; of a module without a package, its name and digest."""
    module_name = path.partition(":")[0].partition(".")[0]
    names = importlib.metadata.packages_distributions().get(module_name, [])
    if names:
        return f"{names[0]} {importlib.metadata.version(names[0])}"
    module = importlib.import_module(module_name)
    file = getattr(module, "__file__", None)
    # The user's own module has no version; its source identifies it.
    return f"{module_name} {file_digest(Path(file))}" if file else module_name
