from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_inference.config import InputConfig, StorageConfig
from batch_inference.errors import RowFailure
from batch_inference.inputs import parquet as inputs_parquet
from batch_inference.inputs import tar as inputs_tar
from batch_inference.inputs.coalesce import plan_reads
from batch_inference.inputs.member_locations import locate_members
from batch_inference.inputs.member_uris import split_member
from batch_inference.inputs.reads import FetchedInput, fetch_inputs
from tests.support.containers import MemoryFetcher, parquet, tar

TAR, PARQUET = "s3://b/a.tar", "s3://b/a.parquet"


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryFetcher:
    """The store that planning and tasks read from."""
    fetcher = MemoryFetcher({})
    monkeypatch.setattr("batch_inference.inputs.member_locations.Fetcher", lambda storage: fetcher)
    return fetcher


def read(uris: list[str], fetcher: MemoryFetcher, max_bytes: int = 1 << 30, **options: Any) -> dict[int, FetchedInput]:
    """Plan inputs and read them; check that every row comes once."""
    locations, _ = locate_members(
        pa.chunked_array([pa.array(uris, pa.string())]), InputConfig(**options), StorageConfig()
    )
    fetcher.ranges.clear()
    fetched = list(fetch_inputs(plan_reads(uris, locations, fetcher, max_bytes), 4))
    assert sorted(entry.row for entry in fetched) == list(range(len(uris)))
    assert all(entry.data == b"" for entry in fetched if entry.error)
    return {entry.row: entry for entry in fetched}


def error_types(fetched: dict[int, FetchedInput]) -> list[str | None]:
    return [fetched[row].error and fetched[row].error.error_type for row in range(len(fetched))]  # type: ignore[union-attr,misc]


@given(st.data())
def test_members_in_any_order_have_the_bytes_of_their_file(data: st.DataObject) -> None:
    fetcher = MemoryFetcher({})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batch_inference.inputs.member_locations.Fetcher", lambda storage: fetcher)
        range_bytes = data.draw(st.sampled_from([100, 5000, 1 << 23]))
        for module in (inputs_tar, inputs_parquet):
            patch.setattr(module, "RANGE_BYTES", range_bytes)
        patch.setattr(inputs_tar, "_GAP_BYTES", data.draw(st.sampled_from([0, 1500, 1 << 17])))
        content: dict[str, bytes | None] = {}
        for number in range(data.draw(st.integers(1, 3))):
            images = data.draw(st.lists(st.binary(max_size=900), min_size=1, max_size=25))
            if data.draw(st.booleans()):
                uri = f"s3://b/{number}.tar"
                fetcher.objects[uri] = tar({f"{n}.jpg": b for n, b in enumerate(images)})
                content |= {f"{uri}#{n}.jpg": b for n, b in enumerate(images)}
            else:
                uri = f"s3://b/{number}.parquet"
                fetcher.objects[uri] = parquet(
                    images,  # type: ignore[arg-type]
                    data.draw(st.integers(1, 30)),
                    data.draw(st.booleans()),
                    compression=data.draw(st.sampled_from(["none", "snappy", "zstd"])),
                    use_dictionary=data.draw(st.booleans()),
                    data_page_size=data.draw(st.sampled_from([100, 1 << 20])),
                )
                content |= {f"{uri}#{n}": b for n, b in enumerate(images)}
        uris = data.draw(st.lists(st.sampled_from(sorted(content)), max_size=60))
        fetched = read(uris, fetcher)
    assert [fetched[row].data for row in range(len(uris))] == [content[uri] for uri in uris]
    assert error_types(fetched) == [None] * len(uris)


def test_adjacent_members_are_read_together(store: MemoryFetcher) -> None:
    store.objects[TAR] = tar({f"{n}.{end}": bytes(100_000) for n in range(200) for end in ("jpg", "txt")})
    assert error_types(read([f"{TAR}#{n}.jpg" for n in range(200)], store)) == [None] * 200
    assert len(store.ranges) == 5  # 40 MB in pieces of 8 MiB
    sizes = [end - start for start, end in store.ranges]
    assert sum(sizes) < len(store.objects[TAR])
    assert max(sizes) <= 8 * 1024 * 1024


def test_members_far_apart_are_read_without_what_is_between(store: MemoryFetcher) -> None:
    store.objects[TAR] = tar({f"{n}.jpg": bytes(100_000) for n in range(100)})
    read([f"{TAR}#{n}.jpg" for n in (3, 50, 51, 97)], store)
    # A member fills 196 blocks and has one before it.
    assert sorted(end - start for start, end in store.ranges) == [100_000, 100_000, 197 * 512 + 100_000]


def test_parquet_reads_cover_only_images_of_wanted_row_groups(
    store: MemoryFetcher,
) -> None:
    images = [bytes([n]) * 50_000 for n in range(100)]
    table = pa.table({"image": pa.array(images, pa.binary()), "text": ["x" * 100_000 + str(n) for n in range(100)]})
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=10, compression="none", use_dictionary=False)
    store.objects[PARQUET] = out.getvalue()
    fetched = read([f"{PARQUET}#{n}" for n in range(25, 55)], store)
    assert [fetched[row].data for row in range(30)] == images[25:55]
    read_bytes = sum(end - start for start, end in store.ranges)
    assert 4 * 500_000 < read_bytes < 4.2 * 500_000  # row groups 2 to 5
    assert len(store.ranges) == 5  # and the footer


def test_large_row_group_is_read_in_pieces_and_no_further_than_needed(
    store: MemoryFetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs_parquet, "RANGE_BYTES", 100_000)
    images = [bytes([n]) * 50_000 for n in range(200)]
    store.objects[PARQUET] = parquet(
        images,  # type: ignore[arg-type]
        200,
        compression="none",
        use_dictionary=False,
        write_batch_size=8,
        data_page_size=100_000,
    )
    fetched = read([f"{PARQUET}#{n}" for n in range(20, 30)], store)
    assert [fetched[row].data for row in range(10)] == images[20:30]
    # 1.5 MB to the last row, the rest of its batch, a page, and what was asked for ahead; of 10 MB.
    assert sum(end - start for start, end in store.ranges) < 4_500_000


def test_column_of_images_is_found_or_named(store: MemoryFetcher) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"a": pa.array([b"1"]), "b": pa.array([b"2"])}), out)
    store.objects[PARQUET] = out.getvalue()
    assert read([f"{PARQUET}#0"], store, image_column="b")[0].data == b"2"


def test_failure_belongs_to_its_member(store: MemoryFetcher) -> None:
    store.objects[TAR] = tar({"a.jpg": b"1", "empty.jpg": b"", "large.jpg": bytes(5000), "z.jpg": b"2"})
    store.objects[PARQUET] = parquet([b"1", None, bytes(5000)])
    uris = [f"{TAR}#{n}" for n in ("a.jpg", "none.jpg", "empty.jpg", "large.jpg", "z.jpg", "")]
    uris += [f"{PARQUET}#{n}" for n in ("0", "1", "2", "3", "-1", "x", "0.0", "٣")]
    uris += ["s3://b/gone.tar#a.jpg", "s3://b/gone.parquet#0"]
    fetched = read(uris, store, max_bytes=4999)
    missing, large = "NOT_FOUND", "TOO_LARGE"
    assert error_types(fetched) == [
        *(None, missing, None, large, None, missing),
        *(None, missing, large, missing, missing, missing, missing, missing),
        *(missing, missing),
    ]  # fmt: skip
    assert {entry.error.stage for entry in fetched.values() if entry.error} == {"fetch"}
    assert fetched[1].error == RowFailure("fetch", "NOT_FOUND", f"there is no such member in {TAR}")
    assert fetched[7].error is not None
    assert "null" in fetched[7].error.message


def test_members_behind_the_cut_of_a_tar_are_truncated(store: MemoryFetcher) -> None:
    archive = tar({f"{n}.jpg": bytes(1000) for n in range(4)})
    uris = [f"{TAR}#{n}.jpg" for n in range(4)]
    # Cut when it is planned: the last member that is listed is not complete, and the others are missing.
    store.objects[TAR] = archive[: 2 * 1536 + 512 + 300]
    fetched = read(uris, store)
    assert error_types(fetched) == [None, None, "TRUNCATED", "NOT_FOUND"]
    assert fetched[2].error is not None
    assert "300 of the member's 1,000 bytes" in fetched[2].error.message
    store.objects[TAR] = archive[: 2 * 1536 + 512]
    assert error_types(read(uris, store)) == [None, None, "TRUNCATED", "NOT_FOUND"]
    assert error_types(read(uris[2:3], store)) == ["TRUNCATED"]


def test_members_behind_the_cut_of_a_tar_that_was_whole_when_it_was_planned_are_truncated(store: MemoryFetcher) -> None:
    """They are read together: one is cut by its last byte, and of the next not even the header is there."""
    uris = [f"{TAR}#{n}.jpg" for n in range(4)]
    archive = store.objects[TAR] = tar({f"{n}.jpg": bytes([n + 1]) * 1000 for n in range(4)})
    locations, _ = locate_members(pa.chunked_array([uris]), InputConfig(), StorageConfig())
    for end, whole, available in (
        (2 * 1536 - 24, 2, [0, 0]),
        (2 * 1536 - 25, 1, [999, 0, 0]),
        (2 * 512 + 1024, 1, [0, 0, 0]),
    ):
        store.objects[TAR] = archive[:end]
        fetched = list(fetch_inputs(plan_reads(uris, locations, store, 1 << 30), 4))
        assert [one.data for one in fetched] == [bytes([n + 1]) * 1000 for n in range(whole)] + [b""] * (4 - whole)
        assert [one.error and one.error.error_type for one in fetched] == [None] * whole + ["TRUNCATED"] * (4 - whole)
        messages = [one.error.message for one in fetched if one.error]
        assert messages == [f"{TAR} ends after {there} of the member's 1,000 bytes" for there in available]


@pytest.mark.parametrize("uri", [TAR, PARQUET])
def test_file_that_was_replaced_after_planning_gives_no_wrong_images(uri: str, store: MemoryFetcher) -> None:
    store.objects[TAR] = tar({"0": b"old"})
    store.objects[PARQUET] = parquet([b"old"])
    locations, _ = locate_members(pa.chunked_array([[f"{uri}#0"]]), InputConfig(), StorageConfig())
    store.objects[TAR] = tar({"0": b"new"})
    store.objects[PARQUET] = parquet([b"new"])
    store.etag = "2"
    (entry,) = fetch_inputs(plan_reads([f"{uri}#0"], locations, store, 1000), 4)
    assert entry.error is not None
    assert (entry.error.error_type, entry.error.retryable) == ("CHANGED", False)


def test_damaged_row_group_costs_its_rows_and_no_others(store: MemoryFetcher) -> None:
    images = [bytes([n]) * 5000 for n in range(30)]
    data = bytearray(parquet(images, 10, compression="snappy", use_dictionary=False))  # type: ignore[arg-type]
    store.objects[PARQUET] = bytes(data)
    uris = [f"{PARQUET}#{n}" for n in range(30)]
    meta = pq.read_metadata(io.BytesIO(data)).row_group(1)
    (chunk,) = (meta.column(n) for n in range(meta.num_columns) if meta.column(n).path_in_schema == "image.bytes")
    data[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = (
        b"\xff" * chunk.total_compressed_size
    )
    store.objects[PARQUET] = bytes(data)
    fetched = read(uris, store)
    assert error_types(fetched) == [None] * 10 + ["CORRUPT"] * 10 + [None] * 10
    assert [fetched[n].data for n in (*range(10), *range(20, 30))] == images[:10] + images[20:]


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://b/a.tar#x.jpg", ("s3://b/a.tar", "x.jpg")),
        ("s3://b/a.TAR#x#y.tar#z.jpg", ("s3://b/a.TAR", "x#y.tar#z.jpg")),
        ("file:///d/a.parquet#12", ("file:///d/a.parquet", "12")),
        ("s3://b/a#1.jpg", None),
        ("s3://b/tar#1.jpg", None),
        ("s3://b/a.tar.gz#1.jpg", None),
        ("s3://b/a.tar/x#1.jpg", None),
        ("s3://b/a.tar", None),
    ],
)
def test_member_sign_counts_only_after_tar_and_parquet(uri: str, parts: tuple[str, str] | None) -> None:
    assert split_member(uri) == parts
