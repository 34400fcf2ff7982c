"""The workflows of GitHub, linted by a program that is compiled; tests/unit/project/test_workflows.py has the rest."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.e2e.cluster.programs import tool

WORKFLOWS = sorted((Path(__file__).parents[2] / ".github" / "workflows").glob("*.yaml"))


def test_actionlint_finds_nothing() -> None:
    assert WORKFLOWS
    done = subprocess.run(
        [tool("actionlint", from_path=False), "-no-color", *WORKFLOWS], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
