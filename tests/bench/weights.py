"""Weights and labels that every contender is given and measured by.

No weights are downloaded: they are random, from a seed, with the statistics of the batch normalizations taken from the images, so that
activations keep a sensible size and different images get different classes. Random weights cost the same time as trained ones. They
exaggerate differences of pixels: many images lie near a border between two classes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

SEED = 5


def make(model: str, folder: Path, file: Path) -> str:
    """Writes a state dict, unless it is there.

    Args:
        model: torchvision's name.
        folder: Images of which the first 64 give the statistics.
        file: ``.safetensors``.

    Returns:
        SHA-256 of the file.
    """
    if not file.is_file():
        import torch
        from PIL import Image
        from safetensors.torch import save_file

        _one_thread()
        torch.manual_seed(SEED)
        network, transform = build(model), transform_of(model)
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the mean over all batches
        images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.jpg"))[:64]]
        with torch.no_grad():
            network.train()(torch.stack([transform(image) for image in images]))
            head = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1]
            kept: list[Any] = []
            hook = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
            logits = network.eval()(torch.stack([transform(image) for image in images]))
            hook.remove()
            # Without the bias what all images have in common decides, and they are of a few classes only.
            head.weight.mul_(2 / logits.sub(logits.mean(0)).std())
            head.bias.copy_(-head.weight @ kept[0].mean(0))
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), str(file))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def build(model: str) -> Any:
    """The architecture, without trained weights."""
    from torchvision.models import get_model

    return get_model(model, weights=None)


def load(model: str, file: str | Path) -> Any:
    """The network with the weights of ``file``, ready to predict."""
    from safetensors.torch import load_file

    network = build(model)
    network.load_state_dict(load_file(str(file)))
    return network.eval()


def transform_of(model: str) -> Any:
    """Return ``weights.transforms()`` of the published weights, without the weights."""
    from torchvision.models import get_model_weights

    return get_model_weights(model).DEFAULT.transforms()


def reference(model: str, weights: Path, folder: Path, file: Path, key: str) -> dict[str, int]:
    """Top-1 class of each image by name: Pillow, ``weights.transforms()``, fp32, one image at a time as the article does before it scales.

    Args:
        model: torchvision's name.
        weights: Of :func:`make`.
        folder: The images.
        file: Where the labels are kept for the next time.
        key: What they depend on.
    """
    if file.is_file():
        kept = json.loads(file.read_text())
        if kept["key"] == key:
            return dict(kept["classes"])
    import torch
    from PIL import Image

    _one_thread()
    network, transform = load(model, weights), transform_of(model)
    paths = sorted(folder.glob("*.jpg"))
    classes: dict[str, int] = {}
    with torch.inference_mode():
        for start in range(0, len(paths), 32):
            part = paths[start : start + 32]
            batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in part])
            best = torch.nn.functional.softmax(network(batch), dim=1).max(dim=1).indices
            classes |= {path.name: int(index) for path, index in zip(part, best, strict=True)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"key": key, "classes": classes}))
    return classes


def _one_thread() -> None:
    """Makes weights and labels independent of the number of cores; on a busy machine several threads mostly wait for each other."""
    import torch

    torch.set_num_threads(1)
