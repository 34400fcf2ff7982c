"""State dicts: read without running code, and loaded into a network or refused with the reason."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import nn

from batch_inference.errors import UserError
from batch_inference.storage import exc_line

log = structlog.get_logger()

_WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "state_dict_ema",
    "model_ema",
    "net",
    "network",
    "weights",
    "params",
)
# What torch.compile, FSDP and activation checkpoints put into names wherever a part of the network was wrapped.
_WRAPPED = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_REMEDY = "Save the state dict: torch.save(model.state_dict(), 'weights.pt'), or better safetensors."
_CLASS = " Or load the file in a predictor class of your own: --set predictor=my_module:MyPredictor."


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Reads a state dict, without running any code that the file may hold.

    Wrapping keys of training scripts (``state_dict``, ``model``) and the ``module.`` of DataParallel are taken off.

    Raises:
        UserError: If the file is damaged, of an unknown kind, or holds pickled objects other than tensors.
    """
    kind = path.suffix.lower()
    remedy = _REMEDY
    if kind in (".pt", ".pth", ".bin", ".ckpt", ".tar") and _is_torchscript(path):
        raise UserError(
            f"{path} is a TorchScript program, not a state dict",
            "Where the network's code is at hand: torch.save(torch.jit.load('model.pt').state_dict(), 'weights.pt'). Else call "
            "torch.jit.load in a predictor class of your own: --set predictor=my_module:MyPredictor.",
        )
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
                f"{path} holds pickled Python objects, which could run any code when loaded: {_cause(exc)}",
                remedy + _CLASS,
            ) from None
        raise UserError(f"{path} is damaged: {exc_line(exc)}", "Fetch or save the file again.") from exc
    except Exception as exc:
        raise UserError(f"cannot read the weights {path}: {exc_line(exc)}", "Fetch or save the file again.") from exc
    while isinstance(data, Mapping):
        inner = next((data[key] for key in _WRAPPERS if isinstance(data.get(key), Mapping)), None)
        if inner is None:
            break
        data = inner
    if isinstance(data, Mapping) and any(isinstance(value, torch.Tensor) for value in data.values()):
        # Beside the tensors: a training script's own notes, such as an epoch.
        noted = [key for key, value in data.items() if isinstance(value, (int, float, str, bool, type(None)))]
        data = {key: value for key, value in data.items() if key not in noted}
        if noted:
            log.warning(f"{path}: left out what is no tensor: {', '.join(map(str, noted[:5]))}")
    if not isinstance(data, Mapping) or not data or not all(isinstance(value, torch.Tensor) for value in data.values()):
        found = f"the keys {', '.join(map(str, list(data)[:5]))}" if isinstance(data, Mapping) else type(data).__name__
        raise UserError(f"{path} holds no state dict (names and tensors), but {found or 'nothing'}", remedy)
    state = {str(key): value for key, value in data.items()}
    while all(key.startswith("module.") for key in state):
        state = {key[len("module.") :]: value for key, value in state.items()}
    return state


def fill(network: nn.Module, state: dict[str, torch.Tensor], location: str) -> None:
    """Load a state dict strictly; UserError lists what is missing, unexpected or of another shape."""
    problems = _mismatch(network, state)
    if problems:
        raise UserError(
            f"{location} does not fit {type(network).__name__}: {'; '.join(problems)}", _misfit_remedy(network, state)
        )
    network.load_state_dict(state)


def without_prefix(network: nn.Module, state: dict[str, torch.Tensor], location: str) -> dict[str, torch.Tensor]:
    """Return a state dict without what a training framework put before its names, where they then are the network's exactly.

    Other tensors of the file (of a loss, of a second network) stay behind, with a warning; where anything of the network's would be
    missing, the state dict is returned as it is.

    Raises:
        UserError: If the file holds several networks that fit.
    """
    own = set(network.state_dict())
    inner = {_WRAPPED.sub("", key): value for key, value in state.items()}
    if len(inner) == len(state):
        state = inner
    if own <= set(state):
        return _extras_apart(own, state, location)
    first = min(own, default="")
    fitting = sorted(
        prefix
        for prefix in {key.removesuffix(first) for key in state if first and key.endswith("." + first)}
        if own <= {key[len(prefix) :] for key in state if key.startswith(prefix)}
    )
    if len(fitting) > 1:
        raise UserError(
            f"{location} holds {len(fitting)} networks that fit, with names that begin with {' and '.join(fitting)}",
            f"Save the one that is meant: torch.save({{k.removeprefix({fitting[0]!r}): v for k, v in state.items() if "
            f"k.startswith({fitting[0]!r})}}, 'weights.pt').",
        )
    if not fitting:
        return state
    log.warning(f"{location}: the names of the tensors begin with {fitting[0]}, which is left out")
    return _extras_apart(
        own,
        {key.removeprefix(fitting[0]): value for key, value in state.items() if key.startswith(fitting[0])},
        location,
    )


def _extras_apart(own: set[str], state: dict[str, torch.Tensor], location: str) -> dict[str, torch.Tensor]:
    extra = sorted(set(state) - own)
    # More layers than the network has are another network; a single tensor of a loss is not.
    if extra and not any(
        key.rpartition(".")[0].partition(".")[0] in {name.partition(".")[0] for name in own} for key in extra
    ):
        log.warning(f"{location}: left out tensors that the network does not have: {', '.join(extra[:5])}")
        return {key: value for key, value in state.items() if key in own}
    return state


def _misfit_remedy(network: nn.Module, state: dict[str, torch.Tensor]) -> str:
    own = set(network.state_dict())
    first = next(iter(own), "")
    for key in state:
        prefix = key.removesuffix(first)
        if first and prefix != key and prefix:
            return (
                f"The tensors' names begin with {prefix!r}, and without it some are still missing. Save them as the network has them: "
                f"torch.save({{k.removeprefix({prefix!r}): v for k, v in state.items()}}, 'weights.pt')."
            )
    return "Check model.name: the weights are of another architecture."


def _is_torchscript(path: Path) -> bool:
    """Whether a file is what torch.jit.save wrote: a zip with code in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


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
    text = " ".join(str(exc).split())
    for mark in ("Unsupported global: ", "Unsupported class ", "Unsupported operand "):
        if mark in text:
            return mark + text.partition(mark)[2].partition(" was not")[0].partition(". ")[0]
    return "more than tensors"
