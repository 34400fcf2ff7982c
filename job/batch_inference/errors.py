"""Errors: exceptions that end a job, and failures that travel with a row.

A :class:`BatchInferenceError` ends the program with its exit code and without a traceback. A :class:`RowFailure` ends nothing: it
is a value that takes the place of a row's prediction and is written to the errors table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Stage = Literal["list", "fetch", "decode", "preprocess", "infer", "postprocess", "write"]
STAGES: tuple[Stage, ...] = ("list", "fetch", "decode", "preprocess", "infer", "postprocess", "write")

EXIT_USER = 2
EXIT_THRESHOLD = 3
EXIT_ACCOUNTING = 4
EXIT_SYSTEM = 5
EXIT_INTERRUPTED = 130

#: Error type of a row that was not tried, because too many others of its shard had failed with one of the types below.
NOT_TRIED = "NOT_TRIED"
# These error types say more about the system than about the image. A shard with no other outcome is not committed: the job stops
# with one error instead of writing the same error for every image.
STORE_ERROR_TYPES = frozenset(
    {NOT_TRIED, "ACCESS_DENIED", "UNAUTHENTICATED", "REFUSED", "STORE_UNREACHABLE", "TIMEOUT", "THROTTLED"}
)
PREDICTOR_ERROR_TYPES = frozenset({"PREDICTOR_ERROR", "PREDICTOR_CRASH", "OUTPUT_MISMATCH"})
SYSTEMIC_ERROR_TYPES = STORE_ERROR_TYPES | PREDICTOR_ERROR_TYPES


class BatchInferenceError(Exception):
    """Base class of the exceptions that end a job.

    The first sentence of a subclass, "name: meaning (exit code).", is its row in the table of exit codes in docs/reference.md.

    Args:
        message: The fact, with its numbers.
        remedy: One sentence that says what the reader can do about it.
    """

    exit_code = EXIT_SYSTEM

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class UserError(BatchInferenceError):
    """User error: configuration, input, credentials, model or predictor (exit 2)."""

    exit_code = EXIT_USER


class ErrorThresholdExceeded(BatchInferenceError):  # noqa: N818 - named after the fact, as the exit code's table does
    """Error threshold exceeded: more rows failed than ``errors.max_count`` or ``errors.max_percent`` allow, or all did (exit 3)."""

    exit_code = EXIT_THRESHOLD


class NoPredictionError(ErrorThresholdExceeded):
    """No prediction: every row of the job failed (exit 3)."""


class AccountingError(BatchInferenceError):
    """Accounting error: rows are missing or duplicated (exit 4)."""

    exit_code = EXIT_ACCOUNTING


class InfrastructureError(BatchInferenceError):
    """Infrastructure error: the store, the cluster or a disk failed; run the same command again (exit 5)."""

    exit_code = EXIT_SYSTEM


class JobInterruptedError(BatchInferenceError):
    """Interrupted: SIGINT or SIGTERM stopped the job; the same command resumes it (exit 130)."""

    exit_code = EXIT_INTERRUPTED


@dataclass(frozen=True)
class RowFailure:
    """The reason why an input has no prediction.

    Attributes:
        stage: Stage that failed, one of :data:`STAGES`.
        error_type: Machine-readable type in capitals, such as ``TRUNCATED``.
        message: One line for a person.
        retryable: Whether the same input may succeed another time (after a timeout it may, a truncated file will not).
        traceback: Traceback of the predictor class, of bounded length; None for any other failure.
    """

    stage: Stage
    error_type: str
    message: str
    retryable: bool = False
    traceback: str | None = None


class RowError(Exception):
    """The exception that carries a :class:`RowFailure` out of nested calls; never leaves the task that handles the row.

    Args:
        stage: Stage that failed.
        error_type: Type in capitals.
        message: The fact.
        retryable: Whether the same input may succeed another time.
        remedy: Remedy for this case, if that of the error type does not fit. It ends the row's message.
        traceback: Traceback of the predictor class.
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
        # One line, of bounded length: messages of libraries can contain entire documents.
        self.fact = " ".join(message.split())[:500]
        self.remedy = remedy
        text = f"{self.fact}. {remedy}" if remedy else self.fact
        self.error = RowFailure(stage, error_type, text, retryable, traceback)

    def __reduce__(self) -> tuple[Any, ...]:
        error = self.error
        return type(self), (error.stage, error.error_type, self.fact, error.retryable, self.remedy, error.traceback)
