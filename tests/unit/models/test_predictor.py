from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

from batch_inference.config import InferenceConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.images.transform import Transform
from batch_inference.models import predictor as predictor_module
from batch_inference.models.info import describe_model
from batch_inference.models.predictor import TorchPredictor
from tests.support.models import LITE

WEIGHTS = SqueezeNet1_1_Weights.DEFAULT
CPU = InferenceConfig(actors=1, gpus_per_actor=0)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(3)
    # Scaled up, so that the best class stands out and rounding cannot swap two of them.
    network = squeezenet1_1(weights=None)
    nn.init.normal_(network.classifier[1].weight, std=0.2)
    return network.eval()


@pytest.fixture
def builder(network: nn.Module) -> Any:
    def squeezenet(*, weights: SqueezeNet1_1_Weights | None = None) -> nn.Module:
        assert weights is WEIGHTS
        return network

    squeezenet.__annotations__["weights"] = SqueezeNet1_1_Weights | None
    return squeezenet


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arrays(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in sizes]


def as_objects(images: list[np.ndarray]) -> np.ndarray:
    column = np.empty(len(images), object)
    column[:] = images
    return column


def plain(network: nn.Module, images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the result of plain PyTorch without Ray."""
    preprocess = WEIGHTS.transforms()
    batch = torch.stack([preprocess(Image.fromarray(image).convert("RGB")) for image in images])
    with torch.inference_mode():
        confidence, idx = torch.max(network(batch).softmax(dim=1), dim=1)
    return idx.numpy(), confidence.numpy()


def same(got: dict[str, np.ndarray], network: nn.Module, images: list[np.ndarray]) -> None:
    idx, confidence = plain(network, images)
    assert sorted(got) == ["confidence", "predicted_class_idx"]
    assert got["predicted_class_idx"].dtype.kind == "i" and got["confidence"].dtype == np.float32
    assert got["predicted_class_idx"].tolist() == idx.tolist()
    np.testing.assert_allclose(got["confidence"], confidence, rtol=1e-4)


def test_predictions_equal_plain_pytorch(network: nn.Module, builder: Any) -> None:
    images = arrays((300, 400), (224, 224), (500, 33), (7, 9), (256, 1000))
    for weights in (WEIGHTS, "DEFAULT", "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"):
        same(TorchPredictor(builder, weights)({"image": as_objects(images)}), network, images)
    same(TorchPredictor(network, None, transform=Transform())({"image": as_objects(images)}), network, images)
    same(TorchPredictor(network, WEIGHTS)({"image": as_objects(images)}), network, images)


def test_stacked_read_only_images_are_accepted(network: nn.Module) -> None:
    images = arrays((60, 80), (60, 80), (60, 80))
    stacked = np.stack(images)
    stacked.flags.writeable = False
    same(TorchPredictor(network, WEIGHTS)({"image": stacked}), network, images)


def test_gray_images_are_accepted(network: nn.Module) -> None:
    gray = [image[:, :, 0] for image in arrays((60, 80), (70, 80))]
    predictor = TorchPredictor(network, WEIGHTS)
    same(predictor({"image": as_objects(gray)}), network, gray)
    same(predictor({"image": np.stack([gray[0], gray[0]])}), network, [gray[0], gray[0]])
    same(predictor({"image": as_objects([gray[0][:, :, None]])}), network, [gray[0]])


def test_architecture_is_found_by_name(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SqueezeNet1_1_Weights, "get_state_dict", lambda *_, **__: network.state_dict())
    images = arrays((60, 80))
    same(TorchPredictor("squeezenet1_1", "DEFAULT")({"image": as_objects(images)}), network, images)
    same(TorchPredictor(squeezenet1_1, WEIGHTS)({"image": as_objects(images)}), network, images)


def test_floats_are_refused(network: nn.Module) -> None:
    with pytest.raises(TypeError, match=r"float32 of shape \(60, 80, 3\)"):
        TorchPredictor(network, None)({"image": np.stack(arrays((60, 80))).astype(np.float32)})


def test_empty_images_are_not_predictions(network: nn.Module) -> None:
    images = arrays((60, 80), (70, 80))
    got = TorchPredictor(network, WEIGHTS)({"image": as_objects([images[0], np.zeros((0, 0, 3), np.uint8), images[1]])})
    assert got["predicted_class_idx"][1] == -1 and math.isnan(got["confidence"][1])
    same({key: value[[0, 2]] for key, value in got.items()}, network, images)


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("squeezenet11", "DEFAULT", "squeezenet1_1"),
        ("squeezenet1_1", "IMAGENET22K", "IMAGENET1K_V1"),
        ("squeezenet1_1", None, "random weights"),
        (squeezenet1_1, "IMAGENET22K", "IMAGENET1K_V1"),
        (squeezenet1_1, None, "random weights"),
        (lambda weights: "text", "any", "not a torch.nn.Module"),
    ],
)
def test_mistake_is_refused_with_a_remedy(model: Any, weights: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        TorchPredictor(model, weights)
    assert message in f"{caught.value.message} {caught.value.remedy}"


def test_unknown_precision_is_refused(network: nn.Module) -> None:
    with pytest.raises(UserError, match="float8"):
        TorchPredictor(network, None, precision="float8")


class Fixed(nn.Module):
    """A network that returns given logits."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits


def pixels(count: int, side: int = 4) -> np.ndarray:
    return np.zeros((count, side, side, 3), np.uint8)


def test_top_k_is_sorted_best_first() -> None:
    got = TorchPredictor(Fixed([[0.0, 2.0, 1.0], [5.0, 0.0, 4.0]]), None, top_k=2).classify(pixels(2))
    assert {key: (value.dtype.name, value.shape) for key, value in got.items()} == {
        "predicted_class_idx": ("int32", (2,)),
        "confidence": ("float32", (2,)),
        "top_k_idx": ("int32", (2, 2)),
        "top_k_confidence": ("float32", (2, 2)),
    }
    assert got["top_k_idx"].tolist() == [[1, 2], [0, 2]]
    assert got["predicted_class_idx"].tolist() == [1, 0]
    assert got["confidence"][0] == pytest.approx(math.exp(2) / (1 + math.e + math.exp(2)))
    assert got["confidence"].tolist() == got["top_k_confidence"][:, 0].tolist()


def test_top_k_is_limited_to_the_number_of_classes() -> None:
    got = TorchPredictor(Fixed([[0.0, 2.0]]), None, top_k=5).classify(pixels(1))
    assert got["top_k_idx"].tolist() == [[1, 0]]
    assert got["top_k_confidence"].sum() == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_stays_nan_and_in_its_row(bad: float) -> None:
    got = TorchPredictor(Fixed([[0.0, 1.0, 2.0], [9.0, bad, 0.0], [3.0, 1.0, 2.0]]), None).classify(pixels(3))
    assert np.isnan(got["confidence"]).tolist() == [False, True, False]
    assert np.isnan(got["top_k_confidence"][1]).all()
    assert got["predicted_class_idx"][[0, 2]].tolist() == [2, 0]


def test_reduced_precision_is_close(network: nn.Module) -> None:
    batch = np.stack([Transform().pixels(Image.fromarray(image)) for image in arrays((300, 400), (50, 60))])
    exact = TorchPredictor(network, None).classify(batch)
    rough = TorchPredictor(network, None, precision="bfloat16").classify(batch)
    assert rough["confidence"].dtype == np.float32
    np.testing.assert_allclose(rough["confidence"], exact["confidence"], atol=0.05)
    assert not np.array_equal(rough["confidence"], exact["confidence"])


def test_configuration_sets_device_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_module, "available_cpus", lambda: 8)
    info = describe_model(LITE, StorageConfig())
    inference = CPU.model_copy(update={"cpus_per_actor": 1.5, "top_k": 3})
    predictor = TorchPredictor.from_config(LITE, inference, StorageConfig(), info.transform)
    assert torch.get_num_threads() == 2
    assert predictor.device.type == "cpu"
    assert predictor.classify(pixels(2, 224))["top_k_idx"].shape == (2, 3)
    # More threads than CPUs only wait for each other.
    monkeypatch.setattr(predictor_module, "available_cpus", lambda: 1)
    predictor_module.set_up_actor_device(inference)
    assert torch.get_num_threads() == 1


def test_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="gpus_per_actor is 1"):
        TorchPredictor.from_config(LITE, InferenceConfig(), StorageConfig(), Transform())


def test_compile_calls_torch_compile(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda module: calls.append(module) or module)
    TorchPredictor(network, None)
    assert calls == []
    TorchPredictor(network, None, compile=True)
    assert calls == [network]


def test_first_output_of_several_is_used() -> None:
    class Pair(Fixed):
        def forward(self, images: torch.Tensor) -> Any:
            return self.logits, images

    assert TorchPredictor(Pair([[0.0, 1.0]]), None).classify(pixels(1))["predicted_class_idx"].tolist() == [1]
