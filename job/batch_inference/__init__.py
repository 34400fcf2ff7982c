"""Run a PyTorch image model over any number of images with Ray Data, each accounted for.

The names below are the public interface; everything is imported on first use, so that ``import batch_inference`` costs
nothing and a process that needs no torch does not load it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "JobConfig": "config",
    "load_config": "config",
    "run": "driver",
    "plan": "planner",
    "verify": "verifier",
    "TorchPredictor": "predictor",
    "from_images": "datasets",
    "from_paths": "datasets",
    "read_images": "datasets",
    "predict": "datasets",
}

if TYPE_CHECKING:
    from batch_inference.config import JobConfig as JobConfig
    from batch_inference.config import load_config as load_config
    from batch_inference.datasets import from_images as from_images
    from batch_inference.datasets import from_paths as from_paths
    from batch_inference.datasets import predict as predict
    from batch_inference.datasets import read_images as read_images
    from batch_inference.driver import run as run
    from batch_inference.planner import plan as plan
    from batch_inference.predictor import TorchPredictor as TorchPredictor
    from batch_inference.verifier import verify as verify

__all__ = [
    "JobConfig",
    "TorchPredictor",
    "from_images",
    "from_paths",
    "load_config",
    "plan",
    "predict",
    "read_images",
    "run",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
