"""Rows that depend on their neighbors, and all that looks like it and is none."""

from __future__ import annotations

import itertools
import time
import uuid
from typing import Any

import numpy as np
import pytest
import torch

from batch_inference.config import PredictorConfig
from batch_inference.errors import BatchInferenceError, UserError
from batch_inference.pipeline.actor import InferenceActor
from batch_inference.pipeline.factories import CustomFactory
from batch_inference.pipeline.result_rows import notes
from batch_inference.pipeline.schemas import raise_if_fatal
from tests.support.batches import errors, prepared

RANDOM = np.random.default_rng(7)
ALIKE = [RANDOM.integers(0, 255, (8, 8, 3), dtype=np.uint8) for _ in range(16)]
SIZES = [RANDOM.integers(0, 255, (8 + i % 3, 8, 3), dtype=np.uint8) for i in range(16)]


def means(batch: dict[str, Any]) -> np.ndarray:
    return np.array([float(image.mean()) for image in batch["image"]])


def tensors(batch: dict[str, Any]) -> torch.Tensor:
    return torch.stack([torch.tensor(image).permute(2, 0, 1).float() for image in batch["image"]])


def tried(call: Any, images: list[np.ndarray] = ALIKE, size: int = 16, **options: Any) -> InferenceActor:
    """An actor after its first batches; raises what ends the job."""

    class Predictor:
        def __call__(self, batch: dict[str, Any]) -> Any:
            return call(batch)

    mine = InferenceActor(CustomFactory(Predictor, PredictorConfig(path="m:P", **options)), [])
    table = prepared(list(images))
    for start in range(0, len(images), size):
        raise_if_fatal(mine(table.slice(start, size)))
    return mine


def network(*layers: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(0)
    pooled = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 8), *layers)
    return pooled.to(dtype)


def flat_and_cut(batch: dict[str, Any]) -> dict[str, Any]:
    """Two boxes an image in one list, of which as many are kept as there are images."""
    boxes = [[float(image[0, 0, k]), float(k)] for image in batch["image"] for k in range(2)]
    return {"box": boxes[: len(batch["image"])]}


def normalized(batch: dict[str, Any]) -> dict[str, Any]:
    found = means(batch)
    return {"z": (found - found.mean()) / (found.std() + 1e-6)}


def trained(batch: dict[str, Any], net: torch.nn.Module = network(torch.nn.BatchNorm1d(8))) -> dict[str, Any]:
    return {"features": net(tensors(batch))}


def padded(batch: dict[str, Any]) -> dict[str, Any]:
    """The mean of each image, with a margin up to the size of the largest of the batch."""
    most = max(image.size for image in batch["image"])
    return {"mean": [float(image.sum()) / most for image in batch["image"]]}


def labels_shifted(batch: dict[str, Any]) -> dict[str, Any]:
    found = [f"class {int(10 * mean) % 7}" for mean in means(batch)]
    return {"label": found[1:] + found[:1]}


DEPENDENT = {
    "flattened and cut": flat_and_cut,
    "shifted by one": lambda b: {"mean": np.roll(means(b), 1)},
    "shifted by half": lambda b: {"mean": np.roll(means(b), len(b["image"]) // 2)},
    "sorted": lambda b: {"mean": np.sort(means(b))},
    "reversed": lambda b: {"mean": means(b)[::-1].copy()},
    "normalized over the batch": normalized,
    "in training mode": trained,
    "share of the batch": lambda b: {"share": means(b) / means(b).sum(), "rank": means(b).argsort().argsort()},
    "labels shifted": labels_shifted,
    "the first image's for all": lambda b: {"mean": [means(b)[0]] * len(b["image"])},
    "padded to the largest": padded,
    "dicts shifted": lambda b: {"found": [{"score": m, "box": [m, 1.0]} for m in np.roll(means(b), 1)]},
    "reversed, beside a random column": lambda b: {"r": np.random.rand(len(b["image"])), "mean": means(b)[::-1].copy()},
    "grouped by size": lambda b: {"mean": [float(i.mean()) for i in sorted(b["image"], key=lambda i: i.shape)]},
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_rows_that_depend_on_their_neighbors_end_the_job_with_both_side_by_side(name: str) -> None:
    images = SIZES if name in ("grouped by size", "padded to the largest") else ALIKE
    with pytest.raises(
        UserError, match=r"the predictor's rows depend on the other images of their batch; column '"
    ) as caught:
        tried(DEPENDENT[name], images)
    head, *lines = caught.value.message.splitlines()
    assert 1 <= len(lines) <= 3
    assert all(
        line.startswith("  - ") and " alone | " in line and " in a batch in another order" in line for line in lines
    )
    assert "'r'" not in head
    assert "predictor.depends_on_batch=true" in caught.value.remedy
    assert tried(DEPENDENT[name], images, depends_on_batch=True).rows_check is None


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8])
def test_few_images_are_enough(count: int) -> None:
    with pytest.raises(UserError, match="depend on the other images"):
        tried(lambda b: {"mean": np.roll(means(b), 1)}, ALIKE[:count])


def test_finding_names_the_other_image() -> None:
    with pytest.raises(UserError) as caught:
        tried(lambda b: {"mean": np.roll(means(b), 1)})
    alone, other = (f"{image.mean():.6g}" for image in ALIKE[:2])
    assert f"  - 1.jpg: {other} alone | {alone} in a batch, which is what 0.jpg gives alone | " in caught.value.message


class Net:
    """A network in eval mode at some precision, with probabilities, labels and the best class."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.net, self.dtype = network(torch.nn.BatchNorm1d(8), dtype=dtype).eval(), dtype

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            scores = self.net(tensors(batch).to(self.dtype) / 255).softmax(1)
        best, index = scores.max(1)
        return {"scores": scores, "best": best, "class": index, "label": [f"class {int(i)}" for i in index]}


def rounded_by_size(batch: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are off by a per cent, and near ties that flip, with the size of the batch."""
    found = means(batch) * (1 + 0.01 * (len(batch["image"]) % 3))
    return {"mean": found, "above": found > 128, "near": [f"{m:.0f}" for m in found]}


def near_tie(batch: dict[str, Any]) -> dict[str, Any]:
    """One label of many flips with the place in the batch."""
    return {
        "label": [
            "tie" if place == 1 and image[0, 0, 0] % 2 else "clear" for place, image in enumerate(batch["image"])
        ],
        "mean": means(batch),
    }


def ragged(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        "boxes": [np.full((int(i[0, 0, 0]) % 4, 4), i[0, 0, 1], np.float32) for i in batch["image"]],
        "lists": [[float(i[0, 0, 1])] * (int(i[0, 0, 0]) % 3) for i in batch["image"]],
        "found": [{"n": int(i[0, 0, 0]), "tags": ["a"] * (int(i[0, 0, 0]) % 2)} for i in batch["image"]],
        "maybe": [None if i[0, 0, 0] % 2 else float(i.mean()) for i in batch["image"]],
        "none": [None] * len(batch["image"]),
        "nan": [float("nan") if i[0, 0, 0] % 2 else float("inf") for i in batch["image"]],
        "bytes": [i[0, 0].tobytes() for i in batch["image"]],
        "pixels": [i.astype(np.float16) for i in batch["image"]],
        "same": ["cat"] * len(batch["image"]),
    }


INDEPENDENT = {
    "means": lambda b: {"mean": means(b)},
    "ragged, nested, missing": ragged,
    "float32": Net(torch.float32),
    "bfloat16": Net(torch.bfloat16),
    "uris": lambda b: {"name": [uri.rpartition("/")[2] for uri in b["uri"]]},
    "constant": lambda b: {"version": ["v12"] * len(b["image"])},
    "rounding": rounded_by_size,
    "a near tie": near_tie,
}


@pytest.mark.parametrize("name", INDEPENDENT)
@pytest.mark.parametrize("images", [ALIKE, ALIKE[:3], SIZES], ids=["alike", "three", "sizes"])
def test_independent_rows_pass(name: str, images: list[np.ndarray]) -> None:
    if images is SIZES and name in ("float32", "bfloat16"):
        images = ALIKE[5:10]
    found = tried(INDEPENDENT[name], images).rows_check
    assert found is not None
    assert found.state == "OK" or name in ("rounding", "a near tie")
    assert found.state != "FAIL"


def counter() -> Any:
    numbers = itertools.count()
    return lambda b: {"n": [next(numbers) for _ in b["image"]], "mean": means(b)}


def previous() -> Any:
    last: list[np.ndarray] = []

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        last.append(means(batch))
        return {"mean": np.resize(last[max(0, len(last) - 2)], len(last[-1]))}

    return call


NOTED = {
    "random": (lambda: lambda b: {"r": np.random.rand(len(b["image"]))}, "column 'r' differs when the same images are predicted again"),
    "random labels": (lambda: lambda b: {"l": [uuid.uuid4().hex for _ in b["image"]]}, "column 'l' differs when the same images"),
    "clock": (lambda: lambda b: {"t": [time.perf_counter_ns() % 1000003 for _ in b["image"]]}, "column 't' differs when the same images"),
    "counter": (counter, "column 'n' differs when the same images"),
    "of the batch before": (previous, "column 'mean' differs when the same images"),
    "row numbers": (lambda: lambda b: {"n": np.arange(len(b["image"]))}, "column 'n' depends on the size of the batch or on the place"),
    "size of the batch": (lambda: lambda b: {"n": np.full(len(b["image"]), len(b["image"]))}, "1 for an image alone, 4 for it in a batch"),
    "squeeze": (lambda: lambda b: {"m": torch.tensor(means(b)).squeeze()}, "one image alone fails, which the last batch of a shard may"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTED)
def test_random_or_size_dependent_rows_are_a_warning_that_the_driver_tells(name: str) -> None:
    make, said = NOTED[name]
    call = make()

    class Predictor:
        def __call__(self, batch: dict[str, Any]) -> Any:
            return call(batch)

    mine = InferenceActor(CustomFactory(Predictor, PredictorConfig(path="m:P")), [])
    first, second = mine(prepared(list(ALIKE))), mine(prepared(list(ALIKE)))
    assert mine.rows_check is not None
    assert mine.rows_check.state == "WARN"
    assert said in mine.rows_check.finding
    assert notes(first) == [f"rows of the predictor: {mine.rows_check.finding}"]
    assert errors(first) == [None] * 16
    assert notes(second) == []


def test_class_for_one_size_of_batch_is_not_refused() -> None:
    def call(batch: dict[str, Any]) -> dict[str, Any]:
        if len(batch["image"]) != 16:
            raise RuntimeError("the engine is built for 16")
        return {"mean": means(batch)}

    found = tried(call).rows_check
    assert found is not None
    assert (found.state, found.finding) == (
        "WARN",
        "rows alone and in a batch were not compared: RuntimeError: the engine is built for 16",
    )


def test_class_that_pads_its_batch_is_found() -> None:
    with pytest.raises(
        UserError,
        match=r"returned 16 values for 16 images is chance: its column 'mean' has 16 for 0.jpg alone",
    ):
        tried(lambda b: {"mean": np.resize(means(b), 16)})


def test_exception_that_ends_the_job_is_not_a_warning() -> None:
    def call(batch: dict[str, Any]) -> dict[str, Any]:
        if len(batch["image"]) == 1:
            raise UserError("no licence for single images", "Get one.")
        return {"mean": means(batch)}

    with pytest.raises(BatchInferenceError, match="no licence for single images"):
        tried(call)


def test_equal_images_are_no_evidence_and_the_next_batch_is_tried() -> None:
    def call(batch: dict[str, Any]) -> dict[str, Any]:
        return {"mean": np.roll(means(batch), 1)}

    same = [ALIKE[0]] * 8
    assert tried(call, same, 8).rows_check is None
    with pytest.raises(UserError, match="depend on the other images"):
        tried(call, same + ALIKE[:8], 8)


def test_slow_class_gets_fewer_images_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 0.0)
    now = [next(clock)]
    monkeypatch.setattr("batch_inference.pipeline.actor.time.perf_counter", lambda: now[0])

    def calls(seconds: float) -> int:
        seen: list[int] = []

        def call(batch: dict[str, Any]) -> dict[str, Any]:
            now[0] += seconds * len(batch["image"])
            seen.append(len(batch["image"]))
            return {"mean": means(batch)}

        tried(call)
        return len(seen) - 1

    assert [calls(seconds) for seconds in (0.0, 1.0, 2.0, 5.0, 20.0)] == [12, 12, 8, 4, 0]


def test_images_that_failed_are_left_out() -> None:
    def call(batch: dict[str, Any]) -> dict[str, Any]:
        if any(image[0, 0, 0] % 2 for image in batch["image"]):
            raise ValueError("odd")
        return {"mean": np.roll(means(batch), 1)}

    even = [image for image in ALIKE if image[0, 0, 0] % 2 == 0]
    assert 2 <= len(even) < 16
    mine = InferenceActor(CustomFactory(lambda: call, PredictorConfig(path="m:P")), [])
    # Halves that succeed have rows of another image, too.
    order = even + [image for image in ALIKE if image[0, 0, 0] % 2]
    with pytest.raises(UserError, match="depend on the other images"):
        raise_if_fatal(mine(prepared(order)))
