"""The preStop hook of the head; tests/faults has it on a real cluster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from batch_inference.kubernetes import prestop


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Yield a list for the test's processes, the only ones that the hook sees."""
    processes: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(
        prestop, "PROC", type("Proc", (), {"iterdir": lambda self: [Path(f"/proc/{p.pid}") for p in processes]})()
    )
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def script(folder: Path, name: str, on_term: str) -> list[str]:
    """Return the command of a program that prints when it is ready and does this at SIGTERM."""
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


def test_drivers_are_stopped_and_waited_for(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    driver = start([*script(tmp_path, "batch-inference", "(time.sleep(0.5), sys.exit(130))"), "run", "--config", "a"])
    other = start([*script(tmp_path, "something-else", "sys.exit(0)"), "run"])
    started += [driver, other]
    # Longer than the test may take: it ends with the drivers.
    assert prestop.stop_drivers(3600) == 0
    reaped(started)
    assert driver.wait() == 130
    assert other.poll() is None


def test_driver_that_does_not_end_is_waited_for_until_the_deadline(
    tmp_path: Path, started: list[subprocess.Popen[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    started.append(start([*script(tmp_path, "batch-inference", "None"), "retry", "out/"]))
    assert prestop.main(["0.5"]) == 1
    assert "1 drivers have not ended" in capsys.readouterr().err


def test_head_without_a_driver_ends_at_once(
    started: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(prestop.time, "sleep", waits.append)
    assert prestop.main(["50"]) == 0
    assert waits == []


@pytest.mark.parametrize("args", [[], ["soon"], ["5", "6"]])
def test_mistaken_arguments(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert prestop.main(args) == 2
    assert "usage" in capsys.readouterr().err
