"""A predictor of a user's own, which takes its time: half a second an image."""

from __future__ import annotations

import time
from typing import Any

import numpy as np


class Slow:
    """Mean brightness, slowly."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns one number an image."""
        images = batch["image"]
        time.sleep(0.5 * len(images))
        return {"brightness": np.array([float(np.mean(image)) for image in images], np.float32)}
