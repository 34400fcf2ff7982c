"""Log lines: their fields, and the processes that write them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from batch_inference.telemetry import logs
from batch_inference.telemetry.context import Telemetry
from batch_inference.telemetry.metrics import meter


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
    Telemetry("photos-0123abcd", "a1b2c3d4", "json").set_up()
    structlog.contextvars.bind_contextvars(shard=42)
    structlog.get_logger().debug("prepared", rows=10)
    structlog.contextvars.clear_contextvars()
    structlog.get_logger().info("planned")
    first, second = lines(capsys)
    assert {"run": "photos-0123abcd", "attempt": "a1b2c3d4", "shard": 42, "rows": 10}.items() <= first.items()
    assert first["event"] == "prepared" and first["level"] == "debug" and first["timestamp"]
    assert second["run"] == "photos-0123abcd" and "shard" not in second


def test_records_of_pythons_logging_become_json(capsys: pytest.CaptureFixture[str]) -> None:
    Telemetry("photos-0123abcd", "a1b2c3d4", "json").set_up()
    structlog.contextvars.bind_contextvars(shard=42)
    logging.getLogger("batch_inference.models.execution").warning("no memory for %d images at once", 64)
    (line,) = lines(capsys)
    assert line["event"] == "no memory for 64 images at once"
    assert {"run": "photos-0123abcd", "attempt": "a1b2c3d4", "shard": 42, "level": "warning"}.items() <= line.items()


def test_text_lines_have_no_context_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("text")
    logs.bind(run="photos-0123abcd", attempt="a1b2c3d4")
    structlog.get_logger().debug("committed", shard=1)
    structlog.get_logger().info("planned", inputs=3)
    (line,) = capsys.readouterr().err.splitlines()
    assert "planned" in line and "inputs=3" in line
    assert "a1b2c3d4" not in line


def test_quiet_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("json", quiet=True)
    structlog.get_logger().info("planned")
    structlog.get_logger().warning("skipped")
    assert [line["event"] for line in lines(capsys)] == ["skipped"]


def test_text_format_does_not_configure_a_workers_process() -> None:
    before = structlog.get_config()
    Telemetry("run", "attempt", "text").set_up()
    assert structlog.get_config() == before
