"""How often a function is tried in a helper process, and what its end is called."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest

from batch_inference.config import PreprocessConfig
from batch_inference.errors import RowError
from batch_inference.images.sandbox import DECODING, UNPACKING, Activity, SandboxedFunction, decode_limits
from batch_inference.system.subprocesses import ForkServer, Limits

# No test waits for these: the kernel may take as long as it likes.
LIMITS = Limits(cpu_s=1000, clock_s=2000, memory_mib=64)


def failure(
    function: Any, argument: Any, monkeypatch: pytest.MonkeyPatch, activity: Activity = DECODING
) -> tuple[RowError, int]:
    """Return the failure of a call, and how often the function was called."""
    calls: list[object] = []
    send_call = ForkServer.send_call

    def counted(self: Any, value: Any) -> None:
        calls.append(value)
        send_call(self, value)

    monkeypatch.setattr(ForkServer, "send_call", counted)
    with SandboxedFunction(function, LIMITS, activity) as sandboxed, pytest.raises(RowError) as caught:
        sandboxed(argument)
    return caught.value, len(calls)


@pytest.mark.parametrize(
    ("number", "calls", "error_type", "words"),
    [
        (
            signal.SIGKILL,
            2,
            "DECODE_MEMORY",
            "the process that decoded the image alone was killed, as when memory ends",
        ),
        (signal.SIGSEGV, 1, "DECODER_CRASH", "the process that decoded the image alone died: SIGSEGV"),
        (signal.SIGTERM, 1, "DECODER_CRASH", "the process that decoded the image alone died: SIGTERM"),
    ],
)
def test_only_a_process_that_was_killed_is_tried_again_and_once(
    number: int, calls: int, error_type: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, called = failure(signal.raise_signal, number, monkeypatch)
    assert (error.error.stage, error.error.error_type, error.error.retryable) == ("decode", error_type, False)
    assert words in error.error.message
    assert called == calls


def test_exit_code_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    error, called = failure(os._exit, 3, monkeypatch, UNPACKING)
    assert "the process that unpacked its pages alone died: exit code 3" in error.error.message
    assert called == 1


def test_exception_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with SandboxedFunction(sys.intern, LIMITS) as sandboxed, pytest.raises(TypeError):
        sandboxed(7)  # type: ignore[arg-type]


def test_clock_may_be_limited_by_itself() -> None:
    config = PreprocessConfig(decode_timeout_s=3, decode_memory_mib=70)
    assert decode_limits(config) == Limits(3, 30, 70)
    assert decode_limits(config, 4) == Limits(3, 4, 70)
    assert decode_limits(config, 0) == Limits(3, 0, 70)
