"""The sentence at the end of a run: each limit is made to happen, and must be found."""

from __future__ import annotations

import io
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from batch_inference.config import StorageConfig
from batch_inference.storage.store import Store
from tests.support.jobs import job_args
from tests.support.servers import Proxy

Program = Callable[..., subprocess.CompletedProcess[str]]


def limit_of(done: subprocess.CompletedProcess[str], output: str, program: Program, *settings: str) -> str:
    """The limit that a run names, after checking that verdict and ``status`` say the same."""
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(program("status", output, "--json", *settings).stdout)
    sentence = found["balance"]
    assert sentence in next(line for line in done.stdout.splitlines() if line.startswith("speed: "))
    return str(sentence).partition(":")[0]


@pytest.fixture
def large_photos(tmp_path: Path) -> Path:
    """Photos that take a tenth of a second to decode, as a progressive JPEG of twelve megapixels does."""
    folder = tmp_path / "large"
    folder.mkdir()
    buffer = io.BytesIO()
    Image.effect_noise((4000, 3000), 60).convert("RGB").save(buffer, "JPEG", quality=60, progressive=True)
    for i in range(30):
        (folder / f"{i}.jpg").write_bytes(buffer.getvalue())
    return folder


def test_a_slow_predictor(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    args = job_args(photos(160), tmp_path / "out", shard_size=40)
    done = attached(*args, "--set", "predictor.kwargs={delay_s: 0.5}", "--address", cluster["address"])
    assert limit_of(done, str(tmp_path / "out"), attached) == "Inference-bound"


def test_slow_decoding(large_photos: Path, tmp_path: Path, attached: Program, cluster: dict[str, str]) -> None:
    args = job_args(large_photos, tmp_path / "out", shard_size=5)
    args += ["--set", "predictor=predictors:FirstPixel", "--set", "preprocess.cpus_per_task=3"]
    done = attached(*args, "--address", cluster["address"])
    assert limit_of(done, str(tmp_path / "out"), attached) == "Decode-bound"


def test_a_slow_store(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str], proxy: Proxy
) -> None:
    folder = photos(96)
    source, settings = f"s3://tests/{tmp_path.name}/in", ("--set", f"storage.endpoint_url={proxy.url}")
    store = Store(source, StorageConfig(endpoint_url=proxy.url))
    for file in folder.iterdir():
        store.put(file.name, file.read_bytes())

    def slowly(method: str, path: str) -> None:
        if method == "GET" and path.endswith(".jpg"):
            time.sleep(0.5)

    proxy.answer = slowly
    args = [*job_args(source, tmp_path / "out", shard_size=16), *settings, "--set", "storage.fetch_concurrency=2"]
    args += ["--set", "preprocess.cpus_per_task=3"]
    done = attached(*args, "--address", cluster["address"])
    assert limit_of(done, str(tmp_path / "out"), attached, *settings) == "Fetch-bound"
