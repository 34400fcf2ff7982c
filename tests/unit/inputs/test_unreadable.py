from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_inference.config import JobConfig
from batch_inference.errors import UserError
from batch_inference.inputs.find import find_inputs, refuse_stream
from batch_inference.inputs.member_uris import COMPRESSED
from batch_inference.inputs.unreadable import find_unreadable, unreadable_reason
from batch_inference.storage.uris import canonical_uri

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
def test_readable_uri_is_not_reported(uri: str) -> None:
    assert find_unreadable(pa.array([uri])) == ()


@pytest.mark.parametrize("uri", BAD)
def test_line_that_cannot_be_read_is_named_with_what_to_write(uri: str) -> None:
    (group,) = find_unreadable(pa.array([uri, *GOOD]))
    why, remedy = BAD[uri]
    assert (group.count, group.examples) == (1, (uri,))
    assert why in group.reason
    assert remedy in group.remedy
    assert str(group).startswith("1 input can't be read: ")


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
def test_quick_check_of_all_lines_agrees_with_the_check_of_each(uris: list[str], pieces: int) -> None:
    # Spelled as the lines of a manifest are after it is read.
    spelled = []
    for uri in uris:
        try:
            spelled.append(canonical_uri(uri) if "://" in uri else uri)
        except UserError:
            spelled.append(uri)
    column = pa.chunked_array([spelled[piece::pieces] for piece in range(pieces)], pa.string())
    groups = find_unreadable(column)
    assert sum(group.count for group in groups) == sum(unreadable_reason(uri) is not None for uri in spelled)
    assert all(group.remedy and group.examples for group in groups)


def test_reasons_stay_few_for_many_lines() -> None:
    groups = find_unreadable(pa.array([f"x{n}://b/a.jpg" for n in range(1000)]))
    assert len(groups) <= 21
    assert sum(group.count for group in groups) == 1000


def config(**options: object) -> JobConfig:
    return JobConfig.model_validate({"input": options})


def test_manifest_without_a_readable_line_is_refused(tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("".join(f"https://example.org/{n}.jpg\n" for n in range(300)))
    with pytest.raises(
        UserError, match=r"none of the 300 inputs can be read: https:// is not read \(https://"
    ) as caught:
        find_inputs(config(manifest=str(tmp_path / "urls.txt")))
    assert "Download the images first" in caught.value.remedy


def test_manifest_with_a_readable_line_is_not_refused(tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text("".join(f"https://example.org/{n}.jpg\n" for n in range(299)) + "a.jpg\n")
    inputs = find_inputs(config(manifest=str(tmp_path / "urls.txt")))
    assert inputs.table.num_rows == 300
    assert [group.count for group in inputs.unreadable] == [299]


@pytest.mark.parametrize("name", ["photos.zip", "photos.ZIP", "a.7z", "a.rar", "a.gz"])
def test_archive_is_refused_at_once(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match="is not supported") as caught:
        find_inputs(config(uris=[str(tmp_path / name)]))
    assert caught.value.remedy.startswith("Unpack: ")
    with pytest.raises(UserError, match="is not supported"):
        find_inputs(config(uris=[f"s3://bucket/{name}"]))


def test_folder_that_is_named_like_an_archive_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.zip").mkdir()
    (tmp_path / "x.zip/a.jpg").write_bytes(b"")
    assert find_inputs(config(uris=[str(tmp_path / "x.zip")])).table.num_rows == 1


def test_folder_of_archives_alone_says_what_to_do_with_them(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"no images in .*a\.zip") as caught:
        find_inputs(config(uris=[str(tmp_path)]))
    assert "Unpack: unzip" in caught.value.remedy


@pytest.mark.parametrize("given", ["-", "/dev/stdin", "/dev/null", "file:///dev/null"])
def test_standard_input_is_refused_with_the_commands_that_work(given: str) -> None:
    if given == "/dev/stdin" and Path(given).is_file():
        pytest.skip("standard input is a file here")
    for options in ({"uris": [given]}, {"manifest": given}):
        with pytest.raises(UserError, match="is a pipe") as caught:
            find_inputs(config(**options))
        assert "> list.txt; batch-inference run --manifest list.txt" in caught.value.remedy
    refuse_stream("photos/")


def test_empty_manifest_says_how_a_script_skips_it(tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("")
    with pytest.raises(UserError, match="has no lines") as caught:
        find_inputs(config(manifest=str(tmp_path / "new.txt")))
    assert f"[ -s {tmp_path}/new.txt ] && batch-inference run --manifest {tmp_path}/new.txt" in caught.value.remedy
