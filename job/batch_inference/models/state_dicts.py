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
from batch_inference.storage.store import exception_line

log = structlog.get_logger()

_WRAPPING_KEYS = (
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
# torch.compile, FSDP and activation checkpoints put these into the names of the parts of a network that they wrap.
_WRAPPER_NAMES = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_SAVE_REMEDY = "Save the state dict: torch.save(model.state_dict(), 'weights.pt'), or better safetensors."
_OWN_CLASS_REMEDY = " Or load the file in a predictor class of your own: --set predictor=my_module:MyPredictor."


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict without running any code that the file may contain.

    The wrapping keys of training scripts (``state_dict``, ``model``) and the prefix ``module.`` of DataParallel are removed.

    Raises:
        UserError: If the file is damaged, has an unknown format, or contains pickled objects other than tensors.
    """
    data = _read_file(path)
    while isinstance(data, Mapping):
        inner = next((data[key] for key in _WRAPPING_KEYS if isinstance(data.get(key), Mapping)), None)
        if inner is None:
            break
        data = inner
    if isinstance(data, Mapping) and any(isinstance(value, torch.Tensor) for value in data.values()):
        # Training scripts add notes of their own to the tensors, such as an epoch.
        notes = [key for key, value in data.items() if isinstance(value, (int, float, str, bool, type(None)))]
        data = {key: value for key, value in data.items() if key not in notes}
        if notes:
            log.warning(f"{path}: left out entries that are not tensors: {', '.join(map(str, notes[:5]))}")
    if not isinstance(data, Mapping) or not data or not all(isinstance(value, torch.Tensor) for value in data.values()):
        content = (
            f"the keys {', '.join(map(str, list(data)[:5]))}" if isinstance(data, Mapping) else type(data).__name__
        )
        raise UserError(f"{path} holds no state dict (names and tensors), but {content or 'nothing'}", _SAVE_REMEDY)
    state = {str(key): value for key, value in data.items()}
    while all(key.startswith("module.") for key in state):
        state = {key[len("module.") :]: value for key, value in state.items()}
    return state


def _read_file(path: Path) -> Any:
    """Read the tensors of a weights file, as they are nested in it."""
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar") and _is_torchscript(path):
        raise UserError(
            f"{path} is a TorchScript program, not a state dict",
            "If you have the network's code: torch.save(torch.jit.load('model.pt').state_dict(), 'weights.pt'). Otherwise call "
            "torch.jit.load in a predictor class of your own: --set predictor=my_module:MyPredictor.",
        )
    try:
        if suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar"):
            return torch.load(path, map_location="cpu", weights_only=True)
        raise UserError(
            f"{path} ends in {suffix or 'nothing'}, not in .safetensors, .pt, .pth or .pt2",
            "Rename or convert the weights.",
        )
    except UserError:
        raise
    except pickle.UnpicklingError as exc:
        if "weights_only" in str(exc).lower() or "unsupported" in str(exc).lower():
            raise UserError(
                f"{path} holds pickled Python objects, which could run any code when loaded: {_unsupported_object(exc)}",
                _SAVE_REMEDY + _OWN_CLASS_REMEDY,
            ) from None
        raise UserError(f"{path} is damaged: {exception_line(exc)}", "Fetch or save the file again.") from exc
    except Exception as exc:
        raise UserError(
            f"cannot read the weights {path}: {exception_line(exc)}", "Fetch or save the file again."
        ) from exc


def load_state_dict(network: nn.Module, state: dict[str, torch.Tensor], location: str) -> None:
    """Load a state dict into a network; raise UserError that lists missing and unexpected tensors and tensors of another shape."""
    problems = _describe_mismatch(network, state)
    if problems:
        raise UserError(
            f"{location} does not fit {type(network).__name__}: {'; '.join(problems)}", _misfit_remedy(network, state)
        )
    network.load_state_dict(state)


def strip_prefix(network: nn.Module, state: dict[str, torch.Tensor], location: str) -> dict[str, torch.Tensor]:
    """Return a state dict without the prefix that a training framework added to its names.

    Other tensors of the file (of a loss, of a second network) are dropped with a warning. If a tensor of the network would be
    missing, the state dict is returned unchanged.

    Raises:
        UserError: If the file holds several networks that fit.
    """
    own = set(network.state_dict())
    inner = {_WRAPPER_NAMES.sub("", key): value for key, value in state.items()}
    if len(inner) == len(state):
        state = inner
    if own <= set(state):
        return _drop_extra_tensors(own, state, location)
    first = min(own, default="")
    fitting = sorted(
        prefix
        for prefix in {key.removesuffix(first) for key in state if first and key.endswith("." + first)}
        if own <= {key[len(prefix) :] for key in state if key.startswith(prefix)}
    )
    if len(fitting) > 1:
        raise UserError(
            f"{location} holds {len(fitting)} networks that fit, with names that begin with {' and '.join(fitting)}",
            f"Save the one to use: torch.save({{k.removeprefix({fitting[0]!r}): v for k, v in state.items() if "
            f"k.startswith({fitting[0]!r})}}, 'weights.pt').",
        )
    if not fitting:
        return state
    log.warning(f"{location}: the names of the tensors begin with {fitting[0]}, which is left out")
    return _drop_extra_tensors(
        own,
        {key.removeprefix(fitting[0]): value for key, value in state.items() if key.startswith(fitting[0])},
        location,
    )


def _drop_extra_tensors(own: set[str], state: dict[str, torch.Tensor], location: str) -> dict[str, torch.Tensor]:
    """Return a state dict without tensors that the network does not have, unless they belong to its own layers."""
    extra = sorted(set(state) - own)
    # A file with more layers than the network is another network; one with the tensor of a loss is not.
    if extra and not any(
        key.rpartition(".")[0].partition(".")[0] in {name.partition(".")[0] for name in own} for key in extra
    ):
        log.warning(f"{location}: left out tensors that the network does not have: {', '.join(extra[:5])}")
        return {key: value for key, value in state.items() if key in own}
    return state


def _misfit_remedy(network: nn.Module, state: dict[str, torch.Tensor]) -> str:
    """Return the remedy for a state dict that does not fit."""
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
    """Return whether torch.jit.save wrote a file: a zip archive with code in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def other_class_count(network: nn.Module, state: dict[str, torch.Tensor]) -> int | None:
    """Return the number of classes of a state dict that differs from the network in nothing else; otherwise None."""
    own = network.state_dict()
    differing = [
        (own[key].shape, value.shape) for key, value in state.items() if key in own and own[key].shape != value.shape
    ]
    if not differing or any(a[1:] != b[1:] or len(a) == 0 for a, b in differing):
        return None
    counts = {int(theirs[0]) for _, theirs in differing}
    return counts.pop() if len(counts) == 1 else None


def _describe_mismatch(network: nn.Module, state: dict[str, torch.Tensor]) -> list[str]:
    """Return a phrase for each way in which a state dict does not fit."""
    own = network.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    return [
        f"{len(names)} {problem} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]


def _unsupported_object(exc: BaseException) -> str:
    """Return the sentence of torch's long message that names the unsupported object."""
    text = " ".join(str(exc).split())
    for mark in ("Unsupported global: ", "Unsupported class ", "Unsupported operand "):
        if mark in text:
            return mark + text.partition(mark)[2].partition(" was not")[0].partition(". ")[0]
    return "more than tensors"
