"""A few damaged inputs for everything that reads untrusted bytes; `make fuzz` feeds many."""

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
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_damaged_inputs_are_answered(tmp_path: Path) -> None:
    done = run("-m", "tests.fuzz", "--inputs", "150", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"| all | {150 * len(targets()):,} |" in done.stdout


@pytest.mark.parametrize("file", sorted((ROOT / "tests/fuzz/found").glob("*/*")), ids=lambda file: file.name)
def test_what_was_found_once_is_mended(file: Path) -> None:
    done = run("-m", "tests.fuzz", "--replay", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_crashes_hangs_and_exceptions_are_found() -> None:
    code = """
import os, signal, time
from tests.fuzz import __main__ as fuzzer
from tests.fuzz.targets import Target
def read(data):
    if 1 in data: os.kill(os.getpid(), signal.SIGSEGV)
    if 2 in data: time.sleep(60)
    if 3 in data: raise KeyError("x")
fuzzer.INPUT_S = 0.2
result = fuzzer.Result()
fuzzer.fuzz(Target("bad", [b"abc" + bytes([n]) for n in (1, 2, 3)], read), 0, 20, result)
print(result.inputs, sorted({name.split(" ")[0] for name in result.findings}))
"""
    done = run("-c", code)
    assert done.stdout.strip() == "20 ['KeyError', 'SIGSEGV', 'hang']", done.stdout + done.stderr
