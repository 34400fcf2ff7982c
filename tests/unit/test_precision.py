from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batch_inference import factories, precision
from batch_inference.config import InferenceConfig, JobConfig, OutputConfig, StorageConfig
from batch_inference.decisions import Decisions
from batch_inference.factories import ClassifierFactory
from batch_inference.models import describe_model
from batch_inference.precision import AGREEMENT, IMAGES, LEAST_IMAGES, Trial, supports_bfloat16
from batch_inference.predictor import TorchPredictor
from batch_inference.storage import Store
from batch_inference.transform import Transform
from tests.photos import photos
from tests.unit.test_predictor import LITE

CPU = torch.device("cpu")


def decisions(folder: Path) -> Decisions:
    return Decisions(Store(str(folder), StorageConfig()))


def run(trial: Trial, differ: set[int], batch: int = 32) -> int:
    """Feeds a trial until it has decided; how many images that took."""
    for start in range(0, 10 * IMAGES, batch):
        exact = np.arange(start, start + batch)
        trial.add(exact, np.array([-1 if number in differ else number for number in exact]))
        if trial.decided:
            return start + batch
    raise AssertionError("never decided")


def test_equal_labels_lower_the_precision_and_it_is_recorded(tmp_path: Path) -> None:
    trial = Trial(decisions(tmp_path), CPU)
    assert trial.decided is None
    assert run(trial, set()) == IMAGES
    assert trial.decided == "bfloat16"
    record = json.loads((tmp_path / "_decisions/precision.json").read_text())
    assert (record["precision"], record["top1_agreement"], record["images"]) == ("bfloat16", 1, IMAGES)
    assert record["required"] == AGREEMENT and record["device"].startswith("cpu")


@pytest.mark.parametrize(("differ", "expected"), [(2, "bfloat16"), (3, "float32")])
def test_the_threshold(tmp_path: Path, differ: int, expected: str) -> None:
    trial = Trial(decisions(tmp_path), CPU)
    run(trial, set(range(IMAGES - differ, IMAGES)))
    assert trial.decided == expected
    assert (IMAGES - differ) / IMAGES >= AGREEMENT if expected == "bfloat16" else (IMAGES - differ) / IMAGES < AGREEMENT


def test_a_hopeless_trial_is_short(tmp_path: Path) -> None:
    trial = Trial(decisions(tmp_path), CPU)
    assert run(trial, set(range(100))) == 32
    assert trial.decided == "float32"


def test_the_first_decision_holds_for_all(tmp_path: Path) -> None:
    first, second = Trial(decisions(tmp_path), CPU), Trial(decisions(tmp_path), CPU)
    run(first, set(range(100)))
    run(second, set())
    assert first.decided == second.decided == "float32"
    assert Trial(decisions(tmp_path), CPU).decided == "float32"


def test_what_cannot_be_recorded_is_not_lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = decisions(tmp_path)
    monkeypatch.setattr(mine, "decide", lambda name, record: None)
    trial = Trial(mine, CPU)
    run(trial, set())
    assert trial.decided == "float32"


def test_a_record_of_rubbish_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "_decisions").mkdir()
    for text in ("", "[]", '{"precision": "int8"}', "{"):
        (tmp_path / "_decisions/precision.json").write_text(text)
        assert Trial(decisions(tmp_path), CPU).decided is None


# --- in an actor


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClassifierFactory:
    monkeypatch.setattr(precision, "supports_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "IMAGES", 24)
    config = JobConfig(
        model=LITE,
        output=OutputConfig(uri=str(tmp_path)),
        inference=InferenceConfig(actors=1, gpus_per_actor=0, top_k=2),
    )
    return ClassifierFactory(config, describe_model(LITE, StorageConfig()).transform, None)


def pixels() -> np.ndarray:
    return np.stack([Transform().pixels(photo) for photo in photos().values()][:12])


def confidences(predict: Any) -> list[float]:
    images = pixels()
    return list(predict(images, [""] * len(images))["confidence"].to_pylist())


def test_an_actor_is_exact_until_the_decision_and_then_what_it_says(
    factory: ClassifierFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "AGREEMENT", 0.5)
    exact = TorchPredictor.from_config(
        LITE, factory.config.inference.model_copy(update={"precision": "float32"}), StorageConfig(), factory.transform
    ).classify(pixels())["confidence"]
    predict = factory()
    np.testing.assert_allclose(confidences(predict), exact, rtol=1e-5)
    assert not (tmp_path / "_decisions/precision.json").exists()
    confidences(predict)
    decided = json.loads((tmp_path / "_decisions/precision.json").read_text())
    after = np.array(confidences(predict))
    assert decided["precision"] == "bfloat16"
    assert np.abs(after - exact).max() > 1e-4
    # The next actor starts with what was decided.
    np.testing.assert_allclose(confidences(factory()), after, rtol=1e-5)


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_a_decision_of_another_actor_is_followed_from_the_start(
    factory: ClassifierFactory, tmp_path: Path, held: str
) -> None:
    decisions(tmp_path).decide("precision", {"precision": held})
    undecided = factories._Undecided
    assert not isinstance(factory(), undecided)


def test_short_jobs_are_float32(factory: ClassifierFactory) -> None:
    short = ClassifierFactory(factory.config, factory.transform, None, images=LEAST_IMAGES - 1)
    assert not isinstance(short(), factories._Undecided)
    assert isinstance(
        ClassifierFactory(factory.config, factory.transform, None, images=LEAST_IMAGES)(), factories._Undecided
    )


def test_what_is_configured_is_not_tried(factory: ClassifierFactory, tmp_path: Path) -> None:
    for name in ("float32", "bfloat16"):
        section = factory.config.inference.model_copy(update={"precision": name})
        fixed = ClassifierFactory(factory.config.model_copy(update={"inference": section}), factory.transform, None)
        confidences(fixed())
    assert not (tmp_path / "_decisions").exists()


def test_support_is_a_matter_of_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, avx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx, raising=False)
        assert supports_bfloat16(CPU) is (amx or avx)


# --- lowered weights


def test_the_users_module_keeps_its_weights() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    before = copy.deepcopy(network.state_dict())
    TorchPredictor(network, None, transform=Transform(resize=4, crop=4), precision="bfloat16").classify(
        np.zeros((2, 4, 4, 3), np.uint8)
    )
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])


def test_a_network_with_constants_of_its_own_runs_under_autocast() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(48, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.linear(images.flatten(1) @ torch.eye(48))

    predictor = TorchPredictor(Constant().eval(), None, transform=Transform(resize=4, crop=4), precision="bfloat16")
    assert len(predictor.classify(np.zeros((2, 4, 4, 3), np.uint8))["confidence"]) == 2
