"""Notes on files of images, and columns that they lack."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_inference.config import InputConfig, StorageConfig
from batch_inference.inputs import parquet_contents
from batch_inference.inputs.allowlist import Allowlist
from batch_inference.inputs.containers import ContainerInputs, first_notes, list_containers, sum_counts
from tests.support.containers import parquet, tar
from tests.support.images import jpeg


def listed(*files: Path, passthrough: tuple[str, ...] = ()) -> ContainerInputs:
    config = InputConfig(uris=tuple(map(str, files)), image_column="image", passthrough_columns=passthrough)
    return list_containers([f"file://{file}" for file in files], [], config, StorageConfig())


@pytest.mark.parametrize(
    ("count", "more"),
    [(9, []), (10, []), (11, ["and 1 more file with such notes"]), (30, ["and 20 more files with such notes"])],
)
def test_ten_notes_are_shown_and_the_others_counted(count: int, more: list[str]) -> None:
    notes = [f"note {index}" for index in range(count)]
    assert first_notes(notes) == notes[:10] + more


def test_counts_are_added_by_key() -> None:
    assert sum_counts([{".txt": 2}, {}, {".txt": 3, ".csv": 1}]) == {".txt": 5, ".csv": 1}


def test_columns_of_a_file_without_rows_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet([jpeg(1)]))
    empty = pa.table({"image": pa.array([], pa.binary()), "number": pa.array([], pa.list_(pa.string()))})
    pq.write_table(empty, tmp_path / "b.parquet")
    inputs = listed(tmp_path / "a.parquet", tmp_path / "b.parquet", passthrough=("number",))
    assert [table.num_rows for table in inputs.tables.values()] == [1, 0]
    assert inputs.notes == []


def test_columns_are_read_only_if_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet([jpeg(1)]))
    monkeypatch.setattr(parquet_contents, "read_columns", lambda *args: pytest.fail("read"))
    (table,) = listed(tmp_path / "a.parquet").tables.values()
    assert "number" not in table.column_names


@pytest.mark.parametrize("prefix", ["/", "file:///"])
def test_local_prefix_allows_no_object_of_a_store(prefix: str) -> None:
    allowlist = Allowlist.from_config(InputConfig(manifest="s3://b/list.csv", allowed_prefixes=(prefix,)))
    assert allowlist is not None
    assert allowlist.refusal("s3://b/1.jpg") is not None
    assert allowlist.refusal("file:///data/1.jpg") is None


def test_prefix_of_a_store_allows_no_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a URI, taken for that of a file, would begin in the current folder."""
    monkeypatch.chdir(tmp_path)
    allowlist = Allowlist.from_config(InputConfig(manifest="s3://b/list.csv", allowed_prefixes=("s3://b/",)))
    assert allowlist is not None
    for name in ("s3:/b", "b", ""):
        assert allowlist.refusal(f"file://{tmp_path / name / '1.jpg'}") is not None


@pytest.mark.parametrize(
    ("prefixes", "words"),
    [
        (("s3://b/x", "gs://c"), "it lies below none of input.allowed_prefixes (s3://b/x, gs://c)"),
        ((), "it lies below none of input.allowed_prefixes (which is empty)"),
        (None, "a manifest on an object store may name objects only"),
    ],
)
def test_refusal_says_which_rule_it_follows(prefixes: tuple[str, ...] | None, words: str) -> None:
    allowlist = Allowlist.from_config(InputConfig(manifest="s3://b/list.csv", allowed_prefixes=prefixes))
    assert allowlist is not None
    failure = allowlist.refusal("file:///data/1.jpg")
    assert failure is not None
    assert (failure.stage, failure.error_type) == ("list", "NOT_ALLOWED")
    assert words in failure.message


def test_large_row_groups_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet([jpeg(1), jpeg(2), jpeg(3)], rows_in_group=2))
    monkeypatch.setattr(parquet_contents, "LARGE_ROW_GROUP_BYTES", 0)
    (note,) = listed(tmp_path / "a.parquet").notes
    assert "a.parquet has row groups of up to 2 images, 0 MiB" in note
    monkeypatch.setattr(parquet_contents, "LARGE_ROW_GROUP_BYTES", 2**30)
    assert listed(tmp_path / "a.parquet").notes == []


@pytest.mark.parametrize("uri", ["s3://b/1.jpg", "file:///data/1.jpg"])
def test_prefix_may_be_the_object_itself(uri: str) -> None:
    allowlist = Allowlist.from_config(InputConfig(manifest="s3://b/list.csv", allowed_prefixes=(uri,)))
    assert allowlist is not None
    assert allowlist.refusal(uri) is None
    assert allowlist.refusal(uri + "x") is not None


def test_member_that_is_named_twice_or_beside_its_file_is_one_input(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"1.jpg": jpeg(1), "2.jpg": jpeg(2)}))
    uri = f"file://{tmp_path}/a.tar"
    config = InputConfig(uris=(str(tmp_path),))
    alone = list_containers([], [f"{uri}#2.jpg", f"{uri}#2.jpg", f"{uri}#1.jpg"], config, StorageConfig())
    assert (alone.duplicates, alone.tables[uri]["uri"].to_pylist()) == (1, [f"{uri}#2.jpg", f"{uri}#1.jpg"])
    beside = list_containers([uri, uri, uri], [f"{uri}#2.jpg"], config, StorageConfig())
    # Both members twice more, and the one that is named by itself.
    assert (beside.duplicates, beside.tables[uri].num_rows) == (2 * 2 + 1, 2)
