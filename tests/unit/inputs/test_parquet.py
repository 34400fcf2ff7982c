"""Row groups of Parquet files that are cut, replaced or damaged after they were planned."""

from __future__ import annotations

import io
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_inference.config import InputConfig, StorageConfig
from batch_inference.errors import RowError, UserError
from batch_inference.inputs.coalesce import plan_reads
from batch_inference.inputs.manifest_formats import parse_manifest
from batch_inference.inputs.member_locations import locate_members
from batch_inference.inputs.parquet_contents import read_footer
from batch_inference.inputs.reads import FetchedInput, fetch_inputs
from batch_inference.storage.etags import hash_etag
from tests.support.containers import MemoryFetcher, parquet

URI = "s3://b/a.parquet"
IMAGES: list[bytes | None] = [bytes([number]) * 500 for number in range(12)]
DATA = parquet(IMAGES, 4, compression="none", use_dictionary=False)


def chunk_of(group: int) -> tuple[int, int]:
    """Return the first byte of a row group's images, and the one behind its last."""
    row_group = pq.read_metadata(io.BytesIO(DATA)).row_group(group)
    (chunk,) = (
        row_group.column(index)
        for index in range(row_group.num_columns)
        if row_group.column(index).path_in_schema == "image.bytes"
    )
    return chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size


def read_after(change: Callable[[MemoryFetcher], None], monkeypatch: pytest.MonkeyPatch) -> list[FetchedInput]:
    """Read all images of a file that changes once the footer has been read, and the requests are not yet sent."""
    fetcher = MemoryFetcher({URI: DATA})
    monkeypatch.setattr("batch_inference.inputs.member_locations.Fetcher", lambda storage: fetcher)
    uris = [f"{URI}#{number}" for number in range(len(IMAGES))]
    locations, _ = locate_members(pa.chunked_array([uris]), InputConfig(), StorageConfig())
    reads = list(plan_reads(uris, locations, fetcher, 1 << 30))
    assert len(reads) == 3
    change(fetcher)
    found = sorted(fetch_inputs(iter(reads), 1))
    assert [one.row for one in found] == list(range(len(IMAGES)))
    assert [one.data for one in found if not one.error] == [IMAGES[one.row] for one in found if not one.error]
    return found


def error_types(found: list[FetchedInput]) -> list[str | None]:
    return [one.error.error_type if one.error else None for one in found]


@pytest.mark.parametrize("missing", [1, 1000])
def test_file_that_ends_within_a_row_group_is_truncated_from_there(
    missing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(fetcher: MemoryFetcher) -> None:
        fetcher.objects[URI] = DATA[: chunk_of(1)[1] - missing]

    found = read_after(cut, monkeypatch)
    assert error_types(found) == [None] * 4 + ["TRUNCATED"] * 8
    messages = [one.error.message for one in found if one.error]
    assert messages == [f"{URI} ends within row group 1"] * 4 + [f"{URI} ends within row group 2"] * 4
    assert not any(one.error.retryable for one in found if one.error)


def test_file_that_ends_behind_its_last_row_group_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(fetcher: MemoryFetcher) -> None:
        fetcher.objects[URI] = DATA[: chunk_of(2)[1]]

    assert error_types(read_after(cut, monkeypatch)) == [None] * 12


def test_file_replaced_after_its_footer_was_read_gives_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes at the same place would be those of other images."""

    def replace(fetcher: MemoryFetcher) -> None:
        fetcher.objects[URI] = parquet(IMAGES[::-1], 4, compression="none", use_dictionary=False)
        fetcher.etag = "2"

    found = read_after(replace, monkeypatch)
    assert error_types(found) == ["CHANGED"] * 12
    assert {one.error.message for one in found if one.error} == {f"{URI} was replaced after the job was planned"}


@pytest.mark.parametrize("damaged", [[0], [1], [2], [0, 1, 2], []])
def test_row_group_with_other_columns_than_the_schema_is_refused(damaged: list[int]) -> None:
    """One is enough: its images would be those of another column."""
    footer = DATA.rindex(b"number", 0, DATA.rindex(b"number", 0, DATA.rindex(b"number")))
    head, *paths = DATA[footer:].split(b"number")
    assert len(paths) == 3  # one for each row group
    names = [b"rebmun" if group in damaged else b"number" for group in range(3)]
    data = DATA[:footer] + head + b"".join(name + rest for name, rest in zip(names, paths, strict=True))
    assert len(data) == len(DATA)
    fetcher, etag_hash = MemoryFetcher({URI: data}), hash_etag("1")
    if not damaged:
        assert read_footer(fetcher, URI, etag_hash).row_count == len(IMAGES)
        return
    with pytest.raises(RowError, match="its row groups have other columns than its schema") as caught:
        read_footer(fetcher, URI, etag_hash)
    assert (caught.value.error.stage, caught.value.error.error_type) == ("list", "CORRUPT")


@pytest.mark.parametrize("column", ["uri", "label"])
def test_manifest_with_texts_that_are_not_utf8_is_refused(column: str) -> None:
    """Arrow reads them without a word; what reads them later would fail."""
    text = b"a\xff.jpg"
    offsets = pa.array([0, len(text)], pa.int32()).buffers()[1]
    wrong = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(text)])
    out = io.BytesIO()
    pq.write_table(pa.table({"uri": ["a.jpg"], "label": ["x"]} | {column: wrong}), out)
    with pytest.raises(UserError, match=r"not a readable parquet manifest: .*Invalid UTF8") as caught:
        parse_manifest("file:///a.parquet", out.getvalue(), "uri")
    assert caught.value.remedy
