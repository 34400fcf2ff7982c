from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batch_inference.cli import demo
from batch_inference.config import load_config
from batch_inference.errors import RowError, UserError
from batch_inference.images.decode import open_image
from batch_inference.models.info import ModelInfo, describe_model
from batch_inference.models.predictor import TorchPredictor

BROKEN = {
    "broken-truncated.jpg": "TRUNCATED",
    "broken-empty.jpg": "EMPTY_FILE",
    "broken-text.jpg": "UNKNOWN_FORMAT",
    "broken-error-page.png": "UNKNOWN_FORMAT",
    "broken-bomb.png": "TOO_MANY_PIXELS",
}
CAT, CUP, MISSILE, MOPED = set(range(281, 286)), {967, 968, 504}, {657, 744}, {665, 670}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    demo.make_photos(folder)
    return folder


@pytest.fixture(scope="module")
def predicted(photos: Path) -> dict[str, int | str]:
    config = demo.demo_config(photos, photos / "out")
    info: ModelInfo = describe_model(config.model, config.storage)
    predictor = TorchPredictor.from_config(config.model, config.inference, config.storage, info.transform)
    results: dict[str, int | str] = {}
    for path in photos.iterdir():
        try:
            pixels = info.transform.pixels(open_image(path.read_bytes(), config.preprocess))
            results[path.name] = int(predictor.classify(pixels[None])["predicted_class_idx"][0])
        except RowError as exc:
            results[path.name] = exc.error.error_type
    return results


def test_broken_files_say_why(predicted: dict[str, int | str]) -> None:
    assert {name: kind for name, kind in predicted.items() if isinstance(kind, str)} == BROKEN


def test_real_network_knows_real_photos(predicted: dict[str, int | str]) -> None:
    expected = {"chelsea": CAT, "coffee": CUP, "rocket": MISSILE, "motorcycle": MOPED}
    checked = {name: idx for name, idx in predicted.items() if name.partition(".")[0].partition("-")[0] in expected}
    assert len(checked) == 10
    for name, idx in checked.items():
        assert idx in expected[name.partition(".")[0].partition("-")[0]], name


def test_formats_are_what_their_names_say(photos: Path) -> None:
    from PIL import Image

    kinds = {path.name: Image.open(path) for path in photos.iterdir() if not path.name.startswith("broken")}
    assert {image.format for image in kinds.values()} == {"JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"}
    assert kinds["coffee.jpg"].info.get("progressive")
    assert kinds["chelsea-gray.jpg"].mode == "L"
    assert kinds["china-cmyk.jpg"].mode == "CMYK"
    assert kinds["chelsea-palette.png"].mode == "P"
    assert kinds["camera-16bit.png"].mode == "I;16"
    assert kinds["coffee-transparent.png"].mode == "RGBA"
    assert np.asarray(kinds["coffee-transparent.png"])[:, :, 3].min() == 0
    assert kinds["chelsea-on-its-side.jpg"].getexif()[0x0112] == 6


def test_bomb_is_a_small_file(photos: Path) -> None:
    assert (photos / "broken-bomb.png").stat().st_size < 200


def test_photos_are_the_same_every_time(photos: Path, tmp_path: Path) -> None:
    demo.make_photos(tmp_path / "new")

    def contents(folder: Path) -> dict[str, bytes]:
        # libtiff of older Pillow leaves a few bytes between the strips as they happen to be.
        return {
            p.name: Image.open(p).tobytes() if p.suffix == ".tif" else p.read_bytes() for p in sorted(folder.iterdir())
        }

    assert contents(photos) == contents(tmp_path / "new")


def test_configuration_is_one_that_a_file_can_hold(tmp_path: Path) -> None:
    config = demo.demo_config(tmp_path / "photos", tmp_path / "out")
    (tmp_path / "job.yaml").write_text(config.to_yaml())
    assert load_config(str(tmp_path / "job.yaml")) == config
    assert config.inference.gpus_per_actor == 0 and config.shard_size < 20


@pytest.mark.parametrize("package", ["skimage", "sklearn", "efficientnet_lite_pytorch"])
def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str) -> None:
    real = demo.importlib.util.find_spec
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(UserError, match=package) as caught:
        demo.demo_config(tmp_path, tmp_path)
        demo.make_photos(tmp_path)
    assert "pip install 'ray-batch-inference[demo]'" in caught.value.remedy


def test_demo_needs_neither_ray_nor_scikit(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from pathlib import Path; from batch_inference.cli.demo import make_photos;"
        "make_photos(Path(sys.argv[1]));"
        "assert not {'ray', 'torch', 'sklearn', 'skimage'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
