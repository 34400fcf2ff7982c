"""Whole jobs of classes whose columns change their types: one schema, which every program reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow.dataset as ds
import pytest

from batch_inference.config import StorageConfig
from batch_inference.output.schema import SCHEMA_PATH, open_columns
from batch_inference.output.schema import decode_schema as decode_schema
from batch_inference.storage.store import Store
from tests.support import spark
from tests.support.jobs import environment, job_args, verified
from tests.support.limits import HANG_S

Program = Callable[..., subprocess.CompletedProcess[str]]
_READERS = {
    "ray": "import ray, sys; ray.init(log_to_driver=False)\nrows = ray.data.read_parquet(sys.argv[1]).take_all()\n",
    "spark": "import sys\nfrom pyspark.sql import SparkSession\n"
    "spark = SparkSession.builder.master('local[1]').config('spark.ui.enabled', 'false').getOrCreate()\n"
    "rows = [row.asDict(recursive=True) for row in spark.read.parquet(sys.argv[1]).collect()]\n",
}
_PRINT = (
    "import json, numpy\n"
    "plain = lambda v: v.tolist() if isinstance(v, numpy.ndarray) else v.item() if isinstance(v, numpy.generic) else str(v)\n"
    "print('ROWS' + json.dumps(rows, default=plain))\n"
)


def model(number: int) -> dict[str, Any]:
    early = number < 4
    return {
        "number": number, "label": None if early else f"t{number}", "boxes": [] if early else [[number + 0.5, 1.0]] * (number % 3),
        "size": number,
    }  # fmt: skip


@pytest.mark.parametrize("predictor", ["TypesDrift", "TypesExclude"])
def test_class_whose_types_drift_leaves_a_folder_that_all_tools_read(
    predictor: str, photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    folder, output = photos(12), tmp_path / "out"
    args = job_args(folder, output, shard_size=4, predictor=f"predictors:{predictor}")
    done = attached(*args, "--set", "inference.batch_size=4", "--address", cluster["address"])
    assert done.returncode == 0, done.stdout + done.stderr
    found = verified(str(output), attached)
    table = ds.dataset(output / "predictions").to_table().sort_by("number")
    errors = pd.read_parquet(output / "errors").to_dict("records") if found["errors"] else []
    assert table.num_rows + len(errors) == 12
    assert {row["error_type"] for row in errors} <= {"OUTPUT_MISMATCH"}
    if predictor == "TypesDrift":
        assert not errors
    else:
        assert errors and table.num_rows
        assert all("'mixed'" in row["message"] or "'late'" in row["message"] for row in errors)
    rows = [{name: row[name] for name in model(0)} for row in table.to_pylist()]
    assert rows == [model(row["number"]) for row in rows]
    schema = decode_schema(Store(str(output), StorageConfig()).get(SCHEMA_PATH))
    assert schema.equals(table.schema) and not open_columns(schema)
    assert len(duckdb.read_parquet(f"{output}/predictions/*.parquet").fetchall()) == table.num_rows
    assert sorted(pd.read_parquet(output / "predictions")["uri"]) == sorted(table["uri"].to_pylist())
    for reader, env in (("ray", {"RAY_ADDRESS": cluster["address"]}), ("spark", spark.variables())):
        read = subprocess.run(
            [sys.executable, "-c", _READERS[reader] + _PRINT, str(output / "predictions")],
            capture_output=True, text=True, timeout=HANG_S, env=environment(env) | _path(env), check=False,
        )  # fmt: skip
        assert read.returncode == 0, f"{reader}: {read.stderr[-3000:]}"
        (line,) = [line for line in read.stdout.splitlines() if line.startswith("ROWS")]
        told = sorted(json.loads(line[4:]), key=lambda row: int(row["number"]))
        assert [{name: row[name] for name in model(0)} for row in told] == rows, reader


def test_values_of_two_types_in_one_batch_cost_only_the_rows_of_one(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    folder, output = photos(12), tmp_path / "out"
    args = job_args(folder, output, shard_size=12, predictor="predictors:TypesWithin")
    done = attached(*args, "--address", cluster["address"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "postprocess OUTPUT_MISMATCH 8" in done.stdout
    assert verified(str(output), attached)["errors"] == 8
    # The first row is a number.
    table = pd.read_parquet(output / "predictions")
    assert table["mixed"].tolist() == table["number"].tolist() == [0, 3, 6, 9]
    errors = pd.read_parquet(output / "errors")
    assert errors["message"].str.contains("column 'mixed' is string here and int64 in this job").all()


def _path(env: dict[str, str]) -> dict[str, str]:
    """Modules of the reader's before those that the tests have anyway."""
    if "PYTHONPATH" not in env:
        return {}
    return {"PYTHONPATH": os.pathsep.join(filter(None, [env["PYTHONPATH"], os.environ.get("PYTHONPATH")]))}
