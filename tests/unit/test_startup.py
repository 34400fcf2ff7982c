from __future__ import annotations

import threading
import time

import pytest

from batch_inference import startup
from batch_inference.errors import UserError
from batch_inference.startup import Background, starts_ray


def test_a_background_call_runs_beside_its_caller_and_gives_its_answer() -> None:
    here = threading.Event()
    with Background(lambda: here.wait(10)) as call:
        here.set()  # the call can only end because the caller goes on
        assert call.result() is True


def test_a_background_call_raises_where_its_answer_is_asked_for() -> None:
    def fail() -> None:
        raise UserError("no such model", "Choose another.")

    with Background(fail) as call, pytest.raises(UserError, match="no such model"):
        call.result()


def test_an_interrupted_caller_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_LEAVE_S", 0.05)
    never = threading.Event()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Background(never.wait):
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 5
    never.set()


@pytest.mark.parametrize(("address", "own"), [(None, True), ("local", True), ("auto", False), ("head:6379", False)])
def test_only_a_job_without_a_cluster_starts_ray(address: str | None, own: bool) -> None:
    assert starts_ray(address) is own
