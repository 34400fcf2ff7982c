"""The predictor of the output in tests/unit/output/data, whose job knows this file by its content: leave it as it is."""

from __future__ import annotations

import time

import numpy as np


class Brightness:
    """Return the mean of each image, after a while."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        time.sleep(self.delay_s)
        return {"brightness": np.array([image.mean() for image in batch["image"]], np.float32)}
