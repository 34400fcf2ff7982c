"""(c) A plain PyTorch loop: a ``DataLoader`` with a worker a core, Pillow and the weights' transform in them; the network outside."""

from __future__ import annotations

import os
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tests.bench import weights
from tests.bench.contenders.common import mark, task, write

BATCH_SIZE = 32


class Photos(Dataset[Any]):
    def __init__(self, paths: list[str], transform: Any) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        path = self.paths[index]
        return path, self.transform(Image.open(path).convert("RGB"))


def main() -> None:
    job = task()
    network = weights.load(job.model, job.weights)
    loader = DataLoader(
        Photos(job.paths, weights.transform_of(job.model)),
        batch_size=job.batch_size or BATCH_SIZE,
        num_workers=os.cpu_count() or 1,
    )
    uris: list[str] = []
    classes: list[int] = []
    confidences: list[float] = []
    with torch.inference_mode():
        for paths, images in loader:
            confidence, index = network(images).softmax(dim=1).max(dim=1)
            uris += paths
            classes += index.tolist()
            confidences += confidence.tolist()
            mark(len(paths))
    write(job.output, uris, classes, confidences)


if __name__ == "__main__":
    main()
