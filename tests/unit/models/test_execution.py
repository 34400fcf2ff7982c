from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from batch_inference.images.transform import Transform
from batch_inference.models import execution
from batch_inference.models.execution import Execution

SMALL = Transform(resize=4, crop=4)
CPU = torch.device("cpu")


class Counting(nn.Module):
    """A network that records shapes and layouts and returns the mean of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, bool, torch.dtype]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        layout = images.is_contiguous(memory_format=torch.channels_last)
        self.seen.append((len(images), layout, images.dtype))
        return images.float().mean(dim=(2, 3))


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 4, 4, 3), np.uint8)


def postprocess(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return output, output.argmax(dim=1)


def expected(images: np.ndarray) -> np.ndarray:
    return SMALL.normalize(torch.from_numpy(images)).mean(dim=(2, 3)).numpy()


@pytest.mark.parametrize("count", [1, 4, 5, 11])
def test_batches_have_the_configured_size_and_channels_last_layout(count: int) -> None:
    network = Counting()
    run = Execution(network, SMALL, CPU, postprocess, batch_size=4)
    means, best = run(pixels(count))
    np.testing.assert_allclose(means, expected(pixels(count)), rtol=1e-5)
    assert best.tolist() == means.argmax(axis=1).tolist()
    assert all(layout and dtype == torch.float32 for _, layout, dtype in network.seen)
    assert [size for size, *_ in network.seen] == [4] * (count // 4) + [count % 4] * (count % 4 > 0)


def test_compiled_networks_see_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module: module)
    network = Counting()
    means, _ = Execution(network, SMALL, CPU, postprocess, batch_size=4, compile=True)(pixels(11))
    np.testing.assert_allclose(means, expected(pixels(11)), rtol=1e-5)
    assert [size for size, *_ in network.seen] == [4, 4, 4]


def test_read_only_pixels_are_taken_without_a_warning_or_a_copy(recwarn: pytest.WarningsRecorder) -> None:
    images = pixels(3)
    images.flags.writeable = False
    before = images.copy()
    Execution(Counting(), SMALL, CPU, postprocess)(images)
    assert np.array_equal(images, before)


# --- compile: auto


def auto(
    monkeypatch: pytest.MonkeyPatch, images: int, slow: float, compiled: Callable[[nn.Module], Any], speed: float
) -> tuple[Execution, Counting, list[str]]:
    """Return an execution on a fake clock: `slow` seconds per image, `speed` times as many once compiled."""
    clock, calls = [0.0], list[str]()

    class Slow(Counting):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            clock[0] += slow * len(batch)
            return super().forward(batch)

    def compile_it(module: nn.Module) -> Any:
        calls.append("compile")
        run = compiled(module)

        def fast(batch: torch.Tensor) -> torch.Tensor:
            clock[0] -= slow * len(batch) * (1 - speed)
            return run(batch)

        return fast

    monkeypatch.setattr(torch, "compile", compile_it)
    monkeypatch.setattr(execution.time, "perf_counter", lambda: clock[0])
    network = Slow()
    return Execution(network, SMALL, CPU, postprocess, batch_size=8, compile=None, images=images), network, calls


def work(run: Execution, images: int) -> None:
    for _ in range(images // 32):
        means, _ = run(pixels(32))
        np.testing.assert_allclose(means, expected(pixels(32)), rtol=1e-5)


def test_short_jobs_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, calls = auto(monkeypatch, 2000, 0.1, lambda module: module, 0.5)
    work(run, 2000)
    assert calls == [] and not run._compiled


@pytest.mark.parametrize(("speed", "kept"), [(0.5, True), (0.99, False), (1.5, False)])
def test_long_jobs_keep_the_faster_network(monkeypatch: pytest.MonkeyPatch, speed: float, kept: bool) -> None:
    run, _, calls = auto(monkeypatch, 100_000, 0.1, lambda module: module, speed)
    work(run, 2000)
    assert calls == ["compile"] and run._compiled is kept


def test_network_that_cannot_be_compiled_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: nn.Module) -> Any:
        def run(batch: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found")

        return run

    run, _, calls = auto(monkeypatch, 100_000, 0.1, broken, 0.5)
    work(run, 2000)
    assert calls == ["compile"] and not run._compiled


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_double_buffering_keeps_images_apart(precision: str) -> None:
    run = Execution(Counting(), SMALL, torch.device("cuda"), postprocess, batch_size=4, precision=precision)
    for count in (1, 4, 30, 301):
        means, _ = run(pixels(count))
        np.testing.assert_allclose(means, expected(pixels(count)), rtol=0.02, atol=0.02)
