"""What the pipeline does, linted; it runs nothing that cannot be run here.

tests/charts/test_workflows.py has the linter that is compiled.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[3]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yaml"))


def test_zizmor_finds_nothing() -> None:
    program = Path(sys.executable).parent / "zizmor"
    command = [program, "--offline", "--persona", "pedantic", "--no-progress", *WORKFLOWS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_actions_are_pinned_and_files_are_there(file: Path) -> None:
    text = file.read_text()
    for used in re.findall(r"uses: (\S+)", text):
        assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", used), used
    steps = [step for job in yaml.safe_load(text)["jobs"].values() for step in job["steps"]]
    commands = "\n".join(step.get("run", "") for step in steps)
    for path in re.findall(r"(?:docker|helm)/[A-Za-z.]+|\.ci/run", commands):
        assert (REPOSITORY / path).exists(), path
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", commands):
        assert f"\n{target}:" in makefile
