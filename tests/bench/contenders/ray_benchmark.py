"""(b) Ray's image classification benchmark: the steps of its release test, in Ray's repository at
``release/nightly_tests/multimodal_inference_benchmarks/image_classification/ray_data_main.py``.

A Parquet file of paths, ``download``, a row at a time Pillow's decoder and ``ToTensor`` before ``weights.transforms()`` (so that floats
are resized), float32 images through the object store, batches of 100. Changed is what a CPU needs, ``compute=`` for the deprecated
``concurrency=``, and the class's index beside a confidence for its label.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image
from ray.data import ActorPoolStrategy
from ray.data.expressions import download
from torchvision import transforms

from tests.bench import weights
from tests.bench.contenders.common import mark, task

BATCH_SIZE = 100


class ResNetActor:
    def __init__(self, model: str, file: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = weights.load(model, file).to(self.device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = torch.from_numpy(batch["norm_image"]).to(self.device)
        with torch.inference_mode():
            confidence, index = torch.max(self.model(images).softmax(dim=1), dim=1)
        mark(len(images))
        return {
            "uri": batch["image_url"],
            "predicted_class_idx": index.cpu().numpy(),
            "confidence": confidence.cpu().numpy(),
        }


def main() -> None:
    job = task()
    transform = transforms.Compose([transforms.ToTensor(), weights.transform_of(job.model)])

    def decode(row: dict[str, Any]) -> dict[str, Any]:
        row["image"] = np.array(Image.open(io.BytesIO(row.pop("bytes"))).convert("RGB"))
        return row

    def normalize(row: dict[str, Any]) -> dict[str, Any]:
        row["norm_image"] = transform(row.pop("image")).numpy()
        return row

    listing = Path(f"{job.output}.parquet")
    pq.write_table(pa.table({"image_url": job.paths}), listing)
    # Beside the actors, which hold a CPU each, `download` plans in an actor of its own and works in tasks.
    ray.init(address="local", num_cpus=max(os.cpu_count() or 1, job.actors + 2))
    ray.data.read_parquet(str(listing)).with_column("bytes", download("image_url")).map(decode).map(
        normalize
    ).map_batches(
        ResNetActor,
        fn_constructor_args=(job.model, str(job.weights)),
        batch_size=job.batch_size or BATCH_SIZE,
        num_gpus=0,
        compute=ActorPoolStrategy(size=job.actors),
    ).write_parquet(str(job.output))


if __name__ == "__main__":
    main()
