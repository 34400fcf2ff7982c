"""An output that an earlier version left unfinished is resumed, retried and read by every command."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from batch_inference.config import StorageConfig
from batch_inference.storage.store import Store
from tests.support.jobs import verified

Program = Callable[..., subprocess.CompletedProcess[str]]

# See tests/unit/output/test_earlier_format.py.
DATA = Path(__file__).parents[1] / "unit" / "output" / "data"
SOURCE = "s3://tests/format-1/"


def tries(output: Path) -> dict[str, int]:
    """Return how often each failed image was tried; all files must have one schema."""
    files = sorted(output.glob("errors/*.parquet"))
    assert len({pq.read_schema(file) for file in files}) == 1
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return {row["uri"].removeprefix(SOURCE): row["attempts"] for row in rows}


def test_output_of_an_earlier_version_is_resumed_and_retried(
    tmp_path: Path, program: Program, attached: Program, s3: str, cluster: dict[str, str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(DATA / "format-1" / "output", output)
    images = Store(SOURCE, StorageConfig(endpoint_url=s3))
    for file in (DATA / "format-1" / "images").iterdir():
        images.put(file.name, file.read_bytes())
    ray = ["--address", cluster["address"], "--dashboard-host", "none"]
    settings = [
        "predictor=brightness:Brightness", "predictor.args=[0.2]", "inference.actors=1", "inference.gpus_per_actor=0",
        "inference.batch_size=1", "shard_size=3", "errors.max_percent=null", "report.thumbnails=0",
        f"storage.endpoint_url={s3}",
    ]  # fmt: skip
    command = ["run", SOURCE, "--output", str(output), *(word for key in settings for word in ("--set", key)), *ray]
    done = program(*command, "--json", cwd=DATA)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert (result["rows"], result["predictions"], result["errors"]) == (15, 12, 3)
    found = verified(str(output), attached)
    assert (found["predictions"], found["errors"], found["uncommitted"]) == (12, 3, [])
    assert tries(output) == {"01.png": 1, "10.png": 1, "11.png": 1}
    # The committed shards are those of the earlier version.
    assert len(list(output.glob("predictions/*-8264d937.parquet"))) == 2
    images.put("10.png", images.get("09.png"))
    retry = ["retry", str(output), "--stage", "decode", "--set", f"storage.endpoint_url={s3}", *ray]
    done = program(*retry, cwd=DATA)
    assert done.returncode == 0, done.stdout + done.stderr
    assert tries(output) == {"01.png": 2, "11.png": 2}
    assert verified(str(output), attached)["errors"] == 2
    for *words, says in (
        ("status", str(output), "13"),
        ("report", str(output), "13 predictions and 2 errors"),
        ("diff", str(output), str(output), "--column", "brightness", "13"),
    ):
        done = program(*words, cwd=DATA)
        assert done.returncode == 0, done.stdout + done.stderr
        assert says in done.stdout
