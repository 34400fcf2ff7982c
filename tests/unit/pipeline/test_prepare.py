from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from batch_inference.config import PreprocessConfig, StorageConfig
from batch_inference.errors import RowError
from batch_inference.images import pixels
from batch_inference.images.decode import Decoded
from batch_inference.images.pixels import Pixels
from batch_inference.images.transform import Transform
from batch_inference.pipeline import prepare as pipeline_prepare
from batch_inference.pipeline.prepare import BLOCK_BYTES, Preparation
from batch_inference.pipeline.schemas import PREPARED_SCHEMA
from batch_inference.storage.fetcher import Fetcher
from tests.support.images import broken, jpeg
from tests.support.limits import HANG_S
from tests.support.waiting import Crowd, wait_until


def prepare(
    uris: list[str], *, transform: Transform | None = None, concurrency: int = 16, **preprocess: Any
) -> list[pa.Table]:
    config = StorageConfig(fetch_concurrency=concurrency)
    blocks = list(Preparation(config, PreprocessConfig(**preprocess), transform).rows(3, uris))
    for block in blocks:
        assert block.schema == PREPARED_SCHEMA
    whole = pa.concat_tables(blocks) if blocks else PREPARED_SCHEMA.empty_table()
    # Each input is one row, in order, whatever became of it.
    assert whole["row"].to_pylist() == list(range(len(uris)))
    assert whole["uri"].to_pylist() == uris
    assert set(whole["shard"].to_pylist()) <= {3}
    for row in whole.to_pylist():
        failed = row["error_type"] is not None
        assert (row["pixels"] is None) is failed
        assert len(row["pixels"] or b"") == row["height"] * row["width"] * 3
        assert failed is (row["stage"] is not None) is (row["message"] is not None)
    return blocks


def one(uris: list[str], **options: Any) -> pa.Table:
    (block,) = prepare(uris, **options)
    return block


def errors(table: pa.Table) -> list[tuple[str, str] | None]:
    pairs = zip(table["stage"].to_pylist(), table["error_type"].to_pylist(), strict=True)
    return [(stage, kind) if kind else None for stage, kind in pairs]


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URIs that were asked for."""
    asked: list[str] = []
    real = Fetcher.fetch

    def fetch(self: Fetcher, uri: str, max_bytes: int, version: int | None = None) -> bytes:
        asked.append(uri)
        return real(self, uri, max_bytes)

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    return asked


def test_pixels_are_those_of_the_image_as_it_is(tmp_path: Path) -> None:
    for size in ((8, 5), (3, 9)):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(
            tmp_path / f"{size[0]}.png"
        )
    table = one([f"{tmp_path}/8.png", f"file://{tmp_path}/3.png"])
    assert table["height"].to_pylist() == [5, 9]
    assert table["width"].to_pylist() == [8, 3]
    for row, name in zip(table.to_pylist(), ("8.png", "3.png"), strict=True):
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["height"], row["width"], 3)
        assert np.array_equal(pixels, np.asarray(Image.open(tmp_path / name)))
        assert row["bytes"] == (tmp_path / name).stat().st_size
        assert row["fetch_s"] > 0
        assert row["decode_s"] > 0


def test_images_have_the_models_size_with_a_transform(tmp_path: Path) -> None:
    for number, size in enumerate([(48, 32), (300, 200), (20, 80)]):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number, size))
    table = one([f"{tmp_path}/{n}.jpg" for n in range(3)], transform=Transform(resize=16, crop=12))
    assert errors(table) == [None] * 3
    assert set(table["height"].to_pylist()) == set(table["width"].to_pylist()) == {12}


def test_failure_has_its_row_and_its_stage(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(jpeg(0))
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(jpeg(1)[:150])
    (tmp_path / "text.jpg").write_bytes(b"not an image at all\n" * 5)
    (tmp_path / "large.jpg").write_bytes(bytes(100_000))
    (tmp_path / "wide.png").write_bytes(b"")
    Image.new("RGB", (200, 50)).save(tmp_path / "wide.png")
    names = ["good.jpg", "none.jpg", "empty.jpg", "cut.jpg", "text.jpg", "large.jpg", "wide.png", ".", "good.jpg"]
    uris = [*(f"{tmp_path}/{n}" for n in names), "", "ftp://x/y.jpg", "file://relative/x.jpg", "s3://"]
    table = one(uris, max_bytes=50_000, max_pixels=9_999)
    assert errors(table) == [
        None,
        ("fetch", "NOT_FOUND"),
        ("decode", "EMPTY_FILE"),
        ("decode", "TRUNCATED"),
        ("decode", "UNKNOWN_FORMAT"),
        ("fetch", "TOO_LARGE"),
        ("decode", "TOO_MANY_PIXELS"),
        ("fetch", "NOT_FOUND"),
        None,
        ("list", "INVALID_URI"),
        ("list", "INVALID_URI"),
        ("list", "INVALID_URI"),
        ("list", "INVALID_URI"),
    ]
    assert table["message"][9].as_py() == "the manifest has no URI in this line"
    assert "ftp://, which is not supported" in table["message"][10].as_py()
    assert set(table["retryable"].to_pylist()) == {False}


def test_limits_include_their_value(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    size = (tmp_path / "a.png").stat().st_size
    uris = [f"{tmp_path}/a.png"]
    assert errors(one(uris, max_pixels=200, max_bytes=size)) == [None]
    assert errors(one(uris, max_pixels=199, max_bytes=size)) == [("decode", "TOO_MANY_PIXELS")]
    assert errors(one(uris, max_pixels=200, max_bytes=size - 1)) == [("fetch", "TOO_LARGE")]


def test_transform_that_fails_is_a_failure_of_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0, (48, 32)))
    (tmp_path / "b.jpg").write_bytes(jpeg(0, (32, 48)))
    real = pixels.resize

    def resize(decoded: Decoded, transform: Transform) -> np.ndarray:
        if decoded.size[0] < decoded.size[1]:
            raise ValueError("too\ntall")
        return real(decoded, transform)

    monkeypatch.setattr(pixels, "resize", resize)
    table = one([f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg", f"{tmp_path}/a.jpg"], transform=Transform(resize=8, crop=8))
    assert errors(table) == [None, ("preprocess", "VALUEERROR"), None]
    assert table["message"][1].as_py() == "too tall"


def test_unexpected_exception_costs_one_row_and_not_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "b.jpg").write_bytes(b"trap")
    real = pipeline_prepare.pixels_of

    def pixels_of(data: bytes, *args: Any) -> Pixels:
        if data == b"trap":
            raise ZeroDivisionError("oops")
        return real(data, *args)

    monkeypatch.setattr(pipeline_prepare, "pixels_of", pixels_of)
    table = one([f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg", f"{tmp_path}/a.jpg"])
    assert errors(table) == [None, ("preprocess", "UNEXPECTED"), None]
    assert table["message"][1].as_py() == "ZeroDivisionError: oops"


@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_rows_stay_in_order_whatever_takes_long(
    concurrency: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = jpeg(0), broken(3)

    def fetch(self: Fetcher, uri: str, max_bytes: int, version: int | None = None) -> bytes:
        number = int(uri.removeprefix("s3://b/"))
        time.sleep(0.002 * (number % 3))
        return good if number % 5 else bad

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    table = one([f"s3://b/{n}" for n in range(60)], concurrency=concurrency)
    assert [e is None for e in errors(table)] == [bool(n % 5) for n in range(60)]


def test_fetches_overlap_but_no_more_than_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = Crowd(5)
    data = jpeg(0)

    def fetch(self: Fetcher, uri: str, max_bytes: int, version: int | None = None) -> bytes:
        with crowd:
            return data

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    prepare([f"s3://b/{n}" for n in range(30)], concurrency=5)
    assert crowd.most == 5


def test_task_does_not_run_far_ahead_of_the_reader_of_its_blocks(fetches: list[str], tmp_path: Path) -> None:
    """Or a shard of large images would be in memory as a whole."""
    uris = [f"{tmp_path}/{n}.jpg" for n in range(1000)]
    blocks = Preparation(StorageConfig(fetch_concurrency=4), PreprocessConfig(), None).rows(0, uris)
    assert next(blocks).num_rows == 64
    time.sleep(0.05)
    assert 64 <= len(fetches) <= 64 + 2 * 4
    assert sum(block.num_rows for block in blocks) == 1000 - 64
    assert len(fetches) == 1000


def test_blocks_are_small_enough_for_the_actors_to_start(tmp_path: Path) -> None:
    Image.new("RGB", (800, 500)).save(tmp_path / "large.png")
    (tmp_path / "small.jpg").write_bytes(jpeg(0))
    large = 800 * 500 * 3
    blocks = prepare([f"{tmp_path}/large.png"] * 9)
    assert [b.num_rows for b in blocks] == [4, 4, 1]
    assert all(BLOCK_BYTES <= b.num_rows * large < BLOCK_BYTES + large for b in blocks[:-1])
    assert [b.num_rows for b in prepare([f"{tmp_path}/small.jpg"] * 300)] == [256, 44]
    assert [b.num_rows for b in prepare([f"{tmp_path}/none.jpg"] * 130)] == [64, 64, 2]
    assert prepare([]) == []


# --- giving up -----------------------------------------------------------------------------------------------------------


def systemic(monkeypatch: pytest.MonkeyPatch, answers: dict[int, Any], default: Any) -> list[int]:
    """A bucket that gives these answers by number; returns what it was asked for."""
    asked: list[int] = []

    def fetch(self: Fetcher, uri: str, max_bytes: int, version: int | None = None) -> bytes:
        number = int(uri.removeprefix("s3://b/"))
        asked.append(number)
        answer = answers.get(number, default)
        if isinstance(answer, str):
            raise RowError("fetch", answer, f"{answer} at {number}", answer == "TIMEOUT")
        return bytes(answer)

    monkeypatch.setattr(Fetcher, "fetch", fetch)
    return asked


@pytest.mark.parametrize("kind", ["ACCESS_DENIED", "UNAUTHENTICATED", "STORE_UNREACHABLE", "TIMEOUT"])
def test_store_that_always_refuses_is_reported_soon(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = systemic(monkeypatch, {}, kind)
    blocks = prepare([f"s3://b/{n}" for n in range(1000)], concurrency=4)
    assert blocks[0].num_rows == 64
    assert 64 <= len(asked) <= 64 + 2 * 4  # what was on its way already
    table = pa.concat_tables(blocks)
    # No row gets an error that it has not had itself; those that were not tried say so.
    kinds = [kind for _, kind in errors(table)]
    assert kinds.count(kind) == len(asked)
    assert kinds.count("NOT_TRIED") == 1000 - len(asked)
    assert set(table["retryable"].to_pylist()) == {kind == "TIMEOUT"}


@pytest.mark.parametrize("error_type", ["ACCESS_DENIED", "TIMEOUT"])
@pytest.mark.parametrize("good", [range(0, 1), range(30, 40), range(0, 300, 10)], ids=["first", "tens", "many"])
def test_store_that_has_answered_once_is_asked_for_every_row(
    error_type: str, good: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More failures than would end a shard in which nothing works, among rows that do."""
    asked = systemic(monkeypatch, {number: jpeg(0) for number in good}, error_type)
    table = pa.concat_tables(prepare([f"s3://b/{n}" for n in range(300)], concurrency=4))
    assert sorted(asked) == list(range(300))
    assert errors(table) == [None if number in good else ("fetch", error_type) for number in range(300)]


def test_store_that_says_of_one_row_that_it_is_missing_is_asked_for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = systemic(monkeypatch, {5: "NOT_FOUND"}, "ACCESS_DENIED")
    prepare([f"s3://b/{n}" for n in range(200)], concurrency=4)
    assert sorted(asked) == list(range(200))


def test_number_of_decoded_images_that_wait_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first image takes long; the others may not all lie decoded in memory until then."""
    decoded: list[int] = []
    first = threading.Event()
    pixels = Preparation._pixels

    def counted(self: Preparation, data: bytes) -> Any:
        if data == b"first":
            first.wait(HANG_S)
            decoded.append(-len(decoded))
            data = jpeg(0)
        decoded.append(1)
        if len(decoded) == 3:
            # Time for a fourth, which must not come.
            threading.Timer(0.3, first.set).start()
        return pixels(self, data)

    monkeypatch.setattr(Preparation, "_pixels", counted)
    for n in range(20):
        (tmp_path / f"{n}.jpg").write_bytes(jpeg(n) if n else b"first")
    table = one([f"file://{tmp_path}/{n}.jpg" for n in range(20)], cpus_per_task=2)
    assert errors(table) == [None] * 20
    before_the_first = -next(n for n in decoded if n < 0)
    assert before_the_first == 3
    assert decoded.count(1) == 20


@pytest.mark.parametrize("cpus", [1, 3])
def test_threads_that_decode_are_as_many_as_the_task_has_cpus(
    cpus: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    crowd = Crowd(cpus)

    def pixels(self: Preparation, data: bytes) -> Pixels:
        with crowd:
            return Pixels(np.zeros((1, 1, 3), np.uint8))

    monkeypatch.setattr(Preparation, "_pixels", pixels)
    prepare([f"{tmp_path}/a.jpg"] * 30, cpus_per_task=cpus)
    assert crowd.most == cpus


@pytest.mark.parametrize("cpus", [1, 2])
def test_task_that_is_stopped_in_the_middle_leaves_no_thread_waiting(
    cpus: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pipeline_prepare, "_BLOCK_ROWS", 2)
    for n in range(60):
        (tmp_path / f"{n}.jpg").write_bytes(jpeg(n))
    rows = Preparation(StorageConfig(), PreprocessConfig(cpus_per_task=cpus), None).rows(
        0, [f"file://{tmp_path}/{n}.jpg" for n in range(60)]
    )
    next(rows)
    rows.close()
    wait_until(lambda: not any(t.name.startswith(("fetch", "decode")) for t in threading.enumerate()))


def test_missing_images_do_not_stop_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = systemic(monkeypatch, {}, "NOT_FOUND")
    prepare([f"s3://b/{n}" for n in range(300)])
    assert sorted(asked) == list(range(300))


def test_lines_without_a_uri_are_never_fetched(fetches: list[str]) -> None:
    assert errors(one([""] * 3)) == [("list", "INVALID_URI")] * 3
    assert fetches == []


def test_tables_have_as_many_images_as_the_pipeline_asks_for(tmp_path: Path) -> None:
    """Whole batches of the network's size, so that none is split and copied on its way."""
    uris = []
    for i in range(20):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
        uris.append(f"file://{tmp_path}/{i}.jpg")
    transform = Transform(resize=16, crop=8)
    blocks = list(Preparation(StorageConfig(), PreprocessConfig(), transform, 8 * 8 * 8 * 3).rows(0, uris))
    assert [b.num_rows for b in blocks] == [8, 8, 4]
