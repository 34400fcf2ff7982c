"""Tables and sentences that the commands print for people."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from batch_inference.driver.planner import Cost, Plan
from batch_inference.kubernetes.capacity import Capacity, PodGroup
from batch_inference.output.tally import describe_errors
from batch_inference.text import describe_skipped, format_count, format_duration, printable

if TYPE_CHECKING:
    from batch_inference.output.diff import Comparison
    from batch_inference.output.status import Status
    from batch_inference.output.verify import Verification
    from batch_inference.preflight.preflight import PreflightResult
    from batch_inference.report.build import ReportSummary

log = structlog.get_logger()


def rate_text(rate: float | None) -> str:
    """Return a rate as text; a short run has none worth printing."""
    return "?" if rate is None else f"{rate:,.1f}"


def show_cursor() -> None:
    """Show the terminal's cursor again, which the live display of a process that is gone has hidden."""
    Console(stderr=True).show_cursor(True)


def print_pairs(title: str, pairs: list[tuple[str, str]]) -> None:
    """Print a two-column table on stdout."""
    Console(highlight=False).print(_pairs(title, pairs))


def _pairs(title: str, pairs: list[tuple[str, str]]) -> Table:
    table = Table(
        box=None,
        pad_edge=False,
        show_header=False,
        padding=(0, 2, 0, 0),
        title=title,
        title_justify="left",
        title_style="bold",
    )
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(escape(printable(name)), escape(printable(value)))
    return table


def print_status(status: Status) -> None:
    """Print the status of a job on stdout."""
    print_pairs(status.state, _status_pairs(status))


def watch_status(read: Callable[[], Status], every_s: float) -> None:
    """Print the status of a job until it ends or someone interrupts: in place on a terminal, else a line each time."""
    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
        while True:
            status = read()
            if live:
                live.update(_pairs(status.state, _status_pairs(status)), refresh=True)
            else:
                rows = status.predictions + status.errors
                eta = "-" if status.state == "succeeded" else format_duration(status.eta_s)
                print(
                    f"{status.state}: {rows:,} of {status.rows:,} rows, {status.errors:,} errors, ETA {eta}", flush=True
                )
            if status.ended:
                return
            time.sleep(every_s)


def _status_pairs(status: Status) -> list[tuple[str, str]]:
    done = status.predictions + status.errors
    finished = status.state == "succeeded" or done == status.rows
    rate = (
        f"{status.images_per_s:,.1f} images/s"
        if status.images_per_s is not None
        else "unknown before the second commit"
    )
    going = [("rate", rate)] if status.images_per_s is not None or not finished else []
    if not finished:
        going.append(("ETA", format_duration(status.eta_s)))
    return [
        (
            "rows",
            f"{done:,} of {status.rows:,} ({100 * done / max(1, status.rows):.1f} %): "
            f"{status.predictions:,} predictions, {status.errors:,} errors",
        ),
        (
            "shards",
            f"{status.shards_done:,} of {status.shards:,} committed, by {format_count(len(status.attempts), 'attempt')}",
        ),
        ("errors", ", ".join(describe_errors(status.errors_by)[:8]) or "none"),
        *going,
        (
            "last commit",
            "none" if status.last_commit_age_s is None else f"{format_duration(status.last_commit_age_s)} ago",
        ),
        *([("verdict", status.verdict)] if status.verdict else []),
        *([("balance", status.balance)] if status.balance else []),
        ("fingerprint", status.fingerprint[:12]),
    ]


def print_verification(verification: Verification, *, quiet: bool = False) -> None:
    """Print the result of a recount on stdout; with ``quiet`` problems only."""
    counts = f"{verification.predictions:,} predictions, {verification.errors:,} errors"
    done = verification.predictions + verification.errors
    for problem in verification.problems:
        typer.echo(f"  - {printable(problem)}")
    if not verification.ok:
        typer.echo(
            f"WRONG: {len(verification.problems)} problems; {done:,} of {verification.rows:,} inputs found ({counts})"
        )
        typer.echo(
            "remedy: run the job again: it deletes files that belong to no commit; for anything else first delete _SUCCESS and the "
            "_commits/ files of the shards named, which are then processed again"
        )
    elif quiet:
        return
    elif verification.finished:
        typer.echo(
            f"OK: all {verification.rows:,} inputs are there exactly once: {counts}, {format_count(verification.shards, 'shard')}"
        )
    elif verification.rows and verification.errors == verification.rows:
        typer.echo(
            f"OK: all {verification.rows:,} inputs are there exactly once, and every one is an error: there is no prediction at all"
        )
    else:
        typer.echo(
            f"OK so far: {done:,} of {verification.rows:,} inputs are there exactly once, {verification.shards_done:,} of "
            f"{verification.shards:,} shards are committed; the job is not finished ({len(verification.uncommitted)} files belong "
            "to no commit yet)"
        )


def print_report(report: ReportSummary) -> None:
    """Print on stdout what a report was made of."""
    for note in report.notes:
        typer.echo(printable(f"  - {note}"))
    done = report.predictions + report.errors
    counts = f"{report.predictions:,} predictions and {report.errors:,} errors"
    typer.echo(printable(f"{report.state}: {done:,} of {report.rows:,} images, {counts}"))
    typer.echo(printable(f"report: {report.uri}"))


def print_comparison(comparison: Comparison, *, quiet: bool = False) -> None:
    """Print what changed between two outputs on stdout; with ``quiet`` one line."""
    if quiet:
        changed = f"{comparison.changed:,} changed ({comparison.changed_percent:.2f} %)"
        print(f"{comparison.column}: {comparison.same:,} same, {changed}, {comparison.newly_failed:,} now failed")
        return
    pairs = [
        ("same", f"{comparison.same:,}"),
        ("changed", f"{comparison.changed:,} ({comparison.changed_percent:.2f} % of those predicted in both)"),
        ("now failed", f"{comparison.newly_failed:,}"),
        ("now predicted", f"{comparison.newly_predicted:,} that had failed"),
        ("inputs apart", f"{comparison.only_before:,} only in the first, {comparison.only_after:,} only in the second"),
    ]
    if comparison.confidence:
        pairs.append(("confidence", f"mean {comparison.confidence[0]:.4f}, then {comparison.confidence[1]:.4f}"))
    if comparison.changes:
        pairs.append(
            ("most often", "\n".join(f"{rows:,} {label} → {other}" for label, other, rows in comparison.changes[:10]))
        )
        pairs.append(("such as", "\n".join(f"{e.uri}: {e.before} → {e.after}" for e in comparison.examples[:5])))
    print_pairs(f"{comparison.column}", pairs)


def print_plan(plan: Plan, *, for_chart: bool, cost: Cost | None = None) -> None:
    """Print a plan on stdout; if values of the chart are given, with the chart's pods instead of this machine."""
    notes = [("left out", text) for text in describe_skipped(plan.skipped)[:8]]
    notes += [("can't be read", str(reason)) for reason in plan.unreadable]
    notes += [("note", note) for note in plan.notes]
    if plan.duplicates:
        notes.append(("duplicates", f"{plan.duplicates:,} inputs listed more than once, done once"))
    if plan.repeated:
        notes.append(("repeated", f"{plan.repeated:,} manifest lines share their URI with another; each gets its row"))
    if plan.passthrough:
        notes.append(("passthrough", ", ".join(plan.passthrough)))
    if for_chart:
        where = _pods(plan.kubernetes)
    else:
        where = [
            ("this machine", f"{plan.available['cpus']:g} CPUs, {plan.available['gpus']:g} GPUs"),
            *[("does not fit", problem) for problem in plan.problems],
            ("on Kubernetes", _defaults(plan.kubernetes)),
        ]
    print_pairs(
        "plan",
        [
            (
                "inputs",
                f"{format_count(plan.inputs, 'image')} in {format_count(plan.shards, 'shard')} of {plan.shard_size:,}",
            ),
            ("first", "\n".join(plan.first)),
            *notes,
            ("runs", ", ".join(f"{k} {v}" for k, v in plan.engine.items() if k.startswith(("model.", "predictor.")))),
            (
                "actors",
                f"{plan.actors} with {format_count(plan.gpus, 'GPU')} in all, {format_count(plan.cpus, 'CPU')} with one preparation task",
            ),
            *where,
            *([("cost", _cost(cost))] if cost else []),
        ],
    )


def _cost(cost: Cost) -> str:
    each = f"{format_count(cost.gpus, 'GPU')} at {cost.gpu_hour_price:,.2f} are {cost.per_hour:,.2f} an hour"
    if cost.hours is None or cost.total is None:
        return f"{each}; --images-per-s RATE, which preflight measures, shows the total"
    time = f"{cost.hours:,.1f} hours" if cost.hours >= 1 else f"{60 * cost.hours:,.1f} minutes"
    all_hours = f"{time} of images are {cost.gpus * cost.hours:,.2f} GPU-hours and {cost.total:,.2f}"
    return f"{each}; {all_hours}, start-up not counted"


def _pods(capacity: Capacity | None) -> list[tuple[str, str]]:
    if capacity is None:
        return [("on Kubernetes", "joins a Ray cluster that is up; its own pod is the submitter")]
    workers, cpu_workers = capacity.workers, capacity.cpu_workers
    count = str(workers.replicas)
    if capacity.min_workers != workers.replicas:
        count = f"{capacity.min_workers} to {workers.replicas}, as Ray asks for them"
    lines = [("head", f"1: {_size(capacity.head)}"), ("workers", f"{count}: {_size(workers)}, {_slots(workers)}")]
    if cpu_workers.replicas:
        lines.append(("CPU workers", f"{cpu_workers.replicas}: {_size(cpu_workers)}, {_slots(cpu_workers)}"))
    total = (
        f"{format_count(capacity.total('gpus'), 'GPU')}, {format_count(capacity.total('cpu_millis') / 1000, 'CPU')}, "
        f"{capacity.total('memory_mib') / 1024:g} GiB of memory, and the submitter"
    )
    return [*lines, ("in all", total), *[("refused", problem) for problem in capacity.problems]]


def _size(group: PodGroup) -> str:
    gpus = f"{format_count(group.gpus, 'GPU')}, " if group.gpus else ""
    return (
        f"{gpus}{format_count(group.cpu_millis / 1000, 'CPU')}, {group.memory_mib / 1024:g} GiB of memory with "
        f"{group.object_store_mib:,} MiB of object store"
    )


def _slots(group: PodGroup) -> str:
    tasks = format_count(group.tasks, "task")
    return f"room for {format_count(group.actors, 'actor')} and {tasks}" if group.actors else f"room for {tasks}"


def _defaults(capacity: Capacity | None) -> str:
    if capacity is None or capacity.problems:
        return "; ".join(["needs values for the chart", *(capacity.problems if capacity else ())])
    return f"{format_count(capacity.workers.replicas, 'worker')}, each with {_size(capacity.workers)}; --values FILE shows yours"


def print_preflight(preflight: PreflightResult, *, quiet: bool = False) -> None:
    """Print the checks of a preflight, each failure with its remedy, and the forecast on stdout; with ``quiet`` without what is OK."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    colors = {"OK": "green", "WARN": "yellow", "FAIL": "red"}
    for check in [check for check in preflight.checks if not quiet or check.state != "OK"]:
        remedy = f"\nremedy: {check.remedy}" if check.remedy else ""
        table.add_row(Text(check.state, style=colors[check.state]), check.name, Text(printable(check.finding + remedy)))
    if table.row_count:
        console.print(table)
    if not quiet:
        console.print()
    if preflight.measured and preflight.forecast and not quiet:
        measured, forecast = preflight.measured, preflight.forecast
        ms = {name: f"{1000 * getattr(measured, f'{name}_s'):.1f} ms" for name in ("fetch", "decode", "infer")}
        pairs = [
            ("one image", f"fetch {ms['fetch']}, decode {ms['decode']} of one CPU, predict {ms['infer']} of one actor"),
            ("one actor", f"{forecast.actor_images_per_s:,.1f} images/s where it never waits"),
            ("the job", f"about {forecast.images_per_s:,.1f} images/s, limited by {forecast.limit}"),
            ("done in", f"about {format_duration(forecast.seconds)}, {measured.load_s:.0f} s of it start-up"),
            (
                "GPU-hours",
                f"{forecast.gpu_hours:,.2f}" if forecast.cpus_per_gpu is not None else "none: the actors have no GPU",
            ),
        ]
        if forecast.cpus_per_gpu is not None:
            pairs.append(("CPUs per GPU", f"{forecast.cpus_per_gpu:,.1f} decode as fast as one GPU predicts"))
        if measured.gpu_bytes:
            pairs.append(("GPU memory", f"{measured.gpu_bytes / (1 << 30):,.1f} GiB of one actor"))
        print_pairs("forecast", pairs)
    failed = sum(check.state == "FAIL" for check in preflight.checks)
    warned = sum(check.state == "WARN" for check in preflight.checks)
    console.print(
        f"{'FAIL' if failed else 'OK'}: {format_count(len(preflight.checks), 'check')}, {failed} failed, {format_count(warned, 'warning')}"
    )


def print_rows(output: str) -> None:
    """Print every prediction and every error of a small local output on stdout.

    Args:
        output: Path of a finished output folder.
    """
    from pathlib import PurePosixPath

    from batch_inference.output.manifest import read_parquet

    console = Console(highlight=False)
    tables = {}
    for folder in ("predictions", "errors"):
        files = Path(output, folder).glob("*.parquet")
        rows = [row for file in files for row in read_parquet(file.read_bytes()).to_pylist()]
        tables[folder] = sorted(rows, key=lambda row: row["uri"])
    good = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("image", "label", "confidence"):
        good.add_column(name, justify="right" if name == "confidence" else "left", overflow="fold")
    for row in tables["predictions"]:
        name, label = (escape(printable(text)) for text in (PurePosixPath(row["uri"]).name, row["label"]))
        good.add_row(name, label, f"{100 * row['confidence']:.1f} %")
    bad = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("failed image", "stage", "type", "reason"):
        bad.add_column(name, overflow="fold")
    for row in tables["errors"]:
        name, message = (escape(printable(text)) for text in (PurePosixPath(row["uri"]).name, row["message"]))
        bad.add_row(name, row["stage"], row["error_type"], message)
    console.print(good)
    console.print()
    console.print(bad)
    console.print()
