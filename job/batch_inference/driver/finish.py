"""The last phase of an attempt: check that every row is there, and declare the job done."""

from __future__ import annotations

import contextlib
import shlex
import time
from dataclasses import replace

import pyarrow as pa
import structlog

from batch_inference.config import JobConfig
from batch_inference.driver.events import AttemptInfo, Events
from batch_inference.driver.job import Planned
from batch_inference.driver.progress import Phase, Progress
from batch_inference.driver.recorder import Recorder, make_report_or_warn
from batch_inference.driver.result import RunResult
from batch_inference.driver.unify import unify
from batch_inference.errors import BatchInferenceError, ErrorThresholdExceeded, NoPredictionError
from batch_inference.output.records import Commit, JobRecord
from batch_inference.output.tally import FIX_AND_START_AGAIN, Tally
from batch_inference.pipeline.bottleneck import Bottleneck
from batch_inference.report.failure_examples import group_failures
from batch_inference.report.worker import AFTER_SUCCESS
from batch_inference.storage.store import Store
from batch_inference.storage.uris import canonical_uri, display_uri

log = structlog.get_logger()


def finish(
    config: JobConfig,
    attempt: AttemptInfo,
    planned: Planned,
    events: Events,
    recorder: Recorder,
    limit: Bottleneck | None,
) -> RunResult:
    """Check that the counts add up, write ``_SUCCESS`` and the report.

    Args:
        config: The job's configuration.
        attempt: This attempt.
        planned: The job.
        events: Told of the end.
        recorder: Writes the summary.
        limit: What limited this attempt, None where it had nothing to run.

    Raises:
        AccountingError: If rows are missing or duplicated.
        ErrorThresholdExceeded: If too many rows failed.
    """
    events.phase_changed(Phase.FINISH)
    ledger, job, progress = planned.ledger, planned.job, events.progress
    commits = ledger.verified_commits(job)
    retry = unify(ledger, attempt.id, config.output.compression, planned.retry)
    if retry != planned.retry:
        log.info("files that were written before a column's type was known have it now (_schema.json)")
        commits = ledger.verified_commits(job)
    generation = retry.generation if retry else 0
    progress.recount(commits)
    if progress.tally.all_failed:
        ledger.delete_unnamed(commits, generation)
        raise _no_prediction(progress.tally, ledger.store, commits)
    progress.tally.check(config.errors)
    excess = progress.tally.excess(config.errors)
    recorder.write_summary(progress, "SUCCEEDED", excess, commits, limit)
    deleted = ledger.finish(job, commits, _totals(progress.tally, job, commits, excess), generation)
    if deleted:
        log.info("deleted files that no commit names", files=deleted)
    result = _result(config, attempt, job, progress, limit)
    events.done(commits)
    events.phase_changed(Phase.DONE)
    return replace(result, report=progress.report)


def already_done(config: JobConfig, attempt: AttemptInfo, planned: Planned, events: Events) -> RunResult:
    """Return the result of a job that an earlier attempt has finished; make its report where there is none."""
    progress = events.progress
    progress.tally.rows = planned.job.rows
    progress.tally.add_errors((planned.success or {}).get("errors_by", {}))
    progress.report = make_report_or_warn(config, planned.ledger.store, AFTER_SUCCESS, keep_existing=True)
    events.phase_changed(Phase.DONE)
    return replace(_result(config, attempt, planned.job, progress, None), already_done=True)


def name_errors_folder(exc: BatchInferenceError, store: Store) -> None:
    """Name the folder of failed rows and the command that does them again in the remedy, where some are committed."""
    if not isinstance(exc, ErrorThresholdExceeded) or isinstance(exc, NoPredictionError):
        return
    with contextlib.suppress(BatchInferenceError, OSError):
        if any(store.objects("errors")):
            output = shlex.quote(display_uri(store.uri))
            retry = f"Fix the cause of the failed rows in {output}/errors, then batch-inference retry {output} --all"
            exc.remedy = exc.remedy.replace(FIX_AND_START_AGAIN, retry)


def _no_prediction(tally: Tally, store: Store, commits: list[Commit]) -> NoPredictionError:
    """Return the error of a job in which every row failed, with an example of the most frequent failure."""
    _, stage, error_type = tally.most_frequent
    example = ""
    with contextlib.suppress(BatchInferenceError, OSError, ValueError, KeyError, pa.ArrowException):
        rows = group_failures(store, commits, {stage: {error_type: 1}}, 1)[0].examples
        example = f"{rows[0].uri or 'a line without a URI'}: {rows[0].message}" if rows else ""
    return tally.no_prediction(shlex.quote(display_uri(store.uri)), example)


def _totals(tally: Tally, job: JobRecord, commits: list[Commit], excess: str) -> dict[str, object]:
    """Return the content of ``_SUCCESS``."""
    return {
        "rows": tally.rows,
        "predictions": tally.predictions,
        "errors": tally.errors,
        "errors_by": tally.errors_by,
        "shards": job.shards,
        "files": sum(len(commit.files) for commit in commits),
        "verdict": excess,
    }


def _result(
    config: JobConfig, attempt: AttemptInfo, job: JobRecord, progress: Progress, limit: Bottleneck | None
) -> RunResult:
    return RunResult(
        **vars(progress.tally.counts(job)),
        output=canonical_uri(config.output.uri).rstrip("/"),
        fingerprint=job.fingerprint,
        attempt=attempt.id,
        already_done=False,
        elapsed_s=time.monotonic() - attempt.started,
        images_per_s=progress.images_per_s,
        limit=limit.limit if limit else "",
        balance=limit.sentence if limit else "",
        report=progress.report,
        excess=progress.tally.excess(config.errors),
    )
