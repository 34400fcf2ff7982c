"""The throughput of a job over time, from the times of its commits and the starts of its attempts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from batch_inference.output.attempts import epoch_seconds
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit

_MAX_BINS = 48
# With less working time, a rate says more about start-up than about the job.
_MIN_WORK_S = 2.0
# A gap before the start of an attempt is a pause if it is longer than this share of the total time.
_MIN_PAUSE_SHARE = 0.02


@dataclass(frozen=True)
class Throughput:
    """Rows per second over the working time of a job.

    Attributes:
        bin_s: Seconds per bin.
        rates: Rows per second in each bin.
        pauses: Positions of the pauses between attempts, in seconds of working time. A pause itself takes no working time.
        work_s: Total working time in seconds.
    """

    bin_s: float
    rates: list[float]
    pauses: list[float] = field(default_factory=list)
    work_s: float = 0.0


def rows_over_time(ledger: Ledger, commits: Iterable[Commit]) -> list[tuple[float, int]]:
    """Return seconds since 1970 and the number of rows that were done at that time, in order of time.

    The commit of a retry counts the rows that succeeded in the retry. The commit that it replaced counts the other rows, at its time.
    """
    current = {commit.shard: commit for commit in commits}
    chains: dict[int, list[Commit]] = {shard: [commit] for shard, commit in current.items()}
    earlier: dict[int, dict[int, int]] = {}
    if any(commit.generation for commit in current.values()):
        for shard, generation in ledger.commit_keys():
            if shard in current and generation < current[shard].generation:
                earlier.setdefault(generation, {})[shard] = generation
    for _, shards in sorted(earlier.items(), reverse=True):
        for commit in ledger.commits(shards):
            chains[commit.shard].insert(0, commit)
    done = []
    for chain in chains.values():
        done.append((epoch_seconds(chain[0].committed_at), chain[0].rows))
        done += [
            (epoch_seconds(after.committed_at), before.errors - after.errors)
            for before, after in itertools.pairwise(chain)
            if before.errors > after.errors
        ]
    return sorted(done)


def measure_throughput(done: list[tuple[float, int]], starts: Iterable[float] = ()) -> Throughput | None:
    """Return the throughput over time; None if the job was too short to tell.

    Args:
        done: Times and rows of :func:`rows_over_time`.
        starts: Starts of attempts in seconds since 1970. The first rows of an attempt were done since its start.

    >>> measure_throughput([(10.0, 100), (20.0, 300)], [0.0]).rates[0]
    10.0
    """
    if not done:
        return None
    first, last = done[0][0], done[-1][0]
    attempt_starts = sorted(start for start in starts if start <= last)
    times = sorted({time for time, _ in done} | set(attempt_starts) | {first})
    min_pause = _MIN_PAUSE_SHARE * (last - times[0])
    # A long time without commits before an attempt started is a pause; all other time is work.
    pauses: list[tuple[float, float]] = []
    for before, after in itertools.pairwise(times):
        if after in attempt_starts and after - before > min_pause:
            pauses.append((before, after))
    work_s = last - times[0] - sum(after - before for before, after in pauses)
    if work_s < _MIN_WORK_S:
        return None
    count = max(1, min(_MAX_BINS, len(done), int(work_s)))
    width = work_s / count
    rows_per_bin = [0.0] * count
    previous = 0.0
    for time, rows in done:
        # The rows of a commit were done since the previous commit: no bin is empty just because shards are large.
        end = _work_seconds(time, times[0], pauses)
        _spread_rows(rows_per_bin, width, min(previous, end), end, rows)
        previous = max(previous, end)
    pause_positions = [_work_seconds(before, times[0], pauses) for before, _ in pauses]
    return Throughput(width, [rows / width for rows in rows_per_bin], pause_positions, work_s)


def _spread_rows(rows_per_bin: list[float], width: float, start: float, end: float, rows: int) -> None:
    """Add rows to the bins, evenly between two times."""
    if end - start < 1e-9:
        rows_per_bin[min(len(rows_per_bin) - 1, int(end / width))] += rows
        return
    for index in range(int(start / width), min(len(rows_per_bin), int(end / width) + 1)):
        overlap = min(end, (index + 1) * width) - max(start, index * width)
        rows_per_bin[index] += rows * max(0.0, overlap) / (end - start)


def _work_seconds(time: float, origin: float, pauses: list[tuple[float, float]]) -> float:
    """Return the working time from ``origin`` to a time."""
    return time - origin - sum(max(0.0, min(time, after) - before) for before, after in pauses if before < time)
