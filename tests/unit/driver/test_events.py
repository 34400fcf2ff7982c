"""Events of an attempt, and the records that follow them; without Ray."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from batch_inference.config import JobConfig
from batch_inference.driver.events import AttemptInfo, Events, Listener, ProgressCallback
from batch_inference.driver.progress import Phase, Progress
from batch_inference.driver.recorder import Recorder
from batch_inference.errors import InfrastructureError, JobInterruptedError
from batch_inference.output.attempts import read_attempts
from batch_inference.output.ledger import Ledger
from batch_inference.pipeline.bottleneck import planned_timings
from tests.support.outputs import planned


class Log(Listener):
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def phase_changed(self, progress: Progress) -> None:
        self.events.append(progress.phase)

    def rows(self, progress: Progress) -> None:
        self.events.append("rows")

    def committed(self, progress: Progress, *, own: bool, seconds: float) -> None:
        self.events.append(f"committed {progress.shards_done} {own}")

    def failed(self, progress: Progress, exc: BaseException) -> None:
        self.events.append(f"failed {type(exc).__name__}")


@pytest.fixture
def config(tmp_path: Path) -> JobConfig:
    return JobConfig.model_validate({"output": {"uri": str(tmp_path)}, "report": {"enabled": False}})


@pytest.fixture
def ledger(config: JobConfig) -> Ledger:
    return planned(config.output.uri, ["s3://b/1.jpg", "s3://b/2.jpg"], 1)[0]


def recorded(config: JobConfig, ledger: Ledger) -> tuple[Events, Recorder]:
    """Return the events of an attempt that a recorder follows."""
    attempt = AttemptInfo("nightly")
    recorder = Recorder(config, ledger.store, ledger.require_job(), attempt)
    return Events(attempt.started, recorder), recorder


def read(ledger: Ledger, path: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(ledger.store.get_or_none(path) or b"{}")
    return content


def test_listeners_are_told_of_every_event_in_order() -> None:
    log = Log()
    events = Events(time.monotonic(), log)
    events.phase_changed(Phase.PLAN)
    events.rows()
    events.rows()
    events.committed(own=True, seconds=0.1)
    events.committed(own=False, seconds=0.1)
    events.failed(KeyboardInterrupt())
    assert log.events == [
        "plan",
        "run",
        "rows",
        "rows",
        "committed 1 True",
        "committed 2 False",
        "failed KeyboardInterrupt",
    ]
    assert events.progress.shards_resumed == 1


def test_callback_gets_the_progress_at_phases_rows_and_the_end() -> None:
    phases: list[str] = []
    events = Events(time.monotonic(), ProgressCallback(lambda progress: phases.append(progress.phase)))
    events.phase_changed(Phase.START)
    events.rows()
    events.committed(own=True, seconds=0.1)
    events.failed(InfrastructureError("x", "y"))
    assert phases == ["start", "run", "run", "run"]


def test_failed_attempt_leaves_verdict_summary_and_record(config: JobConfig, ledger: Ledger) -> None:
    events, recorder = recorded(config, ledger)
    recorder.begin_work(events.progress, planned_timings(config, 2))
    assert [record.state for record in read_attempts(ledger.store)] == ["running"]
    events.rows()
    assert read(ledger, "_report/progress.json")["phase"] == "run"
    events.failed(InfrastructureError("the cluster is gone", "Start it again."))
    verdict = read(ledger, "_FAILED")
    assert (verdict["exit_code"], verdict["verdict"], verdict["run"]) == (5, "the cluster is gone", "nightly")
    assert read(ledger, "_report/summary.json")["state"] == "FAILED"
    assert [record.state for record in read_attempts(ledger.store)] == ["failed"]


@pytest.mark.parametrize("exc", [KeyboardInterrupt(), JobInterruptedError("stopped by SIGTERM", "Run it again.")])
def test_interrupted_attempt_leaves_no_verdict(exc: BaseException, config: JobConfig, ledger: Ledger) -> None:
    events, recorder = recorded(config, ledger)
    recorder.begin_work(events.progress, planned_timings(config, 2))
    events.failed(exc)
    assert read(ledger, "_FAILED") == {}
    assert [record.state for record in read_attempts(ledger.store)] == ["interrupted"]


def test_attempt_without_work_has_no_record(config: JobConfig, ledger: Ledger) -> None:
    events, _ = recorded(config, ledger)
    events.done([])
    events.phase_changed(Phase.DONE)
    assert read_attempts(ledger.store) == []
    assert read(ledger, "_report/progress.json")["phase"] == "done"
