"""The program's output on a real terminal of 80 columns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from batch_inference.cli.app import app
from tests.support.images import jpeg
from tests.support.outputs import finished
from tests.support.terminal import COLUMNS, CONTROL, on_a_terminal

COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]
# Foreground and background; bold and dim are no colors.
COLOR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|4[0-7]|9[0-7]|38;|48;)")


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("terminal"))
    finished(
        folder,
        [f"s3://a-bucket/a-long-prefix/{'x' * 40}/{kind}-{i}.jpg" for i in range(9) for kind in ("ok", "bad")],
        4,
    )
    return folder


@pytest.fixture(scope="module")
def helps() -> dict[str, list[str]]:
    """The lines of each command's help, all printed by one process."""
    code = (
        "import contextlib, sys\n"
        "from batch_inference.cli.app import app\n"
        "for command in sys.argv[1:]:\n"
        "    print('---', command, flush=True)\n"
        "    with contextlib.suppress(SystemExit): app([command, '--help'])\n"
    )
    said = on_a_terminal(*COMMANDS, program=("-c", code))
    parts = [CONTROL.sub("", part).partition("\n") for part in said.split("--- ")[1:]]
    return {command: text.splitlines() for command, _, text in parts}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits(command: str, helps: dict[str, list[str]]) -> None:
    lines = helps[command]
    assert f"batch-inference {command}" in " ".join(lines)
    assert len(lines) > 5
    assert max(map(len, lines)) <= COLUMNS, max(lines, key=len)


@pytest.mark.parametrize("command", ["status", "plan", "diff"])
def test_tables_fit(command: str, output: str, tmp_path: Path) -> None:
    photos = tmp_path / ("a-folder-of-photos-with-a-long-name-" * 3)
    photos.mkdir()
    (photos / "a.jpg").write_bytes(jpeg(0))
    model = ("--model", "resnet18", "--preset", "eks-spot", "--gpu-hour-price", "0.70")
    args = {"status": [output], "plan": [str(photos), *model], "diff": [output, output, "--column", "value"]}[command]
    lines = [CONTROL.sub("", line) for line in on_a_terminal(command, *args).splitlines()]
    assert len(lines) > 3
    assert max(map(len, lines)) <= COLUMNS, max(lines, key=len)


def test_colors_are_for_those_who_want_them(output: str) -> None:
    assert COLOR.search(on_a_terminal("run", "--help"))
    for args in (("run", "--help"), ("status", output), ("verify", output)):
        assert not COLOR.search(on_a_terminal(*args, NO_COLOR="1"))
    # And on no terminal there are no controls at all.
    done = subprocess.run(
        [sys.executable, "-m", "batch_inference", "status", output], capture_output=True, text=True, check=True
    )
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize(("typed", "offered"), [("pre", {"preflight"}), ("re", {"report", "retry"})])
def test_bash_completes_commands(typed: str, offered: set[str]) -> None:
    program = Path(sys.executable).with_name("batch-inference")
    asked = {"_BATCH_INFERENCE_COMPLETE": "complete_bash", "COMP_WORDS": f"batch-inference {typed}", "COMP_CWORD": "1"}
    done = subprocess.run([program], env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_for_every_shell(shell: str) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("batch-inference"), "--show-completion", shell],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "_BATCH_INFERENCE_COMPLETE" in done.stdout
