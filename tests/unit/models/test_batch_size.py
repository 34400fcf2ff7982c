from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batch_inference.errors import RowError
from batch_inference.images.transform import Transform
from batch_inference.models.batch_size import (
    CPU_BATCH_SIZE,
    MAX_BATCH_BYTES,
    BatchSize,
    is_out_of_memory,
    max_batch_rows,
    padding_rows,
    search_batch_size,
    split_by_bytes,
)
from batch_inference.models.execution import Execution
from batch_inference.models.predictor import TorchPredictor
from batch_inference.pipeline.actor import InferenceActor
from batch_inference.pipeline.factories import _classifier_table
from tests.support.batches import errors, image, prepared

SMALL = Transform(resize=4, crop=4)


class Greedy(nn.Module):
    """A network with memory for `room` images at once; the class of an image is its first pixel."""

    def __init__(
        self, room: int, poison: int | None = None, message: str = "CUDA out of memory. Tried to allocate"
    ) -> None:
        super().__init__()
        self.room, self.poison, self.message = room, poison, message
        self.sizes: list[int] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        first = (images[:, 0, 0, 0] * 0.229 + 0.485).mul(255).round().long()
        if len(images) > self.room or (self.poison is not None and (first == self.poison).any()):
            raise torch.cuda.OutOfMemoryError(self.message)
        return nn.functional.one_hot(first, 256).float() * 9


def numbered(count: int) -> np.ndarray:
    return np.stack([np.full((4, 4, 3), number, np.uint8) for number in range(count)])


# --- out-of-memory errors


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
        (RuntimeError("shapes do not fit"), False),
    ],
)
def test_out_of_memory_is_distinguished_from_other_errors(exc: Exception, expected: bool) -> None:
    assert is_out_of_memory(exc) is expected


# --- the size in use


def test_batch_size_is_halved_and_grows_back_slowly() -> None:
    size = BatchSize(32)
    size.halve(32)
    assert size.current == 16
    # A last batch that was smaller anyway.
    size.halve(5)
    assert size.current == 2
    sizes = []
    for _ in range(400):
        size.record_success()
        sizes.append(size.current)
    assert sorted(set(sizes)) == [2, 4, 8, 16, 32]
    assert sizes.count(2) > 10 and sizes[-1] == 32
    size.halve(1)
    assert size.current == 1


# --- the search


def device(room: int, each: int, overhead: float, per_image: float) -> tuple[Any, list[int]]:
    tried: list[int] = []

    def measure(size: int) -> tuple[float, int]:
        tried.append(size)
        if 100 + size * each > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return overhead + size * per_image, 100 + size * each

    return measure, tried


def test_search_stops_when_the_speed_does_not_grow() -> None:
    measure, tried = device(room=1 << 40, each=1, overhead=0.1, per_image=0.001)
    result = search_batch_size(measure, 100, 1 << 40)
    # Fixed costs of 100 images' time: at 1,024 they are 9 %, and the next doubling would bring less than 5 %.
    assert result == 1024 and tried == [4, 8, 16, 32, 64, 128, 256, 512, 1024]
    measure, _ = device(room=1 << 40, each=1, overhead=0.01, per_image=0.001)
    assert search_batch_size(measure, 100, 1 << 40) == 128


@pytest.mark.parametrize("room", [1_000, 5_000, 50_000])
def test_search_keeps_a_margin_of_memory(room: int) -> None:
    measure, tried = device(room, each=100, overhead=10, per_image=0.001)
    result = search_batch_size(measure, 100, room)
    assert 100 + result * 100 <= 0.9 * room
    assert 100 + 4 * result * 100 > 0.8 * room or result == 1024
    # The margin is respected before memory ends.
    assert all(100 + size * 100 <= room for size in tried)


def test_search_on_a_device_without_room_returns_1() -> None:
    measure, tried = device(room=150, each=100, overhead=1, per_image=0.1)
    assert search_batch_size(measure, 100, 150) == 1
    assert tried == [4]


def test_other_errors_of_the_search_are_raised() -> None:
    def measure(size: int) -> tuple[float, int]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        search_batch_size(measure, 0, 1000)


# --- injected out-of-memory errors


@pytest.mark.parametrize(("room", "count"), [(1, 7), (3, 20), (8, 50), (16, 16)])
def test_batches_shrink_without_memory_and_every_image_is_predicted(room: int, count: int) -> None:
    network = Greedy(room)
    predictor = TorchPredictor(network, None, transform=SMALL, batch_size="auto", top_k=1)
    result = predictor.classify(numbered(count))
    assert result["predicted_class_idx"].tolist() == list(range(count))
    failed = [size for size in network.sizes if size > room]
    # Each size fails once, not once for each batch.
    assert len(failed) == len(set(failed)) and max(network.sizes) <= CPU_BATCH_SIZE
    calls_before = len(network.sizes)
    predictor.classify(numbered(room))
    assert max(network.sizes[calls_before:]) <= room


def test_call_without_a_batch_size_shrinks_as_well() -> None:
    network = Greedy(4)
    assert TorchPredictor(network, None, transform=SMALL).classify(numbered(30))[
        "predicted_class_idx"
    ].tolist() == list(range(30))
    assert network.sizes[:4] == [30, 15, 7, 3]


def test_single_image_that_does_not_fit_is_an_error_row_and_the_rest_are_predictions() -> None:
    network = Greedy(room=8, poison=11)
    predictor = TorchPredictor(network, None, transform=SMALL, batch_size=8, top_k=1)
    actor = InferenceActor(lambda: lambda images, uris: _classifier_table(predictor.classify(images), None), [])
    table = actor(prepared([image(number, (4, 4)) for number in range(20)]))
    assert errors(table) == [("infer", "OUT_OF_MEMORY") if number == 11 else None for number in range(20)]
    assert table["predicted_class_idx"].to_pylist() == [None if number == 11 else number for number in range(20)]
    assert table["retryable"].to_pylist()[11] is True
    assert "single image" in table["message"].to_pylist()[11]


def test_custom_predictor_out_of_memory_is_distinguished_from_a_failing_one() -> None:
    def predict(images: np.ndarray, uris: list[str]) -> Any:
        first = np.asarray(images)[:, 0, 0, 0]
        if len(first) > 2 or 3 in first:
            raise RuntimeError("CUDA error: out of memory")
        return _classifier_table(TorchPredictor(Greedy(9), None, transform=SMALL, top_k=1).classify(images), None)

    table = InferenceActor(lambda: predict, [])(prepared([image(number, (4, 4)) for number in range(6)]))
    assert errors(table) == [None, None, None, ("infer", "OUT_OF_MEMORY"), None, None]


def test_errors_other_than_out_of_memory_are_raised() -> None:
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        TorchPredictor(Broken(), None, transform=SMALL).classify(numbered(4))


def test_memory_is_released_outside_of_the_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    raised: list[Any] = []
    monkeypatch.setattr(Execution, "free", lambda self: raised.append(sys.exc_info()[0]))
    TorchPredictor(Greedy(2), None, transform=SMALL).classify(numbered(8))
    assert raised and not any(raised)
    with pytest.raises(RowError):
        TorchPredictor(Greedy(0), None, transform=SMALL).classify(numbered(2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_out_of_memory_halves_the_batch() -> None:
    class Hungry(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.empty(total // 8 * len(images), dtype=torch.uint8, device=images.device)
            return images.mean(dim=(2, 3))

    predictor = TorchPredictor(Hungry(), None, transform=SMALL, device="cuda", batch_size=32)
    assert len(predictor.classify(numbered(40))["confidence"]) == 40
    assert predictor._execution.batch_size is not None and predictor._execution.batch_size.current < 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_search_and_double_buffering_predict_like_the_cpu() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    network = resnet18(weights=None).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (70, 224, 224, 3), np.uint8)
    expected = TorchPredictor(network, None, device="cpu", top_k=1).classify(pixels)
    predictor = TorchPredictor(network, None, device="cuda", batch_size="auto", top_k=1)
    assert predictor._execution.find_batch_size(224) >= 16
    predictor._execution.batch_size = BatchSize(16)
    result = predictor.classify(pixels)
    np.testing.assert_allclose(result["confidence"], expected["confidence"], rtol=0.02)


# --- bounded by bytes ----------------------------------------------------------------------------------------------------

SIZES = st.lists(
    st.one_of(st.integers(0, 3), st.integers(0, MAX_BATCH_BYTES // 8), st.integers(0, 3 * MAX_BATCH_BYTES)), max_size=60
)


@given(SIZES)
def test_slices_have_all_images_in_order_within_the_bound_or_alone(sizes: list[int]) -> None:
    parts = split_by_bytes(sizes)
    assert [size for part in parts for size in sizes[part]] == sizes
    for part in parts:
        bytes_ = [size for size in sizes[part] if size]
        assert sum(bytes_) <= MAX_BATCH_BYTES or len(bytes_) == 1
    # And not cut without need.
    for part, following in itertools.pairwise(parts):
        assert sum(sizes[part]) + sizes[following.start] > MAX_BATCH_BYTES


@given(SIZES, st.integers(1, 300))
def test_batch_of_padded_rows_is_bounded(sizes: list[int], rows: int) -> None:
    """Blocks follow each other with their padding rows at the end, and Ray cuts after a fixed number of rows."""
    stream: list[int] = []
    for start in range(0, len(sizes), 3):  # blocks are small where images are large
        block = sizes[start : start + 3]
        stream += [*block, *[0] * padding_rows(block, rows)]
    largest = max(sizes, default=0)
    for start in range(0, len(stream), rows):
        assert sum(stream[start : start + rows]) <= MAX_BATCH_BYTES + 3 * largest


@given(st.lists(st.integers(0, MAX_BATCH_BYTES // 32), max_size=100))
def test_small_images_need_no_padding(sizes: list[int]) -> None:
    assert padding_rows(sizes, 32) == 0


def test_large_images_count_by_their_bytes() -> None:
    photo = 3000 * 3000 * 3
    assert padding_rows([photo], 32) == 3  # four of 32 rows: eight photos a batch, 216 MB
    assert padding_rows([photo, photo], 1) == 0
    assert padding_rows([300_000_000], 32) == 31  # 100 megapixels: a batch alone
    assert max_batch_rows(32, photo) == 9
    assert max_batch_rows(32, 300_000_000) == 1
    assert max_batch_rows(1000, 3 * 224**2) == 1000
    assert max_batch_rows(2048, 3 * 224**2) == 1783
