"""A few damaged inputs for everything that reads untrusted bytes; tests/job/test_fuzz.py feeds more, and `make fuzz` many."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import Target, targets

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_good_inputs_are_read(target: Target) -> None:
    for seed in target.seeds:
        target.read(seed)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """In a process without threads, which is forked for each batch."""
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def test_damaged_inputs_are_answered(tmp_path: Path) -> None:
    done = run("-m", "tests.fuzz", "--inputs", "20", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"| all | {20 * len(targets()):,} |" in done.stdout


def test_inputs_that_failed_once_are_answered() -> None:
    files = [str(file) for file in sorted((ROOT / "tests/fuzz/found").glob("*/*"))]
    done = run("-m", "tests.fuzz", "--replay", *files)
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"{file}: nothing" for file in files]), done.stderr
    assert len(files) >= 5


def test_crashes_hangs_and_exceptions_are_found() -> None:
    code = """
import os, signal, time
from tests.fuzz import __main__ as fuzzer
from tests.fuzz.targets import Target
def read(data):
    if 1 in data: os.kill(os.getpid(), signal.SIGSEGV)
    if 3 in data: raise KeyError("x")
    while 4 in data: pass
fuzzer.INPUT_S = 0.2
result, asleep = fuzzer.Result(), fuzzer.Result()
fuzzer.fuzz(Target("bad", [b"abc" + bytes([n]) for n in (1, 3, 4)], read), 0, 20, result)
fuzzer.fuzz(Target("sleeps", [b"abc"], lambda data: time.sleep(600)), 0, 1, asleep)
print(result.inputs, sorted({name.split(" ")[0] for name in result.findings}), list(asleep.findings))
"""
    done = run("-c", code)
    assert done.stdout.strip() == "20 ['KeyError', 'SIGSEGV', 'hang'] ['hang']", done.stdout + done.stderr
