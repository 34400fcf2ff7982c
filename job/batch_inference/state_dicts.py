"""State dicts: read without running code, and loaded into a network or refused with the reason."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batch_inference.errors import UserError
from batch_inference.storage import exc_line

_WRAPPERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema")


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict, without running any code that the file may hold.

    Wrapping keys of training scripts (``state_dict``, ``model``) and the ``module.`` of DataParallel are taken off.

    Raises:
        UserError: If the file is damaged, of an unknown kind, or holds pickled objects other than tensors.
    """
    kind = path.suffix.lower()
    remedy = "Save the state dict: torch.save(model.state_dict(), 'weights.pt'), or better safetensors."
    try:
        if kind == ".safetensors":
            from safetensors.torch import load_file

            data: Any = load_file(path)
        elif kind in (".pt", ".pth", ".bin", ".ckpt", ".tar"):
            data = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise UserError(
                f"{path} ends in {kind or 'nothing'}, not in .safetensors, .pt, .pth or .pt2",
                "Rename or convert the weights.",
            )
    except UserError:
        raise
    except pickle.UnpicklingError as exc:
        if "weights_only" in str(exc).lower() or "unsupported" in str(exc).lower():
            raise UserError(
                f"{path} holds pickled Python objects, which could run any code when loaded: {_cause(exc)}", remedy
            ) from None
        raise UserError(f"{path} is damaged: {exc_line(exc)}", "Fetch or save the file again.") from exc
    except Exception as exc:
        hint = remedy if "torchscript" in str(exc).lower() else "Fetch or save the file again."
        raise UserError(f"cannot read the weights {path}: {exc_line(exc)}", hint) from exc
    while isinstance(data, Mapping):
        inner = next((data[key] for key in _WRAPPERS if isinstance(data.get(key), Mapping)), None)
        if inner is None:
            break
        data = inner
    if not isinstance(data, Mapping) or not data or not all(isinstance(value, torch.Tensor) for value in data.values()):
        found = f"the keys {', '.join(map(str, list(data)[:5]))}" if isinstance(data, Mapping) else type(data).__name__
        raise UserError(f"{path} holds no state dict (names and tensors), but {found or 'nothing'}", remedy)
    state = {str(key): value for key, value in data.items()}
    while all(key.startswith("module.") for key in state):
        state = {key[len("module.") :]: value for key, value in state.items()}
    return state


def fill(network: nn.Module, state: dict[str, torch.Tensor], location: str) -> None:
    """Loads a state dict strictly; UserError lists what is missing, unexpected or of another shape."""
    problems = _mismatch(network, state)
    if problems:
        raise UserError(
            f"{location} does not fit {type(network).__name__}: {'; '.join(problems)}",
            "Check model.name: the weights are of another architecture.",
        )
    network.load_state_dict(state)


def other_classes(network: nn.Module, state: dict[str, torch.Tensor]) -> int | None:
    """Number of classes of the state dict, where it differs from the network's in nothing else; else None."""
    own = network.state_dict()
    differing = [
        (own[key].shape, value.shape) for key, value in state.items() if key in own and own[key].shape != value.shape
    ]
    if not differing or any(a[1:] != b[1:] or len(a) == 0 for a, b in differing):
        return None
    counts = {int(theirs[0]) for _, theirs in differing}
    return counts.pop() if len(counts) == 1 else None


def _mismatch(network: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    own = network.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    return [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]


def _cause(exc: BaseException) -> str:
    """The sentence of torch's long message that names the object."""
    text = exc_line(exc)
    for mark in ("Unsupported global: ", "Unsupported class ", "Unsupported operand "):
        if mark in text:
            return mark + text.partition(mark)[2].partition(" was not")[0].partition(". ")[0]
    return text
