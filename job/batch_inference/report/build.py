"""Make the report of a job: one HTML file that loads nothing from anywhere else.

It is made from the files of the output alone, so at any time and for any job: finished, failed or in progress. Its size is bounded
however large the job is. A part that cannot be made is replaced by a note in the report; the outcome of the job never depends on it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from batch_inference.config import JobConfig
from batch_inference.errors import BatchInferenceError
from batch_inference.output.attempts import read_attempts
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit, JobRecord
from batch_inference.output.status import Outcome, read_outcome
from batch_inference.output.tally import Tally
from batch_inference.report.facts import REPORT_PATH, ReportFacts
from batch_inference.report.failure_examples import group_failures, interleave
from batch_inference.report.page import render
from batch_inference.report.prediction_stats import collect_stats
from batch_inference.report.throughput import rows_over_time
from batch_inference.report.thumbnails import read_thumbnails
from batch_inference.storage.store import Store
from batch_inference.storage.uris import display_uri


@dataclass(frozen=True)
class ReportSummary:
    """A summary of a report that was written.

    Attributes:
        uri: Location of the report.
        state: State of the job: ``succeeded``, ``failed``, ``unfinished`` or ``planned``.
        rows: Number of inputs.
        predictions: Number of committed predictions.
        errors: Number of committed errors.
        bytes: Size of the report in bytes.
        notes: Parts that could not be made, each with the reason.
    """

    uri: str
    state: str
    rows: int
    predictions: int
    errors: int
    bytes: int
    notes: tuple[str, ...] = ()


def make_report(
    output: str,
    config: JobConfig,
    *,
    read_s: float = math.inf,
    images_s: float = 120.0,
    commits: list[Commit] | None = None,
) -> ReportSummary:
    """Make the report of an output and write it there.

    Args:
        output: The output folder.
        config: Options to reach the output, and the ``report`` section.
        read_s: Seconds after which no more files of predictions are read.
        images_s: Seconds after which no more images are read.
        commits: The valid commits if they are known already; otherwise they are read.

    Raises:
        UserError: If there is no job, or access is denied.
        InfrastructureError: If the store fails.
    """
    store = Store(output, config.storage, must_exist=True)
    facts = gather_facts(store, config, read_s=read_s, images_s=images_s, commits=commits)
    data = render(facts).encode("utf-8", "replace")
    store.put(REPORT_PATH, data)
    return ReportSummary(
        uri=f"{display_uri(store.uri)}/{REPORT_PATH}",
        state=facts.state,
        rows=facts.job.rows,
        predictions=facts.tally.predictions,
        errors=facts.tally.errors,
        bytes=len(data),
        notes=tuple(facts.notes),
    )


def gather_facts(
    store: Store, config: JobConfig, *, read_s: float, images_s: float, commits: list[Commit] | None = None
) -> ReportFacts:
    """Read the facts that a report shows; the arguments are those of :func:`make_report`."""
    ledger = Ledger(store)
    job = ledger.require_job()
    notes: list[str] = []
    if commits is None:
        commits = []
        with _note_failure(notes, "the ledger cannot be read, so nothing is counted"):
            commits = ledger.commits()
    tally = Tally()
    tally.add_commits(commits)
    result = Outcome("unfinished" if commits else "planned", "", {})
    with contextlib.suppress(BatchInferenceError):
        result = read_outcome(ledger, job, tally, config.errors)
    facts = ReportFacts(
        output=display_uri(store.uri),
        job=job,
        config=config,
        state=result.state,
        failure=result.failed,
        verdict=result.verdict,
        commits=commits,
        tally=tally,
        notes=notes,
    )
    max_samples = config.report.thumbnails
    with _note_failure(notes, "the times of the job cannot be shown"):
        facts.attempts = read_attempts(store)
        facts.rows_over_time = rows_over_time(ledger, commits)
    with _note_failure(notes, "the predictions cannot be read"):
        facts.stats = collect_stats(
            store,
            commits,
            max_samples=max_samples,
            passthrough=job.passthrough,
            deadline=time.monotonic() + read_s,
        )
    with _note_failure(notes, "the failed rows cannot be read"):
        facts.failure_groups = group_failures(store, commits, tally.errors_by, max_samples)
    with _note_failure(notes, "the images cannot be shown"):
        facts.thumbnails = read_thumbnails(
            store,
            _with_job_input(job, config),
            _rows_with_thumbnails(facts, max_samples),
            read=max_samples > 0,
            deadline=time.monotonic() + images_s,
        )
    return facts


def _rows_with_thumbnails(facts: ReportFacts, max_samples: int) -> Iterable[tuple[int, int]]:
    """Yield shard and row of each image that the report shows."""
    if facts.stats is not None:
        for sample in (*facts.stats.highest, *facts.stats.lowest, *facts.stats.samples):
            yield sample.shard, sample.row
    for failed in interleave(facts.failure_groups, max_samples):
        # An image that failed before these stages could not be read, and cannot be read now.
        if failed.stage in ("infer", "postprocess", "write"):
            yield failed.shard, failed.row


def _with_job_input(job: JobRecord, config: JobConfig) -> JobConfig:
    """Return the configuration with the job's own restrictions of its inputs, whatever the current ones are."""
    with contextlib.suppress(ValueError):
        return config.model_copy(update={"input": JobConfig.model_validate(job.config).input})
    return config


@contextlib.contextmanager
def _note_failure(notes: list[str], consequence: str) -> Iterator[None]:
    """Add a note for an error in this block, instead of raising it."""
    try:
        yield
    except (BatchInferenceError, OSError, ValueError, KeyError, IndexError, TypeError, pa.ArrowException) as exc:
        notes.append(f"{consequence}: {getattr(exc, 'message', None) or f'{type(exc).__name__}: {exc}'}")
