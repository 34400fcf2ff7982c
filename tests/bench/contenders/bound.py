"""(f) The bound: the same decoding and the same network, split over the cores beforehand, with no framework.

One process a core, forked once torch is imported, so that the import is paid once. Each takes every n-th image, decodes and resizes it with
this project's own code, the fastest way known here, and runs the network on channels-last batches with one thread. Memory is kept
as the project's actors keep it.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from batch_inference.config import PreprocessConfig
from batch_inference.images import malloc
from batch_inference.images.pixels import decode
from batch_inference.images.transform import Transform
from tests.bench import weights
from tests.bench.contenders.common import Task, mark, task, write

BATCH_SIZE = 32
PREPROCESS, TRANSFORM = PreprocessConfig(), Transform(resize=256, crop=224)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(path: str) -> np.ndarray:
    """Decodes, resizes the shorter side to 256, crops the central 224.

    Returns:
        uint8 of shape (224, 224, 3).
    """
    return decode(Path(path).read_bytes(), PREPROCESS, TRANSFORM)


class Network:
    """The network with its weights in the precision, and the arithmetic around it."""

    def __init__(self, model: str, file: Path, precision: str) -> None:
        self.dtype = getattr(torch, precision)
        self.network = weights.load(model, file).to(dtype=self.dtype, memory_format=torch.channels_last)
        self.mean = torch.tensor(MEAN).mul(255).view(-1, 1, 1)
        self.scale = torch.tensor(STD).mul(255).reciprocal().view(-1, 1, 1)

    def __call__(self, images: list[np.ndarray]) -> tuple[list[int], list[float]]:
        """Classes and confidences of images of :func:`pixels`."""
        with torch.inference_mode():
            batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
            batch = batch.float().sub_(self.mean).mul_(self.scale).to(self.dtype)
            confidence, index = self.network(batch).float().softmax(dim=1).max(dim=1)
        return index.tolist(), confidence.tolist()


def share(job: Task, first: int, step: int, answer: Connection) -> None:
    """One process's share, sent back when it is done."""
    torch.set_num_threads(1)
    malloc.keep_image_memory()
    malloc.keep_activation_memory()
    network = Network(job.model, job.weights, job.precision)
    paths = job.paths[first::step]
    classes: list[int] = []
    confidences: list[float] = []
    size = job.batch_size or BATCH_SIZE
    for start in range(0, len(paths), size):
        index, confidence = network([pixels(path) for path in paths[start : start + size]])
        classes += index
        confidences += confidence
        mark(len(index))
    answer.send((paths, classes, confidences))


def main() -> None:
    job = task()
    context = multiprocessing.get_context("fork")
    cores = len(os.sched_getaffinity(0))
    answers = []
    processes = []
    for first in range(cores):
        here, there = context.Pipe(duplex=False)
        processes.append(context.Process(target=share, args=(job, first, cores, there)))
        processes[-1].start()
        answers.append(here)
    uris: list[str] = []
    classes: list[int] = []
    confidences: list[float] = []
    for answer in answers:
        part = answer.recv()
        uris += part[0]
        classes += part[1]
        confidences += part[2]
    for process in processes:
        process.join()
    write(job.output, uris, classes, confidences)


if __name__ == "__main__":
    main()
