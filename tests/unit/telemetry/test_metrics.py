"""The table of metrics, and the meter of a process."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference.driver import prometheus
from batch_inference.driver.progress import Progress
from batch_inference.output.tally import Tally
from batch_inference.pipeline import backlog
from batch_inference.telemetry import metrics
from batch_inference.telemetry.metrics import METRICS, Meter, markdown_table
from tests.support.waiting import wait_until

DOCUMENT = Path(__file__).parents[3] / "k8s" / "monitoring.md"


class Recorder:
    """A replacement for a metric of Ray that records its values."""

    def __init__(self) -> None:
        self.values: list[tuple[float, dict[str, str]]] = []

    def _record(self, value: float, tags: dict[str, str]) -> None:
        self.values.append((value, tags))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """Return the recorded values by metric, as if Ray were initialized."""
    recorders: dict[str, Recorder] = {}
    fresh = Meter()
    monkeypatch.setattr(prometheus, "meter", fresh)
    monkeypatch.setattr(metrics, "_create", lambda metric: recorders.setdefault(metric.name, Recorder()))
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(prometheus, "_actors", lambda: (1, 0))
    return recorders


def total(recorder: Recorder, **labels: str) -> float:
    return sum(value for value, tags in recorder.values if labels.items() <= tags.items())


def test_table_of_metrics_is_that_of_the_document() -> None:
    assert markdown_table() in DOCUMENT.read_text(), "run python helm/generate.py"


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_metric_names_follow_prometheus(metric: metrics.Metric) -> None:
    assert re.fullmatch(r"[a-z][a-z_]*[a-z]", metric.name)
    assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket")), "Prometheus adds these"
    assert metric.labels[0] == "run"
    assert not {"uri", "shard", "attempt", "message"} & set(metric.labels), "too many values"
    assert bool(metric.boundaries) is (metric.type == "histogram")


def test_meter_without_a_run_records_nothing(recorded: dict[str, Recorder]) -> None:
    Meter().add("images", outcome="error")
    assert recorded == {}


def test_metric_that_cannot_be_recorded_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(metric: metrics.Metric) -> Any:
        tried.append(metric.name)
        raise RuntimeError("no exporter")

    monkeypatch.setattr(metrics, "_create", broken)
    meter = Meter()
    meter.set_run("run")
    meter.add("images", outcome="error")
    meter.add("images", outcome="error")
    assert tried == ["images"], "it is tried once and logged once"


def test_driver_counts_rows_since_the_last_time(recorded: dict[str, Recorder]) -> None:
    """Rows of earlier attempts, which are in the tally when the driver starts, are not counted."""
    snapshot = Progress(rows_total=100, shards_total=10, shards_done=1)
    tally = snapshot.tally = Tally(rows=10, errors=1, errors_by={"fetch": {"NOT_FOUND": 1}})
    exporter = prometheus.MetricsExporter("run", 2, snapshot)
    exporter.count()
    tally.rows, tally.bytes, tally.retries, tally.infer_s = 30, 5000, 3, 1.5
    tally.add_errors({"fetch": {"NOT_FOUND": 2}, "decode": {"CORRUPT": 4}})
    exporter.count()
    exporter.count()
    assert total(recorded["images"], outcome="error") == 6
    assert total(recorded["images"], outcome="prediction") == 14
    assert total(recorded["errors"], stage="fetch", error_type="NOT_FOUND") == 2
    assert total(recorded["errors"], stage="decode", error_type="CORRUPT") == 4
    assert total(recorded["fetched_bytes"]) == 5000
    assert total(recorded["retries"], kind="request") == 3
    assert total(recorded["stage_seconds"], stage="infer") == 1.5
    assert total(recorded["attempts"]) == 1
    assert {tags["run"] for recorder in recorded.values() for _, tags in recorder.values} == {"run"}


def test_gauges_are_set_periodically_and_at_the_end(
    recorded: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus, "INTERVAL_S", 0.02)
    snapshot = Progress(rows_total=100, shards_total=10)
    exporter = prometheus.MetricsExporter("run", 2, snapshot)
    exporter.start()
    wait_until(lambda: len(recorded.get("queued_blocks", Recorder()).values) >= 3)
    snapshot.tally.rows, snapshot.shards_done = 100, 10
    exporter.stop()
    exporter.stop()
    assert recorded["inputs"].values[-2:] == [
        (100, {"run": "run", "state": "done"}),
        (0, {"run": "run", "state": "left"}),
    ]
    assert recorded["shards"].values[-1] == (0, {"run": "run", "state": "left"})
    assert (2, {"run": "run", "state": "wanted"}) in recorded["actors"].values
    assert len(recorded["queued_blocks"].values) >= 3


def test_nothing_is_recorded_before_ray_is_initialized(
    recorded: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    exporter = prometheus.MetricsExporter("run", 2, Progress())
    exporter.start()
    exporter.count()
    exporter.stop()
    assert recorded == {}


def test_blocks_that_wait_for_actors_are_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    def operator(name: str, blocks: int) -> tuple[Any, Any]:
        return SimpleNamespace(name=name), SimpleNamespace(total_enqueued_input_blocks=lambda: blocks)

    monkeypatch.setattr(backlog, "input_queue", queue := backlog._Queue())
    entries = [operator("ReadShards", 7), operator("MapBatches(InferenceActor)", 5)]
    callback = backlog.BacklogCallback()
    topology = SimpleNamespace(items=lambda: iter(entries))
    callback.on_execution_step(SimpleNamespace(_topology=topology))
    assert queue.blocks == 5
    callback._next_s = 0
    callback.on_execution_step(SimpleNamespace())  # another Ray, say
    assert queue.blocks == 5
