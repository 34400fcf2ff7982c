"""Metrics of a run, for Prometheus: their definitions, and the meter of a process.

Ray exports them at each node's metrics port, with `ray_` before the name. :data:`METRICS` lists all of them; the table in
`k8s/monitoring.md` is generated from it. No error of a metric may fail a job: the metric is dropped.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Literal

import structlog

MetricType = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """The definition of a metric.

    Attributes:
        name: Name without the prefixes and suffixes of Ray and Prometheus.
        type: Prometheus' type of the metric.
        unit: Unit of the values.
        labels: Labels besides Ray's own (``WorkerId``, ``NodeAddress``, ``SessionName``, …). Each has few values; never a URI.
        counted_by: Processes that record it.
        description: Help text.
        boundaries: Upper bounds of a histogram's buckets.
    """

    name: str
    type: MetricType
    unit: str
    labels: tuple[str, ...]
    counted_by: Literal["driver", "actors", "tasks", "driver, tasks"]
    description: str
    boundaries: tuple[float, ...] = ()

    @property
    def ray_name(self) -> str:
        """The name under which it is registered with Ray."""
        return f"batch_inference_{self.name}"

    @property
    def prometheus_name(self) -> str:
        """The name in Prometheus; a histogram has series that end in ``_bucket``, ``_sum`` and ``_count``."""
        return f"ray_{self.ray_name}" + ("_total" if self.type == "counter" else "")


METRICS = (
    Metric("images", "counter", "images", ("run", "outcome"), "driver", "Rows that the driver got back: `prediction` or `error`"),
    Metric("errors", "counter", "images", ("run", "stage", "error_type"), "driver", "Rows that failed, by stage and type"),
    Metric("fetched_bytes", "counter", "bytes", ("run",), "driver", "Encoded bytes of the inputs of these rows"),
    Metric(
        "stage_seconds", "counter", "seconds", ("run", "stage"), "driver",
        "Time in `fetch`, `decode` (with preprocessing), `infer` and `write`, summed over parallel work",
    ),
    Metric("commits", "counter", "shards", ("run", "driver"), "driver", "Shards committed by this driver (`own`), or already by `another`"),
    Metric(
        "retries", "counter", "times", ("run", "kind"), "driver, tasks",
        "Repeated `request`s for inputs; `task`s and `actor`s started again after their process died",
    ),
    Metric("attempts", "counter", "attempts", ("run",), "driver", "Starts of the driver; each has its own series"),
    Metric("inputs", "gauge", "images", ("run", "state"), "driver", "Inputs of the job that are `done` or `left`"),
    Metric("shards", "gauge", "shards", ("run", "state"), "driver", "Shards that are `done` (committed) or `left`"),
    Metric("actors", "gauge", "actors", ("run", "state"), "driver", "Actors that are `wanted` by the job or `ready` (model loaded)"),
    Metric("queued_blocks", "gauge", "blocks", ("run",), "driver", "Blocks of prepared images that wait for an actor"),
    Metric(
        "batch_fill", "histogram", "share", ("run",), "actors",
        "Fill of an actor's batches: images divided by the batch size, or bytes by the maximum of a batch; failed rows do not count",
        (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0),
    ),
    Metric(
        "actor_busy_seconds", "counter", "seconds", ("run", "device"), "actors",
        "Time that predictors were busy, on a `gpu` or a `cpu`; its rate divided by the number of actors is their utilization",
    ),
    Metric("out_of_memory_splits", "counter", "times", ("run",), "actors", "Batches split in half after an out-of-memory error"),
)  # fmt: skip

_BY_NAME = {metric.name: metric for metric in METRICS}

log = structlog.get_logger()


class Meter:
    """Records the metrics of this process, for the run that :meth:`set_run` names. Before that call it records nothing.

    Ray sends the values to the node's exporter every ten seconds, and at a regular end of the process.
    """

    def __init__(self) -> None:
        self._run: str | None = None
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def set_run(self, run: str) -> None:
        """Record values for this run from now on."""
        self._run = run

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        """Add to a counter. Adding 0 creates the series: Prometheus sees no increase in a series that starts with a value."""
        self._record(name, value, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge. Ray drops it unless it is set again within 20 seconds."""
        self._record(name, value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add an observation to a histogram."""
        self._record(name, value, labels)

    def _record(self, name: str, value: float, labels: dict[str, str]) -> None:
        if self._run is None:
            return
        try:
            # `inc` refuses 0, with which a counter has to start.
            self._metric(name)._record(value, {"run": self._run, **labels})
        except Exception as exc:
            self._run = None
            log.warning("going on without metrics", metric=name, error=f"{type(exc).__name__}: {exc}")

    def _metric(self, name: str) -> Any:
        with self._lock:
            if name not in self._made:
                self._made[name] = _create(_BY_NAME[name])
            return self._made[name]


def _create(metric: Metric) -> Any:
    from ray.util import metrics as ray_metrics

    if metric.type == "histogram":
        return ray_metrics.Histogram(metric.ray_name, metric.description, list(metric.boundaries), metric.labels)
    metric_class = ray_metrics.Counter if metric.type == "counter" else ray_metrics.Gauge
    return metric_class(metric.ray_name, metric.description, metric.labels)


#: The meter of this process.
meter = Meter()


def markdown_table() -> str:
    """Return all metrics as a table in Markdown."""
    lines = ["| name | type | unit | labels | counted by | |", "| --- | --- | --- | --- | --- | --- |"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(
            f"| `{metric.prometheus_name}` | {metric.type} | {metric.unit} | {labels} | {metric.counted_by} | {metric.description} |"
        )
    return "\n".join(lines)
