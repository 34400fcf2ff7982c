"""Failed rows that are done again, by the command."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from tests.job.conftest import job_args, verified

Program = Callable[..., subprocess.CompletedProcess[str]]


def test_rows_that_failed_are_done_again_from_whatever_folder(
    photos: Callable[..., Path], tmp_path: Path, program: Program, cluster: dict[str, str]
) -> None:
    folder, output = photos(30), tmp_path / "out"
    late = sorted(folder.iterdir())[::6]
    content = {file: file.read_bytes() for file in late}
    (folder / "list.txt").write_text("\n".join(sorted(file.name for file in folder.iterdir())))
    for file in late:
        file.unlink()
    # Named relatively, and taken up again from elsewhere.
    args = job_args("", output)
    args[1:2] = ["--manifest", f"{folder.name}/list.txt"]
    predictor = "predictor=predictors:MeanColor"
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    done = program(*args, "--set", predictor, "--address", cluster["address"], env=path, cwd=folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verified(str(output), program)["errors"] == len(late)
    again = ["retry", str(output), "--dashboard-host", "none", "--address", cluster["address"]]
    done = program(*again, "--stage", "decode", env=path, cwd=tmp_path)
    assert done.returncode == 0
    assert f"nothing to retry: no failed row is meant; failed rows: fetch NOT_FOUND {len(late)}" in done.stdout
    # A predictor that cannot be found leaves the output finished.
    done = program(*again, "--stage", "fetch", env={"PYTHONPATH": ""}, cwd=tmp_path)
    assert done.returncode == 2 and "predictors" in done.stderr
    assert (output / "_SUCCESS").exists() and not (output / "_retries").exists()
    late[0].write_bytes(content[late[0]])
    done = program(*again, "--stage", "fetch", "--json", env=path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert (result["rows"], result["errors"]) == (30, len(late) - 1)
    for file in late:
        file.write_bytes(content[file])
    done = program(*again, "--all", env=path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = verified(str(output), program)
    assert (found["predictions"], found["errors"], found["uncommitted"]) == (30, 0, [])
    assert not list(output.glob("errors/*"))
    names = [row for file in output.glob("predictions/*") for row in pq.read_table(file)["uri"].to_pylist()]
    assert len(names) == len(set(names)) == 30
