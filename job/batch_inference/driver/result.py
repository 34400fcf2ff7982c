"""The result of a job that succeeded."""

from __future__ import annotations

from dataclasses import dataclass

from batch_inference.output.tally import JobCounts


@dataclass(frozen=True, kw_only=True)
class RunResult(JobCounts):
    """Result of a job that succeeded, returned by ``run``; see :class:`~batch_inference.output.tally.JobCounts` for the counts.

    Attributes:
        output: Canonical URI of the output folder.
        fingerprint: Fingerprint of the job.
        attempt: Identifier of this attempt.
        already_done: Whether an earlier attempt had finished everything.
        elapsed_s: Seconds this attempt took.
        images_per_s: Rows per second of this attempt, without start-up; None where it was too short to tell.
        limit: Bottleneck of this attempt (see :class:`~batch_inference.pipeline.bottleneck.Bottleneck`), "" where nothing was run.
        balance: The bottleneck as a sentence, with the setting to change.
        report: URI of the report, "" if there is none.
        excess: Sentence that more rows failed than ``errors.max_percent``, where that did not end the job; else "".
    """

    output: str
    fingerprint: str
    attempt: str
    already_done: bool
    elapsed_s: float
    images_per_s: float | None
    limit: str = ""
    balance: str = ""
    report: str = ""
    excess: str = ""
