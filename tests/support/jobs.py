"""Start whole jobs, wait for them, and check what they wrote."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.support.limits import HANG_S
from tests.support.servers import BIN

PROGRAM = str(BIN / "batch-inference")
HERE = Path(__file__).parents[1] / "job"
# The package's folder, which must win over what happens to be installed.
CHECKOUT = Path(__file__).resolve().parents[2] / "job"


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    """Return the program's environment: as the test's, without authentication of Ray's test cluster.

    A PYTHONPATH in ``extra`` comes after that of the checkout under test.
    """
    variables = {**os.environ, "RAY_AUTH_MODE": "disabled", "COLUMNS": "120", **(extra or {})}
    if extra and "PYTHONPATH" in extra:
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHECKOUT), extra["PYTHONPATH"]]))
    return variables


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
    """Return what ``verify`` finds; it must find no problem."""
    done = program("verify", output, "--json", *args)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] and found["finished"], found
    return dict(found)


POISON = Path(__file__).parents[1] / "poison"


def find(cluster: dict[str, str], title: str) -> psutil.Process:
    """The cluster's newest process with that title (Ray names its workers by what they run)."""
    found = []
    for process in psutil.Process(int(cluster["process"])).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that has just ended
            if " ".join(process.cmdline()).startswith(title):
                found.append(process)
    assert found, f"no process of the cluster is called {title}"
    return max(found, key=lambda process: process.create_time())


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
