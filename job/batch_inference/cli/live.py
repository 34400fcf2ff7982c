"""Displays of a running job: bars on a terminal, log lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batch_inference.cli.tables import log, rate_text
from batch_inference.driver.progress import Phase, Progress
from batch_inference.output.tally import Tally
from batch_inference.text import format_count, format_duration

_LINE_EVERY_S = 10.0
_BAR_WIDTH = 76
_PHASE_TEXTS = {
    Phase.PLAN: "listing the inputs",
    Phase.START: "starting Ray and the model",
    Phase.PREFLIGHT: "trying one actor",
    Phase.RUN: "working",
    Phase.FINISH: "recounting",
    Phase.DONE: "done",
}


class LiveDisplay:
    """Shows the progress of a run; a context manager whose :meth:`update` is the run's ``on_progress``."""

    def __init__(self, *, quiet: bool = False) -> None:
        console = Console(stderr=True)
        self._display: _Display = _Nothing() if quiet else _Bars(console) if console.is_terminal else _Lines()

    def __enter__(self) -> LiveDisplay:
        self._display.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._display.stop()

    def update(self, progress: Progress) -> None:
        """Show the progress; cheap enough for every block of rows."""
        self._display.update(progress)


class _Display(Protocol):
    def start(self) -> None: ...

    def update(self, progress: Progress) -> None: ...

    def stop(self) -> None: ...


class _Nothing:
    """Shows nothing."""

    def start(self) -> None:
        pass

    def update(self, progress: Progress) -> None:
        pass

    def stop(self) -> None:
        pass


class _Lines(_Nothing):
    """Logs a line at each change of phase, and every ten seconds while rows come back."""

    def __init__(self) -> None:
        self._phase: Phase | None = None
        self._logged = 0.0

    def update(self, progress: Progress) -> None:
        moment = time.monotonic()
        if progress.phase == self._phase and moment - self._logged < _LINE_EVERY_S:
            return
        if progress.phase == Phase.RUN:
            log.info(
                "progress",
                rows=f"{progress.tally.rows}/{progress.rows_total}",
                shards=f"{progress.shards_done}/{progress.shards_total}",
                errors=progress.tally.errors,
                images_per_s=rate_text(progress.images_per_s),
                eta=format_duration(progress.eta_s),
            )
        elif progress.phase != self._phase:
            log.info(_PHASE_TEXTS[progress.phase])
        self._phase = progress.phase
        self._logged = moment


class _Bars:
    """Draws bars and counts on a terminal."""

    def __init__(self, console: Console) -> None:
        self._latest: tuple[Progress, list[Text | ProgressBar | Table]] | None = None
        self._started, self._elapsed_s = time.monotonic(), 0.0
        # Drawn by the clock: while Ray and the model start, nothing else moves.
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def start(self) -> None:
        self._live.start()

    def update(self, progress: Progress) -> None:
        # Progress that comes from a cluster may be the same as before.
        if progress.elapsed_s != self._elapsed_s:
            self._elapsed_s, self._started = progress.elapsed_s, time.monotonic() - progress.elapsed_s
        self._latest = (progress, list(_parts(progress)))

    def stop(self) -> None:
        self._live.stop()

    def _render(self) -> Table:
        """Return what to draw. Rich calls it in a thread of its own while the run goes on, so it reads only the time."""
        grid = Table.grid()
        if self._latest is not None:
            progress, parts = self._latest
            times = [f"running for {format_duration(time.monotonic() - self._started)}"]
            if progress.phase == Phase.RUN and progress.eta_s is not None:
                times.append(f"ETA {format_duration(progress.eta_s)}")
            grid.add_row(Text.assemble((_PHASE_TEXTS[progress.phase], "bold"), f"   {', '.join(times)}"))
            for part in parts:
                grid.add_row(part)  # a bar by itself does not end its line
        return grid


def _parts(progress: Progress) -> Iterator[Text | ProgressBar | Table]:
    """Yield the parts of the display below its first line, as far as they are known."""
    tally = progress.tally
    if progress.rows_total:
        yield ProgressBar(total=progress.rows_total, completed=tally.rows, width=_BAR_WIDTH)
        counts = [f"{tally.rows:,} of {format_count(progress.rows_total, 'row')}", format_count(tally.errors, "error")]
        if progress.images_per_s is not None:
            counts.insert(1, f"{rate_text(progress.images_per_s)} images/s")
        yield Text("   ".join(counts))
    if tally.seen:
        yield _stages(tally)
    if progress.shards_total:
        yield Text(f"{progress.shards_done:,} of {format_count(progress.shards_total, 'shard')} committed", style="dim")
    if progress.dashboard:
        yield Text(f"dashboard {progress.dashboard}", style="dim")


def _stages(tally: Tally) -> Table:
    """Return a table of each stage's time and errors."""
    stages = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for name in ("stage", "ms an image", "share", "errors"):
        stages.add_column(name, justify="left" if name == "stage" else "right", style="dim" if name == "stage" else "")
    seconds = {"fetch": tally.fetch_s, "decode": tally.decode_s, "infer": tally.infer_s}
    total = sum(seconds.values()) or 1.0
    for stage, spent in seconds.items():
        errors = sum(tally.errors_by.get(stage, {}).values())
        stages.add_row(stage, f"{1000 * spent / tally.seen:.1f}", f"{100 * spent / total:.0f} %", f"{errors:,}")
    return stages
