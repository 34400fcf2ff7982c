"""The facts that a report shows, and the path of the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from batch_inference.config import JobConfig
from batch_inference.output.attempts import AttemptRecord
from batch_inference.output.records import Commit, JobRecord
from batch_inference.output.tally import Tally
from batch_inference.report.failure_examples import FailureGroup
from batch_inference.report.prediction_stats import PredictionStats
from batch_inference.report.thumbnails import Thumbnail

#: Path of the report in an output folder.
REPORT_PATH = "_report/report.html"


@dataclass
class ReportFacts:
    """The facts that a report shows.

    Attributes:
        output: Location of the output, without credentials.
        job: Content of ``_job.json``.
        config: Current configuration of the report and the stores.
        state: ``succeeded``, ``failed``, ``unfinished`` or ``planned``.
        failure: Content of ``_FAILED``; empty if the job did not fail.
        commits: The valid commits.
        tally: Counts over these commits.
        attempts: Records of the attempts, in order of time.
        rows_over_time: Seconds since 1970 and number of rows that were done at that time, in order of time.
        stats: Statistics of the predictions; None if they could not be read.
        failure_groups: Failed rows by stage and type.
        thumbnails: Thumbnails of samples by shard and row.
        notes: Parts that could not be made, each with the reason.
        verdict: For a job that succeeded with more errors than ``errors.max_percent``, a sentence that says so; else "".
        made_at: Time when the report was made.
    """

    output: str
    job: JobRecord
    config: JobConfig
    state: str
    failure: dict[str, Any]
    commits: list[Commit]
    tally: Tally
    attempts: list[AttemptRecord] = field(default_factory=list)
    rows_over_time: list[tuple[float, int]] = field(default_factory=list)
    stats: PredictionStats | None = None
    failure_groups: list[FailureGroup] = field(default_factory=list)
    thumbnails: dict[tuple[int, int], Thumbnail] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    verdict: str = ""
    made_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
