"""The driver inside a cluster, without a cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from batch_inference.config import JobConfig
from batch_inference.driver import remote
from batch_inference.environment import RUN_VARIABLE
from batch_inference.errors import BatchInferenceError, InfrastructureError, JobInterruptedError, UserError
from tests.support.limits import HANG_S
from tests.support.waiting import wait_until


class Attempt:
    """Stands in for the attempt: keeps its arguments, and ends as a test wants it."""

    last: Any = None
    result: Callable[[], Any] = staticmethod(lambda: None)

    def __init__(self, config: JobConfig, on_progress: Any, engine: Any, *, force_retry: bool) -> None:
        Attempt.last = self
        self.force_retry = force_retry
        self.run_name = os.environ.get(RUN_VARIABLE)
        self.stopping = threading.Event()

    def stop(self) -> None:
        self.stopping.set()

    def run(self, address: str | None, dashboard_host: str | None) -> Any:
        return Attempt.result()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., remote.RemoteDriver]:
    monkeypatch.setattr(remote, "Attempt", Attempt)
    monkeypatch.setenv(RUN_VARIABLE, "another")

    def start(result: Callable[[], Any], force_retry: bool = False) -> remote.RemoteDriver:
        Attempt.result = staticmethod(result)
        return remote.RemoteDriver(JobConfig(), None, force_retry, "nightly-7")

    return start


def outcome(driver: remote.RemoteDriver) -> Any:
    wait_until(lambda: driver.poll()[1] is not None)
    return driver.poll()[1]


@pytest.mark.parametrize("force", [True, False])
def test_options_of_the_command_reach_the_attempt(force: bool, driver: Callable[..., remote.RemoteDriver]) -> None:
    outcome(driver(lambda: "done", force))
    assert (Attempt.last.force_retry, Attempt.last.run_name) == (force, "nightly-7")


def raising(exc: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise exc

    return run


@pytest.mark.parametrize(
    ("raised", "outcome_type"),
    [
        (UserError("a", "b"), UserError),
        (KeyboardInterrupt(), JobInterruptedError),
        (RuntimeError("x"), InfrastructureError),
    ],
)
def test_end_of_the_attempt_is_the_outcome(
    raised: BaseException, outcome_type: type[BatchInferenceError], driver: Callable[..., remote.RemoteDriver]
) -> None:
    assert isinstance(outcome(driver(raising(raised))), outcome_type)


def test_stop_reaches_the_attempt(driver: Callable[..., remote.RemoteDriver]) -> None:
    ready = threading.Event()
    remote_driver = driver(lambda: ready.wait(HANG_S))
    assert not Attempt.last.stopping.is_set()
    remote_driver.stop()
    assert Attempt.last.stopping.is_set()
    ready.set()
    outcome(remote_driver)
