from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_inference.config import JobConfig
from batch_inference.containers import COMPRESSED
from batch_inference.errors import UserError
from batch_inference.manifest import find_inputs, refuse_stream
from batch_inference.storage import canonical_uri
from batch_inference.unreadable import reason, unreadable

GOOD = [
    "s3://b/a.jpg",
    "gs://b/a=1/b.jpg",
    "az://c/x?y&z.jpg",
    "file:///p/a b.jpg",
    "s3://b/a.tar#m.jpg",
    "file:///p/ü\n.png",
]
BAD = {
    "https://example.org/a.jpg?n=1": ("https:// is not read", "Download the images first"),
    "HTTP://example.org/a.jpg": ("http:// is not read", "Download the images first"),
    "https://b.s3.eu-west-1.amazonaws.com/k/a.jpg": ("https:// is not read", "Write s3://b/k/a.jpg"),
    "https://s3.amazonaws.com/b/k/a.jpg?versionId=1": ("https:// is not read", "Write s3://b/k/a.jpg"),
    "https://storage.googleapis.com/b/k/a.jpg": ("https:// is not read", "Write gs://b/k/a.jpg"),
    "https://acc.blob.core.windows.net/c/k/a.jpg": (
        "https:// is not read",
        "Write az://c/k/a.jpg and set AZURE_STORAGE_ACCOUNT_NAME=acc",
    ),
    "ftp://h/a.jpg": ("ftp:// is not read", "Download"),
    "hdfs://n:8020/a.jpg": ("hdfs:// is not read", "hdfs dfs -get"),
    "foo://h/a.jpg": ("the scheme foo://", "s3://"),
    "": ("no URI", "leave the line out"),
    "   ": ("no URI", "leave the line out"),
    "s3:///a.jpg": ("names no bucket", "s3://BUCKET/PATH"),
    "s3://": ("names no bucket", "s3://BUCKET/PATH"),
    "s3://bucket": ("a bucket and no object", "KEY"),
    "gs://bucket/": ("a bucket and no object", "KEY"),
    "s3://b/photos.ZIP": (".zip is not supported", "Unpack: unzip 'photos.ZIP' -d 'photos'"),
    "file:///p/photos.7z": (".7z is not supported", "Unpack: 7z x"),
    "s3://key:secret@b/a.jpg": ("credentials before its bucket", "environment"),
    "s3://b/a.jpg?X-Amz-Signature=0": ("a signature behind its name", "Name the object alone"),
}


@pytest.mark.parametrize("uri", GOOD)
def test_nothing_is_said_of_what_can_be_read(uri: str) -> None:
    assert unreadable(pa.array([uri])) == ()


@pytest.mark.parametrize("uri", BAD)
def test_a_line_that_cannot_be_read_is_named_with_what_to_write(uri: str) -> None:
    (found,) = unreadable(pa.array([uri, *GOOD]))
    why, remedy = BAD[uri]
    assert (found.count, found.first) == (1, (uri,))
    assert why in found.reason
    assert remedy in found.remedy
    assert str(found).startswith("1 input can't be read: ")


lines = st.one_of(
    st.sampled_from([*GOOD, *BAD]),
    st.text(max_size=12),
    st.builds(
        "{}{}{}".format,
        st.sampled_from(["s3://", "gs://b/", "az://c/d", "file:///", "http://", "x://", "s3://b/", "/"]),
        st.text(max_size=8),
        st.sampled_from(["", ".jpg", "?sig=1", *COMPRESSED]),
    ),
)


@given(st.lists(lines, max_size=20), st.integers(1, 3))
def test_the_quick_look_at_all_lines_finds_what_a_look_at_each_finds(uris: list[str], pieces: int) -> None:
    # Such as a manifest has them once its lines have their canonical spelling.
    spelt = []
    for uri in uris:
        try:
            spelt.append(canonical_uri(uri) if "://" in uri else uri)
        except UserError:
            spelt.append(uri)
    column = pa.chunked_array([spelt[piece::pieces] for piece in range(pieces)], pa.string())
    found = unreadable(column)
    assert sum(kind.count for kind in found) == sum(reason(uri) is not None for uri in spelt)
    assert all(kind.remedy and kind.first for kind in found)


def test_reasons_are_few_however_many_lines_there_are() -> None:
    found = unreadable(pa.array([f"x{n}://b/a.jpg" for n in range(1000)]))
    assert len(found) <= 21
    assert sum(kind.count for kind in found) == 1000


def config(**section: object) -> JobConfig:
    return JobConfig.model_validate({"input": section})


def test_a_manifest_of_which_nothing_can_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("".join(f"https://example.org/{n}.jpg\n" for n in range(300)))
    with pytest.raises(
        UserError, match=r"none of the 300 inputs can be read: https:// is not read \(https://"
    ) as caught:
        find_inputs(config(manifest=str(tmp_path / "urls.txt")))
    assert "Download the images first" in caught.value.remedy


def test_a_manifest_with_a_line_that_can_be_read_is_not(tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("".join(f"https://example.org/{n}.jpg\n" for n in range(299)) + "a.jpg\n")
    found = find_inputs(config(manifest=str(tmp_path / "urls.txt")))
    assert found.table.num_rows == 300
    assert [kind.count for kind in found.unreadable] == [299]


@pytest.mark.parametrize("name", ["photos.zip", "photos.ZIP", "a.7z", "a.rar", "a.gz"])
def test_an_archive_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match="is not supported") as caught:
        find_inputs(config(uris=[str(tmp_path / name)]))
    assert caught.value.remedy.startswith("Unpack: ")
    with pytest.raises(UserError, match="is not supported"):
        find_inputs(config(uris=[f"s3://bucket/{name}"]))


def test_a_folder_that_is_named_like_an_archive_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.zip").mkdir()
    (tmp_path / "x.zip/a.jpg").write_bytes(b"")
    assert find_inputs(config(uris=[str(tmp_path / "x.zip")])).table.num_rows == 1


def test_a_folder_of_archives_alone_says_what_to_do_with_them(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"no images in .*a\.zip") as caught:
        find_inputs(config(uris=[str(tmp_path)]))
    assert "Unpack: unzip" in caught.value.remedy


@pytest.mark.parametrize("given", ["-", "/dev/stdin", "/dev/null", "file:///dev/null"])
def test_standard_input_is_refused_with_the_commands_that_work(given: str) -> None:
    if given == "/dev/stdin" and Path(given).is_file():
        pytest.skip("standard input is a file here")
    for section in ({"uris": [given]}, {"manifest": given}):
        with pytest.raises(UserError, match="is a pipe") as caught:
            find_inputs(config(**section))
        assert "> list.txt; batch-inference run --manifest list.txt" in caught.value.remedy
    refuse_stream("photos/")


def test_an_empty_manifest_says_how_a_script_skips_it(tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("")
    with pytest.raises(UserError, match="has no lines") as caught:
        find_inputs(config(manifest=str(tmp_path / "new.txt")))
    assert f"[ -s {tmp_path}/new.txt ] && batch-inference run --manifest {tmp_path}/new.txt" in caught.value.remedy
