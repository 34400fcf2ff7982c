"""(d) Daft on its native runner: the steps of Daft's own image classification benchmark, in its repository at
``benchmarking/ai/image_classification/daft_main.py``, with ``weights.transforms()`` on Pillow images.
"""

from __future__ import annotations

import os
from typing import Any

import daft
import numpy as np
import torch
from torchvision import transforms

from tests.bench import weights
from tests.bench.contenders.common import mark, task

BATCH_SIZE = 100


def main() -> None:
    job = task()
    mode = os.environ.get("DAFT_MODE", "a")
    file, name = str(job.weights), job.model
    daft.set_runner_native()
    transform = transforms.Compose([transforms.ToTensor(), weights.transform_of(job.model)])
    if mode in ("p", "u"):
        pt = weights.transform_of(job.model)
        from PIL import Image

        def transform(a):
            return pt(Image.fromarray(a)).numpy()

    @daft.cls(max_concurrency=job.actors, use_process=True if os.environ.get("DAFT_PROC") else None)
    class Classifier:
        def __init__(self) -> None:
            if os.environ.get("DAFT_THREADS"):
                torch.set_num_threads(int(os.environ["DAFT_THREADS"]))
            self.model = weights.load(name, file)

        @daft.method.batch(
            return_dtype=daft.DataType.struct(
                {"predicted_class_idx": daft.DataType.int32(), "confidence": daft.DataType.float32()}
            ),
            batch_size=job.batch_size or BATCH_SIZE,
        )
        def __call__(self, images: Any) -> Any:
            if len(images) == 0:
                return []
            batch = torch.from_numpy(np.array(images.to_pylist()))
            with torch.inference_mode():
                confidence, index = self.model(batch).softmax(dim=1).max(dim=1)
            mark(len(batch))
            return [
                {"predicted_class_idx": i, "confidence": c}
                for i, c in zip(index.tolist(), confidence.tolist(), strict=True)
            ]

    frame = daft.from_pydict({"uri": job.paths})
    frame = frame.with_column("image", frame["uri"].download().decode_image(mode=daft.ImageMode.RGB))
    frame = frame.with_column(
        "image",
        frame["image"].apply(
            lambda image: transform(image),
            return_dtype=daft.DataType.tensor(dtype=daft.DataType.float32(), shape=(3, 224, 224)),
        ),
    )
    frame = frame.with_column("best", Classifier()(frame["image"]))
    frame = frame.select("uri", frame["best"]["predicted_class_idx"], frame["best"]["confidence"])
    frame.write_parquet(str(job.output))


if __name__ == "__main__":
    main()
