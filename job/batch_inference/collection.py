"""Which rows of which shards have come back, and when a shard is closed."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_inference import causes, manifest
from batch_inference.config import ErrorsConfig
from batch_inference.error_types import remedy_of
from batch_inference.errors import (
    NOT_TRIED,
    PREDICTOR_ERROR_TYPES,
    STORE_ERROR_TYPES,
    SYSTEMIC_ERROR_TYPES,
    BatchInferenceError,
    NoPrediction,
    SystemFault,
    ThresholdExceeded,
    UserError,
)
from batch_inference.ledger import Commit
from batch_inference.tracebacks import with_place

#: How the remedies against too many failed rows begin while no failed row is committed.
START_AGAIN = "Fix the cause and start the same command again"
ERROR_COLUMNS = ("row", "stage", "error_type", "message", "retryable", "traceback")


@dataclass
class Tally:
    """Counts of a job, over all attempts where not said otherwise.

    Attributes:
        rows: Rows that came back or were committed before.
        errors: Those of them that failed.
        errors_by: ``{stage: {error_type: count}}``.
        seen: Rows that came back in this attempt.
        bytes: Bytes fetched in this attempt.
        retries: Requests for inputs that were sent again in this attempt, since they failed or the store asked to slow down.
        fetch_s: Seconds of fetching in this attempt, added up over parallel work; likewise decode_s, infer_s.
    """

    rows: int = 0
    errors: int = 0
    errors_by: dict[str, dict[str, int]] = field(default_factory=dict)
    seen: int = 0
    bytes: int = 0
    retries: int = 0
    fetch_s: float = 0.0
    decode_s: float = 0.0
    infer_s: float = 0.0

    @property
    def predictions(self) -> int:
        """Rows with a prediction."""
        return self.rows - self.errors

    def add_commits(self, commits: Iterable[Commit]) -> None:
        """Adds the rows of shards that are committed."""
        for commit in commits:
            self.rows += commit.rows
            self.add_errors(commit.errors_by)

    def add_errors(self, by: dict[str, dict[str, int]]) -> None:
        """Adds counts by stage and type."""
        for stage, kinds in by.items():
            mine = self.errors_by.setdefault(stage, {})
            for kind, count in kinds.items():
                mine[kind] = mine.get(kind, 0) + count
                self.errors += count

    def remove(self, by: dict[str, dict[str, int]]) -> None:
        """Takes failed rows back that are done again."""
        for stage, kinds in by.items():
            for kind, count in kinds.items():
                self.errors_by[stage][kind] -= count
                self.errors -= count
                self.rows -= count
                if not self.errors_by[stage][kind]:
                    del self.errors_by[stage][kind]
            if not self.errors_by[stage]:
                del self.errors_by[stage]

    @property
    def all_failed(self) -> bool:
        """Whether there are rows, and none of them has a prediction."""
        return self.rows > 0 and not self.predictions

    @property
    def percent(self) -> float:
        """Percentage of the rows that failed."""
        return 100 * self.errors / max(1, self.rows)

    def check(self, limits: ErrorsConfig) -> None:
        """Raise ThresholdExceeded where more rows failed than ``limits`` allow."""
        where = "; ".join(describe_errors(self.errors_by)[:3])
        failed = ("no prediction at all: " if self.all_failed else "") + f"{self.errors:,} of {self.rows:,} rows failed"
        if limits.max_count is not None and self.errors > limits.max_count:
            raise ThresholdExceeded(
                f"{failed}, more than errors.max_count = {limits.max_count:,} ({where})",
                f"{START_AGAIN}, or raise errors.max_count.",
            )
        if self.rows >= limits.min_sample and self._above(limits):
            raise ThresholdExceeded(
                f"{failed} = {self.percent:.1f} %, more than errors.max_percent = {limits.max_percent:g} ({where})",
                f"{START_AGAIN}, or raise errors.max_percent.",
            )

    def excess(self, limits: ErrorsConfig) -> str:
        """Return in words that more rows failed than ``errors.max_percent`` where that does not end the job; "" where they did not."""
        if not self._above(limits):
            return ""
        why = f" (not enforced below errors.min_sample = {limits.min_sample:,} rows)"
        return f"{self.percent:.1f} % errors, more than errors.max_percent = {limits.max_percent:g}" + (
            why if self.rows < limits.min_sample else ""
        )

    def _above(self, limits: ErrorsConfig) -> bool:
        return limits.max_percent is not None and self.percent > limits.max_percent

    @property
    def most_frequent(self) -> tuple[int, str, str]:
        """Count, stage and type of the failures that there are most of."""
        flat = [(count, stage, kind) for stage, kinds in self.errors_by.items() for kind, count in kinds.items()]
        return max(flat, default=(0, "", ""))

    def no_prediction(self, output: str, example: str = "") -> NoPrediction:
        """Return what ends a job in which every row failed.

        Args:
            output: The output folder, as a person types it.
            example: URI and message of a row of the most frequent kind.
        """
        kinds = describe_errors(self.errors_by)
        more = f", and {len(kinds) - 3} more kinds" if len(kinds) > 3 else ""
        count, stage, kind = self.most_frequent
        which = f"{kind} ({count:,}): " if len(kinds) > 1 else ""
        return NoPrediction(
            f"no prediction at all: {all_of(self.rows)} failed ({', '.join(kinds[:3])}{more})"
            + (f", for example {example}" if example else ""),
            f"{which}{remedy_of(stage, kind, output)} Every failed row is in {output}/errors.".lstrip(),
        )


def all_of(rows: int) -> str:
    """Return all rows of a job in words.

    >>> all_of(1), all_of(1200)
    ('the only row', 'all 1,200 rows')
    """
    return "the only row" if rows == 1 else f"all {rows:,} rows"


def describe_errors(by: dict[str, dict[str, int]]) -> list[str]:
    """Errors as short texts, most frequent first: ``decode TRUNCATED 12``."""
    flat = [(count, stage, kind) for stage, kinds in by.items() for kind, count in kinds.items()]
    return [f"{stage} {kind} {count:,}" for count, stage, kind in sorted(flat, key=lambda i: (-i[0], i[1], i[2]))]


def failure_of_all(
    where: str, stage: str, kind: str, message: str, traceback: str | None = None
) -> BatchInferenceError:
    """What ends a job in which everything fails for one reason that is the system's."""
    fact = with_place(f"{where} failed at {stage} with {kind}: {message}", traceback)
    if stage in ("infer", "postprocess"):
        return UserError(
            fact,
            "Fix the predictor, then start the same command again; `batch-inference preflight` with the same options tries it "
            "on a few images.",
        )
    return causes.of_rows(fact, kind, message)


def count_errors(bad: pa.Table) -> dict[str, dict[str, int]]:
    """Failed rows as ``{stage: {error_type: count}}``."""
    by: dict[str, dict[str, int]] = {}
    for (stage, kind), count in Counter(
        zip(bad["stage"].to_pylist(), bad["error_type"].to_pylist(), strict=True)
    ).items():
        by.setdefault(stage, {})[kind] = count
    return by


def by_shard(table: pa.Table) -> list[tuple[int, pa.Table]]:
    """Rows by their ``shard``, in order of the shards; most tables hold one, which is not copied."""
    shards = table["shard"].to_numpy()
    distinct = np.unique(shards).tolist()
    if len(distinct) == 1:
        return [(distinct[0], table)]
    return [(shard, table.filter(pa.array(shards == shard))) for shard in distinct]


@dataclass
class OpenShard:
    """A shard of which rows are still missing.

    Attributes:
        seen: Which rows are there, bool; those that are not to be done are so from the start.
        errors: Tables of failed rows.
        to_do: Number of rows to be done.
        failed: How many of them failed.
        systemic: How many of those for a systemic reason.
        untried: Whether no attempt was made for some.
    """

    seen: np.ndarray
    errors: list[pa.Table] = field(default_factory=list)
    to_do: int = 0
    failed: int = 0
    systemic: int = 0
    untried: bool = False

    @property
    def complete(self) -> bool:
        """Whether every row came back."""
        return bool(self.seen.all())

    def error_table(self) -> pa.Table:
        """All failed rows, columns ``ERROR_COLUMNS``."""
        return pa.concat_tables(self.errors)


class Collector:
    """Takes result rows in any order and tells which shards they complete.

    Shards without a prediction, in which a row failed for a systemic reason, are held back until other rows show that the
    store answers and the predictor works; where none does, the job stops with that one reason instead of writing it once
    for each image. An image that cannot be decoded shows that the store answers, and says nothing of the predictor.

    Of failed rows that run again, nothing is held back: there is an error in their place already, and that the predictor
    fails on them is known.

    Args:
        rows: Number of inputs of each shard that is to be done.
        tally: Counts, updated here.
        chosen: Row numbers to be done, of shards of which these are not all.
        worked: Whether the predictor has worked in an attempt before.
    """

    # So many systemic failures with nothing else between them are not a matter of single images any more.
    WINDOW = 128

    def __init__(
        self, rows: dict[int, int], tally: Tally, chosen: dict[int, np.ndarray] | None = None, *, worked: bool = False
    ) -> None:
        self._rows = rows
        self._chosen = chosen or {}
        self._open: dict[int, OpenShard] = {}
        self._held: dict[int, OpenShard] = {}
        self._given_up: list[int] = []
        # Whether each of the last rows failed of the store, and of those that came to the predictor whether of that.
        self._store: deque[bool] = deque(maxlen=self.WINDOW)
        self._predictor: deque[bool] = deque([False] * worked, maxlen=self.WINDOW)
        self._last: dict[str, tuple[str, str, str, str | None]] = {}
        self.tally = tally

    def add(self, table: pa.Table) -> list[tuple[int, OpenShard]]:
        """Takes rows of ``RESULT_SCHEMA``.

        Returns:
            The shards that are complete now and fit to be committed.

        Raises:
            UserError: If nothing but denied access or a failing predictor came back.
            SystemFault: If nothing but an unreachable store came back, or a row came back twice or has no place.
        """
        failed = pc.is_valid(table["error_type"])
        self._count(table, failed)
        done: list[tuple[int, OpenShard]] = []
        for shard, mine in by_shard(table):
            done += self._add_shard(shard, mine)
        self._judge(table)
        if self._held and self._well:
            done += self._held.items()
            self._held = {}
        return done

    def finish(self) -> None:
        """Checks, when all rows are in, that nothing is left open.

        Raises:
            UserError: If every row of this attempt failed for a systemic reason.
            SystemFault: If that is the store, or rows never came back.
        """
        if self._given_up or (self._held and not self._well):
            raise self._stop()
        if self._open:
            shard, part = next(iter(self._open.items()))
            raise SystemFault(
                f"{len(self._open)} shards did not come back whole, {manifest.shard_name(shard)} has "
                f"{int(part.seen.sum())} of {len(part.seen)} rows",
                "They are not committed; running the same command again does them anew.",
            )

    def _count(self, table: pa.Table, failed: pa.ChunkedArray) -> None:
        tally = self.tally
        tally.rows += table.num_rows
        tally.seen += table.num_rows
        for name in ("bytes", "retries", "fetch_s", "decode_s", "infer_s"):
            setattr(tally, name, getattr(tally, name) + (pc.sum(table[name]).as_py() or 0))
        if table["error_type"].null_count < table.num_rows:
            tally.add_errors(count_errors(table.filter(failed)))

    def _add_shard(self, shard: int, table: pa.Table) -> list[tuple[int, OpenShard]]:
        if shard not in self._open:
            if shard not in self._rows:
                raise SystemFault(
                    f"rows of {manifest.shard_name(shard)} came back, which is complete or was not to be done",
                    "What is committed stands; running the same command again does the rest.",
                )
            to_do = self._rows.pop(shard)
            seen = np.zeros(to_do, bool)
            if shard in self._chosen:
                seen = np.ones(int(self._chosen[shard].max()) + 1, bool)
                seen[self._chosen[shard]] = False
            self._open[shard] = OpenShard(seen, [table.select(list(ERROR_COLUMNS)).slice(0, 0)], to_do)
        part = self._open[shard]
        rows = table["row"].to_numpy()
        if rows.max(initial=0) >= len(part.seen) or part.seen[rows].any() or len(np.unique(rows)) < len(rows):
            # Ray matches the blocks of a task that it runs again by their number, and failures move where one ends.
            raise SystemFault(
                f"a row of {manifest.shard_name(shard)} came back twice or has no place in it",
                "The shard is not committed; running the same command again does it anew.",
            )
        part.seen[rows] = True
        if table["error_type"].null_count < len(rows):
            bad = table.select(list(ERROR_COLUMNS)).filter(pc.is_valid(table["error_type"]))
            kinds = bad["error_type"].to_pylist()
            part.errors.append(bad)
            part.untried |= NOT_TRIED in kinds
            part.failed += len(kinds)
            part.systemic += sum(kind in SYSTEMIC_ERROR_TYPES for kind in kinds)
        if not part.complete:
            return []
        del self._open[shard]
        if part.untried:
            self._given_up.append(shard)
            return []
        if part.systemic and part.failed == part.to_do and shard not in self._chosen:
            self._held[shard] = part
            return []
        return [(shard, part)]

    def _judge(self, table: pa.Table) -> None:
        if table["error_type"].null_count == table.num_rows:
            good = [False] * min(table.num_rows, self.WINDOW)
            self._store.extend(good)
            self._predictor.extend(good)
            return
        kinds, stages = table["error_type"].to_pylist(), table["stage"].to_pylist()
        self._store.extend(kind in STORE_ERROR_TYPES for kind in kinds)
        self._predictor.extend(
            kind in PREDICTOR_ERROR_TYPES
            for kind, stage, shard in zip(kinds, stages, table["shard"].to_pylist(), strict=True)
            if kind is None or (stage in ("infer", "postprocess") and shard not in self._chosen)
        )
        for place, kind in enumerate(kinds):
            if kind in SYSTEMIC_ERROR_TYPES and kind != NOT_TRIED:
                whose = "store" if kind in STORE_ERROR_TYPES else "predictor"
                self._last[whose] = (
                    stages[place],
                    kind,
                    table["message"][place].as_py(),
                    table["traceback"][place].as_py(),
                )
        if self._hopeless:
            raise self._stop()

    @property
    def _well(self) -> bool:
        """Whether the store answers and the predictor works, as far as the last rows tell."""
        return not (all(self._store) or (self._predictor and all(self._predictor)))

    @property
    def _hopeless(self) -> bool:
        return any(self._all_of(last) for last in (self._store, self._predictor))

    def _all_of(self, last: deque[bool]) -> bool:
        return len(last) == self.WINDOW and all(last)

    def _stop(self) -> BatchInferenceError:
        if self._all_of(self._store):
            whose, where = "store", f"every one of the last {self.WINDOW} rows"
        elif self._given_up:
            whose, where = "store", f"every row of {manifest.shard_name(self._given_up[0])}"
        elif self._all_of(self._predictor):
            whose, where = "predictor", f"every one of the last {self.WINDOW} images that came to the predictor"
        elif self._predictor and all(self._predictor):
            whose, where = "predictor", "every image that could be read"
        else:
            whose, where = "store", "everything"
        stage, kind, message, traceback = self._last.get(whose) or ("fetch", "STORE_UNREACHABLE", "", None)
        return failure_of_all(where, stage, kind, message, traceback)
