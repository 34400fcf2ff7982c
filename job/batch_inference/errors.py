"""What can go wrong: exceptions that end a job, and values that travel with a row.

An exception ends the program with its exit code and no traceback. A :class:`RowError` does not: it is a value that takes
the place of a row's prediction and ends in the errors table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal["list", "fetch", "decode", "preprocess", "infer", "postprocess", "write"]
STAGES: tuple[Stage, ...] = ("list", "fetch", "decode", "preprocess", "infer", "postprocess", "write")

EXIT_USER = 2
EXIT_THRESHOLD = 3
EXIT_COUNTS = 4
EXIT_SYSTEM = 5
EXIT_INTERRUPTED = 130


class BatchInferenceError(Exception):
    """Base of everything that ends a job.

    Args:
        message: The fact, with its numbers.
        remedy: What the reader can do about it, one sentence.
    """

    exit_code = EXIT_SYSTEM

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class UserError(BatchInferenceError):
    """The user's to mend: configuration, input, credentials, model (exit 2)."""

    exit_code = EXIT_USER


class ThresholdExceeded(BatchInferenceError):  # noqa: N818 - named after the fact, as the exit code's table does
    """More rows failed than ``errors.max_count`` or ``errors.max_percent`` allow, or all did (exit 3)."""

    exit_code = EXIT_THRESHOLD


class NoPrediction(ThresholdExceeded):
    """Every row of the job failed (exit 3)."""


class CountsDoNotClose(BatchInferenceError):  # noqa: N818
    """Rows are missing or double: manifest, ledger and files disagree (exit 4)."""

    exit_code = EXIT_COUNTS


class SystemFault(BatchInferenceError):  # noqa: N818
    """Store, cluster or disk failed; starting the same command again is worth a try (exit 5)."""

    exit_code = EXIT_SYSTEM


class Interrupted(BatchInferenceError):  # noqa: N818
    """SIGINT or SIGTERM; the same command resumes (exit 130)."""

    exit_code = EXIT_INTERRUPTED


@dataclass(frozen=True)
class RowError:
    """Why one input has no prediction.

    Attributes:
        stage: Where it failed, one of :data:`STAGES`.
        error_type: Machine-readable kind in capitals, such as ``TRUNCATED``.
        message: One line for a person.
        retryable: Whether the same input may well succeed another time (a timeout may, a truncated file does not).
        traceback: Where a predictor class raised, of bounded length; None for anything else.
    """

    stage: Stage
    error_type: str
    message: str
    retryable: bool = False
    traceback: str | None = None


class RowFailure(Exception):  # noqa: N818
    """Carries a :class:`RowError` out of nested calls; never leaves the task that handles the row.

    Args:
        stage: Where it failed.
        error_type: Kind in capitals.
        message: The fact.
        retryable: Whether the same input may well succeed another time.
        remedy: What to do in this case, where the remedy of the error type does not say it; the row's message ends with it.
        traceback: Where a predictor class failed.
    """

    def __init__(
        self,
        stage: Stage,
        error_type: str,
        message: str,
        retryable: bool = False,
        remedy: str = "",
        traceback: str | None = None,
    ) -> None:
        super().__init__(message)
        # One line, of bounded length: messages of libraries can hold whole documents.
        self.fact = " ".join(message.split())[:500]
        self.remedy = remedy
        text = f"{self.fact}. {remedy}" if remedy else self.fact
        self.error = RowError(stage, error_type, text, retryable, traceback)


# A row that no attempt was made for, after too many others of its shard had failed for one of the reasons below.
NOT_TRIED = "NOT_TRIED"
# Error types that say more about the system than about the image. A shard in which nothing but these happened is not
# committed: the job stops with one sentence instead of writing them once for each image.
STORE_ERROR_TYPES = frozenset(
    {NOT_TRIED, "ACCESS_DENIED", "UNAUTHENTICATED", "REFUSED", "STORE_UNREACHABLE", "TIMEOUT", "THROTTLED"}
)
PREDICTOR_ERROR_TYPES = frozenset({"PREDICTOR_ERROR", "PREDICTOR_CRASH", "OUTPUT_MISMATCH"})
SYSTEMIC_ERROR_TYPES = STORE_ERROR_TYPES | PREDICTOR_ERROR_TYPES
