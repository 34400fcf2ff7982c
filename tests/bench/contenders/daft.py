"""(d) Daft on its native runner: the steps of Daft's own benchmark of this task, in Daft's repository at
``benchmarking/ai/image_classification/daft_main.py``.

``download``, Daft's decoder, the transform a row at a time, a class that keeps the model, batches of 100. Three things differ, all in
Daft's favor: images are resized as Pillow images and not as floats, one instance of the class serves a CPU better than several, and torch
gets one thread, since Daft transforms on all cores at the same time.
"""

from __future__ import annotations

from typing import Any

import daft
import numpy as np
import torch
from PIL import Image

from tests.bench import weights
from tests.bench.contenders.common import mark, task

BATCH_SIZE = 100


def main() -> None:
    job = task()
    name, file = job.model, str(job.weights)
    daft.set_runner_native()
    transform = weights.transform_of(name)

    @daft.cls(max_concurrency=job.actors)
    class Classifier:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.model = weights.load(name, file)

        @daft.method.batch(
            return_dtype=daft.DataType.struct(
                {"predicted_class_idx": daft.DataType.int32(), "confidence": daft.DataType.float32()}
            ),
            batch_size=job.batch_size or BATCH_SIZE,
        )
        def __call__(self, images: Any) -> list[dict[str, Any]]:
            if len(images) == 0:
                return []
            batch = torch.from_numpy(np.array(images.to_pylist()))
            with torch.inference_mode():
                confidence, index = self.model(batch).softmax(dim=1).max(dim=1)
            mark(len(batch))
            return [
                {"predicted_class_idx": best, "confidence": value}
                for best, value in zip(index.tolist(), confidence.tolist(), strict=True)
            ]

    frame = daft.from_pydict({"uri": job.paths})
    frame = frame.with_column("image", frame["uri"].download().decode_image(mode=daft.ImageMode.RGB))
    frame = frame.with_column(
        "image",
        frame["image"].apply(
            lambda image: transform(Image.fromarray(image)).numpy(),
            return_dtype=daft.DataType.tensor(dtype=daft.DataType.float32(), shape=(3, 224, 224)),
        ),
    )
    frame = frame.with_column("best", Classifier()(frame["image"]))
    frame = frame.select("uri", frame["best"]["predicted_class_idx"], frame["best"]["confidence"])
    frame.write_parquet(str(job.output))


if __name__ == "__main__":
    main()
