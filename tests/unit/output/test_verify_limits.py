"""How many problems `verify` names, the settings of its store, and the types that it takes for one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from batch_inference.config import StorageConfig
from batch_inference.output import verify as verifier
from batch_inference.output.records import DataFile
from batch_inference.output.verify import verify
from tests.support.outputs import finished


@pytest.mark.parametrize(("named", "last"), [(3, "and 1 more"), (4, None), (5, None)])
def test_problems_beyond_the_limit_are_counted(
    named: int, last: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(str(tmp_path), [f"s3://b/{index}.jpg" for index in range(4)], 1)
    for file in (tmp_path / "predictions").iterdir():
        file.unlink()
    # For each file that it is gone, and for its row that it is missing.
    whole = verify(str(tmp_path)).problems
    assert len(whole) == 8
    monkeypatch.setattr(verifier, "_MAX_PROBLEMS", named + 4)
    found = verify(str(tmp_path)).problems
    assert found == ((*whole[: named + 4], last) if last else whole)


@pytest.mark.parametrize("storage", [StorageConfig(region="eu-west-9"), None])
def test_store_gets_its_settings(storage: StorageConfig | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class SeenError(Exception):
        pass

    def store(output: str, config: StorageConfig, *, must_exist: bool) -> None:
        assert (output, config, must_exist) == ("s3://b/out", storage or StorageConfig(), True)
        raise SeenError

    monkeypatch.setattr(verifier, "Store", store)
    with pytest.raises(SeenError):
        verify("s3://b/out", storage)


def test_types_that_are_stored_alike_are_the_same() -> None:
    """Outputs of earlier versions have types of which only the layout in memory differs."""
    same = verifier._same_type
    assert same(pa.dictionary(pa.int8(), pa.string()), pa.string())
    assert same(pa.list_(pa.large_string()), pa.large_list(pa.string()))
    assert same(pa.int64(), pa.int64())
    assert not same(pa.int64(), pa.int32())
    assert not same(pa.string(), pa.binary())


def test_every_column_that_is_wrong_is_named() -> None:
    columns = verifier._ExpectedColumns(
        pa.schema([("a", pa.int64()), ("b", pa.string()), ("c", pa.bool_())]), "_schema.json"
    )
    file = DataFile("predictions/x.parquet", 1, 1, "")
    assert columns.problems(file, pa.schema([("b", pa.int64()), ("c", pa.bool_()), ("d", pa.int8())])) == [
        "predictions/x.parquet has no column 'a', which is int64 in _schema.json",
        "predictions/x.parquet: the column 'b' is int64, in _schema.json it is string",
        "predictions/x.parquet has a column 'd' (int8), which is not in _schema.json",
    ]
    assert verifier._ExpectedColumns(None).problems(file, pa.schema([("b", pa.int64())])) == []
    guessed = verifier._ExpectedColumns(pa.schema([("a", pa.int64())]), guessed=True)
    assert len(guessed.problems(file, pa.schema([("a", pa.string())]))) == 1
    assert guessed.problems(replace(file, open=("a",)), pa.schema([("a", pa.string())])) == []
