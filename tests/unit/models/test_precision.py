from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batch_inference.config import InferenceConfig, JobConfig, OutputConfig, StorageConfig
from batch_inference.images.transform import Transform
from batch_inference.models import precision
from batch_inference.models.info import describe_model
from batch_inference.models.precision import (
    MIN_AGREEMENT,
    MIN_JOB_IMAGES,
    SAMPLE_IMAGES,
    PrecisionTrial,
    supports_bfloat16,
)
from batch_inference.models.predictor import TorchPredictor
from batch_inference.output.decisions import Decisions
from batch_inference.pipeline import factories
from batch_inference.pipeline.factories import ClassifierFactory
from batch_inference.storage.store import Store
from tests.support.models import LITE
from tests.support.photos import photos

CPU = torch.device("cpu")


def decisions(folder: Path) -> Decisions:
    return Decisions(Store(str(folder), StorageConfig()))


def run(trial: PrecisionTrial, differ: set[int], batch: int = 32) -> int:
    """Add images to a trial until it has decided, and return their number."""
    for start in range(0, 10 * SAMPLE_IMAGES, batch):
        exact = np.arange(start, start + batch)
        trial.add(exact, np.array([-1 if number in differ else number for number in exact]))
        if trial.decided:
            return start + batch
    raise AssertionError("never decided")


def test_equal_labels_lower_the_precision_and_are_recorded(tmp_path: Path) -> None:
    trial = PrecisionTrial(decisions(tmp_path), CPU)
    assert trial.decided is None
    assert run(trial, set()) == SAMPLE_IMAGES
    assert trial.decided == "bfloat16"
    record = json.loads((tmp_path / "_decisions/precision.json").read_text())
    assert (record["precision"], record["top1_agreement"], record["images"]) == ("bfloat16", 1, SAMPLE_IMAGES)
    assert record["required"] == MIN_AGREEMENT and record["device"].startswith("cpu")


@pytest.mark.parametrize(("differ", "expected"), [(2, "bfloat16"), (3, "float32")])
def test_threshold_decides_the_precision(tmp_path: Path, differ: int, expected: str) -> None:
    trial = PrecisionTrial(decisions(tmp_path), CPU)
    run(trial, set(range(SAMPLE_IMAGES - differ, SAMPLE_IMAGES)))
    assert trial.decided == expected
    assert (
        (SAMPLE_IMAGES - differ) / SAMPLE_IMAGES >= MIN_AGREEMENT
        if expected == "bfloat16"
        else (SAMPLE_IMAGES - differ) / SAMPLE_IMAGES < MIN_AGREEMENT
    )


def test_trial_ends_as_soon_as_too_many_labels_differ(tmp_path: Path) -> None:
    trial = PrecisionTrial(decisions(tmp_path), CPU)
    assert run(trial, set(range(100))) == 32
    assert trial.decided == "float32"


def test_first_decision_holds_for_all(tmp_path: Path) -> None:
    first, second = PrecisionTrial(decisions(tmp_path), CPU), PrecisionTrial(decisions(tmp_path), CPU)
    run(first, set(range(100)))
    run(second, set())
    assert first.decided == second.decided == "float32"
    assert PrecisionTrial(decisions(tmp_path), CPU).decided == "float32"


def test_precision_is_not_lowered_without_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = decisions(tmp_path)
    monkeypatch.setattr(mine, "decide", lambda name, record: None)
    trial = PrecisionTrial(mine, CPU)
    run(trial, set())
    assert trial.decided == "float32"


def test_invalid_record_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "_decisions").mkdir()
    for text in ("", "[]", '{"precision": "int8"}', "{"):
        (tmp_path / "_decisions/precision.json").write_text(text)
        assert PrecisionTrial(decisions(tmp_path), CPU).decided is None


# --- in an actor


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClassifierFactory:
    monkeypatch.setattr(precision, "supports_bfloat16", lambda device: True)
    monkeypatch.setattr(precision, "SAMPLE_IMAGES", 24)
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


def test_actor_uses_float32_until_the_decision_and_follows_it(
    factory: ClassifierFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "MIN_AGREEMENT", 0.5)
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
def test_decision_of_another_actor_is_followed_from_the_start(
    factory: ClassifierFactory, tmp_path: Path, held: str
) -> None:
    decisions(tmp_path).decide("precision", {"precision": held})
    undecided = factories.PrecisionComparison
    assert not isinstance(factory(), undecided)


def test_short_jobs_are_float32(factory: ClassifierFactory) -> None:
    short = ClassifierFactory(factory.config, factory.transform, None, images=MIN_JOB_IMAGES - 1)
    assert not isinstance(short(), factories.PrecisionComparison)
    assert isinstance(
        ClassifierFactory(factory.config, factory.transform, None, images=MIN_JOB_IMAGES)(),
        factories.PrecisionComparison,
    )


def test_configured_precision_is_not_compared(factory: ClassifierFactory, tmp_path: Path) -> None:
    for name in ("float32", "bfloat16"):
        section = factory.config.inference.model_copy(update={"precision": name})
        fixed = ClassifierFactory(factory.config.model_copy(update={"inference": section}), factory.transform, None)
        confidences(fixed())
    assert not (tmp_path / "_decisions").exists()


def test_bfloat16_support_depends_on_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, avx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx, raising=False)
        assert supports_bfloat16(CPU) is (amx or avx)


# --- lowered weights


def test_users_module_keeps_its_weights() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)).eval()
    before = copy.deepcopy(network.state_dict())
    TorchPredictor(network, None, transform=Transform(resize=4, crop=4), precision="bfloat16").classify(
        np.zeros((2, 4, 4, 3), np.uint8)
    )
    for name, value in network.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])


def test_network_with_float32_constants_runs_under_autocast() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(48, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.linear(images.flatten(1) @ torch.eye(48))

    predictor = TorchPredictor(Constant().eval(), None, transform=Transform(resize=4, crop=4), precision="bfloat16")
    assert len(predictor.classify(np.zeros((2, 4, 4, 3), np.uint8))["confidence"]) == 2
