"""What a person sees: a live table on a terminal, a line now and then elsewhere, and the verdict."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import structlog
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batch_inference.capacity import Capacity, Size
from batch_inference.collection import Tally, describe_errors
from batch_inference.driver import RunResult
from batch_inference.errors import BatchInferenceError
from batch_inference.planner import Cost, Plan
from batch_inference.progress import Snapshot, duration
from batch_inference.storage import display
from batch_inference.terminal import plain
from batch_inference.wording import count_of, describe_skipped

if TYPE_CHECKING:
    from batch_inference.comparison import Comparison
    from batch_inference.preflight import Preflight
    from batch_inference.status import Status

log = structlog.get_logger()

_LINE_EVERY_S = 10.0
_WARN = "yellow"
_PHASES = {
    "plan": "listing the inputs",
    "start": "starting Ray and the model",
    "preflight": "trying one actor",
    "run": "working",
    "finish": "recounting",
    "done": "done",
}


def rate_text(rate: float | None) -> str:
    """Images a second for people; a short run has none worth printing."""
    return "?" if rate is None else f"{rate:,.1f}"


class Display:
    """Follows a run; a context manager whose :meth:`update` is the run's ``on_progress``."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._shown: tuple[Snapshot, list[Text | ProgressBar | Table]] | None = None
        self._began, self._elapsed_s = time.monotonic(), 0.0
        self._console = Console(stderr=True)
        self._live = (
            None
            if quiet or not self._console.is_terminal
            # Drawn by the clock: while Ray and the model start, nothing else moves.
            else Live(console=self._console, get_renderable=self._now, refresh_per_second=4, transient=True)
        )
        self._quiet = quiet
        self._phase = ""
        self._line_at = 0.0

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, snapshot: Snapshot) -> None:
        """Shows where the run stands; cheap enough for every batch."""
        if self._live:
            if snapshot.elapsed_s != self._elapsed_s:  # a snapshot from afar may come again as it was
                self._elapsed_s, self._began = snapshot.elapsed_s, time.monotonic() - snapshot.elapsed_s
            self._shown = (snapshot, list(_parts(snapshot)))
        elif not self._quiet:
            self._line(snapshot)

    def _line(self, snapshot: Snapshot) -> None:
        moment = time.monotonic()
        if snapshot.phase == self._phase and moment - self._line_at < _LINE_EVERY_S:
            return
        if snapshot.phase == "run":
            log.info(
                "progress",
                rows=f"{snapshot.tally.rows}/{snapshot.rows_total}",
                shards=f"{snapshot.shards_done}/{snapshot.shards_total}",
                errors=snapshot.tally.errors,
                images_per_s=rate_text(snapshot.images_per_s),
                eta=duration(snapshot.eta_s),
            )
        elif snapshot.phase != self._phase:
            log.info(_PHASES[snapshot.phase])
        self._phase = snapshot.phase
        self._line_at = moment

    def _now(self) -> Table:
        """Called in a thread of its own, while the run goes on: only time is read here."""
        grid = Table.grid()
        if self._shown is not None:
            snapshot, parts = self._shown
            moments = [f"running for {duration(time.monotonic() - self._began)}"]
            if snapshot.phase == "run" and snapshot.eta_s is not None:
                moments.append(f"ETA {duration(snapshot.eta_s)}")
            grid.add_row(Text.assemble((_PHASES[snapshot.phase], "bold"), f"   {', '.join(moments)}"))
            for part in parts:
                grid.add_row(part)  # a bar by itself does not end its line
        return grid


def _parts(snapshot: Snapshot) -> Iterator[Text | ProgressBar | Table]:
    """What is known so far, from top to bottom."""
    tally = snapshot.tally
    if snapshot.rows_total:
        yield ProgressBar(total=snapshot.rows_total, completed=tally.rows, width=76)
        counts = [f"{tally.rows:,} of {count_of(snapshot.rows_total, 'row')}", count_of(tally.errors, "error")]
        if snapshot.images_per_s is not None:
            counts.insert(1, f"{rate_text(snapshot.images_per_s)} images/s")
        yield Text("   ".join(counts))
    if tally.seen:
        yield _stages(tally)
    if snapshot.shards_total:
        yield Text(f"{snapshot.shards_done:,} of {count_of(snapshot.shards_total, 'shard')} committed", style="dim")
    if snapshot.dashboard:
        yield Text(f"dashboard {snapshot.dashboard}", style="dim")


def _stages(tally: Tally) -> Table:
    """Where the time goes, and what failed where."""
    stages = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("stage", "ms an image", "share", "errors"):
        stages.add_column(name, justify="left" if name == "stage" else "right", style="dim" if name == "stage" else "")
    seconds = {"fetch": tally.fetch_s, "decode": tally.decode_s, "infer": tally.infer_s}
    total = sum(seconds.values()) or 1.0
    for stage, spent in seconds.items():
        failed = sum(tally.errors_by.get(stage, {}).values())
        stages.add_row(stage, f"{1000 * spent / tally.seen:.1f}", f"{100 * spent / total:.0f} %", f"{failed:,}")
    return stages


def verdict_of(result: RunResult) -> list[str]:
    """The five lines that end a good run: what happened, errors, speed, what next, where the output is."""
    where = display(result.output)
    if result.already_done:
        first = f"{_success(result)}: this job was done already; {_counts(result)}; nothing was run"
        speed = (
            f"speed: answered in {result.elapsed_s:.1f} s; inputs that have come since are not in it: choose another --output for a run "
            f"anew, or delete {where}"
        )
    else:
        first = f"{_success(result)}: {_counts(result)}"
        speed = (
            f"speed: {result.elapsed_s:.1f} s in all, "
            + (f"{result.images_per_s:,.1f} images/s without start-up, " if result.images_per_s is not None else "")
            + count_of(result.shards, "shard")
            + (f". {result.balance}" if result.balance else "")
        )
    kinds = describe_errors(result.errors_by)
    more = f", and {len(kinds) - 5} more kinds" if len(kinds) > 5 else ""
    return [
        first,
        "errors: " + (", ".join(kinds[:5]) + more + f" (see {where}/errors)" if kinds else "none"),
        speed,
        f'next: batch-inference verify {where}; or pandas.read_parquet("{where}/predictions")',
        f"output: {where} (fingerprint {result.fingerprint[:12]}, report {result.report or where + '/_report/summary.json'})",
    ]


def _counts(result: RunResult) -> str:
    limit = result.excess.partition(", ")[2]
    return (
        f"{result.rows:,} of {count_of(result.rows, 'image')} accounted for, {count_of(result.predictions, 'prediction')} and "
        f"{count_of(result.errors, 'error')}" + (f", {limit}" if limit else "")
    )


def _success(result: RunResult) -> str:
    return "SUCCEEDED" + (f" WITH {result.excess.partition(', ')[0].upper()}" if result.excess else "")


def verdict_of_failure(exc: BatchInferenceError, output: str, snapshot: Snapshot) -> list[str]:
    """The five lines that end a run that failed or was stopped."""
    tally = snapshot.tally
    head = "INTERRUPTED" if exc.exit_code == 130 else "FAILED"
    facts = exc.message.strip().splitlines() or ["no reason given"]
    kinds = describe_errors(tally.errors_by)
    return [
        f"{head} (exit {exc.exit_code}): {facts[0]}" + (" (all of it above)" if len(facts) > 1 else ""),
        f"rows: {tally.rows:,} of {snapshot.rows_total:,} came back, {snapshot.shards_done:,} of {snapshot.shards_total:,} shards "
        f"are committed and stay"
        if snapshot.rows_total
        else "rows: none; nothing was started",
        "errors: " + (", ".join(kinds[:5]) if kinds else "none"),
        f"remedy: {exc.remedy or 'start the same command again'}",
        f"output: {display(output) if output else 'none'}"
        + (f" (report {snapshot.report})" if snapshot.report else ""),
    ]


def show_cursor() -> None:
    """Give a terminal back the cursor that a live display, whose process is gone, has hidden."""
    Console(stderr=True).show_cursor(True)


def print_verdict(lines: list[str]) -> None:
    """Prints the verdict to stdout, after everything that is on its way to stderr."""
    sys.stderr.flush()
    # A terminal's lines end between words; what goes elsewhere stays whole.
    console = Console(highlight=False)
    console.soft_wrap = not console.is_terminal
    for place, line in enumerate(lines):
        style = "" if place else "green" if line.startswith("SUCCEEDED:") else _WARN if "SUCCEEDED" in line else "red"
        console.print(Text(plain(line), style=style))


def print_pairs(title: str, pairs: list[tuple[str, str]]) -> None:
    """A small two-column table on stdout."""
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
        table.add_row(escape(plain(name)), escape(plain(value)))
    return table


def print_status(found: Status) -> None:
    """Prints where a job stands on stdout."""
    print_pairs(found.state, _status(found))


def watch_status(read: Callable[[], Status], every_s: float) -> None:
    """Prints where a job stands until it has ended or someone interrupts: in place on a terminal, else a line each time."""
    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:
        while True:
            found = read()
            if live:
                live.update(_pairs(found.state, _status(found)), refresh=True)
            else:
                rows = found.predictions + found.errors
                eta = "-" if found.state == "succeeded" else duration(found.eta_s)
                print(f"{found.state}: {rows:,} of {found.rows:,} rows, {found.errors:,} errors, ETA {eta}", flush=True)
            if found.ended:
                return
            time.sleep(every_s)


def _status(found: Status) -> list[tuple[str, str]]:
    done = found.predictions + found.errors
    finished = found.state == "succeeded" or done == found.rows
    rate = (
        f"{found.images_per_s:,.1f} images/s" if found.images_per_s is not None else "unknown before the second commit"
    )
    going = [("rate", rate)] if found.images_per_s is not None or not finished else []
    if not finished:
        going.append(("ETA", duration(found.eta_s)))
    return [
        (
            "rows",
            f"{done:,} of {found.rows:,} ({100 * done / max(1, found.rows):.1f} %): "
            f"{found.predictions:,} predictions, {found.errors:,} errors",
        ),
        (
            "shards",
            f"{found.shards_done:,} of {found.shards:,} committed, by {count_of(len(found.attempts), 'attempt')}",
        ),
        ("errors", ", ".join(describe_errors(found.errors_by)[:8]) or "none"),
        *going,
        ("last commit", "none" if found.last_commit_age_s is None else f"{duration(found.last_commit_age_s)} ago"),
        *([("verdict", found.verdict)] if found.verdict else []),
        *([("balance", found.balance)] if found.balance else []),
        ("fingerprint", found.fingerprint[:12]),
    ]


def print_comparison(found: Comparison, *, quiet: bool = False) -> None:
    """Prints what changed between two outputs on stdout; with ``quiet`` one line."""
    if quiet:
        changed = f"{found.changed:,} changed ({found.changed_percent:.2f} %)"
        print(f"{found.column}: {found.same:,} same, {changed}, {found.newly_failed:,} now failed")
        return
    pairs = [
        ("same", f"{found.same:,}"),
        ("changed", f"{found.changed:,} ({found.changed_percent:.2f} % of those predicted in both)"),
        ("now failed", f"{found.newly_failed:,}"),
        ("now predicted", f"{found.newly_predicted:,} that had failed"),
        ("inputs apart", f"{found.only_before:,} only in the first, {found.only_after:,} only in the second"),
    ]
    if found.confidence:
        pairs.append(("confidence", f"mean {found.confidence[0]:.4f}, then {found.confidence[1]:.4f}"))
    if found.changes:
        pairs.append(("most often", "\n".join(f"{rows:,} {one} → {other}" for one, other, rows in found.changes[:10])))
        pairs.append(("such as", "\n".join(f"{e.uri}: {e.before} → {e.after}" for e in found.examples[:5])))
    print_pairs(f"{found.column}", pairs)


def print_plan(found: Plan, *, for_chart: bool, cost: Cost | None = None) -> None:
    """Prints a plan on stdout; where values of the chart are given, its pods take the place of this machine."""
    notes = [("left out", what) for what in describe_skipped(found.skipped)[:8]]
    notes += [("can't be read", str(kind)) for kind in found.unreadable]
    notes += [("note", note) for note in found.notes]
    if found.duplicates:
        notes.append(("duplicates", f"{found.duplicates:,} inputs listed more than once, done once"))
    if found.repeated:
        notes.append(("repeated", f"{found.repeated:,} manifest lines share their URI with another; each gets its row"))
    if found.passthrough:
        notes.append(("passthrough", ", ".join(found.passthrough)))
    if for_chart:
        where = _pods(found.kubernetes)
    else:
        where = [
            ("this machine", f"{found.available['cpus']:g} CPUs, {found.available['gpus']:g} GPUs"),
            *[("does not fit", problem) for problem in found.problems],
            ("on Kubernetes", _defaults(found.kubernetes)),
        ]
    print_pairs(
        "plan",
        [
            (
                "inputs",
                f"{count_of(found.inputs, 'image')} in {count_of(found.shards, 'shard')} of {found.shard_size:,}",
            ),
            ("first", "\n".join(found.first)),
            *notes,
            ("runs", ", ".join(f"{k} {v}" for k, v in found.engine.items() if k.startswith(("model.", "predictor.")))),
            (
                "actors",
                f"{found.actors} with {count_of(found.gpus, 'GPU')} in all, {count_of(found.cpus, 'CPU')} with one preparation task",
            ),
            *where,
            *([("cost", _cost(cost))] if cost else []),
        ],
    )


def _cost(cost: Cost) -> str:
    each = f"{count_of(cost.gpus, 'GPU')} at {cost.gpu_hour_price:,.2f} are {cost.per_hour:,.2f} an hour"
    if cost.hours is None or cost.total is None:
        return f"{each}; --images-per-s RATE, which preflight measures, shows the whole"
    time = f"{cost.hours:,.1f} hours" if cost.hours >= 1 else f"{60 * cost.hours:,.1f} minutes"
    whole = f"{time} of images are {cost.gpus * cost.hours:,.2f} GPU-hours and {cost.total:,.2f}"
    return f"{each}; {whole}, start-up not counted"


def _pods(found: Capacity | None) -> list[tuple[str, str]]:
    if found is None:
        return [("on Kubernetes", "joins a Ray cluster that is up; its own pod is the submitter")]
    workers, cpu_workers = found.workers, found.cpu_workers
    count = str(workers.replicas)
    if found.min_workers != workers.replicas:
        count = f"{found.min_workers} to {workers.replicas}, as Ray asks for them"
    lines = [("head", f"1: {_size(found.head)}"), ("workers", f"{count}: {_size(workers)}, {_room(workers)}")]
    if cpu_workers.replicas:
        lines.append(("CPU workers", f"{cpu_workers.replicas}: {_size(cpu_workers)}, {_room(cpu_workers)}"))
    total = (
        f"{count_of(found.total('gpus'), 'GPU')}, {count_of(found.total('cpu_millis') / 1000, 'CPU')}, "
        f"{found.total('memory_mib') / 1024:g} GiB of memory, and the submitter"
    )
    return [*lines, ("in all", total), *[("refused", problem) for problem in found.problems]]


def _size(size: Size) -> str:
    gpus = f"{count_of(size.gpus, 'GPU')}, " if size.gpus else ""
    return (
        f"{gpus}{count_of(size.cpu_millis / 1000, 'CPU')}, {size.memory_mib / 1024:g} GiB of memory with "
        f"{size.object_store_mib:,} MiB of object store"
    )


def _room(size: Size) -> str:
    tasks = count_of(size.tasks, "task")
    return f"room for {count_of(size.actors, 'actor')} and {tasks}" if size.actors else f"room for {tasks}"


def _defaults(found: Capacity | None) -> str:
    if found is None or found.problems:
        return "; ".join(["needs values for the chart", *(found.problems if found else ())])
    return f"{count_of(found.workers.replicas, 'worker')}, each with {_size(found.workers)}; --values FILE shows yours"


def print_preflight(found: Preflight, *, quiet: bool = False) -> None:
    """Prints the checks of a preflight, each failure with its remedy, and the forecast on stdout; with ``quiet`` what is not OK."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    colors = {"OK": "green", "WARN": "yellow", "FAIL": "red"}
    for check in [check for check in found.checks if not quiet or check.state != "OK"]:
        remedy = f"\nremedy: {check.remedy}" if check.remedy else ""
        table.add_row(Text(check.state, style=colors[check.state]), check.name, Text(plain(check.finding + remedy)))
    if table.row_count:
        console.print(table)
    if not quiet:
        console.print()
    if found.measured and found.forecast and not quiet:
        measured, ahead = found.measured, found.forecast
        ms = {name: f"{1000 * getattr(measured, f'{name}_s'):.1f} ms" for name in ("fetch", "decode", "infer")}
        pairs = [
            ("one image", f"fetch {ms['fetch']}, decode {ms['decode']} of one CPU, predict {ms['infer']} of one actor"),
            ("one actor", f"{ahead.actor_images_per_s:,.1f} images/s where it never waits"),
            ("the job", f"about {ahead.images_per_s:,.1f} images/s, limited by {ahead.limit}"),
            ("done in", f"about {duration(ahead.seconds)}, {measured.load_s:.0f} s of it start-up"),
            (
                "GPU-hours",
                f"{ahead.gpu_hours:,.2f}" if ahead.cpus_per_gpu is not None else "none: the actors have no GPU",
            ),
        ]
        if ahead.cpus_per_gpu is not None:
            pairs.append(("CPUs per GPU", f"{ahead.cpus_per_gpu:,.1f} decode as fast as one GPU predicts"))
        if measured.gpu_bytes:
            pairs.append(("GPU memory", f"{measured.gpu_bytes / (1 << 30):,.1f} GiB of one actor"))
        print_pairs("forecast", pairs)
    failed = sum(check.state == "FAIL" for check in found.checks)
    warned = sum(check.state == "WARN" for check in found.checks)
    console.print(
        f"{'FAIL' if failed else 'OK'}: {count_of(len(found.checks), 'check')}, {failed} failed, {count_of(warned, 'warning')}"
    )


def print_rows(output: str) -> None:
    """Prints every prediction and every error of a small local output on stdout.

    Args:
        output: Path of a finished output folder.
    """
    from pathlib import PurePosixPath

    from batch_inference.manifest import read_parquet

    console = Console(highlight=False)
    tables = {}
    for kind in ("predictions", "errors"):
        rows = [
            row for file in Path(output, kind).glob("*.parquet") for row in read_parquet(file.read_bytes()).to_pylist()
        ]
        tables[kind] = sorted(rows, key=lambda row: row["uri"])
    good = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("image", "label", "confidence"):
        good.add_column(name, justify="right" if name == "confidence" else "left", overflow="fold")
    for row in tables["predictions"]:
        name, label = (escape(plain(text)) for text in (PurePosixPath(row["uri"]).name, row["label"]))
        good.add_row(name, label, f"{100 * row['confidence']:.1f} %")
    bad = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("failed image", "stage", "type", "reason"):
        bad.add_column(name, overflow="fold")
    for row in tables["errors"]:
        name, message = (escape(plain(text)) for text in (PurePosixPath(row["uri"]).name, row["message"]))
        bad.add_row(name, row["stage"], row["error_type"], message)
    console.print(good)
    console.print()
    console.print(bad)
    console.print()
