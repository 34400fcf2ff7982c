from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from batch_inference import driver, supervision
from batch_inference.driver import interruptible
from batch_inference.errors import Interrupted, SystemFault


def test_a_signal_is_the_reason_whatever_fails_of_it() -> None:
    """Ray turns an interrupt while it starts into an error of its own."""
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            raise SystemFault("Ray did not start", "Start it again.") from None


def test_other_failures_are_what_they_are() -> None:
    with pytest.raises(SystemFault, match="Ray did not start"), interruptible():
        raise SystemFault("Ray did not start", "Start it again.")


def test_ray_s_own_handler_is_no_silent_end() -> None:
    """A Ray that starts on this machine has one for SIGTERM, until ours is back."""

    def as_ray_does(number: int, frame: object) -> None:
        sys.exit(1)

    with pytest.raises(Interrupted, match="stopped by SIGTERM"), interruptible():
        signal.signal(signal.SIGTERM, as_ray_does)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_what_the_parent_passes_on_does_not_interrupt_the_end_that_the_group_s_signal_leads_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "_stopped_at", {})
    for supervised in (True, False):
        monkeypatch.setattr(supervision, "_parent", -1 if supervised else None)
        ended_well = False
        with pytest.raises(Interrupted, match="stopped by SIGTERM"), interruptible():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)
                ended_well = True
        assert ended_well is supervised


def test_the_inner_reason_stays() -> None:
    with pytest.raises(Interrupted, match="stopped by SIGINT"), interruptible(), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
