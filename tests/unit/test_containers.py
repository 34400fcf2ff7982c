"""Tar and Parquet files among the inputs of a job."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from batch_inference.config import JobConfig, PreprocessConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.manifest import (
    Inputs,
    cut,
    encode_shard,
    find_inputs,
    looks_like_manifest,
    read_places,
    read_shard,
)
from batch_inference.preparation import Preparation
from batch_inference.storage import Store
from tests.conftest import jpeg
from tests.unit.containers import parquet, tar


def find(*uris: str | Path, **section: Any) -> Inputs:
    return find_inputs(JobConfig(input={"uris": [str(u) for u in uris], **section}))


def refused(*uris: str | Path, **section: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        find(*uris, **section)
    assert caught.value.remedy
    return caught.value


def names(found: Inputs, root: Path) -> list[str]:
    return [uri.removeprefix(f"file://{root}/") for uri in found.table["uri"].to_pylist()]


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Images, archives and tables side by side."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "b.tar").write_bytes(tar({"z.jpg": jpeg(1), "z.cls": b"1", "a.PNG": jpeg(2), "notes": b""}))
    (tmp_path / "c.jpg").write_bytes(jpeg(3))
    (tmp_path / "d#1.jpg").write_bytes(jpeg(4))
    (tmp_path / "sub" / "e.tar").write_bytes(tar({"x/1.jpg": jpeg(5)}))
    (tmp_path / "f.parquet").write_bytes(parquet([jpeg(6), jpeg(7)]))
    (tmp_path / "g.tar.gz").write_bytes(b"")
    return tmp_path


IMAGES = ["a.jpg", "b.tar#z.jpg", "b.tar#a.PNG", "c.jpg", "d#1.jpg"]


def test_members_stand_where_their_file_would_in_the_order_of_the_file(mixed: Path) -> None:
    found = find(mixed)
    assert names(found, mixed) == [*IMAGES, "sub/e.tar#x/1.jpg"]
    assert found.skipped == {".cls": 1, "": 1, ".parquet": 1, ".gz": 1}
    assert found.duplicates == 0
    assert found.passthrough == ()
    assert names(find(mixed, recursive=False), mixed) == IMAGES


def test_parquet_files_are_images_where_they_are_asked_for(mixed: Path) -> None:
    assert names(find(mixed, bytes_column="image"), mixed) == [
        *IMAGES,
        "f.parquet#0",
        "f.parquet#1",
        "sub/e.tar#x/1.jpg",
    ]
    for given_name in ("f.parquet", "*.parquet"):
        assert names(find(mixed / given_name), mixed) == ["f.parquet#0", "f.parquet#1"]


def test_their_columns_pass_through_where_they_are_named(mixed: Path) -> None:
    found = find(mixed, bytes_column="image", passthrough_columns=["number"])
    assert found.passthrough == ("number",)
    assert found.table["number"].to_pylist() == [None] * 5 + [0, 1, None]
    assert (
        "has no column none; it has: number, image"
        in refused(mixed / "f.parquet", passthrough_columns=["none"]).message
    )


def test_limit_and_endings_are_those_of_members(mixed: Path) -> None:
    assert names(find(mixed, limit=3), mixed) == IMAGES[:3]
    assert names(find(mixed, extensions=[".cls"]), mixed) == ["b.tar#z.cls"]
    assert names(find(mixed / "b.tar", extensions=[]), mixed) == [
        "b.tar#z.jpg",
        "b.tar#z.cls",
        "b.tar#a.PNG",
        "b.tar#notes",
    ]


def test_what_is_listed_twice_is_done_once(mixed: Path) -> None:
    found = find(mixed / "b.tar", mixed / "*.tar", f"{mixed}/b.tar#a.PNG")
    assert names(found, mixed) == ["b.tar#z.jpg", "b.tar#a.PNG"]
    assert found.duplicates == 3
    (mixed / "twice.tar").write_bytes(tar({"1.jpg": b"old", "2.jpg": b"2"})[:2048] + tar({"1.jpg": b"newer"}))
    found = find(mixed / "twice.tar")
    assert names(found, mixed) == ["twice.tar#2.jpg", "twice.tar#1.jpg"]
    assert found.table["_size"].to_pylist() == [1, 5]
    assert found.duplicates == 1


@pytest.mark.parametrize("name", ["_version", "uri", "shard"])
def test_columns_that_the_output_has_of_its_own_do_not_pass_through(name: str, mixed: Path) -> None:
    error = refused(mixed / "f.parquet", passthrough_columns=[name])
    assert f"names columns that the output has of its own: {name}" in error.message


def test_single_members_can_be_named(mixed: Path) -> None:
    found = find(f"{mixed}/b.tar#a.PNG", f"{mixed}/f.parquet#1", mixed / "c.jpg")
    assert names(found, mixed) == ["b.tar#a.PNG", "c.jpg", "f.parquet#1"]
    assert "there is no" in refused(f"{mixed}/b.tar#none.jpg").message
    # A file of such a name is that file.
    (mixed / "b.tar#z.jpg").write_bytes(jpeg(9))
    found = find(f"{mixed}/b.tar#z.jpg")
    assert found.table.column_names == ["uri"]


@pytest.mark.parametrize(
    ("name", "data", "fact"),
    [
        ("x.tar", b"no archive" * 200, "x.tar is not a tar file"),
        ("x.tar.gz", b"", "x.tar.gz: members of compressed archives can't be read by range"),
        ("x.tgz", b"", "x.tgz: members of compressed archives can't be read by range"),
        ("x.parquet", b"no table" * 200, "x.parquet is not a readable Parquet file"),
        ("x.parquet", b"", "x.parquet is not a readable Parquet file"),
        ("x.tar#1.tar", tar({"a.jpg": b"1"}), "in its name, where its members' names would begin"),
    ],
)
def test_files_that_are_not_what_their_names_say(name: str, data: bytes, fact: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert fact in refused(tmp_path / name).message


def test_columns_of_images_that_cannot_be_told(tmp_path: Path) -> None:
    def write(table: pa.Table) -> Path:
        pq.write_table(table, tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    path = write(pa.table({"uri": ["s3://b/1.jpg"]}))
    error = refused(path)
    assert "x.parquet has no column of encoded images; it has: uri (string)" in error.message
    assert "input.manifest" in error.remedy
    path = write(pa.table({"a": [b"1"], "b": [b"2"]}))
    assert "has several columns of bytes" in refused(path).message
    assert "input.bytes_column" in refused(path).remedy
    assert names(find(path, bytes_column="b"), tmp_path) == ["x.parquet#0"]
    assert "has no column of bytes 'c'; it has: a (binary), b (binary)" in refused(path, bytes_column="c").message


def test_an_archive_without_images_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar({"a.txt": b"1"}))
    assert "only 1 file ending with .txt" in refused(tmp_path / "x.tar").message


def test_a_manifest_may_name_members(mixed: Path) -> None:
    (mixed / "list.csv").write_text(
        "uri,label\nb.tar#a.PNG,one\na.jpg,two\nb.tar#none.jpg,three\nd#1.jpg,four\nf.parquet#1,five\ngone.tar#1.jpg,six\n,seven\n"
    )
    found = find_inputs(JobConfig(input={"manifest": str(mixed / "list.csv")}))
    assert found.passthrough == ("label",)
    assert found.table.column_names[0] == "uri"
    offsets = found.table["_offset"].to_pylist()
    assert offsets[0] > 0
    assert offsets[1:] == [None, -1, None, 1, -1, None]
    rows = prepared(found, mixed)
    kinds = [rows[n]["error_type"] for n in range(7)]
    assert kinds == [None, None, "NOT_FOUND", None, None, "NOT_FOUND", "INVALID_URI"]


def test_a_manifest_of_another_column_is_told_apart_from_a_file_of_images(mixed: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_inputs(JobConfig(input={"manifest": str(mixed / "f.parquet")}))
    assert "input.uris" in caught.value.remedy
    assert looks_like_manifest("f.parquet")
    assert not looks_like_manifest("train-*.parquet")
    assert looks_like_manifest("*.csv")


def prepared(found: Inputs, root: Path, shard_size: int = 3) -> list[dict[str, Any]]:
    """Rows of all shards, by way of the manifest's files."""
    store = Store(str(root / "out"), StorageConfig())
    rows = []
    for shard, table in cut(found.table, shard_size):
        store.put(f"_manifest/shard-{shard:05d}.parquet", encode_shard(table))
        inputs, places = read_places(store, shard)
        assert read_shard(store, shard).equals(inputs)
        assert inputs.column_names == ["uri", "shard", "row", *found.passthrough]
        done: list[dict[str, Any]] = []
        for block in Preparation(StorageConfig(), PreprocessConfig(), None).rows(
            shard, inputs["uri"].to_pylist(), places
        ):
            done += block.to_pylist()
        rows += sorted(done, key=lambda row: int(row["row"]))
    return rows


def test_members_have_the_pixels_of_the_images_that_they_are(mixed: Path) -> None:
    rows = prepared(find(mixed, bytes_column="image"), mixed)
    seeds = [0, 1, 2, 3, 4, 6, 7, 5]
    assert [row["uri"].rpartition("/")[2] for row in rows][1] == "b.tar#z.jpg"
    for row, seed in zip(rows, seeds, strict=True):
        assert row["pixels"] == np.asarray(Image.open(io.BytesIO(jpeg(seed)))).tobytes()
        assert row["bytes"] == len(jpeg(seed))
        assert row["fetch_s"] > 0


@given(st.lists(st.lists(st.booleans(), max_size=8), max_size=6), st.integers(1, 9))
def test_any_mixture_is_planned_once_and_in_order(files: list[list[bool]], shard_size: int) -> None:
    """Files of a folder, each an image, or an archive of images and texts."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        expected = ["000.jpg"]
        (root / "000.jpg").write_bytes(b"1")
        for number, images in enumerate(files):
            if not images:
                (root / f"{number}.jpg").write_bytes(b"1")
                expected.append(f"{number}.jpg")
            else:
                members = {f"{n}.{'jpg' if image else 'txt'}": b"1" for n, image in reversed(list(enumerate(images)))}
                (root / f"{number}.tar").write_bytes(tar(members))
                expected += [f"{number}.tar#{member}" for member in members if member.endswith(".jpg")]
        found = find(root)
        assert names(found, root) == sorted(expected, key=lambda name: name.partition("#")[0])
        shards = [table for _, table in cut(found.table, shard_size)]
        assert [uri for table in shards for uri in table["uri"].to_pylist()] == found.table["uri"].to_pylist()
