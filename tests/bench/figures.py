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
        steady: Images a second after :data:`STEADY_FROM` of the rows; None if the marks are too few. Too high where images were decoded
            ahead, since the time that took is not in it.
        worked: Images a second from the first image read to the last prediction; None if nothing was seen. Too low where the model is
            loaded meanwhile, but no work is left out of it.
        rows: Rows in the output.
        agreement: Share of the rows whose class is the reference's.
        others: Share of the CPUs that something else used in the second before.
    """

    round: int
    scene: str
    contender: str
    wall_s: float
    startup_s: float
    steady: float | None
    worked: float | None
    rows: int
    agreement: float
    others: float = 0.0


@dataclass(frozen=True)
class Spread:
    """Median and range of the runs of all rounds."""

    median: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Target:
    """A target: the ratio of one contender's figure to another's in the same round.

    Attributes:
        scene: Image set and model.
        figure: ``steady``, ``worked``, or ``speed`` (images a second from start to exit).
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


def worked_rate(marks: Marks, first_read: float | None) -> float | None:
    """Rows a second from the first image read to the last prediction: all of the work lies between the two."""
    if first_read is None or not marks or marks[-1][0] <= first_read:
        return None
    return sum(rows for _, rows in marks) / (marks[-1][0] - first_read)


def figure(run: Run, name: str) -> float | None:
    """``steady``, ``worked``, or ``speed``: rows a second of wall time."""
    return {"steady": run.steady, "worked": run.worked, "speed": run.rows / run.wall_s}[name]


def paired(
    runs: Sequence[Run], scene: str, name: str, ours: str, other: str, other_name: str | None = None
) -> list[float]:
    """Ratios of a figure of two contenders, each of one round; ``other_name`` takes another figure of the second."""
    mine, theirs = (
        {
            run.round: value
            for run in runs
            if (run.scene, run.contender) == (scene, who) and (value := figure(run, what))
        }
        for who, what in ((ours, name), (other, other_name or name))
    )
    return [mine[number] / theirs[number] for number in sorted(mine.keys() & theirs.keys())]


@dataclass(frozen=True)
class Judgement:
    """The outcome of a target.

    Attributes:
        target: The target.
        ratio: Of its figure; None where there are no runs to tell.
        safe: The same with our ``worked`` above the other's ``steady``, what decoding ahead cannot embellish; None for other figures.
        verdict: ``reached``, ``missed``, ``not settled`` (reached only by what decoding ahead may embellish), ``not measured``.
    """

    target: Target
    ratio: Spread | None
    safe: Spread | None
    verdict: str


def judged(runs: Sequence[Run], targets: Iterable[Target]) -> list[Judgement]:
    """Each target with the ratios and the verdict."""
    return [_judge(runs, target) for target in targets]


def _judge(runs: Sequence[Run], target: Target) -> Judgement:
    ratio = spread(paired(runs, target.scene, target.figure, target.ours, target.other))
    if ratio is None:
        return Judgement(target, None, None, "not measured")
    if ratio.median < target.least:
        return Judgement(target, ratio, _safe(runs, target), "missed")
    safe = _safe(runs, target)
    if target.figure == "steady" and (safe is None or safe.median < target.least):
        return Judgement(target, ratio, safe, "not settled")
    return Judgement(target, ratio, safe, "reached")


def _safe(runs: Sequence[Run], target: Target) -> Spread | None:
    if target.figure != "steady":
        return None
    return spread(paired(runs, target.scene, "worked", target.ours, target.other, "steady"))


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
    return (*found, Target(large, "worked", "ours-float32", "ray-benchmark", 5.0))


_OTHERS = ("article", "article-2", "ray-benchmark", "dataloader", "daft")
TARGETS = _targets()
