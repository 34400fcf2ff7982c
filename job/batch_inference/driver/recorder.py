"""The record of an attempt in the output folder: progress, summary, what the attempt took, verdict and report."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from dataclasses import asdict, replace

import structlog

from batch_inference.config import JobConfig
from batch_inference.driver.events import AttemptInfo, Listener
from batch_inference.driver.progress import Phase, Progress
from batch_inference.errors import BatchInferenceError, JobInterruptedError
from batch_inference.output.attempts import AttemptRecord
from batch_inference.output.records import Commit, JobRecord, now
from batch_inference.pipeline.bottleneck import Bottleneck, RunTimings, find_bottleneck
from batch_inference.report.facts import REPORT_PATH
from batch_inference.report.worker import AFTER_FAILURE, AFTER_SUCCESS, ReportError, ReportTimeouts, make_in_subprocess
from batch_inference.storage.store import Store
from batch_inference.storage.uris import display_uri
from batch_inference.version import version_info

log = structlog.get_logger()

_WRITE_EVERY_S = 10.0


class AttemptRecorder(Listener):
    """Writes the :class:`AttemptRecord` of an attempt that has work to do; one that is killed leaves what it wrote last.

    Args:
        config: The job.
        store: The output folder.
        attempt: The attempt.
        timings: What the attempt could do at the same time; nothing measured yet.
    """

    def __init__(self, config: JobConfig, store: Store, attempt: AttemptInfo, timings: RunTimings) -> None:
        self.timings = timings
        self._config = config.inference
        self._store = store
        self._attempt = attempt
        self._written = 0.0

    def rows(self, progress: Progress) -> None:
        """Write the record every ten seconds."""
        moment = time.monotonic()
        if moment - self._written > _WRITE_EVERY_S:
            self._written = moment
            self.write(progress, "running")

    def failed(self, progress: Progress, exc: BaseException) -> None:
        """Write how the attempt ended."""
        interrupted = isinstance(exc, (JobInterruptedError, KeyboardInterrupt))
        self.write(progress, "interrupted" if interrupted else "failed")

    def done(self, progress: Progress, commits: list[Commit]) -> None:
        """Write that the attempt succeeded."""
        self.write(progress, "succeeded")

    def update_timings(self, progress: Progress, driver_s: float, commit_s: float) -> None:
        """Take over what has been measured so far.

        Args:
            progress: With the seconds of the stages.
            driver_s: Seconds in which the driver was at work itself and took no rows.
            commit_s: Those of them in which it waited for the output's store.
        """
        tally = progress.tally
        # The first block was worked on before the clock started.
        share = 1 - progress.first_rows / max(1, tally.seen)
        self.timings = replace(
            self.timings,
            working_s=progress.working_s,
            fetch_s=tally.fetch_s * share,
            decode_s=tally.decode_s * share,
            infer_s=tally.infer_s * share,
            driver_s=driver_s,
            commit_s=commit_s,
        )

    def write(self, progress: Progress, state: str) -> None:
        """Write the record with a state of :class:`AttemptRecord`; ignore a store that fails."""
        with contextlib.suppress(BatchInferenceError):
            self._record(progress, state).write(self._store)

    def _record(self, progress: Progress, state: str) -> AttemptRecord:
        tally, config, limit = progress.tally, self._config, find_bottleneck(self.timings)
        busy = {
            "fetch": limit.fetch_busy,
            "decode": limit.decode_busy,
            "infer": limit.actors_busy,
            "driver": limit.driver_busy,
        }
        return AttemptRecord(
            attempt=self._attempt.id,
            state=state,
            started_at=self._attempt.started_at,
            working_from=progress.working_from,
            updated_at=now(),
            elapsed_s=round(time.monotonic() - self._attempt.started, 3),
            working_s=round(progress.working_s, 3),
            rows=tally.seen,
            bytes=tally.bytes,
            retries=tally.retries,
            stage_s=_stage_seconds(progress) | {"driver": round(self.timings.driver_s, 3)},
            busy={} if limit.limit == "unknown" else busy,
            actors=config.actors,
            gpus=config.actors * config.gpus_per_actor,
            cpus=config.actors * config.cpus_per_actor,
            limit=limit.limit,
            sentence=limit.sentence,
        )


class Recorder(Listener):
    """Writes into the output folder what an attempt has to say about itself.

    Args:
        config: The job's configuration.
        store: The output folder.
        job: The job.
        attempt: The attempt.
    """

    def __init__(self, config: JobConfig, store: Store, job: JobRecord, attempt: AttemptInfo) -> None:
        self._config = config
        self._store = store
        self._job = job
        self._attempt = attempt
        self._written = 0.0
        # Does nothing until there is work to record.
        self._work: Listener = Listener()

    def begin_work(self, progress: Progress, timings: RunTimings) -> AttemptRecorder:
        """Write the attempt's record for the first time: from now on another configuration sees that it is at work."""
        recorder = AttemptRecorder(self._config, self._store, self._attempt, timings)
        recorder.write(progress, "running")
        self._work = recorder
        return recorder

    def phase_changed(self, progress: Progress) -> None:
        """Write the last ``progress.json`` when the attempt is done."""
        if progress.phase == Phase.DONE:
            self._write_progress(progress)

    def rows(self, progress: Progress) -> None:
        """Write ``progress.json`` and the attempt's record every ten seconds."""
        moment = time.monotonic()
        if moment - self._written > _WRITE_EVERY_S:
            self._written = moment
            self._write_progress(progress)
        self._work.rows(progress)

    def failed(self, progress: Progress, exc: BaseException) -> None:
        """Leave verdict, summary and report beside the output, if the store still takes them and the job can't go on."""
        self._work.failed(progress, exc)
        if not isinstance(exc, BatchInferenceError) or isinstance(exc, JobInterruptedError):
            return
        if self._store.get_or_none("_SUCCESS") is not None:
            return
        record = {
            "fingerprint": self._job.fingerprint,
            "exit_code": exc.exit_code,
            "verdict": exc.message,
            "remedy": exc.remedy,
            "attempt": self._attempt.id,
            "run": self._attempt.run_name,
            "failed_at": now(),
        }
        with contextlib.suppress(BatchInferenceError, OSError):
            self._put("_FAILED", record)
            self.write_summary(progress, "FAILED", exc.message)
        progress.report = make_report_or_warn(self._config, self._store, AFTER_FAILURE)

    def done(self, progress: Progress, commits: list[Commit]) -> None:
        """Write the attempt's record and make the report."""
        self._work.done(progress, commits)
        progress.report = make_report_or_warn(self._config, self._store, AFTER_SUCCESS, commits)

    def write_summary(
        self,
        progress: Progress,
        state: str,
        verdict: str,
        commits: list[Commit] | None = None,
        limit: Bottleneck | None = None,
    ) -> None:
        """Write ``_report/summary.json``.

        Args:
            progress: The counts.
            state: ``SUCCEEDED`` or ``FAILED``.
            verdict: The verdict in words, "" where there is nothing to say.
            commits: All commits of a job that succeeded.
            limit: What limited this attempt, None where it had nothing to run or failed.
        """
        tally = progress.tally
        summary = {
            "state": state,
            "verdict": verdict,
            "attempt": self._attempt.id,
            "fingerprint": self._job.fingerprint,
            "created_at": self._job.created_at,
            "versions": version_info(),
            "shards_by_attempt": Counter(commit.attempt for commit in commits or ()),
            "skipped": self._job.skipped,
            "duplicates": self._job.duplicates,
            **progress.to_dict(),
            "balance": asdict(limit) if limit else None,
            "this_attempt": {
                "rows": tally.seen,
                "bytes": tally.bytes,
                "retries": tally.retries,
                "working_s": round(progress.working_s, 3),
                "stage_s": _stage_seconds(progress),
            },
        }
        self._put("_report/summary.json", summary)

    def _write_progress(self, progress: Progress) -> None:
        # Progress that can't be written is no reason to stop; a commit that can't be is.
        with contextlib.suppress(BatchInferenceError):
            self._put("_report/progress.json", progress.to_dict())

    def _put(self, path: str, record: dict[str, object]) -> None:
        self._store.put(path, json.dumps(record, indent=1).encode())


def make_report_or_warn(
    config: JobConfig,
    store: Store,
    timeouts: ReportTimeouts,
    commits: list[Commit] | None = None,
    *,
    keep_existing: bool = False,
) -> str:
    """Make the report of an output; a report that can't be made is logged and fails nothing.

    Args:
        config: The job.
        store: The output folder.
        timeouts: For the report.
        commits: All commits, None to read them.
        keep_existing: Make it only where there is none.

    Returns:
        The report's URI, "" where there is none.
    """
    if not config.report.enabled:
        return ""
    try:
        if keep_existing and any(info.path == REPORT_PATH for info in store.objects("_report")):
            return f"{display_uri(store.uri)}/{REPORT_PATH}"
        return make_in_subprocess(store.uri, config, timeouts, commits)
    except (ReportError, BatchInferenceError) as exc:
        log.warning("the report could not be made; batch-inference report makes it again", reason=str(exc))
    except KeyboardInterrupt:
        log.warning("the report was not made: interrupted")
    return ""


def _stage_seconds(progress: Progress) -> dict[str, float]:
    tally = progress.tally
    return {"fetch": round(tally.fetch_s, 3), "decode": round(tally.decode_s, 3), "infer": round(tally.infer_s, 3)}
