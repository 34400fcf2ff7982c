"""Preflight beside the run that it predicts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from tests.job.conftest import job_args

Program = Callable[..., subprocess.CompletedProcess[str]]


def test_the_forecast_beside_the_run(
    photos: Callable[..., Path], tmp_path: Path, program: Program, cluster: dict[str, str]
) -> None:
    """The predictor sleeps for 0.2 s a batch of 8: 40 images a second, whatever the machine is busy with."""
    args = job_args(photos(240, bad_percent=5), tmp_path / "out", shard_size=60)
    args = [a for a in args if a not in ("--dashboard-host", "none")]
    args += ["--set", "predictor.kwargs={delay_s: 0.2}", "--address", cluster["address"]]
    before = program("preflight", *args[1:], "--samples", "40", "--json")
    assert before.returncode == 0, before.stdout + before.stderr
    found = json.loads(before.stdout)
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert states["samples"] == "WARN"
    assert {states[n] for n in ("output", "input", "model", "forward pass", "output schema", "room")} == {"OK"}
    samples = next(check for check in found["checks"] if check["name"] == "samples")
    assert str(tmp_path) in samples["finding"]
    assert found["measured"]["columns"]["mean"] == "float"
    ahead, measured = found["forecast"], found["measured"]
    assert ahead["limit"] == "inference"
    assert 0 < ahead["images_per_s"] <= 40
    assert ahead["seconds"] > measured["load_s"] + 240 / 41
    assert (ahead["gpu_hours"], ahead["cpus_per_gpu"]) == (0, None)
    assert not (tmp_path / "out").exists()
    done = program(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out/_report/summary.json").read_text())
    print(f"predicted {ahead['images_per_s']:.1f} images/s, the run had {summary['images_per_s']:.1f}")


def test_what_fails_is_named_with_its_remedy_and_ends_with_2(
    photos: Callable[..., Path], tmp_path: Path, program: Program, cluster: dict[str, str]
) -> None:
    args = job_args(photos(12), tmp_path / "out", predictor="predictors:FailsOnEverything")
    args = [a for a in args if a not in ("--dashboard-host", "none")]
    done = program("preflight", *args[1:], "--address", cluster["address"])
    assert done.returncode == 2, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "FAIL forward pass" in text
    assert "PREDICTOR_ERROR" in text
    assert "remedy: Mend the predictor" in text
    assert "Traceback" not in text


def test_golden_samples_are_as_they_were_or_the_difference_is_named(
    photos: Callable[..., Path], tmp_path: Path, program: Program, cluster: dict[str, str]
) -> None:
    folder = photos(12)
    args = job_args(folder, tmp_path / "out", predictor="predictors:MeanColor")
    args = [a for a in args if a not in ("--dashboard-host", "none")]
    assert program(*args, "--address", cluster["address"]).returncode == 0
    frame = pd.read_parquet(tmp_path / "out/predictions").drop(columns=["pid"]).reset_index(drop=True)
    frame.to_parquet(tmp_path / "golden.parquet")
    preflight = ["preflight", *args[1:], "--samples", "4", "--address", cluster["address"], "--json"]
    preflight[preflight.index("--output") + 1] = str(tmp_path / "other")

    def tried() -> dict[str, dict[str, str]]:
        done = program(*preflight, "--golden", str(tmp_path / "golden.parquet"))
        found = json.loads(done.stdout)
        assert done.returncode == (0 if found["ok"] else 2)
        return {check["name"]: check for check in found["checks"]}

    good = tried()
    assert (good["golden samples"]["state"], good["golden samples"]["finding"]) == (
        "OK",
        "12 samples, mean are as expected",
    )
    assert good["versions"]["state"] == "OK"
    frame.loc[3, "mean"] += 1
    frame.to_parquet(tmp_path / "golden.parquet")
    bad = tried()["golden samples"]
    assert bad["state"] == "FAIL"
    assert bad["finding"].startswith("1 of 12 samples, mean are off: ")
    assert frame.loc[3, "uri"].rpartition("/")[2] in bad["finding"]
