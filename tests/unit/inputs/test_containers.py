"""Tar and Parquet files among the inputs of a job."""

from __future__ import annotations

import base64
import gzip
import io
import shlex
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from structlog.testing import capture_logs

from batch_inference.config import JobConfig, PreprocessConfig, StorageConfig
from batch_inference.errors import InfrastructureError, RowError, UserError
from batch_inference.inputs import parquet_columns, parquet_contents
from batch_inference.inputs.find import Inputs, find_inputs
from batch_inference.inputs.manifest_files import looks_like_manifest
from batch_inference.inputs.parquet import row_group_reads
from batch_inference.inputs.reads import Member, fetch_inputs
from batch_inference.output.manifest import cut_shards, encode_shard, read_shard, read_with_locations
from batch_inference.pipeline.prepare import Preparation
from batch_inference.storage.fetcher import Fetcher, Piece
from batch_inference.storage.store import Store
from tests.support.containers import MemoryFetcher, parquet, tar
from tests.support.images import jpeg
from tests.support.privileges import unprivileged


def find(*uris: str | Path, **options: Any) -> Inputs:
    return find_inputs(JobConfig(input={"uris": [str(u) for u in uris], **options}))


def refused(*uris: str | Path, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        find(*uris, **options)
    assert caught.value.remedy
    return caught.value


def names(inputs: Inputs, root: Path) -> list[str]:
    return [uri.removeprefix(f"file://{root}/") for uri in inputs.table["uri"].to_pylist()]


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
    inputs = find(mixed)
    assert names(inputs, mixed) == [*IMAGES, "sub/e.tar#x/1.jpg"]
    assert inputs.skipped == {".cls": 1, "": 1, ".parquet": 1, ".tar.gz": 1}
    assert inputs.duplicates == 0
    assert inputs.passthrough == ()
    assert names(find(mixed, recursive=False), mixed) == IMAGES


def test_parquet_files_are_images_where_they_are_asked_for(mixed: Path) -> None:
    assert names(find(mixed, image_column="image"), mixed) == [
        *IMAGES,
        "f.parquet#0",
        "f.parquet#1",
        "sub/e.tar#x/1.jpg",
    ]
    for given_name in ("f.parquet", "*.parquet"):
        assert names(find(mixed / given_name), mixed) == ["f.parquet#0", "f.parquet#1"]


def test_parquet_columns_pass_through_if_they_are_named(mixed: Path) -> None:
    inputs = find(mixed, image_column="image", passthrough_columns=["number"])
    assert inputs.passthrough == ("number",)
    assert inputs.table["number"].to_pylist() == [None] * 5 + [0, 1, None]
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


def test_input_listed_twice_is_one_input(mixed: Path) -> None:
    inputs = find(mixed / "b.tar", mixed / "*.tar", f"{mixed}/b.tar#a.PNG")
    assert names(inputs, mixed) == ["b.tar#z.jpg", "b.tar#a.PNG"]
    assert inputs.duplicates == 3
    (mixed / "twice.tar").write_bytes(tar({"1.jpg": b"old", "2.jpg": b"2"})[:2048] + tar({"1.jpg": b"newer"}))
    inputs = find(mixed / "twice.tar")
    assert names(inputs, mixed) == ["twice.tar#2.jpg", "twice.tar#1.jpg"]
    assert inputs.table["_size"].to_pylist() == [1, 5]
    assert inputs.duplicates == 1


@pytest.mark.parametrize("name", ["_version", "uri", "shard"])
def test_columns_that_the_output_has_of_its_own_do_not_pass_through(name: str, mixed: Path) -> None:
    error = refused(mixed / "f.parquet", passthrough_columns=[name])
    assert f"names columns that the output has of its own: {name}" in error.message


def test_single_members_can_be_named(mixed: Path) -> None:
    inputs = find(f"{mixed}/b.tar#a.PNG", f"{mixed}/f.parquet#1", mixed / "c.jpg")
    assert names(inputs, mixed) == ["b.tar#a.PNG", "c.jpg", "f.parquet#1"]
    assert "there is no" in refused(f"{mixed}/b.tar#none.jpg").message
    # A file of such a name is that file.
    (mixed / "b.tar#z.jpg").write_bytes(jpeg(9))
    inputs = find(f"{mixed}/b.tar#z.jpg")
    assert inputs.table.column_names == ["uri"]


@pytest.mark.parametrize(
    ("name", "data", "fact"),
    [
        ("x.tar", b"no archive" * 200, "x.tar: the file is not a tar file"),
        ("x.tar.gz", b"", "x.tar.gz: .tar.gz is not supported: members of compressed archives can't be read by range"),
        ("x.tgz", b"", "x.tgz: .tgz is not supported: members of compressed archives can't be read by range"),
        ("x.zip", b"", "x.zip: .zip is not supported: members of compressed archives can't be read by range"),
        ("x.parquet", b"no table" * 200, "x.parquet: the file is not a Parquet file: it looks like text"),
        ("x.parquet", b"", "x.parquet: the file is empty, not a Parquet file"),
        ("x.parquet", b"PAR1xx", "x.parquet: the file is a Parquet file that ends at byte 6 without its footer"),
        ("x.parquet", b"PAR1 PARE", "x.parquet: the file is an encrypted Parquet file"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
        ("x.tar", b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
        ("x.parquet", b"PAR1PAR1", "x.parquet: the file is not a readable Parquet file: "),
        ("x.tar#1.tar", tar({"a.jpg": b"1"}), "in its name, where its members' names would begin"),
    ],
)
def test_files_that_are_not_what_their_names_say(name: str, data: bytes, fact: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    assert fact in refused(tmp_path / name).message


@pytest.fixture
def bad(tmp_path: Path) -> dict[str, str]:
    """Bad files of every kind, by name, with the error type of each."""
    sound = tar({"x.jpg": jpeg(0)})
    sound_parquet = parquet([jpeg(1)])
    files = {
        "cut.parquet": (sound_parquet[:-20], "TRUNCATED"),
        "damaged.parquet": (sound_parquet[:-40] + b"\xff" * 32 + sound_parquet[-8:], "CORRUPT"),
        "empty.parquet": (b"", "EMPTY_FILE"),
        "empty.tar": (b"", "EMPTY_FILE"),
        "header.tar": (b"\xff" * 99 + sound[99:], "CORRUPT"),
        "html.parquet": (b"<html>503</html>", "UNKNOWN_FORMAT"),
        "html.tar": (b"<html>503</html>" * 99, "UNKNOWN_FORMAT"),
        "packed.tar": (gzip.compress(sound), "UNKNOWN_FORMAT"),
        "zeros.tar": (bytes(99999), "CORRUPT"),
    }
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    return {name: error_type for name, (_, error_type) in files.items()}


def test_bad_files_are_rows_and_hide_no_others(bad: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "good.parquet").write_bytes(parquet([jpeg(1), jpeg(2)]))
    (tmp_path / "good.tar").write_bytes(tar({"1.jpg": jpeg(3)}))
    (tmp_path / "half.tar").write_bytes(tar({"1.jpg": jpeg(4), "2.jpg": jpeg(5)})[:1536] + b"\xff" * 5000)
    (tmp_path / "image.jpg").write_bytes(jpeg(6))
    with capture_logs() as logs:
        inputs = find(tmp_path, image_column="image")
    good = ["good.parquet#0", "good.parquet#1", "good.tar#1.jpg", "half.tar#1.jpg", "image.jpg"]
    assert sorted(names(inputs, tmp_path)) == sorted([*good, "half.tar", *bad])
    (warning,) = [entry["event"] for entry in logs if "rows of errors" in entry["event"]]
    assert "10 of 15 inputs will be rows of errors" in warning
    assert all(f"{tmp_path}/{name}: " in warning for name in bad)
    rows = {row["uri"].removeprefix(f"file://{tmp_path}/"): row for row in prepared(inputs, tmp_path)}
    assert [rows[name]["error_type"] for name in good] == [None] * 5
    assert {name: rows[name]["error_type"] for name in bad} == bad
    assert rows["half.tar"]["error_type"] == "CORRUPT"
    assert "damaged at byte" in rows["half.tar"]["message"]
    assert {rows[name]["stage"] for name in [*bad, "half.tar"]} == {"list"}
    assert not any(rows[name]["retryable"] for name in bad)


def test_bad_files_alone_are_refused_with_all_names(bad: dict[str, str], tmp_path: Path) -> None:
    error = refused(tmp_path, image_column="image")
    assert f"none of the {len(bad)} files that were found can be used" in error.message
    assert all(f"{tmp_path}/{name}: the" in error.message for name in bad)
    # Named beside others each is a row; alone it is refused.
    (tmp_path / "image.jpg").write_bytes(jpeg(6))
    inputs = find(tmp_path / "empty.tar", tmp_path / "image.jpg")
    assert names(inputs, tmp_path) == ["empty.tar", "image.jpg"]
    assert refused(tmp_path / "empty.tar").message == f"{tmp_path}/empty.tar: the file is empty, not a tar file"


def test_bad_files_beyond_the_named_ones_are_counted(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number:02}.tar").touch()
    message = refused(tmp_path).message
    assert "none of the 60 files" in message
    assert message.endswith("; and 10 more")


def test_files_that_may_not_be_read_are_rows(public_path: Path) -> None:
    (public_path / "a.tar").write_bytes(tar({"1.jpg": jpeg(1)}))
    (public_path / "b.tar").write_bytes(tar({"1.jpg": jpeg(2)}))
    (public_path / "a.tar").chmod(0)
    with unprivileged():
        inputs = find(public_path)
    assert names(inputs, public_path) == ["a.tar", "b.tar#1.jpg"]
    row = prepared(inputs, public_path)[0]
    assert (row["stage"], row["error_type"]) == ("list", "UNREADABLE")
    assert "access denied" in row["message"].lower() or "permission" in row["message"].lower()


def failing(monkeypatch: pytest.MonkeyPatch, *failures: RowError) -> None:
    """Let reads of files named bad.tar fail, in turn and then no more."""
    left = list(failures)
    real = Fetcher.fetch_range

    def fetch(self: Fetcher, uri: str, start: int, end: int) -> Piece:
        if uri.endswith("bad.tar") and left:
            raise left.pop(0)
        return real(self, uri, start, end)

    monkeypatch.setattr(Fetcher, "fetch_range", fetch)


def test_file_that_is_gone_or_denied_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bad.tar", "good.tar"):
        (tmp_path / name).write_bytes(tar({"1.jpg": jpeg(1)}))
    for error_type in ("NOT_FOUND", "ACCESS_DENIED"):
        failing(monkeypatch, RowError("fetch", error_type, "the store says no"))
        inputs = find(tmp_path)
        assert names(inputs, tmp_path) == ["bad.tar", "good.tar#1.jpg"]
        row = prepared(inputs, tmp_path)[0]
        assert (row["stage"], row["error_type"]) == ("list", "UNREADABLE")
        assert "the file's contents cannot be read: the store says no" in row["message"]


def test_store_that_fails_loses_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bad.tar", "good.tar"):
        (tmp_path / name).write_bytes(tar({"1.jpg": jpeg(1)}))
    failing(monkeypatch, RowError("fetch", "TIMEOUT", "no answer", True))
    with pytest.raises(InfrastructureError, match=r"cannot read .*bad\.tar: no answer"):
        find(tmp_path)
    failing(monkeypatch, RowError("fetch", "UNAUTHENTICATED", "expired"))
    assert "expired" in refused(tmp_path).message
    # Replaced while it is read: looked at again, and once only.
    changed = RowError("fetch", "CHANGED", "replaced")
    failing(monkeypatch, changed)
    assert names(find(tmp_path), tmp_path) == ["bad.tar#1.jpg", "good.tar#1.jpg"]
    failing(monkeypatch, changed, changed)
    assert names(find(tmp_path), tmp_path) == ["bad.tar", "good.tar#1.jpg"]


def test_sparse_member_is_a_row(tmp_path: Path) -> None:
    info = tarfile.TarInfo("hole.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + tar({"1.jpg": jpeg(1)}))
    inputs = find(tmp_path)
    assert names(inputs, tmp_path) == ["x.tar#1.jpg", "x.tar#hole.jpg"]
    rows = prepared(inputs, tmp_path)
    assert [row["error_type"] for row in rows] == [None, "SPARSE_MEMBER"]
    assert "without --sparse" in rows[1]["message"]


def test_manifest_of_members_in_bad_files(bad: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "half.tar").write_bytes(tar({"1.jpg": jpeg(4), "2.jpg": jpeg(5)})[:1536] + b"\xff" * 5000)
    lines = [
        *(f"{name}#{'0' if name.endswith('.parquet') else 'x.jpg'}" for name in bad),
        "half.tar#1.jpg",
        "half.tar#2.jpg",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    inputs = find_inputs(JobConfig(input={"manifest": str(tmp_path / "list.txt")}))
    rows = prepared(inputs, tmp_path)
    assert [row["error_type"] for row in rows] == [*bad.values(), None, "CORRUPT"]
    (tmp_path / "list.txt").write_text("\n".join(lines[:-2]))
    with pytest.raises(UserError, match=f"none of the {len(bad)} files that were found can be used"):
        find_inputs(JobConfig(input={"manifest": str(tmp_path / "list.txt")}))


def test_compressed_archives_among_others_are_left_out_and_named(mixed: Path) -> None:
    (mixed / "h.zip").touch()
    with capture_logs() as logs:
        inputs = find(mixed)
    assert {".tar.gz": 1, ".zip": 1}.items() <= inputs.skipped.items()
    (warning,) = [entry["event"] for entry in logs if "left out" in entry["event"]]
    assert f"{mixed}/g.tar.gz, {mixed}/h.zip. Unpack: gunzip 'g.tar.gz', unzip 'h.zip' -d 'h'." in warning


def test_compressed_archives_alone_are_refused_with_the_command(tmp_path: Path) -> None:
    for name in ("a.tar.zst", "b.tgz", "c.tgz"):
        (tmp_path / name).touch()
    error = refused(tmp_path)
    assert "no images in" in error.message
    assert all(name in error.message for name in ("a.tar.zst", "b.tgz", "c.tgz"))
    assert "unzstd 'a.tar.zst', gunzip 'b.tgz'." in error.remedy


IMAGES_OF_ONE_SIZE = [bytes([255, 216, 255, *range(97)]), bytes(range(100)), bytes(100)]
COLUMN_TYPES = {
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
    "fixed_size_binary": pa.binary(100),
    "dictionary": pa.dictionary(pa.int32(), pa.binary()),
    "list<uint8>": pa.list_(pa.uint8()),
    "list<int8>": pa.list_(pa.int8()),
    "large_list<uint8>": pa.large_list(pa.uint8()),
    "fixed_size_list<uint8>": pa.list_(pa.uint8(), 100),
    "struct": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    "struct of list<uint8>": pa.struct([("path", pa.string()), ("bytes", pa.list_(pa.uint8()))]),
}


def column_of(arrow_type: pa.DataType, images: list[bytes | None]) -> pa.Array:
    """Return images as a column of a type."""
    if pa.types.is_struct(arrow_type):
        inside = column_of(arrow_type.field("bytes").type, images)
        paths = pa.array([f"{n}.jpg" for n in range(len(images))])
        return pa.StructArray.from_arrays(
            [{"bytes": inside, "path": paths}[f.name] for f in arrow_type], fields=list(arrow_type)
        )
    if pa.types.is_dictionary(arrow_type):
        return pa.array(images, pa.binary()).dictionary_encode()
    if pa.types.is_nested(arrow_type):
        signed = arrow_type.value_type == pa.int8()
        return pa.array(
            [b if b is None else np.frombuffer(b, np.int8 if signed else np.uint8).tolist() for b in images], arrow_type
        )
    return pa.array(images, arrow_type)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(COLUMN_TYPES)),
    st.lists(st.one_of(st.none(), st.sampled_from(IMAGES_OF_ONE_SIZE)), min_size=1, max_size=9),
    st.integers(1, 5),
)
def test_images_of_every_kind_of_column_are_read(kind: str, images: list[bytes | None], rows_in_group: int) -> None:
    out = io.BytesIO()
    # A digest beside the images is none of them.
    digests = pa.array([bytes(32)] * len(images), pa.binary(32))
    pq.write_table(
        pa.table({"digest": digests, "image": column_of(COLUMN_TYPES[kind], images)}), out, row_group_size=rows_in_group
    )
    uri = "s3://b/x.parquet"
    fetcher = MemoryFetcher({uri: out.getvalue()})
    footer = parquet_contents.read_footer.__wrapped__(fetcher, uri)
    column = parquet_columns.image_column(footer, fetcher, uri, None)
    assert parquet_columns.image_column(footer, fetcher, uri, "image") == column
    members = [Member(n, n, None, footer.etag_hash, column) for n in range(len(images))]
    got = {entry.row: entry for entry in fetch_inputs(row_group_reads(uri, members, fetcher, 1000), 2)}
    for number, image in enumerate(images):
        if image is not None:
            assert (got[number].data, got[number].error) == (image, None)
            continue
        error = got[number].error
        assert error is not None
        assert error.error_type == "NOT_FOUND"
        assert "its bytes are null" in error.message
        assert (f"there is only a path, '{number}.jpg'" in error.message) == kind.startswith("struct")
    small = {entry.row: entry for entry in fetch_inputs(row_group_reads(uri, members, fetcher, 99), 2)}
    assert {entry.error.error_type for n, entry in small.items() if images[n] is not None and entry.error} <= {
        "TOO_LARGE"
    }


def test_null_bytes_in_a_list_of_bytes_are_damage() -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array([[1, None], [2, 3]], pa.list_(pa.uint8()))}), out)
    fetcher = MemoryFetcher({"s3://b/x.parquet": out.getvalue()})
    members = [Member(n, n, None, None, "image.list.element") for n in range(2)]
    got = list(fetch_inputs(row_group_reads("s3://b/x.parquet", members, fetcher, 1000), 2))
    assert [entry.error and entry.error.error_type for entry in got] == ["CORRUPT", None]
    assert got[1].data == bytes([2, 3])


def test_images_without_bytes_are_announced_with_the_way_to_read_their_paths(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(parquet([jpeg(1), None, None]))
    with capture_logs() as logs:
        find(tmp_path / "x.parquet")
    (note,) = [entry["event"] for entry in logs]
    assert "x.parquet has 2 images of 3 without bytes, only with a path in image.path" in note
    assert "input.manifest" in note


@pytest.mark.parametrize(
    ("column", "fact"),
    [
        (pa.array([[jpeg(0), jpeg(1)], [jpeg(2)], None]), "the column pictures has lists of images, not one a row"),
        (
            pa.array([[{"bytes": jpeg(0), "path": "a"}, {"bytes": jpeg(1), "path": "b"}], [], [{"bytes": jpeg(2), "path": "c"}]]),
            "the column pictures has lists of images",
        ),
        (pa.array([base64.b64encode(jpeg(n)).decode() for n in range(3)]), "the column pictures holds images as base64 text"),
        (
            pa.array([f"data:image/jpeg;base64,{base64.b64encode(jpeg(n)).decode()}" for n in range(3)], pa.large_string()),
            "the column pictures holds images as base64 text",
        ),
    ],
    ids=["list<binary>", "list<struct>", "base64", "data URI"],
)  # fmt: skip
def test_images_in_another_shape_have_a_command_that_makes_columns_of_bytes(
    column: pa.Array, fact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"id": range(len(column)), "pictures": column}), tmp_path / "x.parquet")
    for options in ({}, {"image_column": "pictures"}):
        error = refused(tmp_path / "x.parquet", **options)
        assert fact in error.message
        assert "input.manifest" not in error.remedy
    command = error.remedy[error.remedy.index("python -c") :].partition(", then name")[0]
    python, option, code = shlex.split(command)
    assert (python, option) == ("python", "-c")
    exec(code, {})  # noqa: S102 - the command that the message shows
    rows = prepared(find(tmp_path / "x-images.parquet"), tmp_path)
    expected = [np.asarray(Image.open(io.BytesIO(jpeg(n)))).tobytes() for n in range(3)]
    assert [row["pixels"] for row in rows] == expected


def test_texts_and_numbers_are_no_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"caption": ["/a nice day", None], "n": [1, 2]}), tmp_path / "x.parquet")
    assert "If its column caption lists images" in refused(tmp_path / "x.parquet").remedy
    pq.write_table(pa.table({"n": [1, 2]}), tmp_path / "x.parquet")
    assert "write the encoded images into a column of binary" in refused(tmp_path / "x.parquet").remedy


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_ends_of_parquet_files_are_rows(draws: st.DataObject) -> None:
    sound_parquet = parquet([b"\xff\xd8" * 200, b"x", None], rows_in_group=2)
    damage = draws.draw(st.sampled_from(["cut", "end", "length", "head", "junk"]))
    data = {
        "cut": lambda: sound_parquet[: draws.draw(st.integers(0, len(sound_parquet) - 1))],
        "end": lambda: (
            sound_parquet[:-4]
            + draws.draw(st.binary(min_size=4, max_size=4).filter(lambda b: b not in (b"PAR1", b"PARE")))
        ),
        "length": lambda: (
            sound_parquet[:-8]
            + draws.draw(st.binary(min_size=4, max_size=4).filter(lambda b: b != sound_parquet[-8:-4]))
            + b"PAR1"
        ),
        "head": lambda: draws.draw(st.binary(min_size=4, max_size=4)) + sound_parquet[4:-4],
        "junk": lambda: sound_parquet + draws.draw(st.binary(min_size=1, max_size=99)),
    }[damage]()
    uri = "s3://b/x.parquet"
    try:
        parquet_contents.read_footer.__wrapped__(MemoryFetcher({uri: data}), uri)
    except RowError as exc:
        assert exc.error.stage == "list"
        assert exc.error.error_type in ("EMPTY_FILE", "UNKNOWN_FORMAT", "TRUNCATED", "CORRUPT")
        assert exc.fact and exc.remedy
    else:
        pytest.fail(f"{damage}: a file without its end is read")


def test_passthrough_columns_that_some_files_lack_are_null(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet([jpeg(1)]))
    pq.write_table(pa.table({"image": [jpeg(2)]}), tmp_path / "b.parquet")
    with capture_logs() as logs:
        inputs = find(tmp_path / "*.parquet", passthrough_columns=["number"])
    assert inputs.table["number"].to_pylist() == [0, None]
    assert "b.parquet has no column number" in logs[0]["event"]
    pq.write_table(pa.table({"image": [jpeg(2)], "number": ["one"]}), tmp_path / "b.parquet")
    error = refused(tmp_path / "*.parquet", passthrough_columns=["number"])
    assert (
        "b.parquet has passthrough columns of other types: number as string, files before it as int64" in error.message
    )


def test_manifests_of_earlier_versions_have_no_failures_of_files(mixed: Path) -> None:
    inputs = find(mixed / "b.tar")
    old = inputs.table.drop_columns(["_error"])
    assert [row["error_type"] for row in prepared(replace(inputs, table=old), mixed)] == [None, None]


def test_image_column_that_cannot_be_chosen_is_refused(tmp_path: Path) -> None:
    def write(table: pa.Table) -> Path:
        pq.write_table(table, tmp_path / "x.parquet")
        return tmp_path / "x.parquet"

    path = write(pa.table({"uri": ["s3://b/1.jpg"]}))
    error = refused(path)
    assert "x.parquet: the file has no column of encoded images; it has: uri (string)" in error.message
    assert "input.manifest" in error.remedy
    path = write(pa.table({"a": [b"1"], "b": [b"2"]}))
    assert "the file has several columns of bytes" in refused(path).message
    assert "input.image_column" in refused(path).remedy
    assert names(find(path, image_column="b"), tmp_path) == ["x.parquet#0"]
    assert "has no column of bytes 'c'; it has: a (binary), b (binary)" in refused(path, image_column="c").message


def test_archive_without_images_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(tar({"a.txt": b"1"}))
    assert "only 1 file ending with .txt" in refused(tmp_path / "x.tar").message


def test_manifest_may_name_members(mixed: Path) -> None:
    (mixed / "list.csv").write_text(
        "uri,label\nb.tar#a.PNG,one\na.jpg,two\nb.tar#none.jpg,three\nd#1.jpg,four\nf.parquet#1,five\ngone.tar#1.jpg,six\n,seven\n"
    )
    inputs = find_inputs(JobConfig(input={"manifest": str(mixed / "list.csv")}))
    assert inputs.passthrough == ("label",)
    assert inputs.table.column_names[0] == "uri"
    offsets = inputs.table["_offset"].to_pylist()
    assert offsets[0] > 0
    assert offsets[1:] == [None, -1, None, 1, -1, None]
    rows = prepared(inputs, mixed)
    error_types = [rows[n]["error_type"] for n in range(7)]
    assert error_types == [None, None, "NOT_FOUND", None, None, "NOT_FOUND", "INVALID_URI"]


def test_manifest_of_another_column_is_told_apart_from_a_file_of_images(mixed: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_inputs(JobConfig(input={"manifest": str(mixed / "f.parquet")}))
    assert "input.uris" in caught.value.remedy
    assert looks_like_manifest("f.parquet")
    assert not looks_like_manifest("train-*.parquet")
    assert looks_like_manifest("*.csv")


def prepared(inputs: Inputs, root: Path, shard_size: int = 3) -> list[dict[str, Any]]:
    """Return the rows of all shards, by way of the manifest's files."""
    store = Store(str(root / "out"), StorageConfig())
    rows = []
    for shard, table in cut_shards(inputs.table, shard_size):
        store.put(f"_manifest/shard-{shard:05d}.parquet", encode_shard(table))
        shard_inputs, locations = read_with_locations(store, shard)
        assert read_shard(store, shard).equals(shard_inputs)
        assert shard_inputs.column_names == ["uri", "shard", "row", *inputs.passthrough]
        done: list[dict[str, Any]] = []
        for block in Preparation(StorageConfig(), PreprocessConfig(), None).rows(
            shard, shard_inputs["uri"].to_pylist(), locations
        ):
            done += block.to_pylist()
        rows += sorted(done, key=lambda row: int(row["row"]))
    return rows


def test_members_have_the_pixels_of_the_images_that_they_are(mixed: Path) -> None:
    rows = prepared(find(mixed, image_column="image"), mixed)
    seeds = [0, 1, 2, 3, 4, 6, 7, 5]
    assert [row["uri"].rpartition("/")[2] for row in rows][1] == "b.tar#z.jpg"
    for row, seed in zip(rows, seeds, strict=True):
        assert row["pixels"] == np.asarray(Image.open(io.BytesIO(jpeg(seed)))).tobytes()
        assert row["bytes"] == len(jpeg(seed))
        assert row["fetch_s"] > 0


@given(st.lists(st.lists(st.booleans(), max_size=8), max_size=6), st.integers(1, 9))
def test_mixture_of_files_is_planned_once_and_in_order(files: list[list[bool]], shard_size: int) -> None:
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
        inputs = find(root)
        assert names(inputs, root) == sorted(expected, key=lambda name: name.partition("#")[0])
        shards = [table for _, table in cut_shards(inputs.table, shard_size)]
        assert [uri for table in shards for uri in table["uri"].to_pylist()] == inputs.table["uri"].to_pylist()
