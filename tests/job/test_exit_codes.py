"""Every exit code, reached by a real cause; every user's mistake, answered with fact and remedy."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from batch_inference.config import StorageConfig
from batch_inference.output.attempts import read_attempts
from batch_inference.storage.store import Store
from tests.support.jobs import job_args, start, verified, wait_for
from tests.support.limits import HANG_S
from tests.support.servers import Proxy, stop

Program = Callable[..., subprocess.CompletedProcess[str]]


def failed(done: subprocess.CompletedProcess[str], code: int, fact: str, remedy: str = "") -> None:
    """Checks exit code, message, and the five lines of the verdict."""
    text = done.stdout + done.stderr
    assert done.returncode == code, text
    assert "Traceback" not in text, text
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 5, done.stdout
    assert lines[0].startswith(("FAILED" if code != 130 else "INTERRUPTED") + f" (exit {code})")
    assert re.search(fact, text), text
    assert lines[3].startswith("remedy: ")
    assert len(lines[3]) > len("remedy: ")
    assert re.search(remedy, lines[3]), lines[3]


def upload(folder: Path, uri: str, url: str) -> None:
    store = Store(uri, StorageConfig(endpoint_url=url))
    for file in folder.iterdir():
        store.put(file.name, file.read_bytes())


def test_finished_job_ends_with_0_and_prints_no_line_of_ray(
    photos: Callable[..., Path], tmp_path: Path, program: Program
) -> None:
    """The whole way with a Ray of its own, as on a laptop."""
    done = program(*job_args(photos(30, bad_percent=10), tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    for line in done.stderr.splitlines():
        assert re.match(r"\d\d:\d\d:\d\d \[(info|warning)\] ", line), done.stderr
    verified(str(tmp_path / "out"), program)


@pytest.mark.parametrize(
    ("change", "fact", "remedy"),
    [
        (["--set", "predictor=predictors:Nobody"], "predictors has no 'Nobody'; its classes: .*MeanColor", "Name one"),
        (["--set", "predictor=nowhere:X"], "there is no module 'nowhere'", "nowhere.py"),
        (["--set", "inference.gpus_per_actor=1"], "need 1 GPUs .*there are 0", "."),
        (["--set", "predictor=null", "--model", "resnet1"], "resnet1", "."),
    ],
)  # fmt: skip
def test_user_error_ends_with_2(
    change: list[str], fact: str, remedy: str, photos: Callable[..., Path], tmp_path: Path, program: Program
) -> None:
    failed(program(*job_args(photos(20), tmp_path / "out"), *change), 2, fact, remedy)
    assert not list((tmp_path / "out").glob("_commits/*"))


@pytest.mark.parametrize(
    ("predictor", "fact", "remedy"),
    [
        ("CannotStart", "could not be constructed: FileNotFoundError: weights.bin", "__init__"),
        ("FailsOnEverything", r"with PREDICTOR_ERROR: KeyError: 'pixels'\n  File .*\.py", "predictor"),
        ("Flattened", "is chance: its column 'box' has 2 for .* alone", "depends_on_batch=true"),
    ],
)
def test_fault_of_a_predictor_ends_with_2(
    predictor: str, fact: str, remedy: str, photos: Callable[..., Path], tmp_path: Path, attached: Program
) -> None:
    args = job_args(photos(20), tmp_path / "out", predictor=f"predictors:{predictor}")
    failed(attached(*args), 2, fact, remedy)
    assert not list((tmp_path / "out").glob("_commits/*"))


def test_missing_inputs_end_with_2(tmp_path: Path, program: Program) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.md").write_text("x")
    failed(
        program(*job_args(tmp_path / "nowhere", tmp_path / "out")), 2, "there is no file or folder .*nowhere", "path"
    )
    failed(
        program(*job_args(tmp_path / "empty", tmp_path / "out")),
        2,
        r"no images in .*1 file ending with \.md",
        "extensions",
    )


def test_denied_access_to_every_image_ends_with_2_within_the_first_shard(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, proxy: Proxy, s3: str, cluster: dict[str, str]
) -> None:
    source, output = f"s3://tests/{tmp_path.name}/in", f"s3://tests/{tmp_path.name}/out"
    upload(photos(600), source, s3)
    proxy.answer = lambda method, path: 403 if method == "GET" and "/in/image" in path else None
    args = [*job_args(source, output, shard_size=300), "--set", f"storage.endpoint_url={proxy.url}"]
    failed(attached(*args, "--address", cluster["address"]), 2, "failed at fetch with ACCESS_DENIED", "credentials")
    asked = [path for method, path in proxy.requests if method == "GET" and "/in/image" in path]
    assert len(asked) < 300, "the store was asked for more than a shard"
    ledger = Store(output, StorageConfig(endpoint_url=s3))
    assert not list(ledger.objects("_commits"))
    assert not list(ledger.objects("errors"))
    verdict = json.loads(ledger.get("_FAILED"))
    assert verdict["exit_code"] == 2
    # Once that is fixed, the same command does everything.
    proxy.answer = lambda method, path: None
    done = attached(*args, "--address", cluster["address"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(ledger.objects("_FAILED"))


def test_denied_access_to_a_few_images_is_rows_and_no_failure(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, proxy: Proxy, s3: str, cluster: dict[str, str]
) -> None:
    source, output = f"s3://tests/{tmp_path.name}/in", f"s3://tests/{tmp_path.name}/out"
    upload(photos(40), source, s3)
    proxy.answer = lambda method, path: 403 if path.endswith(("000003.jpg", "000017.jpg")) and method == "GET" else None
    args = [*job_args(source, output, shard_size=1), "--set", f"storage.endpoint_url={proxy.url}"]
    done = attached(*args, "--address", cluster["address"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "38 predictions and 2 errors" in done.stdout
    assert "fetch ACCESS_DENIED 2" in done.stdout


def test_wrong_credentials_of_the_output_end_with_2(
    photos: Callable[..., Path], tmp_path: Path, program: Program, s3: str
) -> None:
    args = [*job_args(photos(5), f"s3://tests/{tmp_path.name}"), "--set", f"storage.endpoint_url={s3}"]
    failed(program(*args, env={"AWS_SECRET_ACCESS_KEY": "wrong"}), 2, "access denied|not authenticated", "credentials")


def test_more_failed_rows_than_allowed_end_with_3(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    args = [*job_args(photos(80, bad_percent=30), tmp_path / "out"), "--address", cluster["address"]]
    limits = ["--set", "errors.max_percent=20", "--set", "errors.min_rows=40"]
    failed(attached(*args, *limits), 3, r"rows failed = \d\d\.\d %, more than errors.max_percent = 20", "max_percent")
    failed(attached(*args, "--set", "errors.max_count=5"), 3, "more than errors.max_count = 5", "max_count")
    # A raised limit is no other job: it resumes and finishes.
    done = attached(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    verified(str(tmp_path / "out"), attached)


def test_automatic_retry_of_the_same_run_ends_with_3_again_in_seconds(
    photos: Callable[..., Path], tmp_path: Path, program: Program, attached: Program, cluster: dict[str, str]
) -> None:
    """As the operator does, on a cluster with GPUs; a person who starts the command again means it."""
    args = [*job_args(photos(80, bad_percent=30), tmp_path / "out"), "--address", cluster["address"]]
    limit = ["--set", "errors.max_count=5"]
    run = {"BATCH_INFERENCE_RUN": "photos-1a2b3c4d"}
    failed(program(*args, *limit, env=run), 3, "more than errors.max_count = 5")
    nobody = [*args[:-1], "127.0.0.1:1"]  # nothing is started, nobody is asked
    again = "an earlier attempt of the run photos-1a2b3c4d failed, and this one would as well: .*max_count = 5"
    failed(program(*nobody, *limit, env=run), 3, again, "--force-retry")
    failed(program(*nobody, *limit, env=run), 3, again, "--force-retry")
    failed(program(*args, *limit, "--force-retry", env=run), 3, "rows failed|more than errors.max_count = 5")
    assert program(*args, env={"BATCH_INFERENCE_RUN": "photos-5e6f7a8b"}).returncode == 0
    verified(str(tmp_path / "out"), attached)


def test_accounting_error_ends_with_4(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    """A file that the ledger names is lost: neither `run` nor `verify` calls that a success."""
    output = tmp_path / "out"
    args = [*job_args(photos(40), output), "--address", cluster["address"]]
    assert attached(*args).returncode == 0
    lost = sorted((output / "predictions").iterdir())[1]
    lost.unlink()
    done = attached("verify", str(output))
    assert done.returncode == 4
    assert f"predictions/{lost.name} is committed but missing" in done.stdout
    failed(attached(*args), 4, f"{lost.name} is committed but missing", "_commits")
    # The remedy works: without its commit the shard is done again.
    (output / "_commits/shard-00001.json").unlink()
    assert attached(*args).returncode == 0
    verified(str(output), attached)


def test_store_that_stops_ends_the_job_with_5_and_it_resumes(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, proxy: Proxy, cluster: dict[str, str]
) -> None:
    output = f"s3://tests/{tmp_path.name}"
    commits = 0

    def break_down(method: str, path: str) -> int | None:
        nonlocal commits
        commits += method == "PUT" and "/_commits/" in path
        return 503 if commits > 3 else None

    proxy.answer = break_down
    args = [
        *job_args(photos(100), output),
        "--set",
        f"storage.endpoint_url={proxy.url}",
        "--address",
        cluster["address"],
    ]
    args += ["--set", "storage.max_retries=1", "--set", "storage.retry_timeout_s=5"]
    failed(attached(*args), 5, "cannot (create|write|read) s3://", "same command")
    proxy.answer = lambda method, path: None
    done = attached(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    verified(output, attached, "--set", f"storage.endpoint_url={proxy.url}")


def test_missing_cluster_ends_with_5(photos: Callable[..., Path], tmp_path: Path, program: Program) -> None:
    failed(
        program(*job_args(photos(5), tmp_path / "out"), "--address", "127.0.0.1:9"),
        5,
        "no Ray cluster .* at 127.0.0.1:9",
        "port",
    )


def test_a_file_left_by_a_driver_that_died_after_losing_is_found_and_swept(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    output = tmp_path / "out"
    args = [*job_args(photos(20), output), "--address", cluster["address"]]
    assert attached(*args).returncode == 0
    left = output / "predictions/shard-00000-deadbeef.parquet"
    left.write_bytes(next((output / "predictions").glob("shard-00000-*")).read_bytes())
    done = attached("verify", str(output))
    assert done.returncode == 4
    assert f"predictions/{left.name} is not committed" in done.stdout
    assert attached(*args).returncode == 0
    assert not left.exists()
    verified(str(output), attached)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_job_ends_with_130_within_seconds_and_resumes(
    number: signal.Signals, photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    """Ctrl-C reaches the whole process group, the processes of a Ray of its own included."""
    output, log = tmp_path / "out", tmp_path / "log"
    args = job_args(photos(400, bad_percent=5), output, predictor="predictors:SlowStart")
    if number is signal.SIGTERM:
        args += ["--address", cluster["address"]]
    process = start(*args, log=log)
    deadline = time.monotonic() + HANG_S
    while len(list(output.glob("_commits/*"))) < 2:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    assert process.wait(30) == 130, log.read_text()
    text = log.read_text()
    assert "INTERRUPTED (exit 130): stopped by SIG" in text
    assert "it resumes" in text
    assert "Traceback" not in text, text
    committed = len(list(output.glob("_commits/*")))
    assert 2 <= committed < 40
    status = json.loads(attached("status", str(output), "--json").stdout)
    assert (status["state"], status["shards_done"]) == ("unfinished", committed)
    assert attached("verify", str(output)).returncode == 0
    (attempt,) = read_attempts(Store(str(output), StorageConfig()))
    assert attempt.state == "interrupted"
    assert not (output / "_FAILED").exists()


@pytest.mark.parametrize("program_name", ["raylet", "gcs_server"])
def test_killed_process_of_ray_ends_with_5_and_a_verdict_and_the_job_resumes(
    program_name: str, photos: Callable[..., Path], tmp_path: Path, attached: Program
) -> None:
    """Ray's native code ends the driver then, past everything of Python's."""
    output, log = tmp_path / "out", tmp_path / "log"
    args = [*job_args(photos(120), output), "--set", "predictor.args=[0.2]"]
    process = start(*args, log=log)
    try:
        wait_for(lambda: len(list(output.glob("_commits/*"))) >= 2, process, log)
        (victim,) = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if child.name().startswith(program_name)
        ]
        victim.kill()
        assert process.wait(150) == 5, log.read_text()
    finally:
        stop(process)
    text = log.read_text()
    lines = text.strip().splitlines()[-5:]
    assert lines[0].startswith("FAILED (exit 5): "), text
    assert re.match(r"rows: \d+ of 120 came back, \d+ of 12 shards are committed and stay", lines[1]), text
    assert "it resumes" in lines[3]
    assert "Traceback" not in text, text
    assert json.loads((output / "_FAILED").read_text())["exit_code"] == 5
    done = attached(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    verified(str(output), attached)


def test_killed_program_leaves_nothing(photos: Callable[..., Path], tmp_path: Path) -> None:
    """Its driver is another process, with a Ray below it."""
    output, log = tmp_path / "out", tmp_path / "log"
    args = job_args(photos(120), output)
    process = start(*args, "--set", "predictor.args=[0.2]", log=log)
    try:
        wait_for(lambda: len(list(output.glob("_commits/*"))) >= 1, process, log)
        # Ray's workers and agents notice by themselves, and in their own time, that their raylet is gone.
        family = [
            child
            for child in psutil.Process(process.pid).children(recursive=True)
            if not child.name().startswith("ray::")
        ]
        assert {"raylet", "gcs_server"} <= {child.name() for child in family}
        process.kill()
        process.wait(10)
    finally:
        stop(process)
    _, alive = psutil.wait_procs(family, timeout=HANG_S)
    assert not alive


def test_interrupt_while_ray_waits_for_the_model_ends_with_130(
    photos: Callable[..., Path], tmp_path: Path, cluster: dict[str, str]
) -> None:
    """The driver is then in Ray's native code, which lets one kind of exception through."""
    log = tmp_path / "log"
    args = job_args(photos(20), tmp_path / "out", predictor="predictors:SlowStart")
    process = start(*args, "--address", cluster["address"], log=log)
    deadline = time.monotonic() + HANG_S
    while "starting Ray and the model" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130, log.read_text()
    assert "INTERRUPTED (exit 130): stopped by SIGTERM" in log.read_text()


def test_json_is_one_document_for_programs(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    args = [*job_args(photos(10), tmp_path / "out"), "--address", cluster["address"], "--json", "--quiet"]
    done = attached(*args)
    assert json.loads(done.stdout)["predictions"] == 10
    assert done.stderr == ""
    bad = attached(*args, "--set", "nothing=1")
    assert bad.returncode == 2
    assert json.loads(bad.stdout)["exit_code"] == 2
