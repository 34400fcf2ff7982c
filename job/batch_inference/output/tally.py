"""Count rows, predictions and errors, and decide whether a job has too many errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa

from batch_inference.config import ErrorsConfig
from batch_inference.error_types import remedy_of
from batch_inference.errors import BatchInferenceError, ErrorThresholdExceeded, NoPredictionError, UserError
from batch_inference.output.records import Commit, JobRecord
from batch_inference.storage import failures
from batch_inference.telemetry.tracebacks import with_traceback
from batch_inference.text import format_count

#: Beginning of the remedies for too many failed rows.
FIX_AND_START_AGAIN = "Fix the cause and start the same command again"


@dataclass(frozen=True, kw_only=True)
class JobCounts:
    """Counts of a whole job, as its result and its status show them.

    Attributes:
        rows: Inputs of the job.
        predictions: Rows with a prediction.
        errors: Rows with an error.
        errors_by: ``{stage: {error_type: count}}``.
        shards: Number of shards.
    """

    rows: int
    predictions: int
    errors: int
    errors_by: dict[str, dict[str, int]]
    shards: int


@dataclass
class Tally:
    """Counts of a job under way: rows of all attempts, and the work of this attempt.

    Attributes:
        rows: Rows that came back, or were committed before.
        errors: Number of these rows that failed.
        errors_by: ``{stage: {error_type: count}}``.
        seen: Rows that came back in this attempt.
        bytes: Bytes fetched in this attempt.
        retries: Requests for inputs that this attempt sent again, because they failed or the store asked to slow down.
        fetch_s: Seconds of fetching in this attempt, added up over parallel work.
        decode_s: Seconds of decoding, likewise.
        infer_s: Seconds of inference, likewise.
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
        """Number of rows with a prediction."""
        return self.rows - self.errors

    def counts(self, job: JobRecord) -> JobCounts:
        """Return the counts so far as a value; its ``rows`` and ``shards`` are those of the whole job."""
        return JobCounts(
            rows=job.rows,
            predictions=self.predictions,
            errors=self.errors,
            errors_by={stage: dict(types) for stage, types in self.errors_by.items()},
            shards=job.shards,
        )

    def add_commits(self, commits: Iterable[Commit]) -> None:
        """Add the rows of committed shards."""
        for commit in commits:
            self.rows += commit.rows
            self.add_errors(commit.errors_by)

    def add_errors(self, errors_by: dict[str, dict[str, int]]) -> None:
        """Add counts of errors by stage and type."""
        for stage, counts in errors_by.items():
            totals = self.errors_by.setdefault(stage, {})
            for error_type, count in counts.items():
                totals[error_type] = totals.get(error_type, 0) + count
                self.errors += count

    def remove_errors(self, errors_by: dict[str, dict[str, int]]) -> None:
        """Subtract failed rows that are retried."""
        for stage, counts in errors_by.items():
            for error_type, count in counts.items():
                self.errors_by[stage][error_type] -= count
                self.errors -= count
                self.rows -= count
                if not self.errors_by[stage][error_type]:
                    del self.errors_by[stage][error_type]
            if not self.errors_by[stage]:
                del self.errors_by[stage]

    @property
    def all_failed(self) -> bool:
        """Whether there are rows, but no predictions."""
        return self.rows > 0 and not self.predictions

    @property
    def percent(self) -> float:
        """Percentage of rows that failed."""
        return 100 * self.errors / max(1, self.rows)

    def check(self, limits: ErrorsConfig) -> None:
        """Raise ErrorThresholdExceeded if more rows failed than ``limits`` allow."""
        most_frequent = "; ".join(describe_errors(self.errors_by)[:3])
        failed = ("no prediction at all: " if self.all_failed else "") + f"{self.errors:,} of {self.rows:,} rows failed"
        if limits.max_count is not None and self.errors > limits.max_count:
            raise ErrorThresholdExceeded(
                f"{failed}, more than errors.max_count = {limits.max_count:,} ({most_frequent})",
                f"{FIX_AND_START_AGAIN}, or raise errors.max_count.",
            )
        if self.rows >= limits.min_rows and self._above(limits):
            raise ErrorThresholdExceeded(
                f"{failed} = {self.percent:.1f} %, more than errors.max_percent = {limits.max_percent:g} ({most_frequent})",
                f"{FIX_AND_START_AGAIN}, or raise errors.max_percent.",
            )

    def excess(self, limits: ErrorsConfig) -> str:
        """Return in words that more rows failed than ``errors.max_percent``, if that does not end the job; else ""."""
        if not self._above(limits):
            return ""
        unenforced = f" (not enforced below errors.min_rows = {limits.min_rows:,} rows)"
        return f"{self.percent:.1f} % errors, more than errors.max_percent = {limits.max_percent:g}" + (
            unenforced if self.rows < limits.min_rows else ""
        )

    def _above(self, limits: ErrorsConfig) -> bool:
        return limits.max_percent is not None and self.percent > limits.max_percent

    @property
    def most_frequent(self) -> tuple[int, str, str]:
        """Count, stage and type of the most frequent errors."""
        return max(_flat(self.errors_by), default=(0, "", ""))

    def no_prediction(self, output: str, example: str = "") -> NoPredictionError:
        """Return the error that ends a job in which every row failed.

        Args:
            output: The output folder, as a person types it.
            example: URI and message of a row with the most frequent error.
        """
        lines = describe_errors(self.errors_by)
        more = f", and {format_count(len(lines) - 3, 'more kind')}" if len(lines) > 3 else ""
        count, stage, error_type = self.most_frequent
        subject = f"{error_type} ({count:,}): " if len(lines) > 1 else ""
        return NoPredictionError(
            f"no prediction at all: {all_rows(self.rows)} failed ({', '.join(lines[:3])}{more})"
            + (f", for example {example}" if example else ""),
            f"{subject}{remedy_of(stage, error_type, output)} Every failed row is in {output}/errors.".lstrip(),
        )


def all_rows(rows: int) -> str:
    """Return all rows of a job in words.

    >>> all_rows(1), all_rows(1200)
    ('the only row', 'all 1,200 rows')
    """
    return "the only row" if rows == 1 else f"all {rows:,} rows"


def describe_errors(errors_by: dict[str, dict[str, int]]) -> list[str]:
    """Return errors as short texts, most frequent first.

    >>> describe_errors({"decode": {"TRUNCATED": 12}, "fetch": {"NOT_FOUND": 1200}})
    ['fetch NOT_FOUND 1,200', 'decode TRUNCATED 12']
    """
    ordered = sorted(_flat(errors_by), key=lambda error: (-error[0], error[1], error[2]))
    return [f"{stage} {error_type} {count:,}" for count, stage, error_type in ordered]


def _flat(errors_by: dict[str, dict[str, int]]) -> list[tuple[int, str, str]]:
    return [(count, stage, error_type) for stage, counts in errors_by.items() for error_type, count in counts.items()]


def systemic_failure(
    rows: str, stage: str, error_type: str, message: str, traceback: str | None = None
) -> BatchInferenceError:
    """Return the error that ends a job in which everything fails for one reason of the system's.

    Args:
        rows: The rows that failed, in words.
        stage: Stage at which they failed.
        error_type: Their error type.
        message: Their message.
        traceback: Traceback of the predictor, if there is one.
    """
    fact = with_traceback(f"{rows} failed at {stage} with {error_type}: {message}", traceback)
    if stage in ("infer", "postprocess"):
        return UserError(
            fact,
            "Fix the predictor, then start the same command again; `batch-inference preflight` with the same options tries it "
            "on a few images.",
        )
    return failures.error_of_failed_rows(fact, error_type, message)


def count_errors(errors: pa.Table) -> dict[str, dict[str, int]]:
    """Count failed rows as ``{stage: {error_type: count}}``."""
    errors_by: dict[str, dict[str, int]] = {}
    pairs = zip(errors["stage"].to_pylist(), errors["error_type"].to_pylist(), strict=True)
    for (stage, error_type), count in Counter(pairs).items():
        errors_by.setdefault(stage, {})[error_type] = count
    return errors_by
