"""Failed rows that are done again, by the command."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from batch_inference.config import StorageConfig
from batch_inference.storage.store import Store
from tests.support.jobs import job_args, verified
from tests.support.servers import Proxy

Program = Callable[..., subprocess.CompletedProcess[str]]


def test_rows_that_failed_are_done_again_from_whatever_folder(
    photos: Callable[..., Path], tmp_path: Path, program: Program, attached: Program, cluster: dict[str, str]
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
    assert verified(str(output), attached)["errors"] == len(late)
    again = ["retry", str(output), "--dashboard-host", "none", "--address", cluster["address"]]
    done = program(*again, "--stage", "decode", env=path, cwd=tmp_path)
    assert done.returncode == 0
    assert f"nothing to retry: no failed row is selected; failed rows: fetch NOT_FOUND {len(late)}" in done.stdout
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
    found = verified(str(output), attached)
    assert (found["predictions"], found["errors"], found["uncommitted"]) == (30, 0, [])
    assert not list(output.glob("errors/*"))
    names = [row for file in output.glob("predictions/*") for row in pq.read_table(file)["uri"].to_pylist()]
    assert len(names) == len(set(names)) == 30


def test_an_object_that_was_replaced_since_planning_is_predicted_when_a_retry_asks_for_it(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, proxy: Proxy, s3: str, cluster: dict[str, str]
) -> None:
    direct = StorageConfig(endpoint_url=s3)
    store = Store(f"s3://tests/{tmp_path.name}", direct)
    files = sorted(photos(12).iterdir())
    for file in files:
        store.put(f"in/{file.name}", file.read_bytes())

    def answer(method: str, path: str) -> None:
        # The plan is made, and nothing is read.
        if method == "PUT" and path.endswith("/_job.json"):
            store.delete([f"in/{files[3].name}"])
            store.put(f"in/{files[3].name}", files[4].read_bytes() + b"behind its end")

    proxy.answer = answer
    output = f"{store.uri}/out"
    there = ["--address", cluster["address"], "--set", f"storage.endpoint_url={proxy.url}"]
    done = attached(*job_args(f"{store.uri}/in", output), *there)
    assert done.returncode == 0, done.stdout + done.stderr
    past = ["--set", f"storage.endpoint_url={s3}"]
    assert verified(output, attached, *past)["errors"] == 1
    assert "fetch CHANGED 1" in " ".join(done.stdout.split())
    done = attached("retry", output, "--error-type", "CHANGED", "--dashboard-host", "none", *there)
    assert done.returncode == 0, done.stdout + done.stderr
    assert verified(output, attached, *past)["errors"] == 0
