"""Images as Ray datasets, and predictors over them: a user's own code around Ray Data, in the running cluster."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.models import SqueezeNet1_1_Weights

from batch_inference import TorchPredictor, from_images, from_paths, predict, read_images
from batch_inference.config import PreprocessConfig
from batch_inference.errors import UserError
from tests.support.containers import parquet, tar
from tests.support.images import jpeg

ONE_ACTOR = ray.data.ActorPoolStrategy(size=1)


@pytest.fixture(scope="module", autouse=True)
def connection(cluster: dict[str, str]) -> Iterator[None]:
    """Connect this process to the running cluster."""
    with pytest.MonkeyPatch.context() as patch:
        # Ray's native code reads it once in a process.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(cluster["address"], log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield
        ray.shutdown()


def squeezenet(*, weights: Any) -> nn.Module:
    """Stands for torchvision's builder, whose weights no test can download."""
    torch.manual_seed(3)
    network = models.squeezenet1_1(weights=None)
    nn.init.normal_(network.classifier[1].weight, std=0.2)
    return network.eval()


# Sent by value, since the workers of a test have no such module.
ray.cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])


class Mean:
    """A predictor of a user's: PIL inside, columns of its own, and intolerant of anything but proper images."""

    def __init__(self, factor: float = 1.0, *, name: str = "mean") -> None:
        self.factor, self.name = factor, name

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = [Image.fromarray(array) for array in batch["image"]]
        assert all(image.mode == "RGB" and image.width > 0 for image in images)
        means = [np.asarray(image).mean() * self.factor for image in images]
        return {
            self.name: np.array(means, np.float32),
            "size": np.array([f"{image.width}x{image.height}" for image in images], object),
            "embedding": np.array([[mean, 1.0] for mean in means], np.float32),
        }


def gray(value: int, height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "sub").mkdir()
    for index in range(10):
        Image.fromarray(gray(index * 10, 20 + index % 3, 30)).save(
            folder / ("sub" if index > 7 else ".") / f"{index}.png"
        )
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    (folder / "5.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    return folder


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [Path(row["uri"]).name for row in rows]


def test_from_images() -> None:
    images = [gray(1, 4, 5), gray(2, 6, 7)[:, :, 0], Image.fromarray(gray(3, 2, 2)), Image.new("RGBA", (3, 3))]
    rows = from_images(images).take_all()
    assert [row["image"].shape for row in rows] == [(4, 5, 3), (6, 7, 3), (2, 2, 3), (3, 3, 3)]
    assert [int(row["image"].mean()) for row in rows] == [1, 2, 3, 255]
    assert all(row["image"].dtype == np.uint8 for row in rows)


def test_read_images_keeps_every_row(folder: Path) -> None:
    rows = sorted(read_images(folder).take_all(), key=lambda row: names([row]))
    assert names(rows) == [f"{index}.png" for index in range(10)]
    assert all(row["uri"].startswith("file:///") for row in rows)
    for index, row in enumerate(rows):
        if index in (3, 5):
            assert row["image"].shape == (0, 0, 3)
            assert row["error"].startswith("decode TRUNCATED" if index == 3 else "decode EMPTY_FILE")
        else:
            assert row["error"] is None
            assert row["image"].shape == (20 + index % 3, 30, 3) and row["image"].mean() == index * 10


def test_images_in_tar_and_parquet_files_are_images(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"1.jpg": jpeg(1), "2.jpg": b"", "3.txt": b"no"}))
    (tmp_path / "b.parquet").write_bytes(parquet([jpeg(4), jpeg(5)]))
    (tmp_path / "c.jpg").write_bytes(jpeg(6))
    rows = read_images([tmp_path, tmp_path / "b.parquet"]).take_all()
    rows += from_paths([f"{tmp_path}/a.tar#1.jpg", f"{tmp_path}/a.tar#none.jpg", f"{tmp_path}/c.jpg"]).take_all()
    row_of = {row["uri"].rpartition("/")[2]: row for row in rows}
    assert sorted(row_of) == ["a.tar#1.jpg", "a.tar#2.jpg", "a.tar#none.jpg", "b.parquet#0", "b.parquet#1", "c.jpg"]
    errors = {name: (row["error"] or "").partition(":")[0] for name, row in row_of.items()}
    assert {name: error for name, error in errors.items() if error} == {
        "a.tar#2.jpg": "decode EMPTY_FILE",
        "a.tar#none.jpg": "fetch NOT_FOUND",
    }
    assert np.array_equal(row_of["b.parquet#1"]["image"], np.asarray(Image.open(io.BytesIO(jpeg(5)))))


def test_read_images_takes_lists_and_globs(folder: Path) -> None:
    rows = read_images([str(folder / "sub"), str(folder / "[01].png")]).take_all()
    assert sorted(names(rows)) == ["0.png", "1.png", "8.png", "9.png"]
    with pytest.raises(UserError):
        read_images(folder / "nothing")


def test_from_paths_is_lazy_and_reports_what_is_missing(folder: Path) -> None:
    dataset = from_paths([folder / "late.png", str(folder / "none.png")])
    Image.fromarray(gray(9, 3, 3)).save(folder / "late.png")
    rows = sorted(dataset.take_all(), key=lambda row: names([row]))
    (folder / "late.png").unlink()
    assert rows[0]["image"].mean() == 9
    assert rows[1]["error"] == "fetch NOT_FOUND: there is no such object"


def test_limits_pass_through(folder: Path) -> None:
    rows = from_paths([folder / "0.png"], preprocess=PreprocessConfig(max_pixels=10)).take_all()
    assert "TOO_MANY_PIXELS" in rows[0]["error"]


def test_predict_costs_no_image_its_row(folder: Path) -> None:
    dataset = predict(
        read_images(folder), Mean, fn_constructor_args=(2.0,), fn_constructor_kwargs={"name": "m"}, batch_size=3
    )
    rows = sorted(dataset.take_all(), key=lambda row: names([row]))
    assert names(rows) == [f"{index}.png" for index in range(10)]
    for index, row in enumerate(rows):
        assert sorted(row) == ["embedding", "error", "m", "size", "uri"]
        if index in (3, 5):
            assert row["error"] and row["m"] is None and row["size"] is None
        else:
            assert row["error"] is None and row["m"] == index * 20 and row["size"] == f"30x{20 + index % 3}"
            assert row["embedding"].tolist() == [index * 20, 1]


def test_dataset_of_bad_images_only_keeps_its_columns(folder: Path) -> None:
    rows = predict(from_paths([folder / "3.png", folder / "5.png"]), Mean).take_all()
    assert [row["mean"] for row in rows] == [None, None]
    assert all(row["error"] for row in rows)


def test_predictions_can_be_written_as_parquet(folder: Path, tmp_path: Path) -> None:
    args = (squeezenet, SqueezeNet1_1_Weights.DEFAULT)
    predict(read_images(folder), fn_constructor_args=args, batch_size=2).write_parquet(str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out").to_pandas().sort_values("uri")
    assert len(table) == 10
    assert set(table.columns) == {"uri", "error", "predicted_class_idx", "confidence"}
    assert table["confidence"].isna().sum() == table["error"].notna().sum() == 2


def test_other_columns_are_kept_and_pool_passes_through() -> None:
    items = [{"image": gray(index, 4, 4 + index % 2), "id": f"a{index}", "weight": index / 2} for index in range(7)]
    dataset = predict(ray.data.from_items(items), Mean, compute=ONE_ACTOR, num_cpus=0.5, batch_size=2)
    rows = sorted(dataset.take_all(), key=lambda row: str(row["id"]))
    assert [(row["id"], row["weight"], row["mean"]) for row in rows] == [(f"a{i}", i / 2, i) for i in range(7)]


def test_two_actors_predict_every_image() -> None:
    rows = predict(from_images([gray(index, 3, 3) for index in range(20)]), Mean, batch_size=2, actors=2).take_all()
    assert sorted(row["mean"] for row in rows) == list(range(20))


def test_example_of_the_article_runs() -> None:
    weights = SqueezeNet1_1_Weights.DEFAULT
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (40 + 9 * i, 60, 3), np.uint8)) for i in range(5)]
    dataset = ray.data.from_items([{"image": np.array(picture)} for picture in pictures])
    results = dataset.map_batches(
        TorchPredictor, fn_constructor_args=(squeezenet, weights), batch_size=2, compute=ONE_ACTOR
    ).take_all()
    with torch.inference_mode():
        batch = torch.stack([weights.transforms()(picture.convert("RGB")) for picture in pictures])
        confidence, idx = torch.max(squeezenet(weights=weights)(batch).softmax(dim=1), dim=1)
    results.sort(key=lambda row: row["confidence"])
    order = confidence.argsort()
    assert [row["predicted_class_idx"] for row in results] == idx[order].tolist()
    np.testing.assert_allclose([row["confidence"] for row in results], confidence[order], rtol=1e-4)
    assert all(0 <= row["predicted_class_idx"] < len(weights.meta["categories"]) for row in results)


def test_dataset_without_images() -> None:
    with pytest.raises(Exception, match="no column image"):
        predict(ray.data.from_items([{"picture": 1}]), Mean).take_all()
