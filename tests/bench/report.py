"""The results as Markdown, JSON and a picture."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.bench import images
from tests.bench.figures import Judgement, Run, Spread, Target, figure, judged, paired, spread
from tests.bench.runner import ROOT, Bench
from tests.bench.scenes import Contender, Scene

# An idle machine uses less than this.
_NOISE = 0.1
_PACKAGES = ("torch", "torchvision", "ray", "daft", "numpy", "pillow")


def machine() -> dict[str, Any]:
    """CPU, cores, memory and versions."""
    facts: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": len(os.sched_getaffinity(0))}
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            facts["cpu"] = value.strip()
        if key.strip() == "flags":
            facts["features"] = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in value.split()]
    facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    facts["python"] = platform.python_version()
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    facts["libjpeg"] = images.versions()
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)  # noqa: S607
    facts["commit"] = asked.stdout.strip() or "unknown"
    return facts


def write(bench: Bench, runs: Sequence[Run], targets: Sequence[Target], rounds: int, facts: dict[str, Any]) -> str:
    """Writes ``bench.md``, ``bench.json`` and ``bench.png`` into the bench's folder; returns the Markdown."""
    text = markdown(bench, runs, targets, rounds, facts)
    (bench.folder / "bench.md").write_text(text)
    record = {
        "machine": facts,
        "rounds": rounds,
        "digests": bench.digests,
        "runs": [asdict(run) for run in runs],
        "targets": [asdict(judgement) for judgement in judged(runs, targets)],
        "failures": bench.failures,
    }
    (bench.folder / "bench.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(bench, runs, facts, bench.folder / "bench.png")
    return text


def markdown(bench: Bench, runs: Sequence[Run], targets: Sequence[Target], rounds: int, facts: dict[str, Any]) -> str:
    """The tables; medians over the rounds with the range in brackets."""
    features = f" ({', '.join(facts['features'])})" if facts.get("features") else ""
    lines = [
        "# Benchmark",
        "",
        f"{facts['cores']} cores of {facts['cpu']}{features}, {facts['memory_gib']} GiB, no GPU used; Python {facts['python']}, "
        + ", ".join(f"{name} {facts[name]}" for name in _PACKAGES)
        + f"; commit {facts['commit']}.",
        "",
        f"Rounds: {rounds}, interleaved. Medians, ranges in brackets. *Steady*: images a second after the first quarter of the rows, too "
        "high for contenders that decode ahead. *Worked*: images a second from the first image read to the last prediction, too "
        "low for those that load the model meanwhile. *Start-up*: seconds until the first rows are there. *End to end*: seconds "
        "from command to exit. Ratios are of the same round; those in the tables of contenders are of *worked*. *Top-1*: agreement with "
        "Pillow, `weights.transforms()` and float32, with random weights.",
    ]
    others = max((run.others for run in runs), default=0.0)
    if others > _NOISE:
        lines += [
            "",
            f"**Something else used up to {others:.0%} of the CPUs meanwhile: the figures are not to be trusted.**",
        ]
    if bench.quick:
        lines += ["", "**A quick look: so few images show that everything works. No figure here measures anything.**"]
    for scene in bench.scenes:
        mine = [run for run in runs if run.scene == scene.name]
        if not mine:
            continue
        lines += [
            "",
            f"## {scene.name}: {scene.count:,} images of {scene.images.width} x {scene.images.height}",
            "",
            "| | steady, images/s | worked, images/s | start-up, s | end to end, s | ours / this | this / bound | top-1 |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [_row(contender, scene, mine) for contender in bench.contenders(scene)]
    lines += [
        "", "## Targets", "",
        "*Safe* is our *worked* over the other's *steady*: a steady target is reached if this reaches it, too.",
        "", "| | target | median | range | safe | |", "| --- | ---: | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    lines += [_judgement(judgement) for judgement in judged(runs, targets)]
    if bench.failures:
        lines += ["", "## Failures", "", *(f"- {failure}" for failure in bench.failures)]
    return "\n".join(lines) + "\n"


def _judgement(judgement: Judgement) -> str:
    target, ratio = judgement.target, judgement.ratio
    what = "end to end" if target.figure == "speed" else target.figure
    name = f"{target.scene}: {target.ours} / {target.other}, {what}"
    verdict = f"**{judgement.verdict}**" if judgement.verdict in ("missed", "not settled") else judgement.verdict
    if ratio is None:
        return f"| {name} | {target.least:g} | | | | {verdict} |"
    safe = "" if judgement.safe is None else f"{judgement.safe.median:.2f}"
    return f"| {name} | {target.least:g} | {ratio.median:.2f} | {ratio.low:.2f}-{ratio.high:.2f} | {safe} | {verdict} |"


def _row(contender: Contender, scene: Scene, runs: Sequence[Run]) -> str:
    own = [run for run in runs if run.contender == contender.name]
    if not own:
        return f"| {contender.says} | failed | | | | | | |"
    # Like is compared with like: what computes in bfloat16 with the bound in bfloat16.
    kind = "bfloat16" if contender.name.endswith("bfloat16") else "float32"
    ours = spread(paired(runs, scene.name, "worked", f"ours-{kind}", contender.name))
    bound = spread(paired(runs, scene.name, "worked", contender.name, f"bound-{kind}"))
    cells = [
        contender.says,
        _cell(spread(run.steady for run in own), 0),
        _cell(spread(run.worked for run in own), 0),
        _cell(spread(run.startup_s for run in own), 1),
        _cell(spread(run.wall_s for run in own), 1),
        _cell(ours, 2),
        _cell(bound, 2),
        f"{min(run.agreement for run in own):.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def _cell(value: Spread | None, digits: int) -> str:
    if value is None:
        return ""
    shown = f"{value.median:.{digits}f}"
    return shown if value.n == 1 else f"{shown} ({value.low:.{digits}f}-{value.high:.{digits}f})"


def draw(bench: Bench, runs: Sequence[Run], facts: dict[str, Any], file: Path) -> None:
    """Bars of the rate worked and of the time end to end, a row for each scene; whiskers are the range."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    scenes = [scene for scene in bench.scenes if any(run.scene == scene.name for run in runs)]
    if not scenes:
        return
    heights = [1.3 + 0.34 * len(bench.contenders(scene)) for scene in scenes]
    canvas, axes = pyplot.subplots(
        len(scenes), 2, figsize=(13, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for scene, (left, right) in zip(scenes, axes, strict=True):
        contenders = bench.contenders(scene)
        for axis, title, unit in (
            (left, "first read to last prediction", "images/s"),
            (right, "end to end, start-up pale", "s"),
        ):
            axis.set_title(f"{scene.name}, {scene.count:,} images: {title}", fontsize=10, loc="left")
            axis.set_xlabel(unit, fontsize=9)
            axis.set_yticks(range(len(contenders)), [c.name for c in contenders], fontsize=9)
            axis.set_ylim(len(contenders) - 0.5, -0.5)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
        for place, contender in enumerate(contenders):
            own = [run for run in runs if run.scene == scene.name and run.contender == contender.name]
            color = "#d1495b" if contender.module == "ours" else "#8d99ae" if contender.module == "bound" else "#30638e"
            _bar(left, place, spread(figure(run, "worked") for run in own), color, 0)
            _bar(right, place, spread(run.wall_s for run in own), color, 1)
            startup = spread(run.startup_s for run in own)
            if startup:
                right.barh(place, startup.median, height=0.7, color="white", alpha=0.55)
        for axis in (left, right):
            axis.margins(x=0.12)
    canvas.suptitle(
        f"{facts['cores']} cores of {facts['cpu']}, no GPU; median and range", fontsize=9, x=0.01, ha="left"
    )
    canvas.savefig(file, dpi=120)
    pyplot.close(canvas)


def _bar(axis: Any, place: int, value: Spread | None, color: str, digits: int) -> None:
    if value is None:
        return
    axis.barh(place, value.median, height=0.7, color=color)
    if value.n > 1:
        axis.plot([value.low, value.high], [place, place], color="black", linewidth=1)
    axis.annotate(
        f"{value.median:.{digits}f}",
        (value.high, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )
