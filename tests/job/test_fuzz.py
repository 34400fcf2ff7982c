"""A fixed number of damaged inputs for everything that reads untrusted bytes; `make fuzz` feeds as many as there is time for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.fuzz.targets import targets

ROOT = Path(__file__).parents[2]
INPUTS = 60


def test_damaged_inputs_are_answered(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", str(INPUTS), "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"| all | {INPUTS * len(targets()):,} |" in done.stdout
