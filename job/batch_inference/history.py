"""A job over time: how fast it was, and what its attempts took."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone

from batch_inference.errors import BatchInferenceError
from batch_inference.ledger import Commit, Ledger
from batch_inference.storage import Store

FOLDER = "_report/attempts"
_MOST_BINS = 48
# Below this many seconds a rate says more about start-up than about the job.
_LEAST_S = 2.0
# A silence of so much of the time is a pause between attempts, not slowness.
_PAUSE = 0.02
_MOST_ATTEMPTS = 1000
# An attempt writes its record when it starts, and every ten seconds while it works.
_SILENT_S = 120.0


@dataclass(frozen=True)
class Spent:
    """What one attempt took; written to ``_report/attempts/ATTEMPT.json`` while it runs and at its end.

    Attributes:
        attempt: Its identifier.
        state: ``running`` (or killed), ``succeeded``, ``failed``, ``interrupted``.
        started_at: UTC, ISO 8601.
        working_from: When the first rows came back, "" before.
        updated_at: When this was written.
        elapsed_s: Seconds from its start until then.
        working_s: Seconds between the first and the last rows that came back.
        rows: Rows that came back.
        bytes: Bytes fetched.
        retries: Requests that were sent again.
        stage_s: Seconds of fetch, decode and infer, added up over parallel work; and of the driver and its waiting for the store.
        busy: Share of the time in which actors, decoding, fetching and driver were at work, 0 to 1.
        actors: Actors that were asked for.
        gpus: GPUs of all actors; likewise cpus.
        cpus: See gpus.
        limit: What limited it.
        sentence: The same for people.
    """

    attempt: str
    state: str
    started_at: str
    working_from: str
    updated_at: str
    elapsed_s: float
    working_s: float
    rows: int
    bytes: int
    retries: int
    stage_s: dict[str, float]
    busy: dict[str, float]
    actors: int
    gpus: float
    cpus: float
    limit: str = ""
    sentence: str = ""

    @property
    def gpu_hours(self) -> float:
        """Hours for which it had its GPUs, added up."""
        return self.gpus * self.elapsed_s / 3600

    @property
    def busy_gpu_hours(self) -> float:
        """Those of them in which the actors worked."""
        each = self.gpus / self.actors if self.actors else 0.0
        return min(self.gpu_hours, self.stage_s.get("infer", 0.0) * each / 3600)

    def write(self, store: Store) -> None:
        """Writes it, over what it wrote before."""
        store.put(f"{FOLDER}/{self.attempt}.json", json.dumps(asdict(self), indent=1).encode())


def attempts(store: Store) -> list[Spent]:
    """What the attempts took, in order of their starts; records that can't be read are left out."""
    paths = [i.path for i in store.objects(FOLDER) if i.path.endswith(".json")]
    found = []
    for path in paths[:_MOST_ATTEMPTS]:
        try:
            spent = Spent(**json.loads(store.get(path)))
            # A record is read for its numbers and its time; one without them would end the report later.
            (
                _seconds(spent.started_at),
                starts_of([spent]),
                float(spent.elapsed_s),
                int(spent.rows),
                dict(spent.stage_s),
                dict(spent.busy),
            )
        except (ValueError, TypeError, FileNotFoundError, BatchInferenceError):
            continue
        found.append(spent)
    return sorted(found, key=lambda spent: spent.started_at)


def at_work(store: Store) -> float | None:
    """Return the seconds since an attempt that is not known to have ended gave a sign of life; None if there is none of late."""
    if store.get_or_none("_FAILED") is not None:
        return None
    moment = datetime.now(timezone.utc).timestamp()
    ages = [moment - _seconds(one.updated_at) for one in attempts(store) if one.state == "running"]
    return min((max(0.0, age) for age in ages if age < _SILENT_S), default=None)


@dataclass(frozen=True)
class Pace:
    """Rows a second over the time in which the job was worked on.

    Attributes:
        bin_s: Seconds of a bin.
        rates: Rows a second in each.
        pauses: Seconds of working time before each pause (between attempts), which take none themselves.
        total_s: Working time in all.
    """

    bin_s: float
    rates: list[float]
    pauses: list[float] = field(default_factory=list)
    total_s: float = 0.0


def done_at(ledger: Ledger, commits: Iterable[Commit]) -> list[tuple[float, int]]:
    """When how many rows were done: seconds since 1970, and rows, in order of time.

    A commit of a retry counts the rows that succeeded then; the one whose place it took counts the others, at its own time.
    """
    current = {commit.shard: commit for commit in commits}
    chains: dict[int, list[Commit]] = {shard: [commit] for shard, commit in current.items()}
    earlier: dict[int, dict[int, int]] = {}
    if any(commit.generation for commit in current.values()):
        for shard, generation in ledger.places():
            if shard in current and generation < current[shard].generation:
                earlier.setdefault(generation, {})[shard] = generation
    for _, shards in sorted(earlier.items(), reverse=True):
        for commit in ledger.commits(shards):
            chains[commit.shard].insert(0, commit)
    out = []
    for chain in chains.values():
        out.append((_seconds(chain[0].committed_at), chain[0].rows))
        out += [
            (_seconds(after.committed_at), before.errors - after.errors)
            for before, after in itertools.pairwise(chain)
            if before.errors > after.errors
        ]
    return sorted(out)


def pace(done: list[tuple[float, int]], starts: Iterable[float] = ()) -> Pace | None:
    """How fast rows were done; None where that took too short to say.

    Args:
        done: As :func:`done_at` gives it.
        starts: When attempts began, in seconds since 1970, so that their first rows have a time that they took.

    >>> pace([(10.0, 100), (20.0, 300)], [0.0]).rates[0]
    10.0
    """
    if not done:
        return None
    first, last = done[0][0], done[-1][0]
    begun = sorted(start for start in starts if start <= last)
    marks = sorted({time for time, _ in done} | set(begun) | {first})
    limit = _PAUSE * (last - marks[0])
    # Time that passed before an attempt began is a pause, if it is long; the rest is work.
    pauses: list[tuple[float, float]] = []
    for before, after in itertools.pairwise(marks):
        if after in begun and after - before > limit:
            pauses.append((before, after))
    total = last - marks[0] - sum(after - before for before, after in pauses)
    if total < _LEAST_S:
        return None
    count = max(1, min(_MOST_BINS, len(done), int(total)))
    width = total / count
    rows = [0.0] * count
    previous = 0.0
    for moment, number in done:
        # What is committed at one time was done since the commit before it: no bin is empty only since shards are large.
        time = _worked(moment, marks[0], pauses)
        _fill(rows, width, min(previous, time), time, number)
        previous = max(previous, time)
    breaks = [_worked(before, marks[0], pauses) for before, _ in pauses]
    return Pace(width, [number / width for number in rows], breaks, total)


def _fill(rows: list[float], width: float, start: float, end: float, number: int) -> None:
    """Spreads rows evenly over a span of time."""
    if end - start < 1e-9:
        rows[min(len(rows) - 1, int(end / width))] += number
        return
    for place in range(int(start / width), min(len(rows), int(end / width) + 1)):
        overlap = min(end, (place + 1) * width) - max(start, place * width)
        rows[place] += number * max(0.0, overlap) / (end - start)


def _worked(moment: float, origin: float, pauses: list[tuple[float, float]]) -> float:
    """Seconds of work before a moment."""
    return moment - origin - sum(max(0.0, min(moment, after) - before) for before, after in pauses if before < moment)


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def starts_of(spent: Iterable[Spent]) -> list[float]:
    """When attempts began to work, after start-up, in seconds since 1970."""
    return [_seconds(one.working_from) for one in spent if one.working_from]
