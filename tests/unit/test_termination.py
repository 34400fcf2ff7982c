"""What the head does before it ends; on a real cluster in tests/faults."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_inference import termination


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes of the test's own, which alone are looked at."""
    processes: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(
        termination, "PROC", type("Proc", (), {"iterdir": lambda self: [Path(f"/proc/{p.pid}") for p in processes]})()
    )
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def script(folder: Path, name: str, on_term: str) -> list[str]:
    """A program that says when it is ready, and does this at SIGTERM."""
    file = folder / name
    file.write_text(
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: {on_term})\n"
        "print('ready', flush=True)\n"
        "while True:\n    time.sleep(0.05)\n"
    )
    return [sys.executable, str(file)]


def start(command: list[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def reaped(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.poll()


def test_drivers_are_told_and_waited_for(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    driver = start([*script(tmp_path, "batch-inference", "(time.sleep(0.5), sys.exit(130))"), "run", "--config", "a"])
    other = start([*script(tmp_path, "something-else", "sys.exit(0)"), "run"])
    started += [driver, other]
    begun = time.monotonic()
    assert termination.end_drivers(20) == 0
    assert time.monotonic() - begun < 15
    reaped(started)
    assert driver.wait(5) == 130
    assert other.poll() is None


def test_a_driver_that_does_not_end_is_not_waited_for_longer_than_there_is_time(
    tmp_path: Path, started: list[subprocess.Popen[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    started.append(start([*script(tmp_path, "batch-inference", "None"), "retry", "out/"]))
    assert termination.main(["0.5"]) == 1
    assert "1 drivers have not ended" in capsys.readouterr().err


def test_without_a_driver_a_head_goes_at_once(started: list[subprocess.Popen[bytes]]) -> None:
    begun = time.monotonic()
    assert termination.main(["50"]) == 0
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("args", [[], ["soon"], ["5", "6"]])
def test_mistaken_arguments(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert termination.main(args) == 2
    assert "usage" in capsys.readouterr().err
