"""The report, made in a process of its own, so that the job outlives whatever happens in it.

It reads untrusted files. A decoder, or pyarrow at a damaged file, can end the process that it runs in, and a store that does not
answer can block it. A job that is done must not fail because of its report.
"""

from __future__ import annotations

from dataclasses import dataclass

from batch_inference.config import JobConfig
from batch_inference.errors import BatchInferenceError
from batch_inference.output.records import Commit
from batch_inference.system.subprocesses import Died, Raised, Returned, TimedOut, call


class ReportError(Exception):
    """There is no report; the message says why."""


@dataclass(frozen=True)
class ReportTimeouts:
    """Limits on the time for a report, in seconds.

    Attributes:
        read_s: For reading predictions.
        images_s: For reading images.
        total_s: For everything; the report is given up after it.
    """

    read_s: float
    images_s: float
    total_s: float


#: A cluster waits for the report.
AFTER_SUCCESS = ReportTimeouts(60.0, 30.0, 180.0)
AFTER_FAILURE = ReportTimeouts(20.0, 15.0, 120.0)


def make_in_subprocess(
    output: str, config: JobConfig, timeouts: ReportTimeouts, commits: list[Commit] | None = None
) -> str:
    """Make the report of an output, and return its URI.

    Args:
        output: The output folder.
        config: The job's configuration.
        timeouts: Limits on the time for it.
        commits: The verified commits, if they have just been read; reading those of a large job takes minutes.

    Raises:
        ReportError: If it cannot be made.
    """
    try:
        outcome = call(_make, output, config, timeouts, commits, timeout_s=timeouts.total_s)
    except OSError as exc:
        raise ReportError(f"its process can't be started: {exc}") from None
    match outcome:
        case Returned(value=uri):
            return uri
        case Raised(BatchInferenceError() as error):
            raise ReportError(error.message)
        case Raised(error):
            raise ReportError(f"{type(error).__name__}: {error}")
        case Died(exit_code, last_line):
            raise ReportError(last_line[:300] or f"its process ended with {exit_code}")
        case TimedOut(seconds):
            raise ReportError(f"it was not done after {seconds:g} s")


def _make(output: str, config: JobConfig, timeouts: ReportTimeouts, commits: list[Commit] | None) -> str:
    # Only that process needs what makes the report.
    from batch_inference.report.build import make_report

    return make_report(output, config, read_s=timeouts.read_s, images_s=timeouts.images_s, commits=commits).uri
