"""The commands of the chart's pods, which are hidden and start before the command line is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from batch_inference.__main__ import POD_COMMANDS
from batch_inference.cli.app import app


@pytest.mark.parametrize("command", POD_COMMANDS)
def test_pod_command_starts_without_the_command_line(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "batch_inference", command],
        capture_output=True,
        text=True,
        check=False,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2
    assert f"usage: batch-inference {command} " in done.stderr
    assert not imported & {"typer", "rich", "pydantic", "structlog", "batch_inference.cli.app"}


def test_pod_commands_are_hidden_from_help() -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    assert "submit" in text
    assert not [command for command in POD_COMMANDS if f" {command} " in text]
