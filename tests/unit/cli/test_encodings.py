"""Characters that the output's encoding lacks: they are escaped and never end the program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import batch_inference
from batch_inference.text import escape_unencodable_output
from tests.support.images import jpeg

JOB = str(Path(batch_inference.__file__).parents[1])
NAMES = ("日本🎉.jpg", "naïve.jpg", "plain.jpg")
# As users meet them: a Windows terminal, an old locale, cron and minimal containers.
ENVIRONMENTS = {
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "cp1252": {"PYTHONIOENCODING": "cp1252"},
    "ascii": {"PYTHONIOENCODING": "ascii:strict"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "C.UTF-8": {"LC_ALL": "C.UTF-8"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in NAMES:
        (photos / name).write_bytes(jpeg(0))
    (tmp_path / "probe.py").write_text(
        "class Mean:\n    def __call__(self, batch):\n        return {'mean': [i.mean() for i in batch['image']]}\n"
    )
    return photos


def called(folder: Path, environment: dict[str, str], *args: str) -> subprocess.CompletedProcess[bytes]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-m", "batch_inference", *args],
        cwd=folder.parent,
        env=clean | {"PYTHONPATH": JOB, "COLUMNS": "200"} | environment,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_plan_is_printed_in_any_encoding(name: str, folder: Path) -> None:
    done = called(folder, ENVIRONMENTS[name], "plan", "photos/", "--set", "predictor=probe:Mean")
    said = done.stdout.decode("latin-1") + done.stderr.decode("latin-1")
    assert done.returncode == 0, said
    assert "Traceback" not in said
    assert "plain.jpg" in said
    if name == "C.UTF-8":
        assert NAMES[0].encode() in done.stdout
    else:
        assert "\\u65e5\\u672c\\U0001f389.jpg" in said or "\\udce6" in said


@pytest.mark.parametrize("name", ["latin-1", "ascii"])
def test_message_and_a_verdict_are_printed_in_any_encoding(name: str, folder: Path) -> None:
    environment = ENVIRONMENTS[name] | {"PYTHONUTF8": "1"}
    done = called(folder, environment, "status", "日本🎉")
    assert done.returncode == 2
    assert b"error: there is no folder" in done.stderr
    assert b"Traceback" not in done.stderr
    done = called(folder, environment, "run", "日本🎉.jpg", "--output", "ü", "--set", "predictor=probe:Mean")
    assert done.returncode == 2, done.stderr
    assert b"FAILED (exit 2)" in done.stdout
    assert b"\\u65e5\\u672c\\U0001f389.jpg" in done.stdout
    assert b"Traceback" not in done.stdout + done.stderr
    done = called(folder, environment, "plan", "日本🎉.jpg", "--json", "--set", "predictor=probe:Mean")
    assert "日本🎉.jpg" in json.loads(done.stdout)["verdict"]


def test_streams_that_are_gone_or_not_text_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", object())
    escape_unencodable_output()


def test_plan_ends_quietly_if_nobody_reads_its_output(folder: Path) -> None:
    """A reader that stops and a closed stdout are no failures worth a traceback."""
    command = f"{sys.executable} -m batch_inference plan photos/ --set predictor=probe:Mean"
    for line in (f"{command} | head -1", f"{command} >&-", f"LC_ALL=C {command} | head -1"):
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            cwd=folder.parent,
            env=os.environ | {"PYTHONPATH": JOB},
            capture_output=True,
            check=False,
        )
        assert b"Traceback" not in done.stderr, line
