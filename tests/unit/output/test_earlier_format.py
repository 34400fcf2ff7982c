"""Outputs that an earlier version began, with earlier names of keys and columns: all commands read them, and run resumes them.

`data/format-1/output` was left by version 0.1.0 that was stopped after two of five shards, with one error among them;
`records.json` has configurations and identities that it wrote for models. `data/brightness.py` is the job's predictor.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_inference.config import JobConfig, StorageConfig, load_config
from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.errors import UserError
from batch_inference.output import manifest
from batch_inference.output.diff import diff_outputs
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import JobRecord
from batch_inference.output.retries import select_rows, start_retry
from batch_inference.output.status import status
from batch_inference.output.verify import verify
from batch_inference.pipeline.engine import resolve_engine
from batch_inference.pipeline.fingerprint import check_same_job, differences
from batch_inference.report.build import make_report
from batch_inference.storage.store import Store
from tests.support.outputs import ERRORS

DATA = Path(__file__).parent / "data"
RECORDS = json.loads((DATA / "format-1" / "records.json").read_text())
# What its command line said, with the names that keys have now.
CONFIG = {
    "input": {"uris": ["s3://tests/format-1/"]},
    "predictor": {"path": "brightness:Brightness", "args": [0.2]},
    "inference": {"actors": 1, "gpus_per_actor": 0, "batch_size": 1},
    "errors": {"max_percent": None, "min_rows": 20},
    "report": {"thumbnails": 0},
    "shard_size": 3,
}


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(DATA))
    shutil.copytree(DATA / "format-1" / "output", tmp_path / "out")
    return tmp_path / "out"


def config_of(output: Path) -> JobConfig:
    return load_config({**CONFIG, "output": {"uri": str(output)}})


def do_the_rest(output: Path) -> None:
    """Process the remaining shards as the driver does: all rows but one have a prediction."""
    ledger = Ledger(Store(str(output), StorageConfig()))
    job = ledger.require_job()
    ledger.complete_manifest(job)
    ledger.refresh(range(job.shards))
    for shard in set(range(job.shards)) - ledger.committed():
        count = manifest.read_shard(ledger.store, shard).num_rows
        writer = ShardWriter(ledger.store, "later", "zstd", job.tries_column)
        rows = pa.array(range(1, count), pa.int32())
        places = pa.array([shard] * (count - 1), pa.int32())
        writer.add(
            shard, pa.table({"shard": places, "row": rows, "brightness": pa.array([1.0] * (count - 1), pa.float32())})
        )
        failed = [[0], ["fetch"], ["TIMEOUT"], ["no answer"], [True], [None]]
        errors = pa.Table.from_arrays([pa.array(v, f.type) for v, f in zip(failed, ERRORS, strict=True)], schema=ERRORS)
        assert ledger.commit(writer.write(shard, errors))
    commits = ledger.commits()
    predictions = sum(commit.predictions for commit in commits)
    totals = {"rows": job.rows, "predictions": predictions, "errors": job.rows - predictions, "shards": job.shards}
    ledger.finish(job, commits, totals)


def errors_of(output: Path) -> list[dict[str, object]]:
    """Return the rows of all errors files, which must have one schema."""
    files = sorted(output.glob("errors/*.parquet"))
    assert len({pq.read_schema(file) for file in files}) == 1
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def test_record_has_the_names_of_today(output: Path) -> None:
    job = Ledger(Store(str(output), StorageConfig())).require_job()
    stored = json.loads((output / "_job.json").read_text())
    assert (job.format, job.tries_column, job.fingerprint) == (1, "attempts", stored["fingerprint"])
    assert load_config(job.config).errors.min_rows == stored["config"]["errors"]["min_sample"] == 20
    assert job.config["preprocess"]["decoder"] == job.identity["preprocess.decoder"] == "fast"
    assert not {"preprocess.exact", "input.bytes_column"} & job.identity.keys()


def test_job_is_the_same_by_its_configuration_of_today(output: Path) -> None:
    config = config_of(output)
    engine = resolve_engine(config)
    store = Store(str(output), StorageConfig())
    job = Ledger(store).require_job()
    check_same_job(config, engine, job, store)
    other = load_config({**CONFIG, "preprocess": {"decoder": "exact"}, "output": {"uri": str(output)}})
    assert differences(other, engine, job) == [
        "preprocess.decoder: fast there, exact now",
        "preprocess.pixels: fast-2 there, exact-2 now",
    ]
    with pytest.raises(UserError, match="belongs to another job") as caught:
        check_same_job(other, engine, job, store)
    assert f"write --output {output}-2" in caught.value.remedy


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["config"]["model"]["name"])
def test_models_are_the_same_by_their_configuration_of_today(record: dict[str, dict[str, str]]) -> None:
    given = {"fingerprint": "", "shards": 1, "rows": 1, "plan": "", "versions": {}, "created_at": "", "passthrough": []}
    job = JobRecord.from_json({**record, **given, "format": 1})
    config = load_config(job.config)
    assert differences(config, resolve_engine(config), job) == []


def test_commands_that_read_work_while_it_is_unfinished(output: Path) -> None:
    found = status(str(output), StorageConfig())
    assert (found.shards, found.shards_done, found.rows, found.errors) == (5, 2, 15, 1)
    checked = verify(str(output))
    assert checked.ok and (checked.predictions, checked.errors, checked.finished) == (5, 1, False)
    assert diff_outputs(str(output), str(output), "brightness").same == 5
    made = make_report(str(output), config_of(output))
    assert (made.predictions, made.errors) == (5, 1)
    assert "min_rows: 20" in (output / "_report/report.html").read_text()


def test_resumed_output_has_one_schema_and_the_column_it_began_with(output: Path) -> None:
    do_the_rest(output)
    checked = verify(str(output))
    assert checked.ok and (checked.predictions, checked.errors, checked.finished) == (11, 4, True)
    assert [(row["shard"], row["row"], row["error_type"], row["attempts"]) for row in errors_of(output)] == [
        (0, 1, "UNKNOWN_FORMAT", 1),
        (1, 0, "TIMEOUT", 1),
        (2, 0, "TIMEOUT", 1),
        (3, 0, "TIMEOUT", 1),
    ]
    assert make_report(str(output), config_of(output)).errors == 4
    assert json.loads((output / "_job.json").read_text())["format"] == 1


def test_retry_counts_in_the_column_it_began_with(output: Path) -> None:
    do_the_rest(output)
    ledger = Ledger(Store(str(output), StorageConfig()))
    retry = start_retry(ledger, stages=[], error_types=[], retryable=False, attempt="again")
    assert retry is not None and retry.rows == 4
    chosen = select_rows(ledger, retry, ledger.commits())
    writer = ShardWriter(ledger.store, "again", "zstd", ledger.require_job().tries_column)
    failed = [[1], ["decode"], ["CORRUPT"], ["still"], [False], [None]]
    errors = pa.Table.from_arrays([pa.array(v, f.type) for v, f in zip(failed, ERRORS, strict=True)], schema=ERRORS)
    commit = writer.write(0, errors, chosen[0])
    (file,) = [file for file in commit.files if file.path.startswith("errors/")]
    (row,) = pq.read_table(output / file.path).to_pylist()
    assert (row["error_type"], row["attempts"], "tries" in row) == ("CORRUPT", 2, False)


def test_format_of_a_later_version_is_refused(output: Path) -> None:
    record = json.loads((output / "_job.json").read_text())
    (output / "_job.json").write_text(json.dumps({**record, "format": 3}))
    with pytest.raises(UserError, match="format 3, this version reads 1 and 2") as caught:
        status(str(output), StorageConfig())
    assert "Choose another output, or the version of the program that made this one." in caught.value.remedy
