"""Networks of the four sources, built and filled with their weights. What is known about them is in :mod:`.models`."""

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
from batch_inference.errors import SystemFault, UserError
from batch_inference.exported import ExportedNetwork, Logits
from batch_inference.state_dicts import fill, other_classes, read_state_dict, without_prefix
from batch_inference.storage import exc_line
from batch_inference.torchvision_models import torchvision_models
from batch_inference.weights import cache_folder, node_lock, weights_file

_TIMM_PREFIX = "timm/"
_WEIGHTS_ENDINGS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pt2", ".tar", ".onnx", ".h5")


def load_model(model: ModelConfig, storage: StorageConfig) -> nn.Module:
    """Builds a network and loads its weights, on the CPU and in evaluation mode.

    Args:
        model: Which network.
        storage: How to reach remote weights.

    Returns:
        A module that maps float32 (n, 3, h, w) to logits (n, classes).

    Raises:
        UserError: If the configuration or the weights do not fit; the message says what would.
        SystemFault: If a download fails.
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
                fill(network, without_prefix(network, read_state_dict(path), str(path)), str(path))
    return Logits(network).eval()


def load_features(model: ModelConfig, storage: StorageConfig, side: int) -> nn.Module:
    """A network without the layer that classifies: what comes out is what went into that layer.

    For timm these are its own pre-logits features (``num_classes=0``), for all others the input of the last linear layer,
    which must give the network's output as it is.

    Args:
        model: Which network.
        storage: How to reach remote weights.
        side: Height and width of its input.

    Returns:
        A module that maps float32 (n, 3, side, side) to features (n, d), in evaluation mode.

    Raises:
        UserError: If the network has no such layer. And what :func:`load_model` raises.
    """
    whole = load_model(model, storage)
    network = getattr(whole, "network", None)
    remedy = "Use a network of torchvision or timm, or a predictor of your own."
    if network is None:
        raise UserError(f"{model.weights} is an exported program, of which no layer can be taken off", remedy)
    if hasattr(network, "reset_classifier") and hasattr(network, "forward_head"):
        network.reset_classifier(0)
        return whole.eval()
    path = next(
        (name for name, module in reversed(list(network.named_modules())) if isinstance(module, nn.Linear)), None
    )
    if type(network).__name__ == "SqueezeNet":
        # A convolution classifies each place, and the mean of all is taken behind it.
        path = "classifier.1"
    if path is None or not _gives_the_output(whole, path, side):
        raise UserError(f"{model.name} does not end with a linear layer, so it has no features to take out", remedy)
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, nn.Identity())
    return whole.eval()


def _gives_the_output(whole: nn.Module, path: str, side: int) -> bool:
    seen: list[torch.Tensor] = []
    layer = whole.get_submodule(f"network.{path}")
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        with torch.inference_mode():
            output = whole(torch.zeros(1, 3, side, side))
    finally:
        hook.remove()
    if not seen:
        return False
    if isinstance(layer, nn.Conv2d):
        seen[-1] = seen[-1].relu().mean(dim=(2, 3))
    return seen[-1].shape == output.shape and torch.allclose(seen[-1], output)


def weights_path(model: ModelConfig, storage: StorageConfig) -> Path | None:
    """The weights file of the sources ``file`` and ``package``, on this node; None if a package brings its own."""
    if model.weights is None or (model.source == "package" and model.weights == "DEFAULT"):
        if model.source == "file":
            raise UserError("model.source is file, but model.weights is null", "Give the path or URI of the weights.")
        return None
    if model.source == "file" and model.weights == "DEFAULT":
        raise UserError("model.source is file, but model.weights names no file", "Give the path or URI of the weights.")
    location = model.weights
    module, sign, attribute = location.partition(":")
    # `module:callable`, as opposed to `s3://…` and to a path.
    if model.source == "package" and sign and not attribute.startswith("/") and "/" not in module:
        value = resolve(location, "model.weights")
        location = str(value() if callable(value) else value)
    return weights_file(location, storage, model.sha256)


def torchvision_weights(name: str, member: str | None) -> Any:
    """The member of the weights enum of a torchvision classification network, without downloading anything.

    Raises:
        UserError: If there is no such architecture or member; names those that there are.
    """
    models = torchvision_models()

    check_torchvision(name)
    members = models.get_model_weights(name).__members__
    if member is None:
        raise UserError(
            f"model.weights is null, so {name} would predict with random weights",
            f"Choose one of {', '.join(members) or 'another architecture, it has none'}; or use model.source: file.",
        )
    # `ResNet50_Weights.DEFAULT` is how Python code spells it.
    short = member.rpartition(".")[2]
    if short not in members:
        if _names_a_file(member):
            raise UserError(
                f"{name} has no weights {member!r}, which looks like a file",
                f"Add --set model.source=file, to load it: --model {name} --weights {member} --set model.source=file.",
            )
        raise UserError(
            f"{name} has no weights {member!r}",
            f"Choose one of {', '.join(members)}." if members else "It has none at all.",
        )
    return members[short]


def check_torchvision(name: str) -> None:
    """Raises UserError with close matches if torchvision has no classification network of that name."""
    models = torchvision_models()

    known = models.list_models(module=models)
    if name not in known:
        elsewhere = _elsewhere(name)
        if elsewhere:
            raise UserError(f"torchvision has no classification network named {name!r}", elsewhere)
        close = difflib.get_close_matches(name.lower().replace("-", "_"), known, n=3, cutoff=0.4)
        raise UserError(
            f"torchvision has no classification network named {name!r}",
            f"Did you mean {' or '.join(close)}?" if close else f"Choose one of {', '.join(known)}.",
        )


def _names_a_file(name: str) -> bool:
    """Whether a name is that of a weights file rather than of a network or of published weights."""
    return name.lower().endswith(_WEIGHTS_ENDINGS) or "://" in name or name.startswith(("./", "../", "/", "~"))


def _elsewhere(name: str) -> str:
    """What to type for a name that is not torchvision's, but a file's, timm's or Hugging Face's; "" for any other."""
    if _names_a_file(name):
        return f"It looks like a weights file: --model ARCHITECTURE --weights {name} --set model.source=file, such as --model resnet18."
    short = re.sub(r"^(hf[-_]hub:)?timm/", "", name)
    if short != name or re.fullmatch(r"[a-z0-9_]+\.[a-z0-9_]+", name):
        return f"It is a name of timm's: --model {short} --set model.source=timm"
    if "/" in name or name.startswith(("hf-hub:", "hf_hub:")):
        hub = re.sub(r"^hf[-_]hub:", "", name)
        return (
            "It looks like a model of Hugging Face's, which a predictor class loads: in my_module.py write a class MyPredictor whose "
            f"__init__ calls transformers.pipeline('image-classification', {hub!r}), then --set predictor=my_module:MyPredictor"
        )
    return ""


def timm_config(name: str, tag: str | None) -> tuple[str, dict[str, Any]]:
    """Looks up a pretrained network of timm by name: its full name with the tag, and its configuration; no download.

    Raises:
        UserError: If timm is missing, or has no such network or tag.
    """
    timm = import_timm()
    base, _, inline = re.sub(r"^(hf[-_]hub:)?timm/", "", name).partition(".")
    check_timm(base)
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


def check_timm(name: str) -> None:
    """Raises UserError with close matches if timm has no network of that name, or is not installed."""
    timm = import_timm()
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.4)
        raise UserError(f"timm has no network named {name!r}", f"Did you mean {' or '.join(close)}?" if close else "")


def import_timm() -> Any:
    """The timm package, or a UserError that says how to install it."""
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise UserError("timm is not installed", "Install it with: pip install 'ray-batch-inference[timm]'") from None


def resolve(path: str, key: str) -> Any:
    """What ``module:attribute.attribute`` names; ``key`` is the configuration's key, for messages.

    Raises:
        UserError: If there is no such module or attribute.
    """
    name, sign, attributes = path.partition(":")
    if not sign or not name or not attributes:
        raise UserError(f"{key} is {path!r}, not of the form module:callable", "Write it like my_module:build.")
    if os.getcwd() not in sys.path:  # noqa: PTH109 - compared with strings
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        value: Any = importlib.import_module(name)
    except ImportError as exc:
        missing = exc.name or name
        raise UserError(
            f"{key} is {path!r}, but Python cannot import {missing}: {exc_line(exc)}",
            "Install the package that has it, or put the module into the current directory.",
        ) from None
    except Exception as exc:
        raise UserError(f"{key} is {path!r}, but importing {name} fails: {exc_line(exc)}", "Mend the module.") from exc
    for part in attributes.split("."):
        if not hasattr(value, part):
            known = [entry for entry in dir(value) if not entry.startswith("_")]
            close = difflib.get_close_matches(part, known, n=3)
            hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(known[:20])}."
            raise UserError(f"{key} is {path!r}, but there is no {part} in it", hint)
        value = getattr(value, part)
    return value


def build_from_package(model: ModelConfig) -> nn.Module:
    """Calls ``model.name`` with ``model.args``; UserError if that fails or gives something else than a module."""
    builder = resolve(model.name, "model.name")
    try:
        network = builder(*model.args)
    except Exception as exc:
        raise UserError(
            f"{model.name}({', '.join(map(repr, model.args))}) fails: {exc_line(exc)}",
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
    _writable_hub()
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    with _download_errors(weights.url, f"put the file at {file}"):
        if not file.is_file():
            # One process of a node downloads, the others find the file.
            with node_lock(f"torchvision-{file.name}"):
                weights.get_state_dict(progress=False, check_hash=True)
        if model.sha256 is not None:
            weights_file(str(file), storage, model.sha256)
        return cast(nn.Module, models.get_model(model.name, weights=weights, progress=False))


def _load_timm(model: ModelConfig) -> nn.Module:
    timm = import_timm()
    name, config = timm_config(model.name, model.weights)
    if model.sha256 is not None:
        raise UserError(
            "model.sha256 is given, but timm keeps its weights in a cache of its own", "Use model.source: file."
        )
    source = config.get("hf_hub_id") or config.get("url") or name
    with node_lock(f"timm-{name}"), _download_errors(str(source), "download it elsewhere and use model.source: file"):
        return cast(nn.Module, timm.create_model(name, pretrained=True))


def _load_architecture(name: str, state: dict[str, torch.Tensor], path: Path) -> nn.Module:
    """A torchvision or timm architecture with as many classes as the state dict has."""
    network = _build(name, None)
    state = without_prefix(network, state, str(path))
    classes = other_classes(network, state)
    if classes is not None:
        network = _build(name, classes)
    fill(network, state, str(path))
    return network


def _build(name: str, classes: int | None) -> nn.Module:
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if name.startswith(_TIMM_PREFIX):
        short = name.removeprefix(_TIMM_PREFIX)
        check_timm(short.partition(".")[0])
        return cast(nn.Module, import_timm().create_model(short, pretrained=False, **options))
    check_torchvision(name)
    models = torchvision_models()

    if name in ("googlenet", "inception_v3"):
        # Their initialization takes a minute, all of which the state dict overwrites.
        options["init_weights"] = False
    return cast(nn.Module, models.get_model(name, weights=None, **options))


def _writable_hub() -> None:
    """Moves torch's download folder into our cache where its own cannot be written to, as in a read-only container."""
    folder = Path(torch.hub.get_dir())
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if not os.access(existing, os.W_OK) and not (folder / "checkpoints").is_dir():
        torch.hub.set_dir(str(cache_folder() / "hub"))


@contextlib.contextmanager
def _download_errors(source: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except urllib.error.HTTPError as exc:
        raise SystemFault(f"cannot download {source}: HTTP {exc.code}", f"Try again later, or {remedy}.") from exc
    except Exception as exc:
        raise SystemFault(
            f"cannot download or read {source}: {exc_line(exc)}", f"Check the network, or {remedy}."
        ) from exc
