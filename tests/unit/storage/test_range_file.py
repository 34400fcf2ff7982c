"""Objects as seekable files: the bytes of any reads, and the requests that they cost."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_inference.config import StorageConfig
from batch_inference.inputs.parquet import ColumnChunkFile
from batch_inference.output.data_files import _CommittedFile
from batch_inference.output.records import DataFile
from batch_inference.storage.range_file import RangeFile, SeekableFile
from batch_inference.storage.read_ahead import Answer
from batch_inference.storage.store import Store
from tests.support.containers import MemoryFetcher

URI = "s3://b/x"
DATA = bytes(range(256)) * 1200
READS = st.lists(
    st.tuples(st.integers(0, len(DATA) + 10), st.one_of(st.integers(0, 9000), st.sampled_from([-1, 300_000]))),
    max_size=8,
)


def check_reads(file: SeekableFile, reads: list[tuple[int, int]]) -> None:
    expected = io.BytesIO(DATA)
    for position, size in reads:
        assert file.seek(position) == expected.seek(position)
        assert file.read(size) == expected.read(size)
        assert file.tell() == expected.tell()


@given(READS, st.sampled_from([0, 1000, 1 << 20]))
def test_object_is_read_as_a_file(reads: list[tuple[int, int]], tail: int) -> None:
    file = RangeFile(MemoryFetcher({URI: DATA}), URI, tail=tail)
    file.read(1)  # the size is known after a read
    check_reads(file, reads)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder: Path = tmp_path_factory.mktemp("output")
    (folder / "x").write_bytes(DATA)
    return Store(str(folder), StorageConfig())


@given(reads=READS)
def test_committed_file_is_read_as_a_file(reads: list[tuple[int, int]], store: Store) -> None:
    check_reads(_CommittedFile(store, DataFile("x", 1, len(DATA), "")), reads)


@given(st.lists(st.integers(0, 400_000), max_size=8), st.integers(5000, 100_000))
def test_column_chunk_is_read_from_its_start_to_its_end(sizes: list[int], piece: int) -> None:
    answers = [Answer(DATA[start : start + piece], None, 0.0) for start in range(0, len(DATA), piece)]
    file = ColumnChunkFile(iter(answers).__next__, (0, len(DATA)))
    expected = io.BytesIO(DATA)
    for size in sizes:
        assert file.read(size) == expected.read(size)


def test_adjacent_reads_cost_few_requests_and_distant_ones_little_data() -> None:
    fetcher = MemoryFetcher({URI: bytes(40_000_000)})
    file = RangeFile(fetcher, URI)
    for _ in range(10_000):
        file.read(1000)
    assert len(fetcher.ranges) < 15
    fetcher.ranges.clear()
    for position in range(0, 40_000_000, 4_000_000):
        file.seek(position)
        file.read(512)
    assert [end - start for start, end in fetcher.ranges] == [4096] * 10


def test_large_read_of_a_damaged_header_is_refused() -> None:
    file = RangeFile(MemoryFetcher({URI: DATA}), URI, max_read=1000)
    assert file.read(1000) == DATA[:1000]
    with pytest.raises(ValueError, match="a header asks for 1,001 bytes"):
        file.read(1001)
