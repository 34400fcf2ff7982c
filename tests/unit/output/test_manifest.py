"""Shards of the manifest: names, cuts, and the columns of locations."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_inference.output import manifest
from batch_inference.output.manifest import parse_shard_name, shard_name, shard_path


@pytest.mark.parametrize(
    ("path", "shard", "generation"),
    [
        ("_commits/shard-00042.json", 42, 0),
        ("_commits/shard-00042-g1.json", 42, 1),
        ("errors/shard-123456-g12-4f2a91c0.parquet", 123456, 12),
        ("shard-00000-g3", 0, 3),
        ("errors/notes.txt", -1, 0),
        ("errors/myshard-00001.parquet", -1, 0),
        ("errors/shard-00001x.parquet", -1, 0),
        ("", -1, 0),
    ],
)
def test_name_of_a_file_says_its_shard_and_its_generation(path: str, shard: int, generation: int) -> None:
    assert parse_shard_name(path) == (shard, generation)


def test_names_of_shards_are_read_as_they_are_written() -> None:
    assert [shard_name(0), shard_name(7, 2), shard_name(1_234_567, 10)] == [
        "shard-00000",
        "shard-00007-g2",
        "shard-1234567-g10",
    ]
    assert shard_path(3) == "_manifest/shard-00003.parquet"
    assert parse_shard_name(shard_name(7, 2)) == (7, 2)


def test_shards_are_cut_at_their_size_and_the_last_is_shorter() -> None:
    table = pa.table({"uri": [f"s3://b/{i}.jpg" for i in range(5)], "id": [9, 8, 7, 6, 5]})
    shards = dict(manifest.cut_shards(table, 2))
    assert [shards[number].to_pydict() for number in (0, 1, 2)] == [
        {"uri": ["s3://b/0.jpg", "s3://b/1.jpg"], "shard": [0, 0], "row": [0, 1], "id": [9, 8]},
        {"uri": ["s3://b/2.jpg", "s3://b/3.jpg"], "shard": [1, 1], "row": [0, 1], "id": [7, 6]},
        {"uri": ["s3://b/4.jpg"], "shard": [2], "row": [0], "id": [5]},
    ]
    assert [field.type for field in shards[0].schema][:3] == [pa.string(), pa.int32(), pa.int32()]
    assert list(dict(manifest.cut_shards(table.slice(0, 4), 2))) == [0, 1]


def test_hashes_of_etags_get_no_dictionary() -> None:
    table = pa.table({"uri": ["a"], "_version": pa.array([5], pa.int32())})
    columns = pq.ParquetFile(pa.BufferReader(manifest.encode_shard(table))).metadata.row_group(0)
    assert [columns.column(index).has_dictionary_page for index in (0, 1)] == [True, False]
    assert {columns.column(index).compression for index in (0, 1)} == {"ZSTD"}


def test_locations_are_split_from_inputs() -> None:
    table = pa.table({"uri": ["a"], "_offset": [1], "id": [2], "_size": [3]})
    inputs, locations = manifest.split_locations(table)
    assert inputs.to_pydict() == {"uri": ["a"], "id": [2]}
    assert locations is not None and locations.to_pydict() == {"_offset": [1], "_size": [3]}
    assert manifest.split_locations(inputs) == (inputs, None)


def test_etags_of_members_stay_and_those_of_objects_are_dropped() -> None:
    versions = pa.array([5, 6], pa.int32())
    objects = pa.table({"uri": ["a", "b"], "_version": versions, "id": [1, 2]})
    assert manifest.without_etags(objects).to_pydict() == {"uri": ["a", "b"], "_version": [None, None], "id": [1, 2]}
    both = objects.append_column("_offset", pa.array([None, 512], pa.int64()))
    assert manifest.without_etags(both)["_version"].to_pylist() == [None, 6]
    assert manifest.without_etags(both).column_names == ["uri", "_version", "id", "_offset"]
    plain = objects.drop_columns(["_version"])
    assert manifest.without_etags(plain) is plain


def test_column_that_is_missing_is_named() -> None:
    data = manifest.encode_shard(pa.table({"uri": ["a"], "row": np.arange(1)}))
    assert manifest.read_parquet(data).column_names == ["uri", "row"]
    assert manifest.read_parquet(data, ["row"]).column_names == ["row"]
    with pytest.raises(KeyError, match="there are no columns id, shard"):
        manifest.read_parquet(data, ["shard", "uri", "id"])
