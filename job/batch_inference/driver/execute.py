"""The main phase of an attempt: rows from the pipeline, shards to commits."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
import structlog

from batch_inference.config import JobConfig
from batch_inference.driver.collector import Collector
from batch_inference.driver.committer import Committer, PredictionWriters
from batch_inference.driver.connection import RayConnection
from batch_inference.driver.events import AttemptInfo, Events
from batch_inference.driver.job import Planned
from batch_inference.driver.progress import Phase
from batch_inference.driver.prometheus import MetricsExporter
from batch_inference.driver.recorder import AttemptRecorder, Recorder
from batch_inference.driver.resume import Todo
from batch_inference.output.records import Commit
from batch_inference.pipeline.bottleneck import Bottleneck, find_bottleneck, planned_timings
from batch_inference.pipeline.cluster import ResourceRequest, wait_until_it_fits
from batch_inference.pipeline.ray_errors import explain_ray_failure
from batch_inference.pipeline.result_rows import notes
from batch_inference.pipeline.schemas import raise_if_fatal
from batch_inference.pipeline.stream import PipelineSpec, results
from batch_inference.preflight.preflight import check_before_start, with_one_actor
from batch_inference.system.cpus import available_cpus
from batch_inference.telemetry import logs
from batch_inference.telemetry.context import Telemetry
from batch_inference.telemetry.tracebacks import last_frame, with_traceback

log = structlog.get_logger()

# Faults of a predictor class that are logged with their tracebacks; all are in errors/.
_MAX_LOGGED_FAULTS = 10


class Execution:
    """The work of one attempt on what is left of a job.

    Args:
        config: The job's configuration.
        attempt: This attempt.
        planned: The job.
        todo: The work that is left.
        events: Told of rows and commits.
        recorder: Records what the attempt takes.
        stopping: Set by another thread that wants the work to end as SIGTERM does.
    """

    def __init__(
        self,
        config: JobConfig,
        attempt: AttemptInfo,
        planned: Planned,
        todo: Todo,
        events: Events,
        recorder: Recorder,
        stopping: threading.Event,
    ) -> None:
        self._config = config
        self._attempt = attempt
        self._planned = planned
        self._todo = todo
        self._events = events
        self._recorder = recorder
        self._stopping = stopping
        self._faults = FaultLog()

    def run(self, connection: RayConnection) -> Bottleneck:
        """Connect to Ray where that is still to be done, try one actor first where that is configured, and do the work.

        Returns:
            What limited it.
        """
        config, job, events = self._config, self._planned.job, self._events
        events.phase_changed(Phase.START)
        record = self._recorder.begin_work(events.progress, planned_timings(config, len(self._todo)))
        telemetry = Telemetry(self._attempt.run_name or job.fingerprint[:12], self._attempt.id, logs.log_format())
        logs.bind(run=telemetry.run)
        exporter = MetricsExporter(telemetry.run, config.inference.actors, events.progress)
        connection.before_close(exporter.stop)
        exporter.start()
        events.subscribe(exporter)
        early, try_first = connection.is_open, config.preflight.enabled and self._todo.is_first
        if not early:
            # Where workers come on demand, one actor's come first.
            connection.open(with_one_actor(config) if try_first else config)
            connection.before_close(exporter.stop)
        # A Ray of our own may claim more CPUs than there are; these make nothing faster.
        cpus = float(available_cpus()) if connection.starts_ray else math.inf
        if try_first:
            self._try_one_actor(record, cpus)
            if not early:
                wait_until_it_fits(ResourceRequest.of(config))
        self.work(record, cpus, telemetry)
        return find_bottleneck(record.timings)

    def work(self, record: AttemptRecorder, cpus: float = math.inf, telemetry: Telemetry | None = None) -> None:
        """Run the pipeline and commit what it yields."""
        config, events, todo = self._config, self._events, self._todo
        ledger, job, engine = self._planned.ledger, self._planned.job, self._planned.engine
        events.phase_changed(Phase.START)
        record.timings = planned_timings(config, len(todo), cpus)
        writers = PredictionWriters.start(
            ledger.store, config, self._attempt.id, job.tries_column, todo.generation, custom=engine.custom
        )
        tally, rows, chosen = events.progress.tally, todo.rows(job), todo.chosen()
        pending = dict.fromkeys(todo.pending, todo.generation)
        collector = Collector(rows, tally, chosen, worked=tally.predictions > 0)
        with (
            contextlib.closing(writers),
            Committer(ledger, writers, self._committed, todo.retried, tally, pending) as committer,
            contextlib.closing(
                results(
                    PipelineSpec(
                        ledger.store,
                        config,
                        engine.with_passthrough(job.passthrough),
                        rows,
                        self._attempt.id,
                        writers.handles,
                        chosen,
                        telemetry,
                    )
                )
            ) as tables,
            _ray_failures_explained(),
        ):
            self._collect(tables, collector, committer, writers, record)

    def _try_one_actor(self, record: AttemptRecorder, cpus: float) -> None:
        """Try one actor on a few images; end the job here if it would end so with all of them."""
        self._events.phase_changed(Phase.PREFLIGHT)
        # What is held meanwhile counts.
        record.timings = planned_timings(self._config, self._planned.job.shards, cpus)
        with _ray_failures_explained():
            check_before_start(self._config, self._planned.engine, self._planned.ledger.store, self._planned.job, cpus)

    def _collect(
        self,
        tables: Iterator[pa.Table],
        collector: Collector,
        committer: Committer,
        writers: PredictionWriters,
        record: AttemptRecorder,
    ) -> None:
        progress = self._events.progress
        driver_s = 0.0
        for table in tables:
            begun = time.monotonic()
            raise_if_fatal(table)
            self._faults.add(table)
            if self._stopping.is_set():
                raise KeyboardInterrupt
            writers.add(table)
            for shard, part in collector.add(table):
                committer.add(shard, part)
            progress.advance_clock(table.num_rows)
            progress.tally.check(self._config.errors)
            self._events.rows()
            driver_s += time.monotonic() - begun
            record.update_timings(progress, driver_s, committer.blocked_s)
            if committer.lost_race and committer.everything_committed(progress.shards_total):
                log.info("another driver has committed the rest")
                break
        else:
            collector.finish()
        committer.wait()

    def _committed(self, commit: Commit, own: bool, seconds: float) -> None:
        log.debug(
            "committed" if own else "committed by another driver",
            shard=commit.shard,
            rows=commit.rows,
            errors=commit.errors,
            seconds=round(seconds, 3),
        )
        self._events.committed(own=own, seconds=seconds)


class FaultLog:
    """Logs the actors' notes, and where a predictor class raised, once for each type and place."""

    def __init__(self) -> None:
        self._faults: set[tuple[str, str]] = set()
        self._notes: set[str] = set()

    def add(self, table: pa.Table) -> None:
        """Log what is new in rows of ``RESULT_SCHEMA``."""
        for note in notes(table):
            if note not in self._notes:
                self._notes.add(note)
                log.warning(note)
        if table["traceback"].null_count == table.num_rows or len(self._faults) >= _MAX_LOGGED_FAULTS:
            return
        failed = table.filter(pc.is_valid(table["traceback"]))
        for error_type, message, traceback in zip(
            *(failed[name].to_pylist() for name in ("error_type", "message", "traceback")), strict=True
        ):
            fault = (error_type, last_frame(traceback))
            if fault not in self._faults and len(self._faults) < _MAX_LOGGED_FAULTS:
                self._faults.add(fault)
                log.warning(with_traceback(f"an image failed with {error_type}: {message}", traceback))


@contextlib.contextmanager
def _ray_failures_explained() -> Iterator[None]:
    """Raise what Ray raises as the failure that caused it."""
    try:
        yield
    except Exception as exc:
        failure = explain_ray_failure(exc)
        if failure is exc:
            raise
        raise failure from exc
