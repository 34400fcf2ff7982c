"""Whole jobs: the program as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from tests.job import stores
from tests.job.servers import BIN, Proxy, ray_cluster, s3_server

PROGRAM = str(BIN / "batch-inference")
HERE = Path(__file__).parent
# Long enough for a cold start of Ray and torch on two busy cores; a job that hangs is found all the same.
RUN_TIMEOUT_S = 240
S3_ENV = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
# Also for the Ray cluster's processes, which do the reading.
os.environ.update(S3_ENV | stores.AZURE_ENV)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of a real S3 server with the bucket ``tests``."""
    with s3_server(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def proxy(s3: str) -> Iterator[Proxy]:
    """A proxy before the S3 server."""
    instance = Proxy(s3)
    yield instance
    instance.close()


@pytest.fixture(scope="session")
def google_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RSAPublicKey]:
    """Public key of the service account whose key file ``GOOGLE_APPLICATION_CREDENTIALS`` names from now on."""
    file = tmp_path_factory.mktemp("google") / "key.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
        yield stores.google_key_file(file)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, google_key: RSAPublicKey) -> Iterator[dict[str, str]]:
    """A running Ray cluster, so that a job's start costs less than Ray's."""
    with ray_cluster(4, tmp_path_factory.mktemp("ray")) as addresses:
        yield addresses


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the program to its end; the working folder has the tests' predictors in it."""

    def call(
        *args: str, timeout_s: float = RUN_TIMEOUT_S, env: dict[str, str] | None = None, cwd: Path = HERE
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, *args],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            cwd=cwd,
            env=environment(env),
            check=False,
        )

    return call


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """The program's environment: as the test's, without authentication of Ray's test cluster."""
    return {**os.environ, "RAY_AUTH_MODE": "disabled", "COLUMNS": "120", **(extra or {})}


def start(*args: str, env: dict[str, str] | None = None, log: Path | None = None) -> subprocess.Popen[bytes]:
    """Starts the program and returns at once."""
    out = log.open("ab") if log else subprocess.DEVNULL
    return subprocess.Popen(
        [PROGRAM, *args], cwd=HERE, env=environment(env), stdout=out, stderr=out, start_new_session=True
    )


def job_args(
    photos: Path | str, output: Path | str, *, shard_size: int = 10, predictor: str = "predictors:MeanColor"
) -> list[str]:
    """Arguments of a small job with a trivial predictor on the CPU; no image is read again for the report."""
    return [
        "run", str(photos), "--output", str(output), "--dashboard-host", "none",
        "--set", f"predictor={predictor}", "--set", "inference.actors=1", "--set", "inference.gpus_per_actor=0",
        "--set", "inference.batch_size=8", "--set", f"shard_size={shard_size}", "--set", "errors.max_percent=null",
        "--set", "report.thumbnails=0",
    ]  # fmt: skip


def verified(output: str, program: Callable[..., subprocess.CompletedProcess[str]], *args: str) -> dict[str, object]:
    """What ``verify`` finds, which must be that all is well."""
    done = program("verify", output, "--json", *args)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] and found["finished"], found
    return dict(found)


sys.path.insert(0, str(HERE))
