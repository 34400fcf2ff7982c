"""Log lines: which fields they have, and in which processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from batch_inference import logs
from batch_inference.metrics import meter
from batch_inference.telemetry import Telemetry


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = logging.getLogger("batch_inference")
    before = package.handlers, package.propagate, package.level
    monkeypatch.setattr(logs, "_bound", {})
    monkeypatch.setattr(logs, "_format", "text")
    monkeypatch.setattr(meter, "_run", None)
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    package.handlers, package.propagate = before[:2]
    package.setLevel(before[2])


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_json_lines_have_run_attempt_and_shard(capsys: pytest.CaptureFixture[str]) -> None:
    Telemetry("photos-0123abcd", "a1b2c3d4", "json").begin()
    structlog.contextvars.bind_contextvars(shard=42)
    structlog.get_logger().debug("prepared", rows=10)
    structlog.contextvars.clear_contextvars()
    structlog.get_logger().info("planned")
    first, second = lines(capsys)
    assert {"run": "photos-0123abcd", "attempt": "a1b2c3d4", "shard": 42, "rows": 10}.items() <= first.items()
    assert first["event"] == "prepared" and first["level"] == "debug" and first["timestamp"]
    assert second["run"] == "photos-0123abcd" and "shard" not in second


def test_pythons_own_logging_becomes_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    Telemetry("photos-0123abcd", "a1b2c3d4", "json").begin()
    structlog.contextvars.bind_contextvars(shard=42)
    logging.getLogger("batch_inference.execution").warning("no memory for %d images at once", 64)
    (line,) = lines(capsys)
    assert line["event"] == "no memory for 64 images at once"
    assert {"run": "photos-0123abcd", "attempt": "a1b2c3d4", "shard": 42, "level": "warning"}.items() <= line.items()


def test_lines_for_people_stay_short(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text")
    logs.bind(run="photos-0123abcd", attempt="a1b2c3d4")
    structlog.get_logger().debug("committed", shard=1)
    structlog.get_logger().info("planned", inputs=3)
    (line,) = capsys.readouterr().err.splitlines()
    assert "planned" in line and "inputs=3" in line
    assert "a1b2c3d4" not in line


def test_quiet_leaves_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", quiet=True)
    structlog.get_logger().info("planned")
    structlog.get_logger().warning("skipped")
    assert [line["event"] for line in lines(capsys)] == ["skipped"]


def test_text_leaves_a_workers_process_as_it_is() -> None:
    before = structlog.get_config()
    Telemetry("run", "attempt", "text").begin()
    assert structlog.get_config() == before
