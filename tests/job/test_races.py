"""Two drivers at once on one output: one correct result."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from batch_inference.config import StorageConfig
from batch_inference.storage.store import Store
from tests.support.jobs import job_args, start, verified

Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_two_drivers_at_once_end_with_one_result(
    where: str,
    photos: Callable[..., Path],
    tmp_path: Path,
    attached: Program,
    cluster: dict[str, str],
    request: pytest.FixtureRequest,
) -> None:
    folder = photos(160, bad_percent=5)
    output, extra, storage = str(tmp_path / "out"), [], StorageConfig()
    if where == "s3":
        url = request.getfixturevalue("s3")
        output, extra, storage = (
            f"s3://tests/{tmp_path.name}/out",
            ["--set", f"storage.endpoint_url={url}"],
            StorageConfig(endpoint_url=url),
        )
    args = [*job_args(folder, output), "--set", "predictor.args=[0.05]", "--address", cluster["address"], *extra]
    logs = [tmp_path / f"driver-{i}.log" for i in range(2)]
    processes = [start(*args, log=log) for log in logs]
    for process, log in zip(processes, logs, strict=True):
        assert process.wait(150) == 0, log.read_text()
    found = verified(output, attached, *extra)
    assert (found["rows"], found["predictions"], found["errors"], found["uncommitted"]) == (160, 152, 8, [])
    store = Store(output, storage)
    commits = [json.loads(store.get(info.path)) for info in store.objects("_commits")]
    assert len(commits) == 16
    by_attempt = {c["attempt"]: sum(d["attempt"] == c["attempt"] for d in commits) for c in commits}
    print(f"{where}: shards committed by each of the two drivers: {sorted(by_attempt.values())}")
    # Nothing of a plan that lost is left either.
    assert not [info.path for info in store.objects("_manifest") if not info.path.endswith(".parquet")]


def test_two_drivers_with_different_jobs_never_mix(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    """Started at the same moment on the same output: one wins, the other is told so.

    The one that comes second may find nothing committed and no attempt at work yet: then it takes the output over.
    """
    output = tmp_path / "out"
    args = [*job_args(photos(60), output), "--address", cluster["address"]]
    logs = [tmp_path / f"driver-{i}.log" for i in range(2)]
    processes = [start(*args, "--set", f"preprocess.max_pixels={10**6 + i}", log=logs[i]) for i in range(2)]
    codes = sorted(process.wait(150) for process in processes)
    texts = [log.read_text() for log in logs]
    assert codes == [0, 2], texts
    told = re.compile("belongs to another job|another job is at work in|another configuration has taken over")
    assert sum(bool(told.search(text)) for text in texts) == 1, texts
    verified(str(output), attached)
