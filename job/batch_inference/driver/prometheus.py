"""Metrics of the driver for Prometheus: counts as rows come back, and gauges every few seconds."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace

from batch_inference.driver.events import Listener
from batch_inference.driver.progress import Progress
from batch_inference.output.tally import Tally
from batch_inference.pipeline.backlog import ACTOR_CLASS, INTERVAL_S, input_queue
from batch_inference.telemetry.metrics import meter

_STAGES = ("fetch", "decode", "infer")


class MetricsExporter(Listener):
    """Exports the metrics of one attempt, from :meth:`start` to :meth:`stop`.

    Args:
        run: The run's name.
        actors: Number of actors that the job asks for.
        progress: Kept up to date by the driver. Counts that are in it now came from earlier attempts.
    """

    def __init__(self, run: str, actors: int, progress: Progress) -> None:
        self._run = run
        self._actors = actors
        self._progress = progress
        self._counted = _copy(progress.tally)
        self._restarts = 0
        self._begun = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._export_gauges, name="metrics", daemon=True)

    def start(self) -> None:
        """Start the thread that exports gauges. Nothing is exported until Ray is initialized."""
        input_queue.blocks = 0
        self._thread.start()

    def stop(self) -> None:
        """Export the last values; call it before the connection to Ray ends."""
        if not self._stopped.is_set():
            self._stopped.set()
            # It may be waiting for an answer from a cluster that is gone.
            self._thread.join(INTERVAL_S)
            self.count()
            if self._begun:
                self._show_progress()

    def rows(self, progress: Progress) -> None:
        """Count the rows that came back."""
        self.count()

    def committed(self, progress: Progress, *, own: bool, seconds: float) -> None:
        """Count a commit, and the seconds that it took to write its files and itself."""
        if self._ready():
            meter.add("commits", driver="own" if own else "another")
            _add("stage_seconds", seconds, stage="write")

    def count(self) -> None:
        """Count the rows that came back since the last time."""
        tally = self._progress.tally
        if not self._ready():
            return
        last, self._counted = self._counted, _copy(tally)
        errors = tally.errors - last.errors
        _add("images", tally.rows - last.rows - errors, outcome="prediction")
        _add("images", errors, outcome="error")
        if errors:
            for stage, counts in tally.errors_by.items():
                for error_type, count in counts.items():
                    more = count - last.errors_by.get(stage, {}).get(error_type, 0)
                    _add("errors", more, stage=stage, error_type=error_type)
        _add("fetched_bytes", tally.bytes - last.bytes)
        _add("retries", tally.retries - last.retries, kind="request")
        for stage in _STAGES:
            name = f"{stage}_s"
            _add("stage_seconds", getattr(tally, name) - getattr(last, name), stage=stage)

    def _export_gauges(self) -> None:
        while True:
            self._show_gauges()
            if self._stopped.wait(INTERVAL_S if self._begun else INTERVAL_S / 10):
                return

    def _show_gauges(self) -> None:
        if not self._ready():
            return
        self._show_progress()
        ready, restarts = _actors()
        meter.set("actors", self._actors, state="wanted")
        meter.set("actors", ready, state="ready")
        _add("retries", restarts - self._restarts, kind="actor")
        self._restarts = restarts
        meter.set("queued_blocks", input_queue.blocks)

    def _show_progress(self) -> None:
        progress = self._progress
        for name, total, done in (
            ("inputs", progress.rows_total, progress.tally.rows),
            ("shards", progress.shards_total, progress.shards_done),
        ):
            meter.set(name, done, state="done")
            meter.set(name, total - done, state="left")

    def _ready(self) -> bool:
        """Return whether Ray takes metrics; the first time, export all counters with 0."""
        import ray

        with self._lock:
            if self._begun:
                return True
            if not ray.is_initialized():
                return False
            meter.set_run(self._run)
            for outcome in ("prediction", "error"):
                meter.add("images", 0, outcome=outcome)
            for stage in (*_STAGES, "write"):
                meter.add("stage_seconds", 0, stage=stage)
            for retry_kind in ("request", "task", "actor"):
                meter.add("retries", 0, kind=retry_kind)
            for name in ("fetched_bytes", "attempts"):
                meter.add(name, 0)
            meter.add("commits", 0, driver="own")
            meter.add("attempts")
            self._begun = True
            return True


def _add(name: str, value: float, **labels: str) -> None:
    if value > 0:
        meter.add(name, value, **labels)


def _copy(tally: Tally) -> Tally:
    return replace(tally, errors_by={stage: dict(counts) for stage, counts in tally.errors_by.items()})


def _actors() -> tuple[int, int]:
    """Return the number of actors of this driver that have loaded the model, and how many were restarted."""
    # The only way to ask that needs no dashboard.
    with contextlib.suppress(Exception):
        import ray
        from ray._private.state import actors

        own = [
            actor
            for actor in actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id())).values()
            if ACTOR_CLASS in actor["ActorClassName"]
        ]
        return sum(actor["State"] == "ALIVE" for actor in own), sum(actor["NumRestarts"] for actor in own)
    return 0, 0
