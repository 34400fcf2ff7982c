from __future__ import annotations

import os
import signal
import time

import pytest

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


def test_the_inner_reason_stays() -> None:
    with pytest.raises(Interrupted, match="stopped by SIGINT"), interruptible(), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
