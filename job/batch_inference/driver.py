"""The driver: runs the pipeline and writes the ledger."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import structlog

from batch_inference import logs
from batch_inference.apart import AFTER_FAILURE, AFTER_SUCCESS, REPORT, Patience, ReportFailed, make_apart
from batch_inference.balance import Balance, Load, balance, possible_load
from batch_inference.closing import Closing, Writers
from batch_inference.cluster import Demand, connected, is_client_address, wait_until_it_fits
from batch_inference.collection import START_AGAIN, Collector
from batch_inference.config import JobConfig, load_config
from batch_inference.cpus import available_cpus
from batch_inference.destination import check_output
from batch_inference.environment import RUN_VARIABLE
from batch_inference.errors import (
    BatchInferenceError,
    CountsDoNotClose,
    Interrupted,
    NoPrediction,
    ThresholdExceeded,
    UserError,
)
from batch_inference.failures import examples
from batch_inference.generations import Again, describe, select
from batch_inference.history import Spent, at_work
from batch_inference.identity import (
    Engine,
    check_columns,
    check_same_job,
    differences,
    input_notes,
    job_identity,
    other_output,
    versions,
)
from batch_inference.inference import notes, raise_end_of_job
from batch_inference.ledger import Commit, Job, Ledger, Retry, TakenOver, now
from batch_inference.manifest import Inputs, find_inputs
from batch_inference.pipeline import explain_ray_failure, results
from batch_inference.preflight import first_step, of_one_actor
from batch_inference.progress import Snapshot
from batch_inference.reporter import Reporter
from batch_inference.startup import EngineAhead, starts_ray
from batch_inference.storage import Store, canonical_uri, display, open_output
from batch_inference.supervision import is_supervised, tell
from batch_inference.telemetry import Telemetry
from batch_inference.tracebacks import place, with_place
from batch_inference.unify import unify

log = structlog.get_logger()

_PROGRESS_EVERY_S = 10.0
# What is sent to the whole process group comes twice: the parent passes on what it has got, too (:mod:`.supervision`). The second
# would interrupt what the first one leads to.
_SAME_SIGNAL_S = 2.0
_stopped_at: dict[int, float] = {}
# Below this start-up outweighs the work (the article's figure, and ours).
_FEW = 100
# Faults of a predictor class that are told with their tracebacks; all are in errors/.
_MOST_FAULTS = 10


@dataclass(frozen=True)
class RunResult:
    """How a job ended well.

    Attributes:
        output: Canonical URI of the output folder.
        fingerprint: What its rows belong to.
        rows: Inputs; always ``predictions + errors``.
        predictions: Rows with a prediction.
        errors: Rows with an error.
        errors_by: ``{stage: {error_type: count}}``.
        shards: Number of shards.
        attempt: Identifier of this attempt.
        already_done: Whether an earlier attempt had finished everything.
        elapsed_s: Seconds this attempt took.
        images_per_s: Rows a second of this attempt, start-up left out; None where it was too short to tell.
        limit: What this attempt waited for (see :class:`~batch_inference.balance.Balance`), "" where nothing was run.
        balance: The same as a sentence, with the knob to turn.
        report: Where the report for people is, "" if there is none.
        excess: That more rows failed than ``errors.max_percent``, where that did not end the job; "" where they did not.
    """

    output: str
    fingerprint: str
    rows: int
    predictions: int
    errors: int
    errors_by: dict[str, dict[str, int]]
    shards: int
    attempt: str
    already_done: bool
    elapsed_s: float
    images_per_s: float | None
    limit: str = ""
    balance: str = ""
    report: str = ""
    excess: str = ""


def run(
    config: JobConfig,
    *,
    address: str | None = None,
    dashboard_host: str | None = None,
    on_progress: Callable[[Snapshot], None] | None = None,
    force_retry: bool = False,
) -> RunResult:
    """Runs a job, or what is left of it.

    Args:
        config: The job.
        address: Ray cluster to use; None starts one on this machine for the time of the job. ``ray://`` runs the driver
            inside the cluster, where paths of local files are the cluster's.
        dashboard_host: Address that a started cluster's dashboard listens on; None for no dashboard.
        force_retry: Go on also where an earlier attempt of the same run has failed of what another can't mend.
        on_progress: Called at every change of phase and with every batch of rows; must return quickly.

    Returns:
        The counts, which close.

    Raises:
        UserError: Configuration, input, credentials, model: the user's to mend (exit code 2).
        ThresholdExceeded: Too many rows failed (3).
        CountsDoNotClose: Rows are missing or double (4).
        SystemFault: Store or cluster failed; try again (5).
        Interrupted: SIGINT or SIGTERM (130).
    """
    # Where a Ray job runs, Ray says by RAY_ADDRESS which cluster it is part of.
    address = address or os.environ.get("RAY_ADDRESS")
    if is_client_address(address):
        from batch_inference.remote import run_in_cluster

        return run_in_cluster(config, str(address), on_progress, force_retry=force_retry)
    with interruptible():
        attempt = Attempt(config, on_progress or (lambda snapshot: None), force_retry=force_retry)
        return attempt.run(address, dashboard_host)


def refuse_hopeless(ledger: Ledger, job: Job, run_name: str) -> None:
    """Ends an automatic retry in seconds where an earlier attempt of the same run has failed of what no retry mends.

    Raises:
        UserError: As that attempt did; or ThresholdExceeded, or CountsDoNotClose.
    """
    try:
        record = json.loads(ledger.store.get_or_none("_FAILED") or b"{}")
        same = (record.get("run"), record.get("fingerprint")) == (run_name, job.fingerprint)
        kind = {cls.exit_code: cls for cls in (UserError, ThresholdExceeded, CountsDoNotClose)}[record["exit_code"]]
        message, remedy = str(record["verdict"]), str(record["remedy"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    if same:
        raise kind(
            f"an earlier attempt of the run {run_name} failed, and this one would as well: {message}",
            f"{remedy} Then start a new run, or this one again with --force-retry.",
        )


def close_for_lost_driver(told: dict[str, Any], failure: BatchInferenceError) -> Snapshot:
    """Leave the verdict beside the output of a driver that ended without one, as far as the store takes it.

    Args:
        told: What the driver said of itself (:func:`~batch_inference.supervision.tell`).
        failure: The verdict.

    Returns:
        What the ledger holds; nothing where it cannot be read.
    """
    snapshot = Snapshot()
    # The verdict is given in any case; what the store says against it is no news.
    with contextlib.suppress(Exception):
        place = {"output": {"uri": told["output"]}, "storage": told["storage"]}
        ledger = Ledger(Store(told["output"], load_config(None, place).storage, must_exist=True))
        job = ledger.require_job()
        attempt = Attempt(load_config(job.config, place), lambda snapshot: None)
        attempt.attempt, attempt.started = told["attempt"], told["started"]
        attempt.close_for_lost(ledger, job, failure)
        snapshot = attempt.snapshot
    return snapshot


class Attempt:
    """One start of the program on a job."""

    def __init__(
        self,
        config: JobConfig,
        on_progress: Callable[[Snapshot], None],
        engine: Engine | None = None,
        *,
        force_retry: bool = False,
    ) -> None:
        self.config = config
        self._engine = engine
        self.on_progress = on_progress
        self.attempt = uuid4().hex[:8]
        self.run_name = os.environ.get(RUN_VARIABLE, "")
        self._force_retry = force_retry
        self._stopping = threading.Event()
        self._faults_told: set[tuple[str, str]] = set()
        self._notes_told: set[str] = set()
        self.started = time.monotonic()
        self._started_at = now()
        self._working_from = ""
        self.snapshot = Snapshot()
        self._progress_written = 0.0
        self._load: Load | None = None
        self._balance: Balance | None = None
        self._retry: Retry | None = None
        self._reporter: Reporter | None = None
        logs.bind(attempt=self.attempt, **({"run": self.run_name} if self.run_name else {}))

    def stop(self) -> None:
        """Ends the work as SIGTERM does, when rows come back next; for a thread that no signal reaches."""
        self._stopping.set()

    def run(self, address: str | None, dashboard_host: str | None) -> RunResult:
        """Plans or resumes, works, and finishes; raises what :func:`run` says."""
        self._show("plan")
        notes = check_output(self.config)
        tell(
            output=self.config.output.uri,
            storage=self.config.storage.model_dump(mode="json"),
            attempt=self.attempt,
            started=self.started,
        )
        ledger = Ledger(open_output(self.config))
        for note in notes:
            log.warning(note)
        with contextlib.ExitStack() as cluster, EngineAhead(self.config, self._engine) as ahead:
            job = ledger.job()
            done = None if job is None else ledger.success()
            self._retry = None if job is None else ledger.retry()
            if job is not None and done is None and self.run_name and not self._force_retry:
                refuse_hopeless(ledger, job, self.run_name)
            replaced: Job | None = None
            if job is not None and done is None and ledger.untouched(job):
                # Nothing is committed: what differs is known before anything is started, and makes it another job.
                differing = differences(self.config, ahead.result(), job)
                if differing:
                    self._take_over(ledger, differing)
                    replaced, job = job, None
            if job is None and replaced is None:
                ledger.check_empty()
            # Before anything is started, so that a mistyped path is answered at once.
            found = find_inputs(self.config) if job is None else None
            # Where every shard is committed there may be nothing left to do but to say so.
            complete = job is not None and done is None and len(ledger.committed()) == job.shards
            own = starts_ray(address) and done is None
            early = own and not complete
            if early:
                # Ray's processes take seconds to come up; meanwhile the model is looked at.
                try:
                    cluster.enter_context(self._cluster(address, dashboard_host, self.config))
                except UserError:
                    ahead.result()  # of two mistakes the model's comes first, as where Ray is started later
                    raise
            engine = ahead.result()
            if job is not None:
                check_same_job(self.config, engine, job, ledger.store)
                if done is not None:
                    whole = len(ledger.committed()) == job.shards and ledger.data_files() == done.get("files")
                    if whole and done.get("predictions") != 0:
                        return self._already_done(ledger.store, job, done)
                    if not whole:
                        # A file was lost, or a driver was killed after it had lost its last race: recount, sweep, do what is missing.
                        log.warning("the output is not what _SUCCESS says; taking it up again")
                    # Earlier versions called a job a success in which every row failed.
                    ledger.store.delete(["_SUCCESS"])
            ledger.store.probe()
            if job is None:
                job = self._plan(ledger, engine, found or find_inputs(self.config), replaced)
            ledger.complete_manifest(job)
            commits = ledger.commits()
            if self._retry and len(commits) < job.shards:
                # All were committed before a retry could begin.
                ledger.look(set(range(job.shards)) - {commit.shard for commit in commits})
                commits = ledger.commits()
            again = select(ledger, self._retry, commits) if self._retry else {}
            if again:
                # Whoever reads the folder waits for it to come back.
                ledger.store.delete(["_SUCCESS"])
            self._resume(job, commits, again)
            pending = sorted(set(range(job.shards)) - {c.shard for c in commits})
            ledger.store.delete(["_FAILED"])  # an earlier attempt's; this one ends with a verdict of its own
            try:
                self.snapshot.tally.check(self.config.errors)
                if pending or again:
                    self._show("start")
                    self._load = possible_load(self.config, len(pending) + len(again))
                    self._write_spent(
                        ledger.store, "running"
                    )  # from now on another configuration sees that it is at work
                    telemetry = self._telemetry(job)
                    reporter = self._reporter = Reporter(telemetry.run, self.config.inference.actors, self.snapshot)
                    cluster.callback(reporter.stop)
                    reporter.start()
                    first = self.config.preflight.enabled and not commits
                    if not early:
                        # Where workers come on demand, one actor's come first.
                        config = of_one_actor(self.config) if first else self.config
                        cluster.enter_context(self._cluster(address, dashboard_host, config))
                        cluster.callback(reporter.stop)  # before the connection ends
                    # Of more CPUs than there are, which a Ray of our own may pretend to have, nothing is done faster.
                    cpus = float(available_cpus()) if own else math.inf
                    if first:
                        self._try_first(ledger.store, job, engine, cpus)
                        if not early:
                            wait_until_it_fits(Demand.of(self.config))
                    self._work(ledger, job, engine, pending, again, cpus, telemetry)
                cluster.close()
                return self._finish(ledger, job)
            except BatchInferenceError as exc:
                taken_over = self._taken_over(ledger, job)
                if taken_over is not None:
                    raise taken_over from exc
                self._failed(ledger, job, exc)
                raise
            except KeyboardInterrupt:
                # What interruptible() makes of it, it makes further out, where nothing is written any more.
                self._write_spent(ledger.store, "interrupted")
                raise

    @contextlib.contextmanager
    def _cluster(self, address: str | None, dashboard_host: str | None, config: JobConfig) -> Iterator[None]:
        with connected(config, address, dashboard_host) as dashboard, interruptible():
            self.snapshot.dashboard = dashboard
            if dashboard:
                log.info("Ray's dashboard", url=dashboard)
            yield

    def _telemetry(self, job: Job) -> Telemetry:
        telemetry = Telemetry(self.run_name or job.fingerprint[:12], self.attempt, logs.log_format())
        logs.bind(run=telemetry.run)
        return telemetry

    # --- before ---

    def _take_over(self, ledger: Ledger, differing: list[str]) -> None:
        """Say that an output without a commit becomes this job's; raise UserError where an attempt seems to be at work in it."""
        where = display(ledger.store.uri)
        age = at_work(ledger.store)
        if age is not None:
            raise UserError(
                f"another job is at work in {where}: its attempt gave a sign of life {age:.0f} s ago; what differs: "
                + "; ".join(differing),
                f"Stop it and start again in a minute, or {other_output(self.config)}.",
            )
        names = ", ".join(line.partition(":")[0] for line in differing)
        log.warning(f"took over {where}: an earlier configuration had committed nothing; differs in {names}")

    def _taken_over(self, ledger: Ledger, job: Job) -> TakenOver | None:
        """Whether another configuration has taken the output over, whatever this attempt failed of because of it."""
        try:
            ledger.check_not_taken_over(job)
        except TakenOver as exc:
            return exc
        except (BatchInferenceError, OSError, ValueError):
            pass
        return None

    def _plan(self, ledger: Ledger, engine: Engine, found: Inputs, replaced: Job | None = None) -> Job:
        check_columns(self.config, found.table.column_names)
        rows = found.table.num_rows
        job = Job(
            config=_kept(self.config),
            fingerprint="",
            identity=job_identity(self.config, engine, found.manifest_sha256),
            shards=-(-rows // self.config.shard_size),
            rows=rows,
            plan="",
            versions=versions(),
            created_at=now(),
            skipped=found.skipped,
            duplicates=found.duplicates,
            repeated=found.repeated,
            passthrough=found.passthrough,
        )
        job = ledger.create_job(found.table, job, self.attempt, replaced)
        check_same_job(self.config, engine, job, ledger.store)
        log.info("planned", inputs=job.rows, shards=job.shards, fingerprint=job.fingerprint[:12])
        for note in [*input_notes(job), *(str(kind) for kind in found.unreadable)]:
            log.warning(note)
        if job.rows < _FEW:
            log.info(f"{job.rows} images are few: starting Ray and the model will take most of the time")
        return job

    def _resume(self, job: Job, commits: list[Commit], again: dict[int, Again]) -> None:
        snapshot = self.snapshot
        snapshot.rows_total, snapshot.shards_total = job.rows, job.shards
        snapshot.shards_done = snapshot.shards_resumed = len(commits) - len(again)
        snapshot.tally.add_commits(commits)
        for one in again.values():
            snapshot.tally.remove(one.errors_by)
        if again and self._retry is not None:
            rows = sum(len(one.rows) for one in again.values())
            log.info(f"retry {self._retry.generation}: {rows:,} failed rows again, {describe(self._retry)}")
        if commits:
            log.info("resuming", shards_done=snapshot.shards_done, shards=job.shards, rows_done=snapshot.tally.rows)

    def _already_done(self, store: Store, job: Job, done: dict[str, Any]) -> RunResult:
        tally = self.snapshot.tally
        tally.rows = job.rows
        tally.add_errors(done.get("errors_by", {}))
        self._report(store, AFTER_SUCCESS, anew=False)
        self._show("done")
        return self._result(job, already_done=True)

    def _try_first(self, store: Store, job: Job, engine: Engine, cpus: float) -> None:
        """One actor's try, of which a job ends that would end so with all of them."""
        self._show("preflight")
        self._load = possible_load(self.config, job.shards, cpus)  # what is held meanwhile counts
        with _explained():
            first_step(self.config, engine, store, job, cpus)

    # --- the work ---

    def _work(
        self,
        ledger: Ledger,
        job: Job,
        engine: Engine,
        pending: list[int],
        again: dict[int, Again],
        cpus: float = math.inf,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._show("start")
        self._load = possible_load(self.config, len(pending) + len(again), cpus)
        writers = Writers.start(ledger.store, self.config, self.attempt, custom=engine.custom)
        chosen = {shard: one.rows for shard, one in again.items()}
        rows = {shard: job.rows_of(shard) for shard in pending} | {shard: len(r) for shard, r in chosen.items()}
        worked = self.snapshot.tally.predictions > 0
        collector = Collector(rows, self.snapshot.tally, chosen, worked=worked)
        with (
            Closing(ledger, writers, self._committed, again, self.snapshot.tally) as closing,
            contextlib.closing(
                results(
                    ledger.store,
                    self.config,
                    engine.beside(job.passthrough),
                    rows,
                    writers.handles,
                    self.attempt,
                    chosen,
                    telemetry,
                )
            ) as tables,
            _explained(),
        ):
            self._collect(tables, collector, closing, writers)

    def _collect(self, tables: Iterator[pa.Table], collector: Collector, closing: Closing, writers: Writers) -> None:
        begun: float | None = None
        driver_s = 0.0
        for table in tables:
            moment = time.monotonic()
            raise_end_of_job(table)
            self._tell(table)
            if self._stopping.is_set():
                raise KeyboardInterrupt
            writers.keep(table)
            for shard, part in collector.add(table):
                closing.add(shard, part)
            if self._reporter is not None:
                self._reporter.count()
            if begun is None:
                begun, self.snapshot.first_rows = time.monotonic(), table.num_rows
                self._working_from = now()
            self.snapshot.working_s = time.monotonic() - begun
            self.snapshot.tally.check(self.config.errors)
            self._show("run")
            self._write_progress(closing.ledger.store)
            driver_s += time.monotonic() - moment
            self._measure(driver_s, closing.blocked_s)
            if closing.lost_race and closing.everything_committed(self.snapshot.shards_total):
                log.info("another driver has committed the rest")
                break
        else:
            collector.finish()
        closing.wait()

    def _tell(self, table: pa.Table) -> None:
        """Log the actors' notes, and where a predictor class raised, once for each type and place."""
        for note in notes(table):
            if note not in self._notes_told:
                self._notes_told.add(note)
                log.warning(note)
        if table["traceback"].null_count == table.num_rows or len(self._faults_told) >= _MOST_FAULTS:
            return
        bad = table.filter(pc.is_valid(table["traceback"]))
        for kind, message, traceback in zip(
            *(bad[name].to_pylist() for name in ("error_type", "message", "traceback")), strict=True
        ):
            fault = (kind, place(traceback))
            if fault not in self._faults_told and len(self._faults_told) < _MOST_FAULTS:
                self._faults_told.add(fault)
                log.warning(with_place(f"an image failed with {kind}: {message}", traceback))

    def _measure(self, driver_s: float, commit_s: float) -> None:
        """Keeps what this attempt has measured about itself so far."""
        snapshot, tally = self.snapshot, self.snapshot.tally
        if self._load is not None:
            # The first rows' work was done before the clock started.
            counted = 1 - snapshot.first_rows / max(1, tally.seen)
            self._load = replace(
                self._load,
                working_s=snapshot.working_s,
                fetch_s=tally.fetch_s * counted,
                decode_s=tally.decode_s * counted,
                infer_s=tally.infer_s * counted,
                driver_s=driver_s,
                commit_s=commit_s,
            )

    def _committed(self, commit: Commit, mine: bool, seconds: float) -> None:
        log.debug(
            "committed" if mine else "committed by another driver",
            shard=commit.shard,
            rows=commit.rows,
            errors=commit.errors,
            seconds=round(seconds, 3),
        )
        if self._reporter is not None:
            self._reporter.committed(mine=mine, seconds=seconds)
        self.snapshot.shards_done += 1
        if not mine:
            self.snapshot.shards_resumed += 1

    # --- after ---

    def _finish(self, ledger: Ledger, job: Job) -> RunResult:
        self._show("finish")
        commits = ledger.closed(job)
        before = self._retry
        self._retry = unify(ledger, self.attempt, self.config.output.compression, before)
        if self._retry != before:
            log.info("files that were written before a column's type was known have it now (_schema.json)")
            commits = ledger.closed(job)
        # What the ledger says counts, also where another driver did part of the work.
        tally = self.snapshot.tally
        tally.rows, tally.errors, tally.errors_by = 0, 0, {}
        for commit in commits:
            tally.rows += commit.rows
            tally.add_errors(commit.errors_by)
        self.snapshot.shards_done = len(commits)
        if tally.all_failed:
            ledger.delete_unnamed(commits, self._retry.generation if self._retry else 0)
            raise self._no_prediction(ledger.store, commits)
        tally.check(self.config.errors)
        if self._load is not None:
            self._balance = balance(self._load)
        excess = tally.excess(self.config.errors)
        totals = {
            "rows": tally.rows,
            "predictions": tally.predictions,
            "errors": tally.errors,
            "errors_by": tally.errors_by,
            "shards": job.shards,
            "files": sum(len(commit.files) for commit in commits),
            "verdict": excess,
        }
        self._write_summary(ledger, job, commits, "SUCCEEDED", excess)
        deleted = ledger.finish(job, commits, totals, self._retry.generation if self._retry else 0)
        if deleted:
            log.info("deleted files that no commit names", files=deleted)
        self._write_spent(ledger.store, "succeeded")
        result = self._result(job, already_done=False)
        self._report(ledger.store, AFTER_SUCCESS, commits)
        self._show("done")
        self._write_progress(ledger.store, force=True)
        return replace(result, report=self.snapshot.report)

    def _no_prediction(self, store: Store, commits: list[Commit]) -> NoPrediction:
        """What ends this job, with an example of the kind of failure that is most frequent."""
        tally = self.snapshot.tally
        _, stage, kind = tally.most_frequent
        example = ""
        with contextlib.suppress(BatchInferenceError, OSError, ValueError, KeyError, pa.ArrowException):
            found = examples(store, commits, {stage: {kind: 1}}, 1)[0].found
            example = f"{found[0].uri or 'a line without a URI'}: {found[0].message}" if found else ""
        return tally.no_prediction(shlex.quote(display(store.uri)), example)

    def _failed(self, ledger: Ledger, job: Job, exc: BatchInferenceError) -> None:
        """Leaves the verdict beside the output, if the store still takes it."""
        if isinstance(exc, ThresholdExceeded) and not isinstance(exc, NoPrediction):
            with contextlib.suppress(BatchInferenceError, OSError):
                if any(ledger.store.objects("errors")):
                    where = shlex.quote(display(ledger.store.uri))
                    retry = (
                        f"Fix the cause of the failed rows in {where}/errors, then batch-inference retry {where} --all"
                    )
                    exc.remedy = exc.remedy.replace(START_AGAIN, retry)
        self._show(self.snapshot.phase)  # with what was committed last
        self._write_spent(ledger.store, "interrupted" if isinstance(exc, Interrupted) else "failed")
        if isinstance(exc, Interrupted) or ledger.store.get_or_none("_SUCCESS") is not None:
            return
        record = {
            "fingerprint": job.fingerprint,
            "exit_code": exc.exit_code,
            "verdict": exc.message,
            "remedy": exc.remedy,
            "attempt": self.attempt,
            "run": self.run_name,
            "failed_at": now(),
        }
        with contextlib.suppress(BatchInferenceError, OSError):
            ledger.store.put("_FAILED", json.dumps(record, indent=1).encode())
            self._write_summary(ledger, job, [], "FAILED", exc.message)
        self._report(ledger.store, AFTER_FAILURE)
        self._show(self.snapshot.phase)

    def close_for_lost(self, ledger: Ledger, job: Job, exc: BatchInferenceError) -> None:
        """Do what :meth:`run` does at a failure, in another process than the one that is gone."""
        self._resume(job, ledger.commits(), {})
        self._failed(ledger, job, exc)

    def _report(
        self, store: Store, patience: Patience, commits: list[Commit] | None = None, *, anew: bool = True
    ) -> None:
        """Makes the report; what goes wrong with it is no matter of the job's."""
        if not self.config.report.enabled:
            return
        try:
            there = f"{display(store.uri)}/{REPORT}"
            if anew or all(info.path != REPORT for info in store.objects("_report")):
                there = make_apart(store.uri, self.config, patience, commits)
            self.snapshot.report = there
        except (ReportFailed, BatchInferenceError) as exc:
            log.warning("the report could not be made; batch-inference report makes it again", reason=str(exc))
        except KeyboardInterrupt:
            log.warning("the report was not made: interrupted")

    def _result(self, job: Job, *, already_done: bool) -> RunResult:
        tally = self.snapshot.tally
        return RunResult(
            output=canonical_uri(self.config.output.uri).rstrip("/"),
            fingerprint=job.fingerprint,
            rows=tally.rows,
            predictions=tally.predictions,
            errors=tally.errors,
            errors_by=tally.errors_by,
            shards=job.shards,
            attempt=self.attempt,
            already_done=already_done,
            elapsed_s=time.monotonic() - self.started,
            images_per_s=self.snapshot.images_per_s,
            limit=self._balance.limit if self._balance else "",
            balance=self._balance.sentence if self._balance else "",
            report=self.snapshot.report,
            excess=tally.excess(self.config.errors),
        )

    def _write_summary(self, ledger: Ledger, job: Job, commits: list[Commit], state: str, verdict: str) -> None:
        tally = self.snapshot.tally
        by_attempt: dict[str, int] = {}
        for commit in commits:
            by_attempt[commit.attempt] = by_attempt.get(commit.attempt, 0) + 1
        summary = {
            "state": state,
            "verdict": verdict,
            "attempt": self.attempt,
            "fingerprint": job.fingerprint,
            "created_at": job.created_at,
            "versions": versions(),
            "shards_by_attempt": by_attempt,
            "skipped": job.skipped,
            "duplicates": job.duplicates,
            **self.snapshot.to_dict(),
            "balance": asdict(self._balance) if self._balance else None,
            "this_attempt": {
                "rows": tally.seen,
                "bytes": tally.bytes,
                "retries": tally.retries,
                "working_s": round(self.snapshot.working_s, 3),
                "stage_s": {n: round(getattr(tally, f"{n}_s"), 3) for n in ("fetch", "decode", "infer")},
            },
        }
        ledger.store.put("_report/summary.json", json.dumps(summary, indent=1).encode())

    # --- progress ---

    def _show(self, phase: str) -> None:
        self.snapshot.phase = phase
        self.snapshot.elapsed_s = time.monotonic() - self.started
        self.on_progress(self.snapshot)

    def _write_progress(self, store: Store, force: bool = False) -> None:
        moment = time.monotonic()
        if force or moment - self._progress_written > _PROGRESS_EVERY_S:
            self._progress_written = moment
            # A report that can't be written is no reason to stop; a commit that can't be is.
            with contextlib.suppress(BatchInferenceError):
                store.put("_report/progress.json", json.dumps(self.snapshot.to_dict(), indent=1).encode())
            if self.snapshot.phase == "run":
                self._write_spent(store, "running")

    def _write_spent(self, store: Store, state: str) -> None:
        """Keeps what this attempt has taken so far, for the report; one that is killed leaves what it wrote last."""
        if self._load is None:
            return
        tally, section, load = self.snapshot.tally, self.config.inference, self._load
        found = self._balance or balance(load)
        known = found.limit != "unknown"
        spent = Spent(
            attempt=self.attempt,
            state=state,
            started_at=self._started_at,
            working_from=self._working_from,
            updated_at=now(),
            elapsed_s=round(time.monotonic() - self.started, 3),
            working_s=round(self.snapshot.working_s, 3),
            rows=tally.seen,
            bytes=tally.bytes,
            retries=tally.retries,
            stage_s={
                "fetch": round(tally.fetch_s, 3),
                "decode": round(tally.decode_s, 3),
                "infer": round(tally.infer_s, 3),
                "driver": round(load.driver_s, 3),
            },
            busy={
                "fetch": found.fetch_busy,
                "decode": found.decode_busy,
                "infer": found.actors_busy,
                "driver": found.driver_busy,
            }
            if known
            else {},
            actors=section.actors,
            gpus=section.actors * section.gpus_per_actor,
            cpus=section.actors * section.cpus_per_actor,
            limit=found.limit,
            sentence=found.sentence,
        )
        with contextlib.suppress(BatchInferenceError):
            spent.write(store)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What Ray raises as what really happened."""
    try:
        yield
    except Exception as exc:
        failure = explain_ray_failure(exc)
        if failure is exc:
            raise
        raise failure from exc


def _kept(config: JobConfig) -> dict[str, Any]:
    """A configuration as the output keeps it: inputs by their canonical URIs, so that it means the same from any folder."""
    section = config.input
    uris = tuple(canonical_uri(uri) for uri in section.uris)
    manifest = canonical_uri(section.manifest) if section.manifest else None
    section = section.model_copy(update={"uris": uris, "manifest": manifest})
    return config.model_copy(update={"input": section}).model_dump(mode="json")


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM as :class:`Interrupted` from the main thread; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    received: list[str] = []

    def stop(number: int, frame: Any) -> None:
        moment = time.monotonic()
        again, _stopped_at[number] = moment - _stopped_at.get(number, -math.inf) < _SAME_SIGNAL_S, moment
        if again and is_supervised():
            return
        received.append(signal.Signals(number).name)
        # Of all exceptions this is the one that Ray's native code lets through while it waits; another becomes a SystemError.
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (KeyboardInterrupt, SystemExit, Exception) as exc:
        # What was under way fails in its own words, as Ray does while it starts; the reason is the signal. And a Ray that has just
        # started here takes SIGTERM until it is taken back: it exits with 1.
        if isinstance(exc, Interrupted) or not (received or isinstance(exc, (KeyboardInterrupt, SystemExit))):
            raise
        unseen = "SIGTERM" if isinstance(exc, SystemExit) else "SIGINT"
        raise Interrupted(
            f"stopped by {received[0] if received else unseen}",
            "Run the same command again: it resumes with the shards that are left.",
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
