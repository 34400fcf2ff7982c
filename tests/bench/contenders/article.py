"""(a) The article's pipeline as published: ``read_images`` and its predictor class in an actor pool.

Changed is what a CPU needs: no GPU for the actors, and no more of them than leave Ray a CPU to read with. Weights come from a file, and the
path travels along, so that rows can be told apart.
"""

from __future__ import annotations

import os

import numpy as np
import ray
import torch
from PIL import Image
from ray.data import ActorPoolStrategy

from tests.bench import weights
from tests.bench.contenders.common import mark, task

BATCH_SIZE = 32


class TorchPredictor:
    def __init__(self, model: str, file: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.transform = weights.transform_of(model)
        self.model = weights.load(model, file).to(self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = [self.transform(Image.fromarray(image)) for image in batch["image"]]
        with torch.inference_mode():
            scores = torch.nn.functional.softmax(self.model(torch.stack(images).to(self.device)), dim=1)
            confidence, index = torch.max(scores, dim=1)
        mark(len(images))
        return {
            "uri": batch["path"],
            "predicted_class_idx": index.cpu().numpy(),
            "confidence": confidence.cpu().numpy(),
        }


def main() -> None:
    job = task()
    # Actors that take every CPU leave none to read with, and Ray Data waits for ever.
    ray.init(address="local", num_cpus=max(os.cpu_count() or 1, job.actors + 1))
    ray.data.read_images(str(job.images), include_paths=True).map_batches(
        TorchPredictor,
        fn_constructor_args=(job.model, str(job.weights)),
        batch_size=job.batch_size or BATCH_SIZE,
        num_gpus=0,
        compute=ActorPoolStrategy(size=job.actors),
    ).write_parquet(str(job.output))


if __name__ == "__main__":
    main()
