"""Helper processes that die or stop in every state: whose row fails, and what the next call gets."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from batch_inference.errors import RowError
from batch_inference.images.sandbox import SandboxedFunction, SandboxedGenerator
from batch_inference.system.subprocesses import Limits
from tests.support.child_functions import die, echo, number_of_bytes, pieces

# No test waits for these: the kernel may take as long as it likes.
LIMITS = Limits(cpu_s=1000, clock_s=2000, memory_mib=64)


def only_fork_of(sandboxed: SandboxedFunction[Any, Any]) -> int:
    assert sandboxed._server is not None
    server = sandboxed._server.pid
    (fork,) = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    return int(fork)


def kill_once_idle(pid: int) -> None:
    """Kill a process that is not this one's child once it waits for a request, and wait until its parent has noticed."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "after", "deaths", "ends", "begun"),
    [
        (signal.SIGKILL, "at once", 1, ["end"], 2),
        (signal.SIGKILL, "at once", 2, [("DECODE_MEMORY", True)], 2),
        # The input is gone, so that another try would begin in the middle; values would come twice.
        (signal.SIGKILL, "input", 1, [("DECODE_MEMORY", True)], 1),
        (signal.SIGKILL, "value", 1, ["value", ("DECODE_MEMORY", True)], 1),
        (signal.SIGSEGV, "at once", 1, [("DECODER_CRASH", False)], 1),
        (signal.SIGSEGV, "input", 1, [("DECODER_CRASH", False)], 1),
        (signal.SIGSEGV, "value", 1, ["value", ("DECODER_CRASH", False)], 1),
    ],
)
def test_generator_is_tried_again_only_if_killed_before_it_did_anything(
    number: int, after: str, deaths: int, ends: list[object], begun: int, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    asked: list[None] = []
    found: list[object] = []
    with SandboxedGenerator(die, LIMITS) as sandboxed:
        try:
            found.extend(sandboxed(f"{number:d},{after},{deaths},{notes}", lambda: asked.append(None)))
        except RowError as exc:
            assert exc.error.stage == "decode"
            found.append((exc.error.error_type, exc.error.retryable))
    assert found == ends
    assert notes.read_text().count("begun") == begun
    assert len(asked) == (after == "input")


def test_call_after_one_that_was_given_up_begins_from_the_start() -> None:
    """Values and input of the one that was given up are still on their way."""

    def fail() -> Any:
        raise ConnectionError("the store does not answer")

    with SandboxedGenerator(pieces, LIMITS) as sandboxed:
        with pytest.raises(ConnectionError, match="does not answer"):
            list(sandboxed("first", fail))
        given_up = sandboxed("second", lambda: "x")
        assert isinstance(given_up, Generator)
        assert [next(given_up), next(given_up)] == ["second", ("second", "x")]
        given_up.close()
        left = ["y", "z", None]
        assert list(sandboxed("third", lambda: left.pop(0))) == ["third", ("third", "y"), ("third", "z")]


def test_input_that_does_not_fit_into_the_memory_fails_only_its_own_call() -> None:
    """The rest of it is still on its way when the process fails."""
    left: list[Any] = [bytes(100 << 20), None]
    with SandboxedGenerator(pieces, LIMITS) as sandboxed:
        with pytest.raises(MemoryError):
            list(sandboxed("first", lambda: left.pop(0)))
        assert list(sandboxed("second", lambda: left.pop(0))) == ["second"]


def test_argument_that_does_not_fit_into_the_memory_fails_only_its_own_row() -> None:
    with SandboxedFunction(number_of_bytes, LIMITS) as sandboxed:
        for _ in range(2):
            with pytest.raises(RowError, match="not enough memory to decode the image") as caught:
                sandboxed(bytes(100 << 20))
            assert caught.value.error.error_type == "DECODE_MEMORY"
            assert sandboxed(b"123") == 3


def test_process_killed_between_two_images_shifts_no_answers() -> None:
    with SandboxedFunction(echo, LIMITS) as sandboxed:
        assert sandboxed("before") == "before"
        kill_once_idle(only_fork_of(sandboxed))
        assert [sandboxed(number) for number in range(3)] == [0, 1, 2]
