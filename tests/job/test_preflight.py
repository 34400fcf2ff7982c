"""Preflight beside the run that it predicts."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from batch_inference.config import StorageConfig
from batch_inference.output.attempts import read_attempts
from batch_inference.storage.store import Store
from tests.support.jobs import POISON, job_args, verified
from tests.support.servers import Proxy, ray_cluster

Program = Callable[..., subprocess.CompletedProcess[str]]


def test_the_forecast_beside_the_run(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    """The predictor sleeps for 0.2 s a batch of 8: 40 images a second, whatever the machine is busy with."""
    args = job_args(photos(240, bad_percent=5), tmp_path / "out", shard_size=60)
    args = [a for a in args if a not in ("--dashboard-host", "none")]
    args += ["--set", "predictor.kwargs={delay_s: 0.2}", "--address", cluster["address"]]
    before = attached("preflight", *args[1:], "--samples", "40", "--json")
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
    done = attached(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out/_report/summary.json").read_text())
    print(f"predicted {ahead['images_per_s']:.1f} images/s, the run had {summary['images_per_s']:.1f}")


def test_failed_checks_are_named_with_their_remedies_and_end_with_2(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    args = job_args(photos(12), tmp_path / "out", predictor="predictors:FailsOnEverything")
    args = [a for a in args if a not in ("--dashboard-host", "none")]
    done = attached("preflight", *args[1:], "--address", cluster["address"])
    assert done.returncode == 2, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "FAIL forward pass" in text
    assert "PREDICTOR_ERROR" in text
    assert "remedy: Fix the predictor" in text
    assert "Traceback" not in text


def test_golden_samples_are_as_they_were_or_the_difference_is_named(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    folder = photos(12)
    args = job_args(folder, tmp_path / "out", predictor="predictors:MeanColor")
    args = [a for a in args if a not in ("--dashboard-host", "none")]
    assert attached(*args, "--address", cluster["address"]).returncode == 0
    frame = pd.read_parquet(tmp_path / "out/predictions").drop(columns=["pid"]).reset_index(drop=True)
    frame.to_parquet(tmp_path / "golden.parquet")
    preflight = ["preflight", *args[1:], "--samples", "4", "--address", cluster["address"], "--json"]
    preflight[preflight.index("--output") + 1] = str(tmp_path / "other")

    def tried() -> dict[str, dict[str, str]]:
        done = attached(*preflight, "--golden", str(tmp_path / "golden.parquet"))
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


def test_a_job_begins_with_its_own_preflight_and_not_when_it_resumes(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    out = tmp_path / "out"
    args = [*job_args(photos(60, bad_percent=5), out), "--address", cluster["address"]]
    args += ["--set", "preflight.enabled=true", "--set", "preflight.samples=40"]
    done = attached(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    log = done.stderr
    for said in (
        "trying one actor",
        "preflight: samples",
        "preflight: forward pass",
        "preflight: versions",
        "images/s, limited by",
    ):
        assert said in log, log
    assert log.index("trying one actor") < log.index("preflight: samples") < log.index("recounting")
    verified(str(out), attached)
    (out / "_SUCCESS").unlink()
    next((out / "_commits").iterdir()).unlink()
    again = attached(*args)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "preflight" not in again.stderr
    verified(str(out), attached)


def test_a_job_whose_preflight_fails_ends_with_2_and_keeps_the_verdict(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    folder, out = photos(12), tmp_path / "out"
    golden = tmp_path / "golden.csv"
    golden.write_text("uri,mean\n" + "".join(f"{path},999\n" for path in sorted(folder.iterdir())[:3]))
    args = [*job_args(folder, out), "--address", cluster["address"], "--set", "preflight.enabled=true"]
    done = attached(*args, "--set", f"preflight.golden_manifest={golden}")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "preflight: golden samples: 3 of 3 samples, mean are off" in done.stdout
    assert json.loads((out / "_FAILED").read_text())["exit_code"] == 2
    assert not list(out.glob("_commits/*"))
    # What is expected belongs to no fingerprint: the same job goes on without.
    assert attached(*args).returncode == 0
    verified(str(out), attached)


def test_an_image_that_ends_its_process_is_a_bad_sample(
    photos: Callable[..., Path], tmp_path: Path, program: Program
) -> None:
    folder = photos(6)
    with sorted(folder.iterdir())[2].open("ab") as file:
        file.write(b"POISON:crash")
    args = job_args(folder, tmp_path / "out")
    args = [a for a in args if a not in ("--dashboard-host", "none")]
    done = program("preflight", *args[1:], "--json", env={"PYTHONPATH": str(POISON)})
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["samples"]["state"] == "WARN"
    assert "DECODER_CRASH" in checks["samples"]["finding"]
    assert checks["forward pass"]["state"] == "OK"


def test_each_kind_of_gpu_is_tried(photos: Callable[..., Path], tmp_path: Path, program: Program) -> None:
    """Ray counts GPUs and their kinds, which here are names; the predictor needs none."""
    kinds = json.dumps({"accelerator_type:L4": 1, "accelerator_type:T4": 1})
    with ray_cluster(4, tmp_path / "ray", options=("--num-gpus=2", f"--resources={kinds}")) as addresses:
        args = [*job_args(photos(12), tmp_path / "out"), "--set", "inference.gpus_per_actor=1"]
        args = [a for a in args if a not in ("--dashboard-host", "none")]
        done = program("preflight", *args[1:], "--address", addresses["address"], "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    passes = [c["finding"] for c in json.loads(done.stdout)["checks"] if c["name"] == "forward pass"]
    assert passes == ["a batch of 8 gave 8 predictions on L4", "a batch of 8 gave 8 predictions on T4"]


def test_members_of_a_tar_file_are_tried_as_members(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    folder = photos(12)
    archive = tmp_path / "in" / "photos.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    out = tmp_path / "out"
    args = [*job_args(archive.parent, out), "--address", cluster["address"], "--set", "preflight.enabled=true"]
    done = attached(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preflight: samples: all 12 samples were fetched and decoded" in " ".join(done.stderr.split())
    frame = pd.read_parquet(out / "predictions")
    frame.drop(columns=["pid"]).to_parquet(tmp_path / "golden.parquet")
    args = [a for a in job_args(archive.parent, tmp_path / "other") if a not in ("--dashboard-host", "none")]
    tried = attached(
        "preflight", *args[1:], "--address", cluster["address"], "--golden", f"{tmp_path}/golden.parquet", "--json"
    )
    checks = {check["name"]: check for check in json.loads(tried.stdout)["checks"]}
    assert checks["golden samples"]["finding"] == "12 samples, mean are as expected"
    assert checks["output schema"]["finding"] == "uri string, shard int32, row int32, mean float, pid int64"
    # And nothing of it stays, neither files nor decisions.
    assert not (tmp_path / "other").exists()


def test_store_that_is_down_is_no_user_error(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str], s3: str, proxy: Proxy
) -> None:
    """Exit code 2 would end the retries, too."""
    source = f"s3://tests/{tmp_path.name}/in"
    store = Store(source, StorageConfig(endpoint_url=s3))
    for path in photos(8).iterdir():
        store.put(path.name, path.read_bytes())
    settings = [
        "--set",
        f"storage.endpoint_url={proxy.url}",
        "--set",
        "storage.max_retries=0",
        "--set",
        "storage.retry_timeout_s=1",
    ]
    proxy.answer = lambda method, path: 503 if method == "GET" and path.endswith(".jpg") else None
    args = [
        *job_args(source, tmp_path / "out"),
        *settings,
        "--address",
        cluster["address"],
        "--set",
        "preflight.enabled=true",
    ]
    done = attached(*args)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "every one of 8 samples failed at fetch with" in done.stdout
    (attempt,) = read_attempts(Store(str(tmp_path / "out"), StorageConfig()))
    assert attempt.state == "failed"
