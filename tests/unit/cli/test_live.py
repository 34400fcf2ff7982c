"""Untrusted text on a terminal."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_inference.cli import app
from batch_inference.config import parse_config
from batch_inference.driver import run
from batch_inference.errors import ErrorThresholdExceeded
from batch_inference.telemetry import logs
from batch_inference.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("photos/ünïcode 猫.jpg", "photos/ünïcode 猫.jpg"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b[2J\x1b[31mred", r"\x1b[2J\x1b[31mred"),
        ("over\rwritten", r"over\rwritten"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("gpj.\u202egnp", r"gpj.\u202egnp"),
        ("\x9b31m", r"\x9b31m"),
        ("half \ud800", r"half \ud800"),
    ],
)
def test_control_characters_become_visible(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_control_characters_never_get_through_and_other_text_is_unchanged(text: str) -> None:
    shown = printable(text)
    assert all(char in "\n\t" or char.isprintable() or char.isspace() or ord(char) > 0xA0 for char in shown)
    assert "\x1b" not in shown and "\r" not in shown and "\u202e" not in shown
    assert printable(shown) == shown


def test_log_lines_have_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    import structlog

    logs.configure("text")
    structlog.get_logger().info("reading \x1b[2Ja.jpg", uri="s3://b/\x1b[31m.jpg")
    shown = capsys.readouterr().err
    assert r"\x1b[2Ja.jpg" in shown
    assert "\x1b" not in shown


def test_output_of_ray_is_no_line_of_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray._private.worker import print_to_stdstream

    def fail(*args: object, **kwargs: object) -> None:
        print_to_stdstream({"lines": ["Task f() failed."], "pid": "raylet", "is_err": False}, ignore_prefix=False)
        raise ErrorThresholdExceeded("too many errors", "Look at them.")

    monkeypatch.setattr(run, "run", fail)
    logs.configure("json")
    assert app.run_job(parse_config({"output": {"uri": "out"}}), None, None) == 3
    out, err = capsys.readouterr()
    assert out.startswith("FAILED (exit 3): too many errors\n") and "Task" not in out
    assert json.loads(err)["text"] == "(raylet) Task f() failed."
