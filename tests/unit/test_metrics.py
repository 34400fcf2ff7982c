"""The table of metrics, and how a process counts."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_inference import metrics, reporter
from batch_inference.collection import Tally
from batch_inference.metrics import METRICS, Meter, table
from batch_inference.progress import Snapshot

DOCUMENT = Path(__file__).parents[2] / "k8s" / "monitoring.md"


class Recorder:
    """In the place of a metric of Ray's."""

    def __init__(self) -> None:
        self.values: list[tuple[float, dict[str, str]]] = []

    def _record(self, value: float, tags: dict[str, str]) -> None:
        self.values.append((value, tags))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Recorder]:
    """What the process' meter is told, by metric; as if Ray were up."""
    found: dict[str, Recorder] = {}
    fresh = Meter()
    monkeypatch.setattr(reporter, "meter", fresh)
    monkeypatch.setattr(metrics, "_make", lambda metric: found.setdefault(metric.name, Recorder()))
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(reporter, "_actors", lambda: (1, 0))
    return found


def total(recorder: Recorder, **labels: str) -> float:
    return sum(value for value, tags in recorder.values if labels.items() <= tags.items())


def test_the_table_is_that_of_the_document() -> None:
    assert table() in DOCUMENT.read_text(), "run python helm/generate.py"


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_prometheus(metric: metrics.Metric) -> None:
    assert re.fullmatch(r"[a-z][a-z_]*[a-z]", metric.name)
    assert not metric.name.endswith(("_total", "_count", "_sum", "_bucket")), "these Prometheus adds"
    assert metric.labels[0] == "run"
    assert not {"uri", "shard", "attempt", "message"} & set(metric.labels), "too many values"
    assert bool(metric.boundaries) is (metric.type == "histogram")


def test_a_process_that_was_not_told_of_a_run_counts_nothing(recorded: dict[str, Recorder]) -> None:
    Meter().add("images", outcome="error")
    assert recorded == {}


def test_what_cannot_be_counted_fails_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def broken(metric: metrics.Metric) -> Any:
        tried.append(metric.name)
        raise RuntimeError("no exporter")

    monkeypatch.setattr(metrics, "_make", broken)
    meter = Meter()
    meter.begin("run")
    meter.add("images", outcome="error")
    meter.add("images", outcome="error")
    assert tried == ["images"], "it is tried once and said once"


def test_the_driver_counts_what_came_back_since_the_last_time(recorded: dict[str, Recorder]) -> None:
    """Not what earlier attempts have done, which is in the tally when it starts."""
    snapshot = Snapshot(rows_total=100, shards_total=10, shards_done=1)
    tally = snapshot.tally = Tally(rows=10, errors=1, errors_by={"fetch": {"NOT_FOUND": 1}})
    told = reporter.Reporter("run", 2, snapshot)
    told.count()
    tally.rows, tally.bytes, tally.retries, tally.infer_s = 30, 5000, 3, 1.5
    tally.add_errors({"fetch": {"NOT_FOUND": 2}, "decode": {"CORRUPT": 4}})
    told.count()
    told.count()
    assert total(recorded["images"], outcome="error") == 6
    assert total(recorded["images"], outcome="prediction") == 14
    assert total(recorded["errors"], stage="fetch", error_type="NOT_FOUND") == 2
    assert total(recorded["errors"], stage="decode", error_type="CORRUPT") == 4
    assert total(recorded["fetched_bytes"]) == 5000
    assert total(recorded["retries"], kind="request") == 3
    assert total(recorded["stage_seconds"], stage="infer") == 1.5
    assert total(recorded["attempts"]) == 1
    assert {tags["run"] for recorder in recorded.values() for _, tags in recorder.values} == {"run"}


def test_gauges_are_told_again_and_again_and_once_more_at_the_end(
    recorded: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "_EVERY_S", 0.02)
    snapshot = Snapshot(rows_total=100, shards_total=10)
    told = reporter.Reporter("run", 2, snapshot)
    told.start()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and len(recorded.get("queued_blocks", Recorder()).values) < 3:
        time.sleep(0.01)
    snapshot.tally.rows, snapshot.shards_done = 100, 10
    told.stop()
    told.stop()
    assert recorded["inputs"].values[-2:] == [
        (100, {"run": "run", "state": "done"}),
        (0, {"run": "run", "state": "left"}),
    ]
    assert recorded["shards"].values[-1] == (0, {"run": "run", "state": "left"})
    assert (2, {"run": "run", "state": "wanted"}) in recorded["actors"].values
    assert len(recorded["queued_blocks"].values) >= 3


def test_nothing_is_told_before_ray_is_up(recorded: dict[str, Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    told = reporter.Reporter("run", 2, Snapshot())
    told.start()
    told.count()
    told.stop()
    assert recorded == {}


def test_blocks_before_the_actors_are_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    def operator(name: str, blocks: int) -> tuple[Any, Any]:
        return SimpleNamespace(name=name), SimpleNamespace(total_enqueued_input_blocks=lambda: blocks)

    monkeypatch.setattr(reporter, "_queue", queue := reporter._Queue())
    entries = [operator("ReadShards", 7), operator("MapBatches(InferenceActor)", 5)]
    look = reporter.QueueLook()
    topology = SimpleNamespace(items=lambda: iter(entries))
    look.on_execution_step(SimpleNamespace(_topology=topology))
    assert queue.blocks == 5
    look._next = 0
    look.on_execution_step(SimpleNamespace())  # another Ray, say
    assert queue.blocks == 5
