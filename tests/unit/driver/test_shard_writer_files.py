"""Which files a shard has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.errors import AccountingError
from batch_inference.output import manifest
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit
from tests.support.outputs import ERRORS, planned


def written(ledger: Ledger, shard: int, values: list[Any]) -> Commit:
    """Write the files of a shard with these predictions."""
    writer = ShardWriter(ledger.store, "one", "zstd")
    rows = {"shard": pa.array([shard] * len(values), pa.int32()), "row": pa.array(range(len(values)), pa.int32())}
    writer.add(shard, pa.table({**rows, "value": values}))
    commit = writer.write(shard, ERRORS.empty_table())
    assert ledger.commit(commit)
    return commit


def test_shard_of_which_no_prediction_fits_has_no_file_of_predictions(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), [f"s3://b/{index}.jpg" for index in range(4)], 2)
    assert [file.path.partition("/")[0] for file in written(ledger, 0, [1, 2]).files] == ["predictions"]
    commit = written(ledger, 1, ["one", "two"])
    assert (commit.predictions, commit.errors, commit.errors_by) == (0, 2, {"postprocess": {"OUTPUT_MISMATCH": 2}})
    assert [file.path.partition("/")[0] for file in commit.files] == ["errors"]
    table = manifest.read_parquet(ledger.store.get(commit.files[0].path))
    assert table["stage"].to_pylist() == ["postprocess"] * 2
    assert table["retryable"].to_pylist() == [False] * 2
    assert not [info.path for info in ledger.store.objects("predictions") if "shard-00001" in info.path]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_columns_of_a_shard_are_those_of_all_its_batches(tmp_path: Path, order: tuple[int, int]) -> None:
    ledger, _ = planned(str(tmp_path), [f"s3://b/{index}.jpg" for index in range(2)], 2)
    batches = [{"value": [1], "name": ["a"]}, {"value": [2.5], "other": [True]}]
    writer = ShardWriter(ledger.store, "one", "zstd")
    for row in order:
        rows = {"shard": pa.array([0], pa.int32()), "row": pa.array([row], pa.int32())}
        writer.add(0, pa.table({**rows, **batches[row]}))
    commit = writer.write(0, ERRORS.empty_table())
    assert commit.predictions == 2
    table = manifest.read_parquet(ledger.store.get(commit.files[0].path))
    assert table.select(["value", "name", "other"]).to_pydict() == {
        "value": [1.0, 2.5],
        "name": ["a", None],
        "other": [None, True],
    }


def test_file_that_is_damaged_or_not_what_its_commit_says_is_not_written_again(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), [f"s3://b/{index}.jpg" for index in range(2)], 2)
    commit = written(ledger, 0, [1, 2])
    writer = ShardWriter(ledger.store, "two", "zstd")
    (file,) = commit.files
    schema = manifest.read_parquet(ledger.store.get(file.path)).schema
    texts = schema.set(schema.get_field_index("value"), pa.field("value", pa.bool_()))
    # The commit says that there is no value in the column yet, so that any type will do.
    with pytest.raises(
        AccountingError, match=r"has values in columns of which its commit says that they have none \(value\)"
    ):
        writer.rewrite(commit, [replace(file, open=("value",))], texts, 1)
    again = writer.rewrite(commit, [file], schema, 1)
    assert (again.generation, again.rows, len(again.files)) == (1, 2, 1)
    ledger.store.put(file.path, b"PAR1")
    with pytest.raises(AccountingError, match=rf"{file.path} is committed but can't be read: Arrow"):
        writer.rewrite(commit, [file], schema, 1)
