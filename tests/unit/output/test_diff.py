from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.errors import AccountingError, UserError
from batch_inference.output.diff import Example, diff_outputs
from batch_inference.output.ledger import Ledger
from batch_inference.storage.store import Store
from tests.support.outputs import CONFIG, ERRORS, job_of, table_of

Row = tuple[str, str | None]  # an image's URI and its label, None where it failed


def output(folder: Path, rows: list[Row], shard_size: int = 3, **columns: Any) -> str:
    """Make an output with these rows, by the real ledger and writer."""
    store = Store(str(folder), CONFIG)
    ledger = Ledger(store)
    table = table_of([uri for uri, _ in rows])
    job = ledger.create_job(table, job_of(table, shard_size), "first")
    ledger.complete_manifest(job)
    for shard in range(job.shards):
        failed = [
            i for i, (_, label) in enumerate(rows[shard * shard_size : (shard + 1) * shard_size]) if label is None
        ]
        errors = pa.Table.from_pylist(
            [dict(zip(ERRORS.names, (i, "decode", "TRUNCATED", "cut off", False, None), strict=True)) for i in failed],
            ERRORS,
        )
        writer = ShardWriter(store, "first", "zstd")
        mine = [(i, label) for i, (_, label) in enumerate(rows[shard * shard_size : (shard + 1) * shard_size]) if label]
        if mine:
            start = shard * shard_size
            more = {name: pa.array([values[start + i] for i, _ in mine]) for name, values in columns.items()}
            places = pa.array([i for i, _ in mine], pa.int32())
            numbers = pa.array([shard] * len(mine), pa.int32())
            writer.add(
                shard,
                pa.table({"shard": numbers, "row": places, "label": pa.array([label for _, label in mine]), **more}),
            )
        assert ledger.commit(writer.write(shard, errors))
    return str(folder)


def test_changes_are_counted_and_named(tmp_path: Path) -> None:
    before = output(tmp_path / "a", [("0", "cat"), ("1", "cat"), ("2", "dog"), ("3", "dog"), ("4", None), ("5", "cat")])
    after = output(tmp_path / "b", [("1", "dog"), ("0", "cat"), ("2", "dog"), ("3", None), ("6", "cat"), ("5", "dog")])
    found = diff_outputs(before, after, to=str(tmp_path / "changed.parquet"))
    assert (found.column, found.same, found.changed) == ("label", 2, 2)
    assert (found.newly_failed, found.newly_predicted, found.only_before, found.only_after) == (1, 0, 0, 1)
    assert found.changed_percent == 50
    assert found.changes == (("cat", "dog", 2),)
    assert found.examples == (Example("1", "cat", "dog"), Example("5", "cat", "dog"))
    frame = pd.read_parquet(tmp_path / "changed.parquet")
    assert frame.to_dict("list") == {"uri": ["1", "5"], "before": ["cat", "cat"], "after": ["dog", "dog"]}


labels = st.one_of(st.none(), st.sampled_from(["a", "b", "c"]))


@settings(max_examples=40)
@given(st.dictionaries(st.integers(0, 30), labels, min_size=1), st.dictionaries(st.integers(0, 30), labels, min_size=1))
def test_counts_are_those_of_a_dictionary(
    tmp_path_factory: pytest.TempPathFactory, one: dict[int, str | None], other: dict[int, str | None]
) -> None:
    folder = tmp_path_factory.mktemp("diff")
    outputs = [output(folder / name, [(str(k), v) for k, v in d.items()]) for name, d in (("a", one), ("b", other))]
    a, b = ({k: v for k, v in d.items() if v is not None} for d in (one, other))
    if not a or not b:
        with pytest.raises(UserError, match="no column label"):
            diff_outputs(*outputs)
        return
    found = diff_outputs(*outputs)
    both = a.keys() & b.keys()
    assert found.changed == sum(a[k] != b[k] for k in both)
    assert found.same == len(both) - found.changed
    assert found.newly_failed == len(a.keys() & (other.keys() - b.keys()))
    assert found.newly_predicted == len(b.keys() & (one.keys() - a.keys()))
    assert found.only_before == len(a.keys() - other.keys())
    assert found.only_after == len(b.keys() - one.keys())


def test_confidence_and_other_columns(tmp_path: Path) -> None:
    rows: list[Row] = [("0", "cat"), ("1", "dog")]
    a = output(tmp_path / "a", rows, confidence=[0.5, 0.75], size=[1, 2], vector=[[1.0], [2.0]])
    b = output(tmp_path / "b", rows, confidence=[0.25, 1.0], size=[1, 3], vector=[[1.0], [2.0]])
    assert diff_outputs(a, b).confidence == (0.625, 0.625)
    assert diff_outputs(a, b, "size").changes == (("2", "3", 1),)
    with pytest.raises(UserError, match="holds lists or structs"):
        diff_outputs(a, b, "vector")
    with pytest.raises(UserError, match="no column colour in common") as refused:
        diff_outputs(a, b, "colour")
    assert "confidence" in (refused.value.remedy or "")


@pytest.mark.parametrize(("damage", "says"), [(None, "is missing"), (b"no Parquet", "can't be read")])
def test_missing_or_damaged_file_is_named_with_remedy(damage: bytes | None, says: str, tmp_path: Path) -> None:
    outputs = [output(tmp_path / name, [("0", "cat"), ("1", "dog")]) for name in ("a", "b")]
    (file,) = (tmp_path / "b/predictions").iterdir()
    file.unlink()
    if damage:
        file.write_bytes(damage)
    with pytest.raises(AccountingError, match=says) as caught:
        diff_outputs(*outputs)
    assert file.name in caught.value.message
    assert "batch-inference verify" in (caught.value.remedy or "")


def test_folder_that_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        diff_outputs(str(tmp_path), str(tmp_path))
