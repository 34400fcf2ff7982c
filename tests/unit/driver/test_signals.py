"""Signals that interrupt a job."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from batch_inference.driver import signals, supervision
from batch_inference.driver.signals import interruptible
from batch_inference.errors import InfrastructureError, JobInterruptedError


def test_signal_is_the_reason_whatever_error_it_causes() -> None:
    """Ray turns an interrupt while it starts into an error of its own."""
    with pytest.raises(JobInterruptedError, match="stopped by SIGTERM"), interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            raise InfrastructureError("Ray did not start", "Start it again.") from None


def test_other_failures_are_unchanged() -> None:
    with pytest.raises(InfrastructureError, match="Ray did not start"), interruptible():
        raise InfrastructureError("Ray did not start", "Start it again.")


def test_handler_of_ray_is_no_silent_end() -> None:
    """A Ray that starts on this machine handles SIGTERM itself, until our handler is back."""

    def as_ray_does(number: int, frame: object) -> None:
        sys.exit(1)

    with pytest.raises(JobInterruptedError, match="stopped by SIGTERM"), interruptible():
        signal.signal(signal.SIGTERM, as_ray_does)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_signal_passed_on_by_the_parent_does_not_interrupt_the_end_that_the_first_one_caused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals, "_stopped_at", {})
    monkeypatch.setattr(signals, "_SAME_SIGNAL_S", 3600)
    for supervised in (True, False):
        monkeypatch.setattr(supervision, "_parent", -1 if supervised else None)
        cleaned_up = False
        with pytest.raises(JobInterruptedError, match="stopped by SIGTERM"), interruptible():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
                cleaned_up = True
        assert cleaned_up is supervised


def test_inner_reason_stays() -> None:
    with pytest.raises(JobInterruptedError, match="stopped by SIGINT"), interruptible(), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
