"""The benchmark on a dozen images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.bench import figures, images, weights
from tests.bench.runner import ROOT, classes_of


def test_bound_and_project_predict_the_same_classes(tmp_path: Path) -> None:
    """A dozen images through both, each in a process of its own as in the benchmark; marks and rows close."""
    folder, file = tmp_path / "images", tmp_path / "weights.safetensors"
    images.SMALL.make(12, folder, 1)
    weights.make("mobilenet_v3_small", folder, file)
    expected = weights.reference("mobilenet_v3_small", file, folder, tmp_path / "labels.json", "key")
    assert len(set(expected.values())) > 3
    found = {}
    for name in ("bound", "ours"):
        output, marks = tmp_path / name, tmp_path / f"{name}.marks"
        done = subprocess.run(
            [sys.executable, "-m", f"tests.bench.contenders.{name}", str(folder), str(output),
             "--model", "mobilenet_v3_small", "--weights", str(file)],
            cwd=ROOT, env=os.environ | {"BENCH_MARKS": str(marks), "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert sum(rows for _, rows in figures.read_marks(marks)) == 12
        found[name] = classes_of(output)
    assert found["ours"] == found["bound"] == expected
    assert json.loads((tmp_path / "labels.json").read_text())["classes"] == expected
