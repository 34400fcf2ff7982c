"""Networks of the four sources, built and loaded with their weights. :mod:`.info` describes them."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import re
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from batch_inference.config import ModelConfig, StorageConfig
from batch_inference.errors import InfrastructureError, UserError
from batch_inference.models.exported import ExportedNetwork, Logits
from batch_inference.models.state_dicts import load_state_dict, other_class_count, read_state_dict, strip_prefix
from batch_inference.models.torchvision_import import torchvision_models
from batch_inference.models.weights import cache_folder, local_weights_file, node_lock
from batch_inference.storage.store import exception_line

_TIMM_PREFIX = "timm/"
_WEIGHTS_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pt2", ".tar", ".onnx", ".h5")


def load_model(model: ModelConfig, storage: StorageConfig) -> nn.Module:
    """Build a network and load its weights, on the CPU and in evaluation mode.

    Args:
        model: Configuration of the network.
        storage: Options to reach remote weights.

    Returns:
        A module that maps float32 (n, 3, h, w) to logits (n, classes).

    Raises:
        UserError: If configuration and weights do not fit each other; the message says what would.
        InfrastructureError: If a download fails.
    """
    if model.source == "torchvision":
        network = _load_torchvision(model, storage)
    elif model.source == "timm":
        network = _load_timm(model)
    else:
        path = weights_path(model, storage)
        if path is not None and path.suffix.lower() == ".pt2":
            return ExportedNetwork(path)
        if model.source == "file":
            assert path is not None  # noqa: S101 - `weights_path` refuses a file source without a file
            network = _load_architecture(model.name, read_state_dict(path), path)
        else:
            network = build_from_package(model)
            if path is not None:
                load_state_dict(network, strip_prefix(network, read_state_dict(path), str(path)), str(path))
    return Logits(network).eval()


def load_features(model: ModelConfig, storage: StorageConfig, side: int) -> nn.Module:
    """Load a network without its classification layer; its output is the input of that layer.

    For networks of timm these are the pre-logits features (``num_classes=0``). For all others they are the input of the last
    linear layer, whose output must be the network's output.

    Args:
        model: Configuration of the network.
        storage: Options to reach remote weights.
        side: Height and width of the network's input in pixels.

    Returns:
        A module that maps float32 (n, 3, side, side) to features (n, d), in evaluation mode.

    Raises:
        UserError: If the network has no such layer, or as for :func:`load_model`.
        InfrastructureError: If a download fails.
    """
    classifier = load_model(model, storage)
    network = getattr(classifier, "network", None)
    remedy = "Use a network of torchvision or timm, or a predictor of your own."
    if network is None:
        raise UserError(f"{model.weights} is an exported program, of which no layer can be taken off", remedy)
    if hasattr(network, "reset_classifier") and hasattr(network, "forward_head"):
        network.reset_classifier(0)
        return classifier.eval()
    path = next(
        (name for name, module in reversed(list(network.named_modules())) if isinstance(module, nn.Linear)), None
    )
    if type(network).__name__ == "SqueezeNet":
        # A convolution classifies each position, and the network returns the mean over all positions.
        path = "classifier.1"
    if path is None or not _is_output_layer(classifier, path, side):
        raise UserError(f"{model.name} does not end with a linear layer, so it has no features to take out", remedy)
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())
    return classifier.eval()


def _is_output_layer(classifier: nn.Module, path: str, side: int) -> bool:
    """Return whether the output of a layer is the network's output, by running it on a blank image."""
    outputs: list[torch.Tensor] = []
    layer = classifier.get_submodule(f"network.{path}")
    hook = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        with torch.inference_mode():
            output = classifier(torch.zeros(1, 3, side, side))
    finally:
        hook.remove()
    if not outputs:
        return False
    layer_output = outputs[-1]
    if isinstance(layer, nn.Conv2d):
        layer_output = layer_output.relu().mean(dim=(2, 3))
    return layer_output.shape == output.shape and torch.allclose(layer_output, output)


def weights_path(model: ModelConfig, storage: StorageConfig) -> Path | None:
    """Return the weights file of the sources ``file`` and ``package`` on this node; None if a package brings its own.

    Raises:
        UserError: If ``model.weights`` names no file, or the file is missing or has another digest.
        InfrastructureError: If a download fails.
    """
    if model.weights is None or (model.source == "package" and model.weights == "DEFAULT"):
        if model.source == "file":
            raise UserError("model.source is file, but model.weights is null", "Give the path or URI of the weights.")
        return None
    if model.source == "file" and model.weights == "DEFAULT":
        raise UserError("model.source is file, but model.weights names no file", "Give the path or URI of the weights.")
    location = model.weights
    module, colon, attribute = location.partition(":")
    # `module:callable`, as opposed to `s3://…` and to a path.
    if model.source == "package" and colon and not attribute.startswith("/") and "/" not in module:
        value = import_object(location, "model.weights")
        location = str(value() if callable(value) else value)
    return local_weights_file(location, storage, model.sha256)


def torchvision_weights(name: str, member: str | None) -> Any:
    """Return the member of the weights enum of a torchvision classification network; nothing is downloaded.

    Raises:
        UserError: If there is no such architecture or member; the message lists the available ones.
    """
    models = torchvision_models()
    check_torchvision_name(name)
    members = models.get_model_weights(name).__members__
    if member is None:
        raise UserError(
            f"model.weights is null, so {name} would predict with random weights",
            f"Choose one of {', '.join(members) or 'another architecture, it has none'}; or use model.source: file.",
        )
    # Python code writes `ResNet50_Weights.DEFAULT`.
    short = member.rpartition(".")[2]
    if short not in members:
        if _looks_like_file(member):
            raise UserError(
                f"{name} has no weights {member!r}, which looks like a file",
                f"Add --set model.source=file, to load it: --model {name} --weights {member} --set model.source=file.",
            )
        raise UserError(
            f"{name} has no weights {member!r}",
            f"Choose one of {', '.join(members)}." if members else "It has none at all.",
        )
    return members[short]


def check_torchvision_name(name: str) -> None:
    """Raise UserError with close matches if torchvision has no classification network of that name."""
    models = torchvision_models()
    known = models.list_models(module=models)
    if name not in known:
        if hint := _other_source_hint(name):
            raise UserError(f"torchvision has no classification network named {name!r}", hint)
        close = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=3, cutoff=0.4)
        raise UserError(
            f"torchvision has no classification network named {name!r}",
            f"Did you mean {' or '.join(close)}?" if close else f"Choose one of {', '.join(known)}.",
        )


def _looks_like_file(name: str) -> bool:
    """Return whether a name looks like a weights file rather than a network or published weights."""
    return name.lower().endswith(_WEIGHTS_ENDINGS) or "://" in name or name.startswith(("./", "../", "/", "~"))


def _other_source_hint(name: str) -> str:
    """Say what to type for the name of a file, or of a network of timm or Hugging Face; return "" for any other name."""
    if _looks_like_file(name):
        return f"It looks like a weights file: --model ARCHITECTURE --weights {name} --set model.source=file, such as --model resnet18."
    short = re.sub(r"^(hf[-_]hub:)?timm/", "", name)
    if short != name or re.fullmatch(r"[a-z0-9_]+\.[a-z0-9_]+", name):
        return f"This is a name of timm: --model {short} --set model.source=timm"
    if "/" in name or name.startswith(("hf-hub:", "hf_hub:")):
        hub = re.sub(r"^hf[-_]hub:", "", name)
        return (
            "It looks like a model of Hugging Face, which a predictor class can load: in my_module.py write a class MyPredictor whose "
            f"__init__ calls transformers.pipeline('image-classification', {hub!r}), then --set predictor=my_module:MyPredictor"
        )
    return ""


def find_timm_config(name: str, tag: str | None) -> tuple[str, dict[str, Any]]:
    """Look up a pretrained network of timm by name; nothing is downloaded.

    Args:
        name: Name of the network, with or without a tag.
        tag: Tag of the weights, ``DEFAULT``, or None if none were chosen.

    Returns:
        The full name with the tag, and timm's configuration of the network.

    Raises:
        UserError: If timm is not installed, or has no such network or tag.
    """
    timm = import_timm()
    base, _, inline = re.sub(r"^(hf[-_]hub:)?timm/", "", name).partition(".")
    check_timm_name(base)
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*") if full.partition(".")[0] == base]
    if tag is None:
        raise UserError(
            f"model.weights is null, so {base} would predict with random weights",
            f"Choose DEFAULT or one of {', '.join(tags) or 'another architecture, this one has none'}.",
        )
    tag = (inline or None) if tag == "DEFAULT" else tag.removeprefix(f"{base}.")
    config = timm.models.get_pretrained_cfg(f"{base}.{tag}" if tag else base) if tag is None or tag in tags else None
    if config is None or not tags:
        raise UserError(
            f"timm's {base} has no pretrained weights {tag or 'DEFAULT'!r}",
            f"Choose one of {', '.join(tags)}." if tags else "It has none at all; choose another architecture.",
        )
    return f"{base}.{config.tag}" if config.tag else base, config.to_dict()


def check_timm_name(name: str) -> None:
    """Raise UserError with close matches if timm has no network of that name, or is not installed."""
    timm = import_timm()
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise UserError(f"timm has no network named {name!r}", f"Did you mean {' or '.join(close)}?" if close else "")


def import_timm() -> Any:
    """Import timm; raise UserError that says how to install it if it is missing."""
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise UserError("timm is not installed", "Install it with: pip install 'ray-batch-inference[timm]'") from None


def import_object(path: str, key: str) -> Any:
    """Import the object that ``module:attribute.attribute`` names.

    Args:
        path: The name.
        key: Key of the configuration that has it, for messages.

    Raises:
        UserError: If there is no such module or attribute.
    """
    name, colon, attributes = path.partition(":")
    if not colon or not name or not attributes:
        raise UserError(f"{key} is {path!r}, not of the form module:callable", "Write it like my_module:build.")
    if os.getcwd() not in sys.path:  # noqa: PTH109 - compared with strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        value: Any = importlib.import_module(name)
    except ImportError as exc:
        missing = exc.name or name
        raise UserError(
            f"{key} is {path!r}, but Python cannot import {missing}: {exception_line(exc)}",
            "Install the package that has it, or put the module into the current directory.",
        ) from None
    except Exception as exc:
        raise UserError(
            f"{key} is {path!r}, but importing {name} fails: {exception_line(exc)}", "Fix the module."
        ) from exc
    for part in attributes.split("."):
        if not hasattr(value, part):
            known = [entry for entry in dir(value) if not entry.startswith("_")]
            close = difflib.get_close_matches(part, known, n=3)
            hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(known[:20])}."
            raise UserError(f"{key} is {path!r}, but there is no {part} in it", hint)
        value = getattr(value, part)
    return value


def build_from_package(model: ModelConfig) -> nn.Module:
    """Call ``model.name`` with ``model.args``; raise UserError if it fails or returns anything but a module."""
    builder = import_object(model.name, "model.name")
    try:
        network = builder(*model.args)
    except Exception as exc:
        raise UserError(
            f"{model.name}({', '.join(map(repr, model.args))}) fails: {exception_line(exc)}",
            "Check model.name and model.args.",
        ) from exc
    if not isinstance(network, nn.Module):
        raise UserError(
            f"{model.name} gives a {type(network).__name__}, not a torch.nn.Module", "Name a callable that builds one."
        )
    return network


def _load_torchvision(model: ModelConfig, storage: StorageConfig) -> nn.Module:
    models = torchvision_models()
    weights = torchvision_weights(model.name, model.weights)
    _use_writable_hub()
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    with _download_errors(weights.url, f"put the file at {file}"):
        if not file.is_file():
            # One process per node downloads the file, the others wait and use it.
            with node_lock(f"torchvision-{file.name}"):
                weights.get_state_dict(progress=False, check_hash=True)
        if model.sha256 is not None:
            local_weights_file(str(file), storage, model.sha256)
        return cast(nn.Module, models.get_model(model.name, weights=weights, progress=False))


def _load_timm(model: ModelConfig) -> nn.Module:
    timm = import_timm()
    name, config = find_timm_config(model.name, model.weights)
    if model.sha256 is not None:
        raise UserError("model.sha256 is given, but timm keeps its weights in its own cache", "Use model.source: file.")
    source = config.get("hf_hub_id") or config.get("url") or name
    with node_lock(f"timm-{name}"), _download_errors(str(source), "download it elsewhere and use model.source: file"):
        return cast(nn.Module, timm.create_model(name, pretrained=True))


def _load_architecture(name: str, state: dict[str, torch.Tensor], path: Path) -> nn.Module:
    """Return a torchvision or timm architecture, with as many classes as its state dict."""
    network = _build_architecture(name, None)
    state = strip_prefix(network, state, str(path))
    classes = other_class_count(network, state)
    if classes is not None:
        network = _build_architecture(name, classes)
    load_state_dict(network, state, str(path))
    return network


def _build_architecture(name: str, classes: int | None) -> nn.Module:
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if name.startswith(_TIMM_PREFIX):
        short = name.removeprefix(_TIMM_PREFIX)
        check_timm_name(short.partition(".")[0])
        return cast(nn.Module, import_timm().create_model(short, pretrained=False, **options))
    check_torchvision_name(name)
    models = torchvision_models()
    if name in ("googlenet", "inception_v3"):
        # Their initialization takes a minute, and the state dict overwrites it.
        options["init_weights"] = False
    return cast(nn.Module, models.get_model(name, weights=None, **options))


def _use_writable_hub() -> None:
    """Move torch's download folder into the node's cache if it is not writable, as in a read-only container."""
    folder = Path(torch.hub.get_dir())
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not os.access(existing, os.W_OK) and not (folder / "checkpoints").is_dir():
        torch.hub.set_dir(str(cache_folder() / "hub"))


@contextlib.contextmanager
def _download_errors(source: str, remedy: str) -> Iterator[None]:
    """Raise InfrastructureError with a remedy for any error of a download in this block."""
    try:
        yield
    except UserError:
        raise
    except urllib.error.HTTPError as exc:
        raise InfrastructureError(
            f"cannot download {source}: HTTP {exc.code}", f"Try again later, or {remedy}."
        ) from exc
    except Exception as exc:
        raise InfrastructureError(
            f"cannot download or read {source}: {exception_line(exc)}", f"Check the network, or {remedy}."
        ) from exc
