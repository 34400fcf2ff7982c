"""The arithmetic: from marks and wall times to rates, medians, paired ratios, and what the issue asks for."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Where the steady part begins: by then every contender has all of its processes at work.
STEADY_FROM = 0.25
Marks = Sequence[tuple[float, int]]


@dataclass(frozen=True)
class Run:
    """One run of one contender.

    Attributes:
        round: Runs of the same round stand beside each other in time, and only these are compared.
        scene: Image set and model.
        contender: Its name.
        wall_s: Seconds from the start of the process to its end.
        startup_s: Seconds from the start to the first rows with a prediction.
        steady: Images a second after :data:`STEADY_FROM` of the rows; None if the marks are too few.
        rows: Rows in the output.
        agreement: Share of the rows whose class is the reference's.
    """

    round: int
    scene: str
    contender: str
    wall_s: float
    startup_s: float
    steady: float | None
    rows: int
    agreement: float


@dataclass(frozen=True)
class Spread:
    """Median and range of the runs of all rounds."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Target:
    """What a figure of one contender must be, as a multiple of another's in the same round.

    Attributes:
        scene: Image set and model.
        figure: ``steady`` (images a second) or ``speed`` (one over the wall time).
        ours: The contender that is judged.
        other: What it is compared with.
        least: The ratio's lower limit, for the median.
    """

    scene: str
    figure: str
    ours: str
    other: str
    least: float


def read_marks(file: Path) -> list[tuple[float, int]]:
    """The marks that a contender's processes have written, as (seconds, rows), in order of time."""
    if not file.is_file():
        return []
    fields = (line.split() for line in file.read_text().splitlines())
    return sorted((float(moment), int(rows)) for moment, rows in fields)


def steady_rate(marks: Marks) -> float | None:
    """Rows a second from the mark at which a quarter of the rows was done to the last one.

    The rows of the mark that starts the clock are not counted, since their work was done before.
    """
    total = sum(rows for _, rows in marks)
    done = 0
    begun: float | None = None
    before = 0
    for moment, rows in marks:
        done += rows
        if begun is None and done >= STEADY_FROM * total:
            begun, before = moment, done
    if begun is None or done == before or marks[-1][0] <= begun:
        return None
    return (done - before) / (marks[-1][0] - begun)


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median and range; None where there is nothing."""
    kept = [value for value in values if value is not None]
    return Spread(statistics.median(kept), min(kept), max(kept), len(kept)) if kept else None


def figure(run: Run, name: str) -> float | None:
    """``steady``, or ``speed``: rows a second of wall time."""
    return run.steady if name == "steady" else run.rows / run.wall_s


def paired(runs: Sequence[Run], scene: str, name: str, ours: str, other: str) -> list[float]:
    """Ratios of a figure of two contenders, each of one round."""
    by_round: dict[int, dict[str, float]] = {}
    for run in runs:
        value = figure(run, name)
        if run.scene == scene and run.contender in (ours, other) and value is not None:
            by_round.setdefault(run.round, {})[run.contender] = value
    return [
        found[ours] / found[other]
        for found in by_round.values()
        if len({ours, other} & found.keys()) == len({ours, other})
    ]


def judged(runs: Sequence[Run], targets: Iterable[Target]) -> list[tuple[Target, Spread | None]]:
    """Each target with the ratio that was reached; None where there are no runs to tell."""
    return [(t, spread(paired(runs, t.scene, t.figure, t.ours, t.other))) for t in targets]


def _targets() -> tuple[Target, ...]:
    mobile, resnet, large = "mobilenet_v3_small", "resnet18", "mobilenet_v3_small, 12 MP"
    found = [
        Target(scene, "steady", f"ours-{precision}", f"bound-{precision}", least)
        for scene, least in ((mobile, 0.85), (resnet, 0.9))
        for precision in ("float32", "bfloat16")
    ]
    for scene in (mobile, resnet):
        found += [
            Target(scene, "steady", "ours-float32", "daft", 1.25),
            Target(scene, "steady", "ours-float32", "article", 2.5),
            Target(scene, "steady", "ours-bfloat16", "daft", 2.0 if scene == mobile else 3.0),
        ]
        found += [Target(scene, "speed", "ours-auto", other, 1.0) for other in _OTHERS]
    return (*found, Target(large, "steady", "ours-float32", "ray-benchmark", 5.0))


_OTHERS = ("article", "article-2", "ray-benchmark", "dataloader", "daft")
TARGETS = _targets()
