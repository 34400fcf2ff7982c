"""The report of whole jobs: named by the verdict, on disks and stores, of jobs that failed, were killed, or can't have one."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batch_inference.config import StorageConfig
from batch_inference.storage.store import Store
from tests.support import jobs
from tests.support.jobs import start, verified
from tests.support.limits import HANG_S

Program = Callable[..., subprocess.CompletedProcess[str]]


def job_args(*args: Any, **more: Any) -> list[str]:
    """Those of the other tests, with images in the report."""
    return [*jobs.job_args(*args, **more), "--set", "report.thumbnails=18"]


def test_report_is_named_by_the_verdict_and_written_again_by_the_command(
    photos: Callable[..., Path], s3: str, tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    output = f"s3://tests/{tmp_path.name}"
    endpoint = ("--set", f"storage.endpoint_url={s3}")
    folder = photos(40, bad_percent=20)
    done = attached(*job_args(folder, output, shard_size=10), *endpoint, "--address", cluster["address"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(f"report {output}/_report/report.html)")
    store = Store(output, StorageConfig(endpoint_url=s3))
    html = store.get("_report/report.html").decode()
    assert "Succeeded: all 40 images are accounted for" in html
    assert html.count("data:image/jpeg;base64,") == 18  # without confidences there are no two ends
    assert "1 start of the program" in html
    store.delete(["_report/report.html"])
    again = attached("report", output, "--gpu-hour-price", "2", "--thumbnails", "3", *endpoint, "--json")
    assert again.returncode == 0, again.stdout + again.stderr
    found = json.loads(again.stdout)
    assert (found["state"], found["rows"], found["predictions"], found["errors"]) == ("succeeded", 40, 32, 8)
    assert len(store.get("_report/report.html")) == found["bytes"]
    verified(output, attached, *endpoint)


def test_failed_job_has_a_report_with_the_reason(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    args = job_args(photos(60, bad_percent=50), tmp_path / "out", shard_size=5)
    done = attached(*args, "--address", cluster["address"], "--set", "errors.max_count=3")
    assert done.returncode == 3, done.stdout + done.stderr
    where = tmp_path / "out/_report/report.html"
    assert done.stdout.splitlines()[-1] == f"output: {tmp_path / 'out'} (report {where})"
    html = where.read_text()
    assert "Failed (exit code 3)" in html
    assert "more than errors.max_count = 3" in html


def test_attempts_add_up(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    output = tmp_path / "out"
    args = [*job_args(photos(400), output), "--set", "predictor.args=[0.1]", "--address", cluster["address"]]
    process = start(*args)
    try:
        deadline = time.monotonic() + HANG_S
        while len(list(output.glob("_commits/*.json"))) < 3:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait(30)
    # Of an output that nobody works on any more.
    assert attached("report", str(output)).returncode == 0
    assert "Not finished" in (output / "_report/report.html").read_text()
    done = attached(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    html = (output / "_report/report.html").read_text()
    assert "Succeeded: all 400 images are accounted for" in html
    assert "2 starts of the program for this job." in html
    assert "running, or killed" in html
    records = [json.loads(path.read_text()) for path in (output / "_report/attempts").glob("*.json")]
    assert sorted(record["state"] for record in records) == ["running", "succeeded"]


def test_report_that_cannot_be_made_costs_a_warning_and_not_the_job(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    output = tmp_path / "out"
    (output / "_report/report.html").mkdir(parents=True)
    done = attached(*job_args(photos(10), output), "--address", cluster["address"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the report could not be made" in done.stderr
    assert done.stdout.splitlines()[-1].endswith("_report/summary.json)")
    # By hand it is an error like any other.
    failed = attached("report", str(output))
    assert failed.returncode in (2, 5)
    assert "Traceback" not in failed.stdout + failed.stderr


def test_report_can_be_left_out(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    args = [*job_args(photos(10), tmp_path / "out"), "--address", cluster["address"], "--set", "report.enabled=false"]
    assert attached(*args).returncode == 0
    assert not (tmp_path / "out/_report/report.html").exists()
    # A job that was done without one gets it at the next start.
    done = attached(*args, "--set", "report.enabled=true")
    assert "nothing was run" in done.stdout
    assert (tmp_path / "out/_report/report.html").exists()


def test_output_without_a_job_has_no_report(tmp_path: Path, program: Program) -> None:
    for output in (tmp_path, tmp_path / "none"):
        done = program("report", str(output))
        assert done.returncode == 2
        assert "Traceback" not in done.stdout + done.stderr
