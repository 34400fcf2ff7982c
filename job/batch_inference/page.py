"""A report's facts as HTML: every text of a stranger's escaped, shortened, and without what hides in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from batch_inference import charts, exhibits, history
from batch_inference.progress import duration
from batch_inference.tracebacks import MOST
from batch_inference.wording import (
    NO_NUMBER,
    breakable,
    count_of,
    describe_skipped,
    figure,
    masked,
    moment,
    percent,
    shown,
    whole,
)

if TYPE_CHECKING:
    from batch_inference.report import Facts

_MOST_ATTEMPT_ROWS = 50
_TEMPLATES = Path(__file__).parent / "templates"
_STAGES = {"fetch": "Fetch", "decode": "Decode", "infer": "Predict", "driver": "Write and commit"}
# What the sentence calls the limit, and the row of the table that it is.
_LIMITS = {
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


def render(facts: Facts) -> str:
    """The page."""
    context = {
        "style": Markup(_style()),  # noqa: S704 - the program's own file
        "sections": _SECTIONS,
        "output": shown(facts.output, 300),
        "what": _what(facts),
        "verdict": _verdict(facts),
        "tiles": _tiles(facts),
        "notes": [shown(note, 500) for note in facts.notes],
        "counts": _counts(facts),
        **_speed(facts),
        **exhibits.predictions(facts),
        **exhibits.images(facts),
        **exhibits.errors(facts),
        **_job(facts),
        "made": f"Made {moment(facts.made_at)} by batch-inference {shown(str(facts.job.versions.get('batch-inference', '')))}".strip()
        + ". Nothing in this file is loaded from anywhere else.",
    }
    return _environment().get_template("report.html").render(context)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    return environment


@lru_cache(maxsize=1)
def _style() -> str:
    return (_TEMPLATES / "report.css").read_text(encoding="utf-8")


def _what(facts: Facts) -> str:
    config = facts.job.config
    predictor = config.get("predictor")
    model = config.get("model") or {}
    who = predictor.get("path") if isinstance(predictor, dict) else model.get("name")
    doing = "Embeddings of" if config.get("task") == "embed" else "Predictions by"
    return f"{doing} {shown(str(who), 120)} for {count_of(facts.job.rows, 'image')}"


def _verdict(facts: Facts) -> dict[str, Any]:
    tally, rows = facts.tally, facts.job.rows
    counted = f"{count_of(tally.predictions, 'prediction')} and {count_of(tally.errors, 'error')}"
    accounted = "the only image is accounted for" if rows == 1 else f"all {rows:,} images are accounted for"
    if facts.state == "succeeded" and facts.verdict:
        share, _, limit = facts.verdict.partition(", ")
        return {
            "word": f"Succeeded with {share}",
            "tone": "wait",
            "sign": "!",
            "headline": f"Succeeded with {share}: {counted}, {limit}",
            "lines": [f"{accounted[0].upper()}{accounted[1:]}; each image has exactly one row."],
            "more": "",
            "remedy": "Look at the errors below before you use the predictions.",
        }
    if facts.state == "succeeded":
        return {
            "word": "Succeeded",
            "tone": "good",
            "sign": "✓",
            "headline": f"Succeeded: {accounted}",
            "lines": [f"{counted}; each image has exactly one row."],
            "more": "",
            "remedy": "",
        }
    done = f"{tally.rows:,} of {count_of(rows, 'image')} {'is' if tally.rows == 1 else 'are'} committed, {counted}."
    done += (" It stays." if tally.rows == 1 else " They stay.") if tally.rows else ""
    if facts.state == "failed":
        failed = facts.failed
        fact, _, more = str(failed.get("verdict", "no reason given")).partition("\n")
        return {
            "word": "Failed",
            "tone": "bad",
            "sign": "✕",
            "headline": f"Failed (exit code {shown(str(failed.get('exit_code', '?')), 10)})",
            "lines": [shown(fact, 1500), done],
            "more": shown(more, MOST),
            "remedy": shown(str(failed.get("remedy", "")), 600),
        }
    return {
        "word": "Not finished",
        "tone": "wait",
        "sign": "…",
        "headline": f"Not finished: {percent(tally.rows, rows)} of the images are done",
        "more": "",
        "lines": [done + " The job is under way, or was stopped."],
        "remedy": "If it is not running, the same command again goes on with the rest.",
    }


def _tiles(facts: Facts) -> list[dict[str, str]]:
    tally, job, spent = facts.tally, facts.job, facts.spent
    tiles = [
        _tile("Images", f"{job.rows:,}", f"in {count_of(job.shards, 'shard')}"),
        _tile("Predictions", f"{tally.predictions:,}", percent(tally.predictions, job.rows)),
        _tile(
            "Errors",
            f"{tally.errors:,}",
            percent(tally.errors, tally.rows) + (" of those done" if tally.rows < job.rows else ""),
            tone="bad" if tally.errors else "",
        ),
    ]
    working, seen = sum(one.working_s for one in spent), sum(one.rows for one in spent)
    if working >= 1 and seen:
        tiles.append(_tile("Images a second", figure(seen / working), "without start-up"))
    if spent:
        note = f"{len(spent):,} attempts" if len(spent) > 1 else "start-up included"
        tiles.append(_tile("Time", duration(sum(one.elapsed_s for one in spent)), note))
    hours, settings = sum(one.gpu_hours for one in spent), facts.config.report
    if hours and settings.gpu_hour_price is None:
        tiles.append(_tile("GPU-hours", figure(hours), f"{_busy(spent)} busy"))
    elif hours and settings.gpu_hour_price is not None:
        note = f"{shown(settings.currency)}, {figure(hours)} GPU-hours"
        tiles.append(_tile("Cost of GPUs", f"{hours * settings.gpu_hour_price:,.2f}", note))
    return tiles


def _tile(name: str, value: str, note: str, tone: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "note": note, "tone": tone}


def _busy(spent: Iterable[history.Spent]) -> str:
    ones = list(spent)
    return percent(sum(one.busy_gpu_hours for one in ones), sum(one.gpu_hours for one in ones))


def _counts(facts: Facts) -> dict[str, Any]:
    tally, job = facts.tally, facts.job
    left = job.rows - tally.rows
    parts = [
        ("Predictions", tally.predictions, "good"),
        ("Errors", tally.errors, "bad"),
        ("Not done yet", left, "wait"),
    ]
    closing = f"{tally.predictions:,} + {tally.errors:,}" + (f" + {left:,}" if left else "")
    aside = []
    if job.duplicates:
        aside.append(f"{job.duplicates:,} inputs were listed more than once and are done once.")
    if job.repeated:
        aside.append(f"{job.repeated:,} lines of the manifest share their URI with another; each has its row.")
    if skipped := describe_skipped(job.skipped):
        most = ", ".join(shown(one, 60) for one in skipped[:5])
        more = f", and {len(skipped) - 5:,} more endings" if len(skipped) > 5 else ""
        aside.append(f"{sum(job.skipped.values()):,} files are no images by their names or kinds: {most}{more}.")
    return {
        "sentence": f"{closing} = {job.rows:,}: the counts close."
        if left >= 0
        else f"{closing} is not {job.rows:,}: the counts do not close.",
        "parts": [
            {
                "name": name,
                "count": f"{count:,}",
                "percent": percent(count, job.rows),
                "share": round(100 * count / max(1, job.rows), 3),
                "tone": tone,
            }
            for name, count, tone in parts
            if count or tone != "wait"
        ],
        "total": f"{job.rows:,}",
        "aside": aside,
    }


def _speed(facts: Facts) -> dict[str, Any]:
    spent = [one for one in facts.spent if one.rows]
    longest = max(spent, key=lambda one: one.working_s, default=None)
    return {
        "bottleneck": shown(longest.sentence, 600) if longest else "",
        "pace": _pace(facts),
        "stages": _stages(spent, longest),
        "cost": _cost(facts),
    }


def _pace(facts: Facts) -> dict[str, Any] | None:
    found = history.pace(facts.done, history.starts_of(facts.spent))
    if found is None or len(found.rates) < 2:
        return None
    count = len(found.rates)
    parts = 4 if count >= 8 else 1
    ticks = {round(count * part / parts): duration(found.total_s * part / parts) for part in range(parts + 1)}
    sentence = (
        f"{figure(sum(found.rates) / count)} images/s in the mean, {figure(max(found.rates))} at best, over "
        f"{duration(found.total_s)} of work, from the times of the commits."
    )
    if found.pauses:
        sentence += " At a dashed line an attempt ended and another began; the time between them is left out."
    svg = charts.bars(
        "pace",
        "Images a second over time",
        sentence,
        found.rates,
        ticks,
        text=whole,
        marks=[at / found.bin_s for at in found.pauses],
    )
    return {"svg": svg, "sentence": sentence}


def _stages(spent: list[history.Spent], longest: history.Spent | None) -> list[dict[str, Any]]:
    if longest is None:
        return []
    rows = sum(one.rows for one in spent)
    working = sum(one.working_s for one in spent if one.busy)
    limits = _LIMITS.get(longest.limit, ())
    out = []
    for key, name in _STAGES.items():
        seconds = sum(float(one.stage_s.get(key, 0.0)) for one in spent)
        busy = sum(float(one.busy.get(key, 0.0)) * one.working_s for one in spent) / working if working else None
        out.append(
            {
                "name": name,
                "seconds": figure(seconds),
                "ms": figure(1000 * seconds / rows),
                "busy": None if busy is None else min(100, round(100 * busy)),
                "limit": key in limits,
            }
        )
    return out


def _cost(facts: Facts) -> list[tuple[str, str]]:
    spent, settings = facts.spent, facts.config.report
    if not spent:
        return []
    hours, busy = sum(one.gpu_hours for one in spent), sum(one.busy_gpu_hours for one in spent)
    read = sum(one.bytes for one in spent)
    pairs = []
    if hours:
        pairs.append(("GPU-hours", f"{figure(hours)}, from the start of each attempt to its end, times its GPUs"))
        pairs.append(("of these busy", f"{figure(busy)} ({percent(busy, hours)})"))
        if settings.gpu_hour_price is not None:
            cost, currency = hours * settings.gpu_hour_price, shown(settings.currency)
            pairs.append(
                ("Cost of GPUs", f"{cost:,.2f} {currency} at {settings.gpu_hour_price:g} {currency} a GPU-hour")
            )
            if facts.tally.rows:
                million = cost / facts.tally.rows * 1e6
                pairs.append(("for a million images", f"{million:,.2f} {currency}"))
        else:
            pairs.append(("Cost", "set report.gpu_hour_price to see it"))
    else:
        cpu_hours = sum(one.cpus * one.elapsed_s for one in spent) / 3600
        pairs.append(("GPU-hours", "none: the actors have no GPU"))
        pairs.append(("CPU-hours of the actors", figure(cpu_hours)))
    pairs.append(("Bytes read", f"{read / 1e9:,.2f} GB" if read >= 1e8 else f"{read / 1e6:,.2f} MB"))
    again = sum(one.retries for one in spent)
    pairs.append(("Requests sent again", f"{again:,}"))
    return pairs


def _stamp(text: str) -> str:
    """A time of the ledger's, which is in UTC, to the second."""
    return shown(text[:19].replace("T", " "), 30) + " UTC"


def _job(facts: Facts) -> dict[str, Any]:
    job = facts.job
    shards = Counter(commit.attempt for commit in facts.commits)
    last = max((c.committed_at for c in facts.commits), default="")
    about = [
        ("Output", shown(facts.output, 400)),
        ("Fingerprint", shown(job.fingerprint, 80)),
        ("Planned", _stamp(job.created_at)),
        ("Last commit", _stamp(last) if last else "none"),
        ("Shards", f"{len(facts.commits):,} of {job.shards:,} committed, of {job.shard_size:,} images each"),
    ]
    rows = [
        {
            "attempt": shown(one.attempt, 20),
            "state": shown("running, or killed" if one.state == "running" else one.state, 30),
            "started": _stamp(one.started_at).removesuffix(" UTC"),
            "took": duration(one.elapsed_s),
            "rows": f"{one.rows:,}",
            "rate": figure(one.rows / one.working_s) if one.working_s >= 1 else NO_NUMBER,
            "shards": f"{shards[one.attempt]:,}",
            "gpu_hours": figure(one.gpu_hours) if one.gpus else NO_NUMBER,
        }
        for one in facts.spent[-_MOST_ATTEMPT_ROWS:]
    ]
    left_out = len(facts.spent) - len(rows)
    sentence = f"{len(facts.spent):,} start{'s' * (len(facts.spent) != 1)} of the program on this job."
    configuration = yaml.safe_dump(masked(job.config), sort_keys=False, allow_unicode=True, width=100)
    return {
        "about": about,
        "attempts": {
            "rows": rows,
            "sentence": sentence + (f" The first {left_out:,} are left out." if left_out else ""),
        },
        "versions": [(shown(str(k), 60), shown(str(v), 120)) for k, v in job.versions.items()],
        "identity": [(shown(str(k), 60), shown(str(v), 200)) for k, v in list(job.identity.items())[:100]],
        "configuration": shown(configuration, 30_000),
    }
