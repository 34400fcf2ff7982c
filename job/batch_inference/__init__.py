"""Run a PyTorch image model over any number of images with Ray Data, and account for every image.

The names below are the public interface. They are imported on first use: ``import batch_inference`` stays fast, and a process
that does not need torch does not load it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from batch_inference.version import __version__ as __version__

_MODULES = {
    "JobConfig": "config",
    "load_config": "config",
    "run": "driver.run",
    "plan": "driver.planner",
    "verify": "output.verify",
    "TorchPredictor": "models.predictor",
    "from_images": "pipeline.datasets",
    "from_paths": "pipeline.datasets",
    "read_images": "pipeline.datasets",
    "predict": "pipeline.datasets",
}

if TYPE_CHECKING:
    from batch_inference.config import JobConfig as JobConfig
    from batch_inference.config import load_config as load_config
    from batch_inference.driver.planner import plan as plan
    from batch_inference.driver.run import run as run
    from batch_inference.models.predictor import TorchPredictor as TorchPredictor
    from batch_inference.output.verify import verify as verify
    from batch_inference.pipeline.datasets import from_images as from_images
    from batch_inference.pipeline.datasets import from_paths as from_paths
    from batch_inference.pipeline.datasets import predict as predict
    from batch_inference.pipeline.datasets import read_images as read_images

__all__ = [
    "JobConfig",
    "TorchPredictor",
    "__version__",
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
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
