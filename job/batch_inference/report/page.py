"""Render a report's facts as HTML. Untrusted texts are escaped, shortened, and stripped of hidden characters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from batch_inference.output.attempts import AttemptRecord, work_starts
from batch_inference.report.sections import errors_section, images_section, predictions_section
from batch_inference.report.svg import bar_chart
from batch_inference.report.throughput import measure_throughput
from batch_inference.telemetry.tracebacks import MAX_CHARACTERS
from batch_inference.text import (
    NO_NUMBER,
    allow_breaks,
    describe_skipped,
    format_count,
    format_duration,
    format_number,
    format_percent,
    format_tick,
    format_time,
    mask_secrets,
    safe_excerpt,
)

if TYPE_CHECKING:
    from batch_inference.report.facts import ReportFacts

_MAX_ATTEMPT_ROWS = 50
_TEMPLATES = Path(__file__).parent / "templates"
# Keys of AttemptRecord.stage_s and their names.
_STAGES = {"fetch": "Fetch", "decode": "Decode", "infer": "Predict", "driver": "Write and commit"}
# Rows of the table of stages that each bottleneck marks.
_BOTTLENECK_STAGES = {
    "inference": ("infer",),
    "decode": ("decode",),
    "fetch": ("fetch",),
    "commit": ("driver",),
    "driver": ("driver",),
    "cpu": ("decode", "infer"),
}
_SECTIONS = (
    ("counts", "Counts"), ("speed", "Speed"), ("predictions", "Predictions"), ("images", "Images"), ("errors", "Errors"), ("job", "Job")
)  # fmt: skip


def render(facts: ReportFacts) -> str:
    """Return the page."""
    context = {
        "style": Markup(_style()),  # noqa: S704 - the program's own file
        "sections": _SECTIONS,
        "output": safe_excerpt(facts.output, 300),
        "job_title": _job_title(facts),
        "verdict": _verdict_box(facts),
        "tiles": _tiles(facts),
        "notes": [safe_excerpt(note, 500) for note in facts.notes],
        "counts": _counts_section(facts),
        **_speed_section(facts),
        **predictions_section(facts),
        **images_section(facts),
        **errors_section(facts),
        **_job_section(facts),
        "made": _made_by(facts),
    }
    return _environment().get_template("report.html").render(context)


def _made_by(facts: ReportFacts) -> str:
    version = safe_excerpt(str(facts.job.versions.get("batch-inference", "")))
    made = f"Made {format_time(facts.made_at)} by batch-inference {version}".strip()
    return f"{made}. This file loads nothing from anywhere else."


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["allow_breaks"] = allow_breaks
    return environment


@lru_cache(maxsize=1)
def _style() -> str:
    return (_TEMPLATES / "report.css").read_text(encoding="utf-8")


def _job_title(facts: ReportFacts) -> str:
    config = facts.job.config
    predictor = config.get("predictor")
    model = config.get("model") or {}
    name = predictor.get("path") if isinstance(predictor, dict) else model.get("name")
    results = "Embeddings of" if config.get("task") == "embed" else "Predictions by"
    return f"{results} {safe_excerpt(str(name), 120)} for {format_count(facts.job.rows, 'image')}"


def _verdict_box(facts: ReportFacts) -> dict[str, Any]:
    """Return the values of the box at the top that says how the job ended."""
    tally, rows = facts.tally, facts.job.rows
    counts = f"{format_count(tally.predictions, 'prediction')} and {format_count(tally.errors, 'error')}"
    accounted = "the only image is accounted for" if rows == 1 else f"all {rows:,} images are accounted for"
    if facts.state == "succeeded" and facts.verdict:
        share, _, limit = facts.verdict.partition(", ")
        return _box(
            f"Succeeded with {share}",
            "wait",
            "!",
            f"Succeeded with {share}: {counts}, {limit}",
            [f"{accounted[0].upper()}{accounted[1:]}; each image has exactly one row."],
            remedy="Look at the errors below before you use the predictions.",
        )
    if facts.state == "succeeded":
        lines = [f"{counts}; each image has exactly one row."]
        return _box("Succeeded", "good", "✓", f"Succeeded: {accounted}", lines)
    committed = (
        f"{tally.rows:,} of {format_count(rows, 'image')} {'is' if tally.rows == 1 else 'are'} committed, {counts}."
    )
    committed += (" It stays." if tally.rows == 1 else " They stay.") if tally.rows else ""
    if facts.state == "failed":
        failure = facts.failure
        fact, _, details = str(failure.get("verdict", "no reason given")).partition("\n")
        return _box(
            "Failed",
            "bad",
            "✕",
            f"Failed (exit code {safe_excerpt(str(failure.get('exit_code', '?')), 10)})",
            [safe_excerpt(fact, 1500), committed],
            details=safe_excerpt(details, MAX_CHARACTERS),
            remedy=safe_excerpt(str(failure.get("remedy", "")), 600),
        )
    return _box(
        "Not finished",
        "wait",
        "…",
        f"Not finished: {format_percent(tally.rows, rows)} of the images are done",
        [committed + " The job is running, or was stopped."],
        remedy="If it is not running, run the same command again: it resumes the job.",
    )


def _box(
    word: str, tone: str, sign: str, headline: str, lines: list[str], *, details: str = "", remedy: str = ""
) -> dict[str, Any]:
    return {
        "word": word,
        "tone": tone,
        "sign": sign,
        "headline": headline,
        "lines": lines,
        "details": details,
        "remedy": remedy,
    }


def _tiles(facts: ReportFacts) -> list[dict[str, str]]:
    """Return the tiles with the most important numbers."""
    tally, job, attempts = facts.tally, facts.job, facts.attempts
    tiles = [
        _tile("Images", f"{job.rows:,}", f"in {format_count(job.shards, 'shard')}"),
        _tile("Predictions", f"{tally.predictions:,}", format_percent(tally.predictions, job.rows)),
        _tile(
            "Errors",
            f"{tally.errors:,}",
            format_percent(tally.errors, tally.rows) + (" of the done images" if tally.rows < job.rows else ""),
            tone="bad" if tally.errors else "",
        ),
    ]
    working_s, rows = sum(attempt.working_s for attempt in attempts), sum(attempt.rows for attempt in attempts)
    if working_s >= 1 and rows:
        tiles.append(_tile("Images per second", format_number(rows / working_s), "without start-up"))
    if attempts:
        note = f"{len(attempts):,} attempts" if len(attempts) > 1 else "start-up included"
        tiles.append(_tile("Time", format_duration(sum(attempt.elapsed_s for attempt in attempts)), note))
    hours, settings = sum(attempt.gpu_hours for attempt in attempts), facts.config.report
    if hours and settings.gpu_hour_price is None:
        tiles.append(_tile("GPU-hours", format_number(hours), f"{_busy_percent(attempts)} busy"))
    elif hours and settings.gpu_hour_price is not None:
        note = f"{safe_excerpt(settings.currency)}, {format_number(hours)} GPU-hours"
        tiles.append(_tile("Cost of GPUs", f"{hours * settings.gpu_hour_price:,.2f}", note))
    return tiles


def _tile(name: str, value: str, note: str, tone: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "note": note, "tone": tone}


def _busy_percent(attempts: Sequence[AttemptRecord]) -> str:
    busy_hours = sum(attempt.busy_gpu_hours for attempt in attempts)
    return format_percent(busy_hours, sum(attempt.gpu_hours for attempt in attempts))


def _counts_section(facts: ReportFacts) -> dict[str, Any]:
    tally, job = facts.tally, facts.job
    left = job.rows - tally.rows
    parts = [
        ("Predictions", tally.predictions, "good"),
        ("Errors", tally.errors, "bad"),
        ("Not done yet", left, "wait"),
    ]
    terms = f"{tally.predictions:,} + {tally.errors:,}" + (f" + {left:,}" if left else "")
    remarks = []
    if job.duplicates:
        remarks.append(
            f"{job.duplicates:,} duplicate inputs were left out: an input that is listed several times is done once."
        )
    if job.repeated:
        remarks.append(
            f"{job.repeated:,} lines of the manifest have the URI of another line; each line has its own row."
        )
    if skipped := describe_skipped(job.skipped):
        endings = ", ".join(safe_excerpt(text, 60) for text in skipped[:5])
        more = f", and {len(skipped) - 5:,} more endings" if len(skipped) > 5 else ""
        remarks.append(
            f"{sum(job.skipped.values()):,} files were skipped, since their names are not those of images: {endings}{more}."
        )
    return {
        "sentence": f"{terms} = {job.rows:,}: the counts add up."
        if left >= 0
        else f"{terms} is not {job.rows:,}: rows are missing or duplicated.",
        "parts": [
            {
                "name": name,
                "count": f"{count:,}",
                "percent": format_percent(count, job.rows),
                "share": round(100 * count / max(1, job.rows), 3),
                "tone": tone,
            }
            for name, count, tone in parts
            if count or tone != "wait"
        ],
        "total": f"{job.rows:,}",
        "remarks": remarks,
    }


def _speed_section(facts: ReportFacts) -> dict[str, Any]:
    attempts = [attempt for attempt in facts.attempts if attempt.rows]
    longest = max(attempts, key=lambda attempt: attempt.working_s, default=None)
    return {
        "bottleneck": safe_excerpt(longest.sentence, 600) if longest else "",
        "throughput": _throughput_chart(facts),
        "stages": _stage_rows(attempts, longest),
        "cost": _cost_pairs(facts),
    }


def _throughput_chart(facts: ReportFacts) -> dict[str, Any] | None:
    throughput = measure_throughput(facts.rows_over_time, work_starts(facts.attempts))
    if throughput is None or len(throughput.rates) < 2:
        return None
    count = len(throughput.rates)
    parts = 4 if count >= 8 else 1
    ticks = {
        round(count * part / parts): format_duration(throughput.work_s * part / parts) for part in range(parts + 1)
    }
    sentence = (
        f"{format_number(sum(throughput.rates) / count)} images/s on average, at most "
        f"{format_number(max(throughput.rates))} images/s, over "
        f"{format_duration(throughput.work_s)} of working time, from the times of the commits."
    )
    if throughput.pauses:
        sentence += (
            " A dashed line marks the end of an attempt and the start of the next; the time between them is left out."
        )
    svg = bar_chart(
        "throughput",
        "Images per second over time",
        sentence,
        throughput.rates,
        ticks,
        text=format_tick,
        marks=[position / throughput.bin_s for position in throughput.pauses],
    )
    return {"svg": svg, "sentence": sentence}


def _stage_rows(attempts: list[AttemptRecord], longest: AttemptRecord | None) -> list[dict[str, Any]]:
    if longest is None:
        return []
    rows = sum(attempt.rows for attempt in attempts)
    working_s = sum(attempt.working_s for attempt in attempts if attempt.busy)
    bottlenecks = _BOTTLENECK_STAGES.get(longest.limit, ())
    stages = []
    for key, name in _STAGES.items():
        seconds = sum(float(attempt.stage_s.get(key, 0.0)) for attempt in attempts)
        busy_s = sum(float(attempt.busy.get(key, 0.0)) * attempt.working_s for attempt in attempts)
        busy = busy_s / working_s if working_s else None
        stages.append(
            {
                "name": name,
                "seconds": format_number(seconds),
                "ms": format_number(1000 * seconds / rows),
                "busy": None if busy is None else min(100, round(100 * busy)),
                "bottleneck": key in bottlenecks,
            }
        )
    return stages


def _cost_pairs(facts: ReportFacts) -> list[tuple[str, str]]:
    attempts, settings = facts.attempts, facts.config.report
    if not attempts:
        return []
    hours = sum(attempt.gpu_hours for attempt in attempts)
    busy = sum(attempt.busy_gpu_hours for attempt in attempts)
    read = sum(attempt.bytes for attempt in attempts)
    pairs = []
    if hours:
        pairs.append(
            ("GPU-hours", f"{format_number(hours)} (duration of each attempt, including its start, times its GPUs)")
        )
        pairs.append(("GPU-hours busy", f"{format_number(busy)} ({format_percent(busy, hours)})"))
        if settings.gpu_hour_price is not None:
            cost, currency = hours * settings.gpu_hour_price, safe_excerpt(settings.currency)
            pairs.append(
                ("Cost of GPUs", f"{cost:,.2f} {currency} at {settings.gpu_hour_price:g} {currency} per GPU-hour")
            )
            if facts.tally.rows:
                million = cost / facts.tally.rows * 1e6
                pairs.append(("Cost of a million images", f"{million:,.2f} {currency}"))
        else:
            pairs.append(("Cost", "set report.gpu_hour_price to see it"))
    else:
        cpu_hours = sum(attempt.cpus * attempt.elapsed_s for attempt in attempts) / 3600
        pairs.append(("GPU-hours", "none: the actors have no GPU"))
        pairs.append(("CPU-hours of the actors", format_number(cpu_hours)))
    pairs.append(("Bytes read", f"{read / 1e9:,.2f} GB" if read >= 1e8 else f"{read / 1e6:,.2f} MB"))
    retries = sum(attempt.retries for attempt in attempts)
    pairs.append(("Repeated requests", f"{retries:,}"))
    return pairs


def _format_timestamp(text: str) -> str:
    """Return a time of the ledger, which is in UTC, to the second."""
    return safe_excerpt(text[:19].replace("T", " "), 30) + " UTC"


def _job_section(facts: ReportFacts) -> dict[str, Any]:
    job = facts.job
    committed_shards = Counter(commit.attempt for commit in facts.commits)
    last_commit = max((c.committed_at for c in facts.commits), default="")
    about = [
        ("Output", safe_excerpt(facts.output, 400)),
        ("Fingerprint", safe_excerpt(job.fingerprint, 80)),
        ("Planned", _format_timestamp(job.created_at)),
        ("Last commit", _format_timestamp(last_commit) if last_commit else "none"),
        ("Shards", f"{len(facts.commits):,} of {job.shards:,} committed, with {job.shard_size:,} images each"),
    ]
    rows = [
        {
            "attempt": safe_excerpt(attempt.attempt, 20),
            "state": safe_excerpt("running, or killed" if attempt.state == "running" else attempt.state, 30),
            "started": _format_timestamp(attempt.started_at).removesuffix(" UTC"),
            "took": format_duration(attempt.elapsed_s),
            "rows": f"{attempt.rows:,}",
            "rate": format_number(attempt.rows / attempt.working_s) if attempt.working_s >= 1 else NO_NUMBER,
            "shards": f"{committed_shards[attempt.attempt]:,}",
            "gpu_hours": format_number(attempt.gpu_hours) if attempt.gpus else NO_NUMBER,
        }
        for attempt in facts.attempts[-_MAX_ATTEMPT_ROWS:]
    ]
    unlisted = len(facts.attempts) - len(rows)
    sentence = f"{len(facts.attempts):,} start{'s' * (len(facts.attempts) != 1)} of the program for this job."
    configuration = yaml.safe_dump(mask_secrets(job.config), sort_keys=False, allow_unicode=True, width=100)
    return {
        "about": about,
        "attempts": {
            "rows": rows,
            "sentence": sentence + (f" The first {unlisted:,} are not listed." if unlisted else ""),
        },
        "versions": [(safe_excerpt(str(k), 60), safe_excerpt(str(v), 120)) for k, v in job.versions.items()],
        "identity": [
            (safe_excerpt(str(k), 60), safe_excerpt(str(v), 200)) for k, v in list(job.identity.items())[:100]
        ],
        "configuration": safe_excerpt(configuration, 30_000),
    }
