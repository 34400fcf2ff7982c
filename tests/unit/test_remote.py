"""The driver inside a cluster, without one."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from batch_inference import remote
from batch_inference.config import JobConfig
from batch_inference.environment import RUN_VARIABLE
from batch_inference.errors import BatchInferenceError, Interrupted, SystemFault, UserError


class Attempt:
    """In the attempt's place: remembers how it was made, and ends as a test wants it."""

    made: Any = None
    ends: Callable[[], Any] = staticmethod(lambda: None)

    def __init__(self, config: JobConfig, on_progress: Any, engine: Any, *, force_retry: bool) -> None:
        Attempt.made = self
        self.force_retry = force_retry
        self.run_name = os.environ.get(RUN_VARIABLE)
        self.stopping = threading.Event()

    def stop(self) -> None:
        self.stopping.set()

    def run(self, address: str | None, dashboard_host: str | None) -> Any:
        return Attempt.ends()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., remote.RemoteDriver]:
    monkeypatch.setattr(remote, "Attempt", Attempt)
    monkeypatch.setenv(RUN_VARIABLE, "another")

    def start(ends: Callable[[], Any], force_retry: bool = False) -> remote.RemoteDriver:
        Attempt.ends = staticmethod(ends)
        return remote.RemoteDriver(JobConfig(), None, force_retry, "nightly-7")

    return start


def outcome(driver: remote.RemoteDriver) -> Any:
    until = time.monotonic() + 10
    while (found := driver.poll()[1]) is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("force", [True, False])
def test_what_the_command_was_told_reaches_the_attempt(force: bool, driver: Callable[..., remote.RemoteDriver]) -> None:
    outcome(driver(lambda: "done", force))
    assert (Attempt.made.force_retry, Attempt.made.run_name) == (force, "nightly-7")


def raising(exc: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise exc

    return run


@pytest.mark.parametrize(
    ("raised", "told"),
    [(UserError("a", "b"), UserError), (KeyboardInterrupt(), Interrupted), (RuntimeError("x"), SystemFault)],
)
def test_how_the_attempt_ended_is_told(
    raised: BaseException, told: type[BatchInferenceError], driver: Callable[..., remote.RemoteDriver]
) -> None:
    assert isinstance(outcome(driver(raising(raised))), told)


def test_a_stop_reaches_the_attempt(driver: Callable[..., remote.RemoteDriver]) -> None:
    ready = threading.Event()
    one = driver(lambda: ready.wait(10))
    assert not Attempt.made.stopping.is_set()
    one.stop()
    assert Attempt.made.stopping.is_set()
    ready.set()
    outcome(one)
