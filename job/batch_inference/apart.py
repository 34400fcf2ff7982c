"""The report made in a process of its own, which a job outlives whatever happens in it.

What it reads are files of strangers. A decoder, or pyarrow at a damaged file, can end the process that it runs in, and a store that does
not answer can hold it up: a job that is done must not fail of that.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from batch_inference.config import JobConfig
from batch_inference.errors import BatchInferenceError
from batch_inference.ledger import Commit

#: Where the report is in an output.
REPORT = "_report/report.html"


class ReportFailed(Exception):  # noqa: N818 - no error of the job's
    """There is no report; says why."""


@dataclass(frozen=True)
class Patience:
    """How long a report may take, in seconds.

    Attributes:
        read_s: For reading predictions.
        images_s: For reading images.
        whole_s: For everything; then it is given up.
    """

    read_s: float
    images_s: float
    whole_s: float


#: While a cluster waits.
AFTER_SUCCESS = Patience(60.0, 30.0, 180.0)
AFTER_FAILURE = Patience(20.0, 15.0, 120.0)


def make_apart(output: str, config: JobConfig, patience: Patience, commits: list[Commit] | None = None) -> str:
    """Makes the report of an output; returns where it is.

    Args:
        output: The output folder.
        config: The job's.
        patience: How long it may take.
        commits: Those that count, where they have just been read; of a large job that takes minutes.

    Raises:
        ReportFailed: If it can't be made.
    """
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path[:] = {sys.path!r}; from batch_inference import apart; apart.serve()",
    ]
    request = pickle.dumps((output, config, patience, commits))
    try:
        process = subprocess.Popen(  # noqa: S603 - this program itself
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as exc:
        raise ReportFailed(f"its process can't be started: {exc}") from None
    try:
        out, err = process.communicate(request, timeout=patience.whole_s)
    except subprocess.TimeoutExpired:
        raise ReportFailed(f"it was not done after {patience.whole_s:g} s") from None
    finally:
        # Also what decodes images for it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    try:
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        last = err.decode("utf-8", "replace").strip().splitlines()[-1:] or [
            f"its process ended with {process.returncode}"
        ]
        raise ReportFailed(last[0][:300]) from None
    if "failed" in answer:
        raise ReportFailed(str(answer["failed"]))
    return str(answer["uri"])


def serve() -> None:
    """The other side: reads what is wanted from standard input, and writes what came of it as one line."""
    output, config, patience, commits = pickle.load(sys.stdin.buffer)  # noqa: S301 - from :func:`make_apart`
    from batch_inference.report import make

    try:
        made = make(output, config, read_s=patience.read_s, images_s=patience.images_s, commits=commits)
        answer: dict[str, Any] = asdict(made)
    except BatchInferenceError as exc:
        answer = {"failed": exc.message}
    except Exception as exc:
        answer = {"failed": f"{type(exc).__name__}: {exc}"}
    print(json.dumps(answer), flush=True)
