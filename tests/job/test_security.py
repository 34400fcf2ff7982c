"""Secrets that a job must not give away, and requests that its inputs must not talk it into."""

from __future__ import annotations

import csv
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.support.jobs import job_args, start, verified
from tests.support.servers import stop

Program = Callable[..., subprocess.CompletedProcess[str]]
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-1-3f9c2e",
    "HF_TOKEN": "planted-2-77ab01",
    "AZURE_STORAGE_ACCOUNT_KEY": "planted-3-c0ffee",
    "DATABASE_URL": "postgres://user:planted-4-d00d1e@db/x",
}


@pytest.fixture
def ray() -> Iterator[Path]:
    """For Ray's files; its sockets' names may have a hundred characters, and pytest's folders have that many."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_secrets_of_the_environment_are_found_nowhere(
    fails: bool, photos: Callable[..., Path], tmp_path: Path, ray: Path
) -> None:
    """Not in the output, nor in what is printed, nor in Ray's logs, nor in any command line."""
    args = job_args(photos(40, bad_percent=0 if fails else 10), tmp_path / "out")
    args += ["--set", "predictor=predictors:FailsOnEverything"] if fails else ["--set", "predictor.args=[0.2]"]
    log = tmp_path / "log"
    process = start(*args, log=log, env={**SECRETS, "RAY_TMPDIR": str(ray)})
    lines: set[str] = set()
    try:
        while process.poll() is None:
            for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                try:
                    lines.add(" ".join(child.cmdline()))
                except psutil.Error:
                    continue
            try:
                process.wait(0.3)
            except subprocess.TimeoutExpired:
                continue
        assert process.returncode == (2 if fails else 0), log.read_text()
    finally:
        stop(process)
    assert any("ray::" in line for line in lines)
    files = [file for folder in (tmp_path / "out", ray) for file in folder.rglob("*") if file.is_file()]
    assert any(file.suffix == ".log" for file in files) and any(file.name == "_job.json" for file in files)
    for secret in SECRETS.values():
        word = secret.partition("planted")[2][:10]
        assert not [line for line in lines if word in line]
        for file in [*files, log]:
            assert word.encode() not in file.read_bytes(), file


def test_untrusted_manifest_opens_nothing_that_is_not_allowed(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    """Local files, links out of the folder, the metadata service, control characters: rows like any other, and told apart."""
    folder = photos(3)
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(next(folder.iterdir()).read_bytes())
    (folder / "link.jpg").symlink_to(secret)
    good = sorted(str(file) for file in folder.iterdir() if not file.is_symlink())
    bad = {
        str(secret): "NOT_ALLOWED",
        str(folder / "link.jpg"): "NOT_ALLOWED",
        f"{folder}/../secret.jpg": "NOT_ALLOWED",
        "/proc/self/environ": "NOT_ALLOWED",
        "http://169.254.169.254/latest/meta-data/iam": "INVALID_URI",
        "s3://other/\x1b[2J.jpg": "NOT_ALLOWED",
        f"{folder}/\x1b]0;owned\x07.jpg": "NOT_FOUND",
    }
    manifest = tmp_path / "list.csv"
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([["uri"], *([uri] for uri in [*good, *bad])])
    args = job_args("", tmp_path / "out")
    args[1:2] = ["--manifest", str(manifest)]
    done = attached(*args, "--set", f"input.allowed_prefixes=[{folder}]", "--address", cluster["address"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    verified(str(tmp_path / "out"), attached)
    rows = [row for file in (tmp_path / "out/errors").iterdir() for row in pq.read_table(file).to_pylist()]
    assert sorted(row["error_type"] for row in rows) == sorted(bad.values())
    predicted = [row for file in (tmp_path / "out/predictions").iterdir() for row in pq.read_table(file).to_pylist()]
    assert sorted(row["uri"] for row in predicted) == [f"file://{name}" for name in good]


def test_hostile_name_in_a_message_moves_no_cursor(
    photos: Callable[..., Path], tmp_path: Path, program: Program
) -> None:
    name = tmp_path / "\x1b[2J\u202egpj"
    done = program("verify", str(name))
    assert done.returncode == 2
    assert "\x1b" not in done.stdout + done.stderr
    assert r"\x1b[2J\u202e" in done.stdout + done.stderr
