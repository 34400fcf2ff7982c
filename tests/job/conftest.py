"""Whole jobs: the program as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from tests.support import emulators
from tests.support.attached import AttachedProgram
from tests.support.jobs import HERE, PROGRAM, environment
from tests.support.limits import HANG_S
from tests.support.servers import Proxy, ray_cluster, s3_server

MEMORY_OF_ONE_GIB = 6
S3_ENV = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
# Also for the Ray cluster's processes, which do the reading.
os.environ.update(S3_ENV | emulators.AZURE_ENV)


def pytest_xdist_auto_num_workers() -> int:
    """Return the number of processes for `--numprocesses auto`: one more than cores, as many tests wait for a limit or an end.

    Each has a Ray cluster, and so fewer run where memory is short.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min((os.cpu_count() or 1) + 1, int(memory / MEMORY_OF_ONE_GIB)))


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
        yield emulators.google_key_file(file)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, google_key: RSAPublicKey) -> Iterator[dict[str, str]]:
    """A running Ray cluster, so that a job's start costs less than Ray's."""
    with ray_cluster(4, tmp_path_factory.mktemp("ray")) as addresses:
        yield addresses


@pytest.fixture(scope="session")
def attached(cluster: dict[str, str]) -> Iterator[AttachedProgram]:
    """Runs the program in a process that stays attached to the cluster: for all that is not about a start or an end."""
    instance = AttachedProgram(cluster["address"])
    yield instance
    instance.close()


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the program to its end; the working folder has the tests' predictors in it."""

    def call(
        *args: str, timeout_s: float = HANG_S, env: dict[str, str] | None = None, cwd: Path = HERE
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


sys.path.insert(0, str(HERE))
