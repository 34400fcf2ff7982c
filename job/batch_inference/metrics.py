"""Metrics of a run, for Prometheus: which there are, and how a process counts.

Ray exports them at each node's metrics port, with `ray_` before the name. :data:`METRICS` is all of them, and the table in
`k8s/monitoring.md`. Nothing here may fail a job: what cannot be counted is not.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Literal

import structlog

Type = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: Without what Ray and Prometheus put around it.
        type: As Prometheus has it.
        unit: What is counted.
        labels: Beside Ray's own (``WorkerId``, ``NodeAddress``, ``SessionName``, …). Few values each; never a URI.
        by: Which processes count.
        text: What it says.
        boundaries: Of a histogram's buckets.
    """

    name: str
    type: Type
    unit: str
    labels: tuple[str, ...]
    by: Literal["driver", "actors", "tasks", "driver, tasks"]
    text: str
    boundaries: tuple[float, ...] = ()

    @property
    def registered(self) -> str:
        """The name that Ray is told."""
        return f"batch_inference_{self.name}"

    @property
    def scraped(self) -> str:
        """The name that Prometheus sees; a histogram's has ``_bucket``, ``_sum`` and ``_count`` behind it."""
        return f"ray_{self.registered}" + ("_total" if self.type == "counter" else "")


METRICS = (
    Metric("images", "counter", "images", ("run", "outcome"), "driver", "Rows that came back: `prediction` or `error`"),
    Metric("errors", "counter", "images", ("run", "stage", "error_type"), "driver", "Rows that failed, by stage and type"),
    Metric("fetched_bytes", "counter", "bytes", ("run",), "driver", "Encoded bytes of the inputs that came back"),
    Metric(
        "stage_seconds", "counter", "seconds", ("run", "stage"), "driver",
        "Time in `fetch`, `decode` (with preprocessing), `infer` and `write`, added up over all that works at the same time",
    ),
    Metric("commits", "counter", "shards", ("run", "driver"), "driver", "Shards committed by this driver (`own`) or, first, by `another`"),
    Metric(
        "retries", "counter", "times", ("run", "kind"), "driver, tasks",
        "Begun again: `request`s for inputs, `task`s whose process died, `actor`s whose process died",
    ),
    Metric("attempts", "counter", "attempts", ("run",), "driver", "Starts of the driver; each is a series of its own"),
    Metric("inputs", "gauge", "images", ("run", "state"), "driver", "Inputs of the job that are `done`, and that are `left`"),
    Metric("shards", "gauge", "shards", ("run", "state"), "driver", "Shards that are `done` (committed), and that are `left`"),
    Metric("actors", "gauge", "actors", ("run", "state"), "driver", "Actors `wanted` by the job, and `ready` with the model loaded"),
    Metric("queued_blocks", "gauge", "blocks", ("run",), "driver", "Blocks of prepared images that wait for an actor"),
    Metric(
        "batch_fill", "histogram", "share", ("run",), "actors",
        "Images that an actor got at once, divided by the batch size, or their bytes by the most that it gets; failed rows take no place",
        (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0),
    ),
    Metric(
        "actor_busy_seconds", "counter", "seconds", ("run", "device"), "actors",
        "Time in which actors' predictors were at work, on a `gpu` or a `cpu`; its rate divided by the actors is how busy they are",
    ),
    Metric("out_of_memory_splits", "counter", "times", ("run",), "actors", "Batches that were halved since the memory did not do"),
)  # fmt: skip

_BY_NAME = {metric.name: metric for metric in METRICS}

log = structlog.get_logger()


class Meter:
    """Counts in this process for the run that :meth:`begin` names; does nothing before it.

    Ray sends what was counted to the node's exporter every ten seconds, and when the process ends in order.
    """

    def __init__(self) -> None:
        self._run: str | None = None
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def begin(self, run: str) -> None:
        """From now on what is counted belongs to this run."""
        self._run = run

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Adds to a counter; 0 makes it appear, since Prometheus sees no increase in what appears with a value."""
        self._record(name, value, labels)

    def show(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge; Ray forgets it if it is not set again within 20 seconds."""
        self._record(name, value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Adds an observation to a histogram."""
        self._record(name, value, labels)

    def _record(self, name: str, value: float, labels: dict[str, str]) -> None:
        if self._run is None:
            return
        try:
            # Not `inc`, which refuses the 0 that a counter has to start with.
            self._metric(name)._record(value, {"run": self._run, **labels})
        except Exception as exc:
            self._run = None
            log.warning("going on without metrics", metric=name, error=f"{type(exc).__name__}: {exc}")

    def _metric(self, name: str) -> Any:
        with self._lock:
            if name not in self._made:
                self._made[name] = _make(_BY_NAME[name])
            return self._made[name]


def _make(metric: Metric) -> Any:
    from ray.util import metrics as ray_metrics

    if metric.type == "histogram":
        return ray_metrics.Histogram(metric.registered, metric.text, list(metric.boundaries), metric.labels)
    kind = ray_metrics.Counter if metric.type == "counter" else ray_metrics.Gauge
    return kind(metric.registered, metric.text, metric.labels)


#: This process's.
meter = Meter()


def table() -> str:
    """All metrics as a table of Markdown."""
    lines = ["| name | type | unit | labels | counted by | |", "| --- | --- | --- | --- | --- | --- |"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.scraped}` | {metric.type} | {metric.unit} | {labels} | {metric.by} | {metric.text} |")
    return "\n".join(lines)
