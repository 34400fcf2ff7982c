from __future__ import annotations

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_inference.config import JobConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.inputs import distinct, manifest_files
from batch_inference.inputs.bucket_listing import glob_regex
from batch_inference.inputs.find import Inputs, find_inputs
from batch_inference.inputs.manifest_files import looks_like_manifest, manifest_digest
from batch_inference.output import manifest
from batch_inference.output.manifest import cut_shards, encode_shard, read_shard
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.store import Store
from tests.support.containers import tar
from tests.support.privileges import unprivileged

ODD = [
    "a b.jpg",
    "100%.jpg",
    "a%20b.jpg",
    "x#1.jpg",
    "ü.jpg",
    "u\u0308.jpg",
    "[x].jpg",
    "a?b.jpg",
    "a*b.jpg",
    "two\nlines.jpg",
    " leading and trailing .jpg",
    "日本.jpg",
    "'\"\\.jpg",
    "line\u2028separator.jpg",
    "x.JPG",
    ".jpg.jpg"[1:],
]


def config(**options: Any) -> JobConfig:
    return JobConfig.model_validate({"input": options})


def listed(*uris: Path | str, **options: Any) -> Inputs:
    return find_inputs(config(uris=[str(u) for u in uris], **options))


def names(inputs: Inputs, root: Path) -> list[str]:
    return [uri.removeprefix(f"file://{root}/") for uri in inputs.table["uri"].to_pylist()]


def touch(root: Path, *paths: str) -> Path:
    for path in paths:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(path.encode())
    return root


def refused(**options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        find_inputs(config(**options))
    assert caught.value.remedy
    return caught.value


# --- folders, globs, files -----------------------------------------------------------------------------------------------


def test_folder_is_listed_in_order_with_its_subfolders(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "a.png", "sub/deep/c.webp", "sub/a.jpeg", "z.tif")
    inputs = listed(tmp_path)
    assert names(inputs, tmp_path) == ["a.png", "b.jpg", "sub/a.jpeg", "sub/deep/c.webp", "z.tif"]
    assert inputs.table.schema == pa.schema([("uri", pa.string())])
    assert inputs.passthrough == ()
    assert (inputs.skipped, inputs.duplicates, inputs.repeated, inputs.manifest_sha256) == ({}, 0, 0, "")


def test_subfolders_stay_out_without_recursion(tmp_path: Path) -> None:
    touch(tmp_path, "b.jpg", "sub/a.jpg")
    assert names(listed(tmp_path, recursive=False), tmp_path) == ["b.jpg"]


def test_hidden_files_and_folders_are_tools_own(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", ".b.jpg", ".git/c.jpg", "sub/.d/e.jpg", "sub/f.jpg")
    assert names(listed(tmp_path), tmp_path) == ["a.jpg", "sub/f.jpg"]


def test_hidden_folder_that_is_named_is_listed(tmp_path: Path) -> None:
    touch(tmp_path, ".cache/a.jpg")
    assert names(listed(tmp_path / ".cache"), tmp_path) == [".cache/a.jpg"]


def test_other_endings_are_left_out_and_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.JPEG", "c.txt", "d.txt", "e.JSON", "README", "f.jpg.bak")
    inputs = listed(tmp_path)
    assert names(inputs, tmp_path) == ["a.jpg", "b.JPEG"]
    assert inputs.skipped == {".txt": 2, ".json": 1, "": 1, ".bak": 1}


def test_other_endings_can_be_asked_for(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.HEIC", "README")
    assert names(listed(tmp_path, extensions=["heic"]), tmp_path) == ["b.HEIC"]
    assert names(listed(tmp_path, extensions=[]), tmp_path) == ["README", "a.jpg", "b.HEIC"]


def test_single_file_needs_no_ending(tmp_path: Path) -> None:
    touch(tmp_path, "photo", "x.dat")
    inputs = listed(tmp_path / "photo", tmp_path / "x.dat")
    assert names(inputs, tmp_path) == ["photo", "x.dat"]
    assert inputs.skipped == {}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg", "b1.jpg"]),
        ("b?.jpg", ["b1.jpg"]),
        ("[ab]*.jpg", ["a.jpg", "b1.jpg"]),
        ("**/*.jpg", ["a.jpg", "b1.jpg", "sub/c.jpg", "sub/deep/d.jpg"]),
        ("sub/**", ["sub/c.jpg", "sub/deep/d.jpg", "sub/deep/e.png"]),
        ("*/*.jpg", ["sub/c.jpg"]),
        ("s*/deep/*", ["sub/deep/d.jpg", "sub/deep/e.png"]),
    ],
)
def test_local_globs_match_as_in_a_shell(pattern: str, expected: list[str], tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b1.jpg", "x.txt", "sub/c.jpg", "sub/deep/d.jpg", "sub/deep/e.png", "sub/n.txt")
    assert names(listed(tmp_path / pattern), tmp_path) == expected


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("a/*.jpg", ["a/b.jpg", "a/.jpg"], ["a/b/c.jpg", "a/b.jpgx", "xa/b.jpg", "a/b.jpg\n"]),
        ("a/**/*.jpg", ["a/b.jpg", "a/b/c/d.jpg"], ["ab.jpg", "a/b.png"]),
        ("a/**/b.jpg", ["a/b.jpg", "a/x/y/b.jpg"], ["a/xb.jpg", "a/x/yb.jpg"]),
        ("a/**", ["a/b", "a/b/c"], ["ab"]),
        ("a/b?.jpg", ["a/b1.jpg"], ["a/b.jpg", "a/b/.jpg", "a/b12.jpg"]),
        ("a/[!x]1.jpg", ["a/y1.jpg"], ["a/x1.jpg"]),
        ("a/[0-9]/x+y(z).jpg", ["a/7/x+y(z).jpg"], ["a/77/x+y(z).jpg", "a/7/xxy(z).jpg"]),
    ],
)
def test_bucket_globs_match_as_in_a_shell(pattern: str, yes: list[str], no: list[str]) -> None:
    regex = glob_regex(pattern)
    assert all(regex.match(path) for path in yes)
    assert not any(regex.match(path) for path in no)


def test_odd_names_are_kept_as_they_are_and_can_be_read(tmp_path: Path) -> None:
    touch(tmp_path, *ODD)
    inputs = listed(tmp_path)
    assert sorted(names(inputs, tmp_path)) == sorted(ODD)
    fetcher = Fetcher(StorageConfig())
    for uri in inputs.table["uri"].to_pylist():
        assert fetcher.fetch(uri, 1000) == uri.removeprefix(f"file://{tmp_path}/").encode()


@pytest.mark.parametrize("folder", ["a [1] b", "100%", "ü\nx", "q?"])
def test_folders_of_odd_names_are_listed(folder: str, tmp_path: Path) -> None:
    touch(tmp_path, f"{folder}/a.jpg")
    assert names(listed(tmp_path / folder), tmp_path) == [f"{folder}/a.jpg"]


def test_name_that_is_not_utf8_is_shown_by_an_escape_and_read(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"x")
    touch(tmp_path, "a.jpg", "caf\\udce9.jpg", "caf\\xe9.jpg")
    inputs = listed(tmp_path)
    assert names(inputs, tmp_path) == ["a.jpg", "caf\\udce9.jpg", "caf\\x5cxe9.jpg", "caf\\xe9.jpg"]
    fetcher = Fetcher(StorageConfig())
    assert [fetcher.fetch(uri, 1000) for uri in inputs.table["uri"].to_pylist()] == [
        b"a.jpg",
        b"caf\\udce9.jpg",
        b"caf\\xe9.jpg",
        b"x",
    ]


def test_overlapping_locations_list_each_input_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b.jpg", "sub/c.jpg")
    inputs = listed(tmp_path, tmp_path / "sub", tmp_path / "*.jpg", tmp_path / "a.jpg")
    assert names(inputs, tmp_path) == ["a.jpg", "b.jpg", "sub/c.jpg"]
    assert inputs.duplicates == 4


def test_uris_may_exceed_one_array_of_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gigabytes of URIs are 30 million; the limit is lowered instead."""
    touch(tmp_path, "b.jpg", "d.jpg", "sub/e.jpg")
    (tmp_path / "c.tar").write_bytes(tar({"1.jpg": b"1", "2.jpg": b"2"}))
    (tmp_path / "m.txt").write_text("b.jpg\nd.jpg\nb.jpg\n")
    sources: list[dict[str, Any]] = [{"uris": [str(tmp_path)]}, {"manifest": str(tmp_path / "m.txt")}]
    for source in sources:
        few = find_inputs(config(**source))
        with monkeypatch.context() as patch:
            patch.setattr(distinct, "_SHORT_OFFSETS", 0)
            many = find_inputs(config(**source))
        assert few.table["uri"].type == pa.string()
        assert many.table["uri"].type == pa.large_string()
        assert list(cut_shards(many.table, 2)) == list(cut_shards(few.table, 2))


def test_dangling_link_is_an_input_that_fails_later(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(tmp_path / "none")
    assert names(listed(tmp_path), tmp_path) == ["a.jpg"]


def test_order_of_inputs_does_not_depend_on_the_order_of_the_folders(tmp_path: Path) -> None:
    touch(tmp_path, "x/1.jpg", "y/2.jpg", "y/0.jpg")
    inputs, reversed_inputs = listed(tmp_path / "x", tmp_path / "y"), listed(tmp_path / "y", tmp_path / "x")
    assert inputs.table.equals(reversed_inputs.table)


def test_limit_keeps_the_first_files(tmp_path: Path) -> None:
    touch(tmp_path, *[f"{i:02d}.jpg" for i in range(20)])
    assert names(listed(tmp_path, limit=3), tmp_path) == ["00.jpg", "01.jpg", "02.jpg"]
    assert len(listed(tmp_path, limit=100).table) == 20


def test_messages_say_why_nothing_was_found(tmp_path: Path) -> None:
    touch(tmp_path, "docs/a.txt", "docs/b.txt", "docs/README", "empty/.x")
    assert refused().message == "no input is given"
    error = refused(uris=[str(tmp_path / "docs")])
    assert error.message.startswith(
        f"no images in {tmp_path}/docs: only 2 files ending with .txt, 1 file ending with nothing"
    )
    assert "images end with .jpg, .jpeg" in error.message
    assert refused(uris=[str(tmp_path / "empty")]).message == f"nothing was found in {tmp_path}/empty"
    assert refused(uris=[str(tmp_path / "none*.jpg")]).message == f"nothing was found in {tmp_path}/none*.jpg"
    assert refused(uris=[str(tmp_path / "none")]).message == f"there is no file or folder {tmp_path}/none"
    assert "scheme ftp://" in refused(uris=["ftp://x/y"]).message


def test_folder_that_may_not_be_listed_is_not_left_out_silently(public_path: Path) -> None:
    touch(public_path, "a.jpg", "closed/b.jpg")
    (public_path / "closed").chmod(0)
    with unprivileged():
        message = refused(uris=[str(public_path)]).message
    assert "cannot list the folder" in message


# --- manifests -----------------------------------------------------------------------------------------------------------


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def read(path: Path, data: bytes | str, **options: Any) -> Inputs:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return find_inputs(config(manifest=str(path), **options))


ROWS = [("s3://b/a.jpg", "007"), ("file:///x/b c.jpg", 'a "quoted", text'), ("gs://b/ü.jpg", "")]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("list.csv", 'uri,id\ns3://b/a.jpg,007\nfile:///x/b c.jpg,"a ""quoted"", text"\ngs://b/ü.jpg,\n'),
        ("BOM.CSV", '\ufeffuri,id\r\ns3://b/a.jpg,007\r\nfile:///x/b c.jpg,"a ""quoted"", text"\r\ngs://b/ü.jpg,\r\n'),
        ("list.jsonl", "".join(json.dumps({"uri": u, "id": i}) + "\n" for u, i in ROWS)),
        ("list.ndjson", "".join(json.dumps({"id": i, "uri": u}) + "\n" for u, i in ROWS)),
        ("list.parquet", parquet(pa.table({"id": [i for _, i in ROWS], "uri": [u for u, _ in ROWS]}))),
        (
            "large.parquet",
            parquet(pa.table({"uri": pa.array([u for u, _ in ROWS], pa.large_string()), "id": [i for _, i in ROWS]})),
        ),
        (
            "dictionary.parquet",
            parquet(pa.table({"uri": pa.array([u for u, _ in ROWS]).dictionary_encode(), "id": [i for _, i in ROWS]})),
        ),
    ],
)
def test_manifest_formats_give_the_same_table(name: str, data: bytes | str, tmp_path: Path) -> None:
    inputs = read(tmp_path / name, data)
    assert inputs.table.column_names == ["uri", "id"]
    assert inputs.table.schema.field("uri").type == pa.string()
    assert list(zip(*inputs.table.to_pydict().values(), strict=True)) == ROWS
    assert (inputs.duplicates, inputs.repeated) == (0, 0)
    assert len(inputs.manifest_sha256) == 64


def test_texts_stay_texts_whatever_they_look_like(tmp_path: Path) -> None:
    values = ["007", "2024-01-01", "1e5", "true", "NA"]
    lines = "".join(f"a{i}.jpg,{v}\n" for i, v in enumerate(values))
    assert read(tmp_path / "a.csv", "uri,x\n" + lines).table["x"].to_pylist() == values
    dates = [{"uri": "a.jpg", "x": "2024-01-01", "n": 1}, {"uri": "b.jpg", "x": "2024-01-02", "n": 2}]
    inputs = read(tmp_path / "a.jsonl", "".join(json.dumps(d) + "\n" for d in dates))
    assert inputs.table.column_names == ["uri", "x", "n"]
    assert inputs.table["x"].to_pylist() == ["2024-01-01", "2024-01-02"]
    assert inputs.table["n"].to_pylist() == [1, 2]


def test_values_of_a_csv_may_have_several_lines(tmp_path: Path) -> None:
    # More than one of the blocks that Arrow reads a file in, with line ends inside of values everywhere.
    note = "x,\n" * 20
    lines = "".join(f'"a\n{i}.jpg","{note}"\n' for i in range(30000))
    inputs = read(tmp_path / "a.csv", "uri,note\n" + lines)
    assert inputs.table.num_rows == 30000
    assert inputs.table["uri"][29999].as_py() == f"file://{tmp_path}/a\n29999.jpg"
    assert set(inputs.table["note"].to_pylist()) == {note}


def test_text_manifest_has_a_uri_a_line(tmp_path: Path) -> None:
    text = (
        "\ufeff s3://b/a.jpg \r\n\n/x/b c.jpg\n  \n#1.jpg\nline\u2028separator.jpg\na\x0cb.jpg\ns3://b/a.jpg\nlast.jpg"
    )
    inputs = read(tmp_path / "a.txt", text)
    assert inputs.table["uri"].to_pylist() == [
        "s3://b/a.jpg",
        "file:///x/b c.jpg",
        *(f"file://{tmp_path}/{n}" for n in ("#1.jpg", "line\u2028separator.jpg", "a\x0cb.jpg", "last.jpg")),
    ]
    assert (inputs.duplicates, inputs.repeated) == (1, 0)


def test_folder_of_parquet_is_one_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "list.parquet"
    for part, ids in enumerate([[1, 2], [3, None]]):
        touch(folder, f"part-{part}.parquet")
        (folder / f"part-{part}.parquet").write_bytes(
            parquet(pa.table({"uri": [f"s3://b/{i}" for i in ids], "id": ids}))
        )
    touch(folder, "_SUCCESS", ".hidden.parquet")
    inputs = find_inputs(config(manifest=str(folder)))
    assert inputs.table["id"].to_pylist() == [1, 2, 3, None]
    assert inputs.manifest_sha256 == manifest_digest(config(manifest=str(folder)))
    before = inputs.manifest_sha256
    (folder / "part-2.parquet").write_bytes(parquet(pa.table({"uri": ["s3://b/9"], "id": [9]})))
    assert manifest_digest(config(manifest=str(folder))) != before


def test_digest_is_that_of_the_file_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    inputs = read(file, "uri\na.jpg\n")
    job_config = config(manifest=str(file))
    assert manifest_digest(job_config) == inputs.manifest_sha256
    file.write_text("uri\na.jpg\n\n")
    assert manifest_digest(job_config) != inputs.manifest_sha256
    file.unlink()
    with pytest.raises(UserError, match="cannot read the manifest"):
        manifest_digest(job_config)


def test_columns_pass_through_in_their_order_with_their_types(tmp_path: Path) -> None:
    table = pa.table(
        {
            "z": pa.array([1.5, None], pa.float32()),
            "image": ["s3://b/1", "s3://b/2"],
            "tags": pa.array([["a"], []]),
            "a": pa.array([1, 2], pa.int8()),
        }
    ).replace_schema_metadata({"pandas": "{}"})
    inputs = read(tmp_path / "a.parquet", parquet(table), uri_column="image")
    assert inputs.table.schema == pa.schema(
        [("uri", pa.string()), ("z", pa.float32()), ("tags", table.schema.field("tags").type), ("a", pa.int8())]
    )
    assert inputs.table.schema.metadata is None
    assert inputs.table["tags"].to_pylist() == [["a"], []]


def test_lines_that_repeat_a_uri_are_kept_where_other_columns_differ(tmp_path: Path) -> None:
    inputs = read(tmp_path / "a.csv", "uri,id\na.jpg,1\nb.jpg,2\na.jpg,3\na.jpg,1\n")
    assert inputs.table["id"].to_pylist() == ["1", "2", "3", "1"]
    assert (inputs.duplicates, inputs.repeated) == (0, 2)


def test_lines_with_only_the_same_uri_are_one_input(tmp_path: Path) -> None:
    inputs = read(tmp_path / "a.csv", "uri\nb.jpg\na.jpg\nb.jpg\n")
    assert names(inputs, tmp_path) == ["b.jpg", "a.jpg"]
    assert (inputs.duplicates, inputs.repeated) == (1, 0)


def test_lines_without_a_uri_keep_their_place(tmp_path: Path) -> None:
    table = pa.table({"uri": ["a.jpg", None, "", "  "], "id": [1, 2, 3, 4]})
    inputs = read(tmp_path / "a.parquet", parquet(table))
    assert inputs.table["uri"].to_pylist() == [f"file://{tmp_path}/a.jpg", "", "", ""]
    assert inputs.table["id"].to_pylist() == [1, 2, 3, 4]


def test_uris_get_one_spelling_and_wrong_ones_keep_their_place(tmp_path: Path) -> None:
    given = [
        "s3a://b/1",
        "/abs/2",
        "rel/3",
        "../4",
        "http://x/5",
        "file://x/6",
        "S3://b/7",
        "file:///8",
        "file:///x/ü 9%",
    ]
    inputs = read(tmp_path / "a.txt", "\n".join(given))
    assert inputs.table["uri"].to_pylist() == [
        "s3://b/1",
        "file:///abs/2",
        f"file://{tmp_path}/rel/3",
        f"file://{tmp_path}/../4",
        "http://x/5",
        "file://x/6",
        "s3://b/7",
        "file:///8",
        "file:///x/ü 9%",
    ]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("file:///list.csv", "file:///a.jpg"),
        ("s3://b/list.csv", "s3://b/a.jpg"),
        ("s3://b/x/list.csv", "s3://b/x/a.jpg"),
    ],
)
def test_relative_uris_start_at_the_manifest(path: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_files, "read_object", lambda *args: b"uri\na.jpg\n")
    assert find_inputs(config(manifest=path)).table["uri"].to_pylist() == [expected]


def test_limit_keeps_the_first_lines(tmp_path: Path) -> None:
    inputs = read(tmp_path / "a.csv", "uri\n" + "".join(f"{i}.jpg\n" for i in range(9, 0, -1)), limit=2)
    assert names(inputs, tmp_path) == ["9.jpg", "8.jpg"]
    assert inputs.manifest_sha256 == manifest_digest(config(manifest=str(tmp_path / "a.csv"), limit=2))


@pytest.mark.parametrize(
    ("name", "data", "options", "fact"),
    [
        ("a.csv", "url,id\na,b\n", {}, "has no column 'uri'; it has: url, id"),
        ("a.parquet", parquet(pa.table({"k": [1]})), {"uri_column": "path"}, "has no column 'path'; it has: k"),
        ("a.csv", "uri,row,stage\na,b,c\n", {}, "columns that the output has of its own: row, stage"),
        ("a.csv", "image,uri\na,b\n", {"uri_column": "image"}, "columns that the output has of its own: uri"),
        ("a.csv", "uri,x,x\na,b,c\n", {}, "several columns of the same name: x"),
        ("a.csv", "uri,uri\na,b\n", {}, "several columns of the same name: uri"),
        ("a.parquet", parquet(pa.table({"uri": [1, 2]})), {}, "the column 'uri' of {} holds int64, not text"),
        ("a.parquet", parquet(pa.table({"uri": [b"a"]})), {}, "holds binary, not text"),
        ("a.csv", "", {}, "is not a readable csv manifest: Empty CSV file"),
        ("a.csv", "uri,id\na\n", {}, "Expected 2 columns, got 1"),
        ("a.jsonl", '{"uri": "a"\n', {}, "is not a readable jsonl manifest"),
        ("a.jsonl", "", {}, "is not a readable jsonl manifest"),
        (
            "a.txt",
            b"b\na\xff\n",
            {},
            "is text in another encoding than UTF-8 (byte 0xff in line 2), not a txt manifest in UTF-8",
        ),
        ("a.parquet", "no parquet", {}, "is not a readable parquet manifest"),
        ("a.csv", "uri,id\n", {}, "the manifest {} has no lines"),
        ("a.txt", "\n \n", {}, "the manifest {} has no lines"),
        ("a.json", "{}", {}, "has no ending that says what kind of manifest it is"),
    ],
)
def test_manifests_that_are_refused(
    name: str, data: bytes | str, options: dict[str, Any], fact: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    with pytest.raises(UserError) as caught:
        read(path, data, **options)
    assert fact.format(path) in caught.value.message
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.remedy


def test_missing_manifest_is_refused(tmp_path: Path) -> None:
    assert "cannot read the manifest" in refused(manifest=str(tmp_path / "none.csv")).message
    assert "there is no file or folder" in refused(manifest=str(tmp_path / "none")).message
    touch(tmp_path, "folder/a.csv")
    assert f"there is no manifest at {tmp_path}/folder" in refused(manifest=str(tmp_path / "folder")).message


def test_names_that_look_like_manifests() -> None:
    assert all(looks_like_manifest(n) for n in ("a.parquet", "s3://b/A.CSV", "x.jsonl", "x.ndjson", "x.txt"))
    assert not any(looks_like_manifest(n) for n in ("a.jpg", "parquet/", "csv"))


# --- shards --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.text()), st.integers(1, 7))
def test_cutting_keeps_every_row_once_and_in_order(uris: list[str], size: int) -> None:
    table = pa.table({"uri": pa.array(uris, pa.string()), "id": pa.array(range(len(uris)), pa.int64())})
    rows: list[tuple[str, int]] = []
    for number, (shard, part) in enumerate(cut_shards(table, size)):
        back = pq.read_table(io.BytesIO(encode_shard(part)))
        assert back.schema.names == ["uri", "shard", "row", "id"]
        assert back.schema.field("shard").type == back.schema.field("row").type == pa.int32()
        assert shard == number
        assert set(back["shard"].to_pylist()) == {shard}
        assert back["row"].to_pylist() == list(range(len(back)))
        assert 1 <= len(back) <= size
        assert len(back) == size or len(rows) + len(back) == len(uris)
        rows += zip(back["uri"].to_pylist(), back["id"].to_pylist(), strict=True)
    assert rows == list(zip(uris, range(len(uris)), strict=True))


def test_shards_are_read_back_from_the_store(tmp_path: Path) -> None:
    store = Store(str(tmp_path), StorageConfig())
    table = pa.table({"uri": ["a", "b", "c"], "tags": [["x"], [], None]})
    for shard, part in cut_shards(table, 2):
        store.put(f"_manifest/{manifest.shard_name(shard)}.parquet", encode_shard(part))
    assert (tmp_path / "_manifest/shard-00001.parquet").exists()
    assert read_shard(store, 1).to_pylist() == [{"uri": "c", "shard": 1, "row": 0, "tags": None}]
    with pytest.raises(FileNotFoundError):
        read_shard(store, 2)


def test_same_shard_has_the_same_bytes() -> None:
    table = pa.table({"uri": [f"s3://b/{i}" for i in range(100)]})
    first, second = ([encode_shard(part) for _, part in cut_shards(table, 30)] for _ in range(2))
    assert first == second
    assert manifest.shard_name(42) == "shard-00042"
    assert manifest.shard_name(123456) == "shard-123456"


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, "real/a.jpg", "photos/b.jpg")
    (tmp_path / "photos/link").symlink_to(tmp_path / "real")
    (tmp_path / "photos/circle").symlink_to(tmp_path / "photos")
    uris = find_inputs(config(uris=[str(tmp_path / "photos")])).table["uri"].to_pylist()
    assert uris == [f"file://{tmp_path}/photos/b.jpg", f"file://{tmp_path}/photos/link/a.jpg"]


def test_glob_of_folders_says_what_to_write(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.jpg", "two/b.jpg")
    error = refused(uris=[f"{tmp_path}/*"])
    assert error.message == f"{tmp_path}/* matches 2 folders and no file"
    assert error.remedy == f"Write {tmp_path}/*/** for what is in them."


LIST = "uri,id\na.jpg,1\nb.jpg,2\n"


@pytest.mark.parametrize(
    ("name", "data", "fact", "remedy"),
    [
        ("a.csv", LIST.encode("utf-16"), "is UTF-16 text, not a csv manifest", "iconv -f UTF-16 -t UTF-8 'a.csv' > 'utf8-a.csv'"),
        ("a.csv", LIST.encode("utf-16-le"), "is UTF-16 text", "iconv -f UTF-16LE -t"),
        ("a.txt", LIST.encode("utf-16-be"), "is UTF-16 text", "iconv -f UTF-16BE -t"),
        ("a.jsonl", LIST.encode("utf-32"), "is UTF-32 text", "iconv -f UTF-32 -t"),
        ("a.csv", "uri,id\ncafé.jpg,1\n".encode("latin-1"), "(byte 0xe9 in line 2)", "iconv -f WINDOWS-1252 -t UTF-8 'a.csv'"),
        ("a.csv", b"\x1f\x8b\x08", "is compressed by gzip", "gunzip < 'a.csv'"),
        ("a.csv", b"PK\x03\x04", "an Excel workbook", "Save it as CSV"),
        ("a.csv", b"PAR1", "is a Parquet file", "mv 'a.csv' 'a.parquet'"),
        ("a.jsonl", b' [{"uri": "a"}]', "is one JSON array", "jq -c '.[]' 'a.jsonl' > 'lines-a.jsonl'"),
        ("a.csv", b"uri;id\na.jpg;1\n", "no column 'uri'; it has: uri;id", "csv.reader(sys.stdin, delimiter=';')"),
        ("a.csv", b"id\turi\n1\ta.jpg\n", "no column 'uri'", "delimiter='\\t'"),
        ("a.csv", b"URI ,id\na.jpg,1\n", "no column 'uri'", "Set input.uri_column='URI '"),
        ("a.csv", b"s3://b/a.jpg\ns3://b/b.jpg\n", "no column 'uri'", "Its first line is no header"),
        ("a.tsv", b"uri\tid\n", "no ending that says", "< 'a.tsv' > 'a.csv'"),
        ("a.json", b"[]", "no ending that says", "jq -c '.[]' 'a.json' > 'a.jsonl'"),
        ("a.csv.gz", b"", "no ending that says", "gunzip 'a.csv.gz'"),
    ],
)  # fmt: skip
def test_remedy_of_a_manifest_in_another_format(name: str, data: bytes, fact: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    error = refused(manifest=str(tmp_path / name))
    assert fact in error.message
    assert remedy in error.remedy


def test_commands_of_remedies_make_manifests_that_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(LIST.replace(",", ";").encode())
    remedy = refused(manifest=str(tmp_path / "a.csv")).remedy
    command = remedy[remedy.index("python -c") :].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, check=True)
    (tmp_path / "b.csv").write_bytes(LIST.encode("utf-16"))
    remedy = refused(manifest=str(tmp_path / "b.csv")).remedy
    command = remedy.removeprefix("Run: ").split("   and")[0]
    subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, check=True)
    for name in ("commas.csv", "utf8-b.csv"):
        inputs = find_inputs(config(manifest=str(tmp_path / name)))
        assert [uri.rpartition("/")[2] for uri in inputs.table["uri"].to_pylist()] == ["a.jpg", "b.jpg"]
        assert inputs.table["id"].to_pylist() == ["1", "2"]
