"""A run as a person at a terminal sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.jobs import HERE, environment, job_args
from tests.support.terminal import COLUMNS, CONTROL, on_a_terminal


def test_a_run_on_a_terminal(photos: Callable[..., Path], tmp_path: Path, cluster: dict[str, str]) -> None:
    out = tmp_path / "out"
    env = {key: value for key, value in environment().items() if key.startswith(("RAY_", "AWS_"))}
    said = on_a_terminal(*job_args(photos(60, bad_percent=5), out), "--address", cluster["address"], cwd=HERE, **env)
    lines = [line.strip() for line in CONTROL.sub("", said).replace("\r", "\n").splitlines()]
    assert max(map(len, lines)) <= COLUMNS, max(lines, key=len)
    # What moves: phases by the clock, counts, stages.
    assert any(line.startswith("starting Ray and the model   running for ") for line in lines), said
    assert any(line.startswith("of 60 rows", line.find("of 60")) for line in lines)
    assert any(line.endswith("of 6 shards committed") for line in lines)
    # What stays: the verdict, broken between words, with the report's path whole.
    verdict = lines[next(i for i, line in enumerate(lines) if line.startswith("SUCCEEDED: ")) :]
    assert verdict[0] == "SUCCEEDED: 60 of 60 images accounted for, 57 predictions and 3 errors"
    text = "".join(line if len(line) == COLUMNS else f"{line} " for line in verdict)
    assert f"{out}/_report/report.html" in text, verdict
