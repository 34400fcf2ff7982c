"""`preprocess.decoder: gpu`: on the CPU, where libjpeg-turbo replaces nvJPEG, and on a GPU if there is one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from batch_inference.cli.demo import make_photos
from batch_inference.config import InferenceConfig, JobConfig, PreprocessConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.images.decode import is_plain_jpeg
from batch_inference.images.pixels import decode
from batch_inference.images.transform import Transform
from batch_inference.pipeline.actor import InferenceActor
from batch_inference.pipeline.gpu_jpeg import GpuJpeg, GpuJpegFactory
from batch_inference.pipeline.prepare import Preparation
from batch_inference.pipeline.schemas import PREPARED_SCHEMA

ON, OFF, TRANSFORM = PreprocessConfig(decoder="gpu"), PreprocessConfig(), Transform()
CPU = torch.device("cpu")


def prepared(folder: Path, config: PreprocessConfig) -> pa.Table:
    uris = sorted(f"file://{path}" for path in folder.iterdir())
    return pa.concat_tables(Preparation(StorageConfig(), config, TRANSFORM).rows(0, uris))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("photos")
    make_photos(folder)
    return folder


def pixels(table: pa.Table, *, files: bool = False) -> dict[str, np.ndarray | None]:
    """Images by name, None where there is none; or the files among them."""
    columns = (table[name].to_pylist() for name in ("uri", "pixels", "height", "width"))
    images: dict[str, np.ndarray | None] = {}
    for uri, value, height, width in zip(*columns, strict=True):
        wanted = value is not None and bool(height) is not files
        shape = (-1,) if files else (height, width, 3)
        images[uri.rpartition("/")[2]] = np.frombuffer(value, np.uint8).reshape(shape) if wanted else None
    return images


def compared(photos: Path, device: torch.device) -> dict[str, float]:
    """Mean difference of the pixels of each photo that travelled as a file."""
    sent = prepared(photos, ON)
    files = [name for name, value in pixels(sent, files=True).items() if value is not None]
    here = pixels(GpuJpeg(ON, TRANSFORM, device)(sent))
    exact = pixels(prepared(photos, PreprocessConfig(decoder="exact")))
    assert {name for name, value in here.items() if value is None} == {n for n, v in exact.items() if v is None}
    return {
        name: float(np.abs(here[name].astype(int) - exact[name].astype(int)).mean())  # type: ignore[union-attr]
        for name in files
        if here[name] is not None
    }


def test_plain_jpegs_travel_as_files_and_all_others_as_pixels(photos: Path) -> None:
    sent = prepared(photos, ON)
    assert sent.schema == PREPARED_SCHEMA
    names = [uri.rpartition("/")[2] for uri in sent["uri"].to_pylist()]
    undecoded = np.flatnonzero((sent["height"].to_numpy() == 0) & sent["pixels"].is_valid().to_numpy())
    files = {names[index] for index in undecoded}
    assert {"astronaut.jpg", "chelsea.jpg", "chelsea-gray.jpg", "coffee.jpg", "motorcycle.jpg", "rocket.jpg"} <= files
    assert not files & {
        "chelsea-on-its-side.jpg",
        "china-cmyk.jpg",
        "broken-truncated.jpg",
        "coffee.gif",
        "rocket.webp",
    }
    for name in files:
        index = names.index(name)
        assert sent["pixels"][index].as_py() == (photos / name).read_bytes()


def test_pixels_are_nearly_those_of_the_exact_way(photos: Path) -> None:
    differences = compared(photos, CPU)
    print("mean difference of 255:", {name: round(value, 2) for name, value in differences.items()})
    assert len(differences) >= 6
    assert max(differences.values()) < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pixels_of_nvjpeg_are_nearly_those_of_the_exact_way(photos: Path) -> None:
    differences = compared(photos, torch.device("cuda"))
    print("mean difference of 255:", {name: round(value, 2) for name, value in differences.items()})
    assert max(differences.values()) <= 2


def test_file_that_the_device_refuses_is_decoded_as_without_it(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad file makes the decoder refuse the batch; the others keep what it gives."""
    from torchvision import io as torchvision_io

    whole = (photos / "coffee.jpg").read_bytes()
    refused, bad = (photos / "rocket.jpg").read_bytes(), b"\xff\xd8\xff\xd9"
    real = torchvision_io.decode_jpeg

    def picky(files: list[torch.Tensor], **options: object) -> list[torch.Tensor]:
        if any(bytes(file.numpy()) in (refused, bad) for file in files):
            raise RuntimeError("nvjpegDecodeBatched failed: 4")
        return list(real(files, **options))

    monkeypatch.setattr(torchvision_io, "decode_jpeg", picky)
    decoder = GpuJpeg(ON, TRANSFORM, CPU)
    found = decoder.decode([np.frombuffer(data, np.uint8) for data in (whole, refused, bad, whole)])
    assert np.array_equal(found[1], decode(refused, OFF, TRANSFORM))  # type: ignore[arg-type]
    assert found[2].stage == "decode"  # type: ignore[union-attr]
    assert np.array_equal(found[0], found[3])  # type: ignore[arg-type]
    assert not np.array_equal(found[0], found[1])  # type: ignore[arg-type]


def test_actor_decodes_before_it_predicts(photos: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def predict(images: np.ndarray, uris: list[str]) -> pa.Table:
        seen.append(images.shape)
        return pa.table({"mean": [float(image.mean()) for image in images]})

    inference = InferenceConfig(device="cpu")
    table = prepared(photos, ON)
    result = InferenceActor(lambda: predict, [], GpuJpegFactory(inference, ON, TRANSFORM))(table)
    plain = InferenceActor(lambda: predict, [])(prepared(photos, OFF))
    assert seen[0] == seen[1] == (15, 224, 224, 3)
    assert result["error_type"].to_pylist() == plain["error_type"].to_pylist()
    assert result["mean"].is_valid().to_pylist() == plain["mean"].is_valid().to_pylist()
    for one, other in zip(result["mean"].to_pylist(), plain["mean"].to_pylist(), strict=True):
        assert one is other is None or abs(one - other) < 1


@pytest.mark.parametrize(
    ("size", "limit", "plain"), [((64, 64), 4096, True), ((65, 64), 4096, False), ((200, 10), 4096, False)]
)
def test_only_plain_jpegs_are_left_to_the_device(size: tuple[int, int], limit: int, plain: bool) -> None:
    out = io.BytesIO()
    Image.new("RGB", size).save(out, "JPEG")
    assert is_plain_jpeg(out.getvalue(), PreprocessConfig(max_pixels=limit)) is plain
    assert not is_plain_jpeg(out.getvalue()[:-4], PreprocessConfig(max_pixels=limit))


@pytest.mark.parametrize(
    ("job", "problem"),
    [
        ({"inference": {"gpus_per_actor": 0}}, "there is no GPU to do it"),
        ({"predictor": "m:C"}, "a predictor takes images at their own size"),
    ],
)
def test_settings_that_contradict_are_refused(job: dict[str, object], problem: str) -> None:
    from batch_inference.config import load_config

    with pytest.raises(UserError, match=problem):
        load_config({"preprocess": {"decoder": "gpu"}, **job})
    assert JobConfig(preprocess=ON).preprocess.decoder == "gpu"
