"""What the driver tells Prometheus: counts as rows come back, and every few seconds where the run stands."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from batch_inference.collection import Tally
from batch_inference.metrics import meter
from batch_inference.progress import Snapshot

# Ray exports every ten seconds, and forgets a gauge that was not set for twenty.
_EVERY_S = 5.0
_STAGES = ("fetch", "decode", "infer")
_ACTOR_CLASS = "InferenceActor"


@dataclass
class _Queue:
    blocks: int = 0


_queue = _Queue()


class QueueLook:
    """Looks, while Ray Data works, how many blocks wait for an actor: an execution callback, which Ray Data constructs."""

    def __init__(self) -> None:
        self._next = 0.0

    def before_execution_starts(self, executor: Any) -> None:
        """Does nothing; likewise the others."""

    def after_execution_succeeds(self, executor: Any) -> None:
        """See before_execution_starts."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """See before_execution_starts."""

    def on_execution_step(self, executor: Any) -> None:
        """Called many times a second."""
        if (now := time.monotonic()) < self._next:
            return
        self._next = now + _EVERY_S / 2
        # Nothing of this is Ray's promise, and a job is worth more than a metric.
        with contextlib.suppress(Exception):
            _queue.blocks = sum(
                state.total_enqueued_input_blocks()
                for operator, state in executor._topology.items()
                if _ACTOR_CLASS in operator.name
            )


class Reporter:
    """Tells of one attempt, from :meth:`start` to :meth:`stop`.

    Args:
        run: The run's name.
        actors: Actors that the job wants.
        snapshot: Where the run stands; changed by the driver. What is in its tally now came of earlier attempts.
    """

    def __init__(self, run: str, actors: int, snapshot: Snapshot) -> None:
        self._run = run
        self._actors = actors
        self._snapshot = snapshot
        self._counted = _copy(snapshot.tally)
        self._restarts = 0
        self._begun = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="metrics", daemon=True)

    def start(self) -> None:
        """Begins; where Ray is still to be started, there is nothing to tell before it is."""
        _queue.blocks = 0
        self._thread.start()

    def stop(self) -> None:
        """Tells the last; to be called before the connection to Ray ends."""
        if not self._ended.is_set():
            self._ended.set()
            # It may be waiting for an answer from a cluster that is gone.
            self._thread.join(_EVERY_S)
            self.count()
            if self._begun:
                self._show_rows()

    def count(self) -> None:
        """Counts what has come back since the last time."""
        tally = self._snapshot.tally
        if not self._ready():
            return
        last, self._counted = self._counted, _copy(tally)
        errors = tally.errors - last.errors
        _add("images", tally.rows - last.rows - errors, outcome="prediction")
        _add("images", errors, outcome="error")
        if errors:
            for stage, kinds in tally.errors_by.items():
                for kind, count in kinds.items():
                    _add("errors", count - last.errors_by.get(stage, {}).get(kind, 0), stage=stage, error_type=kind)
        _add("fetched_bytes", tally.bytes - last.bytes)
        _add("retries", tally.retries - last.retries, kind="request")
        for stage in _STAGES:
            name = f"{stage}_s"
            _add("stage_seconds", getattr(tally, name) - getattr(last, name), stage=stage)

    def committed(self, *, mine: bool, seconds: float) -> None:
        """Counts a commit, and the seconds that it took to write its files and itself."""
        if self._ready():
            meter.add("commits", driver="own" if mine else "another")
            _add("stage_seconds", seconds, stage="write")

    def _tell(self) -> None:
        while True:
            self._look()
            if self._ended.wait(_EVERY_S if self._begun else _EVERY_S / 10):
                return

    def _look(self) -> None:
        if not self._ready():
            return
        self._show_rows()
        ready, restarts = _actors()
        meter.show("actors", self._actors, state="wanted")
        meter.show("actors", ready, state="ready")
        _add("retries", restarts - self._restarts, kind="actor")
        self._restarts = restarts
        meter.show("queued_blocks", _queue.blocks)

    def _show_rows(self) -> None:
        snapshot = self._snapshot
        for name, total, done in (
            ("inputs", snapshot.rows_total, snapshot.tally.rows),
            ("shards", snapshot.shards_total, snapshot.shards_done),
        ):
            meter.show(name, done, state="done")
            meter.show(name, total - done, state="left")

    def _ready(self) -> bool:
        """Whether Ray takes metrics; the first time, all counters appear with 0."""
        import ray

        with self._lock:
            if self._begun:
                return True
            if not ray.is_initialized():
                return False
            meter.begin(self._run)
            for outcome in ("prediction", "error"):
                meter.add("images", 0, outcome=outcome)
            for stage in (*_STAGES, "write"):
                meter.add("stage_seconds", 0, stage=stage)
            for kind in ("request", "task", "actor"):
                meter.add("retries", 0, kind=kind)
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
    return replace(tally, errors_by={stage: dict(kinds) for stage, kinds in tally.errors_by.items()})


def _actors() -> tuple[int, int]:
    """Actors of this driver that have loaded the model, and how many processes of theirs were started again."""
    # The one way to ask that needs no dashboard.
    with contextlib.suppress(Exception):
        import ray
        from ray._private.state import actors

        mine = [
            actor
            for actor in actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id())).values()
            if _ACTOR_CLASS in actor["ActorClassName"]
        ]
        return sum(actor["State"] == "ALIVE" for actor in mine), sum(actor["NumRestarts"] for actor in mine)
    return 0, 0
