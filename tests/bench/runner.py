"""Runs the contenders in turn, each in a fresh process, and takes the times."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench import figures, weights
from tests.bench.contenders.common import MARKS
from tests.bench.figures import Run
from tests.bench.images import versions
from tests.bench.reads import Reads
from tests.bench.scenes import CONTENDERS, Contender, Scene, shortened

ROOT = Path(__file__).parents[2]
_PYTHON = ROOT / ".venv" / "bin" / "python"
_TIMEOUT_S = 900
_MOST_PROCESSES = len(os.sched_getaffinity(0))


class ContenderError(Exception):
    """A contender did not do its job; the message says what its log says."""


class Bench:
    """Image sets, weights and reference labels in a folder, and runs on them.

    Args:
        folder: For everything that is made.
        scenes: What to measure.
        only: Names of contenders; empty: all.
        quick: Whether to take a few images, which shows that everything works and measures nothing.
    """

    def __init__(self, folder: Path, scenes: Sequence[Scene], only: Sequence[str] = (), *, quick: bool = False) -> None:
        self.folder = folder
        self.scenes = shortened(scenes) if quick else scenes
        self.only = only
        self.quick = quick
        self.failures: list[str] = []
        self.digests: dict[str, str] = {}
        self._classes: dict[str, dict[str, int]] = {}

    def prepare(self) -> None:
        """Makes what is not there yet."""
        for scene in self.scenes:
            images = self._images(scene)
            self.digests[images.name] = scene.images.make(scene.count, images, _MOST_PROCESSES)
            file = self._weights(scene)
            self.digests[file.name] = weights.make(scene.model, images, file)
            labels = self.folder / "labels" / f"{images.name}-{scene.model}.json"
            key = f"{self.digests[images.name]} {self.digests[file.name]} {versions()}"
            self._classes[scene.name] = weights.reference(scene.model, file, images, labels, key)

    def rounds(self, count: int) -> Iterator[Run]:
        """Every contender once, then every one again, so many times; a failure is noted and does not stop the others."""
        for number in range(1, count + 1):
            for scene in self.scenes:
                for contender in self.contenders(scene):
                    try:
                        yield self._run(number, scene, contender)
                    except ContenderError as exc:
                        self.failures.append(f"round {number}, {scene.name}, {contender.name}: {exc}")

    def contenders(self, scene: Scene) -> list[Contender]:
        """Who competes in a scene."""
        return [c for c in CONTENDERS if c.name in scene.contenders and (not self.only or c.name in self.only)]

    def _run(self, number: int, scene: Scene, contender: Contender) -> Run:
        name = f"{self._images(scene).name}-{scene.model}-{contender.name}"
        work = self.folder / "runs" / name
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        marks = work / "marks.txt"
        command = [
            sys.executable if contender.own_python else str(_PYTHON),
            "-m", f"tests.bench.contenders.{contender.module}",
            str(self._images(scene)), str(work / "output"),
            "--model", scene.model, "--weights", str(self._weights(scene)), *contender.options, *scene.options,
        ]  # fmt: skip
        # Usage statistics and telemetry would add calls to the network to some and not to others.
        environment = os.environ | {
            MARKS: str(marks), "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "true",
        }  # fmt: skip
        others = _busy(1.0)
        with (work / "log.txt").open("wb") as log, Reads(self._images(scene)) as reads:
            started = time.monotonic()
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
            try:
                code = process.wait(_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise ContenderError(f"not done after {_TIMEOUT_S} s, see {work / 'log.txt'}") from None
            finally:
                wall = time.monotonic() - started
                # What a contender has left behind would take time from the next one.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code:
            last = (work / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            raise ContenderError(f"exit code {code}: {' '.join(last)[:300]} (see {work / 'log.txt'})")
        seen = figures.read_marks(marks)
        classes = classes_of(work / "output")
        expected = self._classes[scene.name]
        if classes.keys() != expected.keys():
            raise ContenderError(f"{len(classes)} different images of {len(expected)} are in the output")
        agreeing = sum(classes[image] == expected[image] for image in expected)
        return Run(
            number, scene.name, contender.name, wall, seen[0][0] - started if seen else wall,
            figures.steady_rate(seen), figures.worked_rate(seen, reads.first), len(classes), agreeing / len(expected), others,
        )  # fmt: skip

    def _images(self, scene: Scene) -> Path:
        return self.folder / "images" / f"{scene.images.name}-{scene.count}"

    def _weights(self, scene: Scene) -> Path:
        # Of the images they are made from, so that a quick run does not leave others for a real one.
        return self.folder / "weights" / f"{scene.model}-{self._images(scene).name}.safetensors"


def classes_of(output: Path) -> dict[str, int]:
    """The class of each image by file name, from a contender's output.

    Raises:
        ContenderError: If an image has two rows.
    """
    import pyarrow.parquet as pq

    folder = output / "predictions" if (output / "predictions").is_dir() else output
    files = sorted(folder.rglob("*.parquet"))
    found: list[tuple[str, int]] = []
    for file in files:
        table = pq.read_table(file, columns=["uri", "predicted_class_idx", "confidence"])
        names = (uri.rpartition("/")[2] for uri in table["uri"].to_pylist())
        found += zip(names, table["predicted_class_idx"].to_pylist(), strict=True)
    twice = [name for name, times in Counter(name for name, _ in found).items() if times > 1]
    if twice:
        raise ContenderError(f"{len(twice)} images have more than one row, such as {twice[0]}")
    return dict(found)


def _busy(seconds: float) -> float:
    """Share of the machine's CPU time that is used during so many seconds; 0 where the system does not say."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    before, idle_before = _ticks(stat)
    time.sleep(seconds)
    after, idle_after = _ticks(stat)
    return 1 - (idle_after - idle_before) / max(1, after - before)


def _ticks(stat: Path) -> tuple[int, int]:
    # user nice system idle iowait irq softirq steal; guest time is part of user's.
    fields = [int(field) for field in stat.read_text().splitlines()[0].split()[1:9]]
    return sum(fields), fields[3] + fields[4]
