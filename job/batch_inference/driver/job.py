"""The first phase of an attempt: plan the job of an output folder, or take up the one that is there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import structlog

from batch_inference.config import JobConfig
from batch_inference.driver.connection import RayConnection
from batch_inference.driver.events import AttemptInfo
from batch_inference.driver.startup import EngineResolver
from batch_inference.driver.supervision import tell_parent
from batch_inference.errors import (
    AccountingError,
    BatchInferenceError,
    ErrorThresholdExceeded,
    UserError,
)
from batch_inference.inputs.find import Inputs, find_inputs
from batch_inference.output.attempts import seconds_since_sign_of_life
from batch_inference.output.destination import check_output
from batch_inference.output.job_chain import TakenOverError
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import JobRecord, Retry, now
from batch_inference.pipeline.engine import Engine
from batch_inference.pipeline.fingerprint import (
    check_columns,
    check_same_job,
    differences,
    fingerprint_parts,
    input_notes,
    other_output,
)
from batch_inference.storage.store import open_output
from batch_inference.storage.uris import canonical_uri, display_uri
from batch_inference.version import version_info

log = structlog.get_logger()

# Below this many images, start-up takes longer than the work.
_FEW_IMAGES = 100


@dataclass(frozen=True)
class Planned:
    """A job that is planned.

    Attributes:
        ledger: The ledger of its output.
        job: The job.
        engine: What runs on its images.
        retry: The latest retry of its failed rows, None where there was none.
        success: Content of ``_SUCCESS`` where nothing is left to do, None else.
    """

    ledger: Ledger
    job: JobRecord
    engine: Engine
    retry: Retry | None
    success: dict[str, Any] | None = None

    def taken_over(self) -> TakenOverError | None:
        """Return the error to raise where another configuration has taken the output over, None where it has not."""
        try:
            self.ledger.check_not_taken_over(self.job)
        except TakenOverError as exc:
            return exc
        except (BatchInferenceError, OSError, ValueError):
            pass
        return None


def open_ledger(config: JobConfig, attempt: AttemptInfo) -> Ledger:
    """Check the output folder and return its ledger; tell the parent process, if there is one, where it is."""
    notes = check_output(config)
    tell_parent(
        output=config.output.uri,
        storage=config.storage.model_dump(mode="json"),
        attempt=attempt.id,
        started=attempt.started,
    )
    ledger = Ledger(open_output(config))
    for note in notes:
        log.warning(note)
    return ledger


def plan_job(
    config: JobConfig,
    attempt: AttemptInfo,
    ledger: Ledger,
    resolver: EngineResolver,
    connection: RayConnection,
    *,
    force_retry: bool,
) -> Planned:
    """Plan a job, or take up the one of an earlier attempt. Meanwhile Ray is started if there will be work for it.

    Args:
        config: The job's configuration.
        attempt: This attempt.
        ledger: Of the output.
        resolver: Resolves the engine meanwhile.
        connection: Opened where Ray is to be started by this process.
        force_retry: Go on even if an earlier attempt of this run failed with an error that a retry cannot fix.

    Raises:
        BatchInferenceError: If the job can't be done with this configuration in this output.
    """
    job = ledger.job()
    success = None if job is None else ledger.success_record()
    retry = None if job is None else ledger.retry()
    unfinished = job if success is None else None
    if unfinished is not None and attempt.run_name and not force_retry:
        fail_fast_on_known_error(ledger, unfinished, attempt.run_name)
    replaced: JobRecord | None = None
    if unfinished is not None and ledger.untouched(unfinished):
        # Nothing is committed: differences are known before anything is started, and make it another job.
        differing = differences(config, resolver.result(), unfinished)
        if differing:
            _take_over(config, ledger, differing)
            replaced, job = unfinished, None
    if job is None and replaced is None:
        ledger.check_empty()
    # Before anything is started, so that a mistyped path is answered at once.
    inputs = find_inputs(config) if job is None else None
    if success is None and not (job is not None and len(ledger.committed()) == job.shards):
        _start_ray(config, connection, resolver)
    engine = resolver.result()
    if job is not None:
        check_same_job(config, engine, job, ledger.store)
    if job is not None and success is not None:
        if _is_finished(ledger, job, success):
            return Planned(ledger, job, engine, retry, success)
        ledger.store.delete(["_SUCCESS"])
    ledger.store.probe()
    if job is None:
        job = create_job(config, attempt, ledger, engine, inputs or find_inputs(config), replaced)
    ledger.complete_manifest(job)
    return Planned(ledger, job, engine, retry)


def fail_fast_on_known_error(ledger: Ledger, job: JobRecord, run_name: str) -> None:
    """End an automatic retry in seconds where an earlier attempt of this run failed with an error that no retry can fix.

    Raises:
        UserError: As that attempt did; or ErrorThresholdExceeded, or AccountingError.
    """
    error_types = {cls.exit_code: cls for cls in (UserError, ErrorThresholdExceeded, AccountingError)}
    try:
        record = json.loads(ledger.store.get_or_none("_FAILED") or b"{}")
        same_run = (record.get("run"), record.get("fingerprint")) == (run_name, job.fingerprint)
        error_type = error_types[record["exit_code"]]
        message, remedy = str(record["verdict"]), str(record["remedy"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    if same_run:
        raise error_type(
            f"an earlier attempt of the run {run_name} failed, and this one would as well: {message}",
            f"{remedy} Then start a new run, or this one again with --force-retry.",
        )


def create_job(
    config: JobConfig,
    attempt: AttemptInfo,
    ledger: Ledger,
    engine: Engine,
    inputs: Inputs,
    replaced: JobRecord | None = None,
) -> JobRecord:
    """Cut the inputs into shards and write the plan; return the job, another driver's where that was first.

    Args:
        config: The job's configuration.
        attempt: This attempt.
        ledger: Of the output.
        engine: What runs on the images.
        inputs: The images.
        replaced: The job whose output is taken over.
    """
    check_columns(config, inputs.table.column_names)
    rows = inputs.table.num_rows
    job = JobRecord(
        config=_canonical_config(config),
        fingerprint="",
        identity=fingerprint_parts(config, engine, inputs.manifest_sha256),
        shards=-(-rows // config.shard_size),
        rows=rows,
        plan="",
        versions=version_info(),
        created_at=now(),
        skipped=inputs.skipped,
        duplicates=inputs.duplicates,
        repeated=inputs.repeated,
        passthrough=inputs.passthrough,
    )
    job = ledger.create_job(inputs.table, job, attempt.id, replaced)
    check_same_job(config, engine, job, ledger.store)
    log.info("planned", inputs=job.rows, shards=job.shards, fingerprint=job.fingerprint[:12])
    for note in [*input_notes(job), *(str(reason) for reason in inputs.unreadable)]:
        log.warning(note)
    if job.rows < _FEW_IMAGES:
        log.info(f"{job.rows} images are few: starting Ray and the model will take most of the time")
    return job


def _take_over(config: JobConfig, ledger: Ledger, differing: list[str]) -> None:
    """Log that an output without a commit becomes this job's; raise UserError where an attempt seems to be at work in it."""
    output = display_uri(ledger.store.uri)
    age = seconds_since_sign_of_life(ledger.store)
    if age is not None:
        raise UserError(
            f"another job is at work in {output}: its attempt gave a sign of life {age:.0f} s ago; what differs: "
            + "; ".join(differing),
            f"Stop it and start again in a minute, or {other_output(config)}.",
        )
    names = ", ".join(line.partition(":")[0] for line in differing)
    log.warning(f"took over {output}: an earlier configuration had committed nothing; differs in {names}")


def _start_ray(config: JobConfig, connection: RayConnection, resolver: EngineResolver) -> None:
    """Start Ray's processes, if they are to be of this process's own: they come up while the engine is resolved."""
    if not connection.starts_ray:
        return
    try:
        connection.open(config)
    except UserError:
        resolver.result()  # of two mistakes the model's is told first, as where Ray is started later
        raise


def _is_finished(ledger: Ledger, job: JobRecord, success: dict[str, Any]) -> bool:
    """Return whether a job with a ``_SUCCESS`` has everything it says, and needs no other verdict."""
    if len(ledger.committed()) != job.shards or ledger.data_file_count() != success.get("files"):
        # A file was lost, or a driver was killed after it had lost its last race: recount, sweep, do what is missing.
        log.warning("the output is not what _SUCCESS says; taking it up again")
        return False
    # Earlier versions called a job a success in which every row failed.
    return success.get("predictions") != 0


def _canonical_config(config: JobConfig) -> dict[str, Any]:
    """Return a configuration as the output keeps it: inputs by canonical URIs, which mean the same from any folder."""
    uris = tuple(canonical_uri(uri) for uri in config.input.uris)
    manifest = canonical_uri(config.input.manifest) if config.input.manifest else None
    input_config = config.input.model_copy(update={"uris": uris, "manifest": manifest})
    return config.model_copy(update={"input": input_config}).model_dump(mode="json")
