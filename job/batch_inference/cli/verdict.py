"""The verdict: the last five lines of every job."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.text import Text

from batch_inference.driver.progress import Progress
from batch_inference.driver.result import RunResult
from batch_inference.errors import BatchInferenceError
from batch_inference.output.tally import describe_errors
from batch_inference.storage.uris import display_uri
from batch_inference.text import format_count, printable

_MAX_ERROR_TYPES = 5


def verdict_of(result: RunResult) -> list[str]:
    """Return the five lines that end a run that succeeded: counts, errors, speed, next commands, output."""
    output = display_uri(result.output)
    if result.already_done:
        first = f"{_success(result)}: this job was done already; {_counts(result)}; nothing was run"
        speed = (
            f"speed: answered in {result.elapsed_s:.1f} s; inputs added since then are not in it: to run again from scratch, "
            f"choose another --output or delete {output}"
        )
    else:
        first = f"{_success(result)}: {_counts(result)}"
        speed = (
            f"speed: {result.elapsed_s:.1f} s in all, "
            + (f"{result.images_per_s:,.1f} images/s without start-up, " if result.images_per_s is not None else "")
            + format_count(result.shards, "shard")
            + (f". {result.balance}" if result.balance else "")
        )
    errors = describe_errors(result.errors_by)
    more = f", and {len(errors) - _MAX_ERROR_TYPES} more kinds" if len(errors) > _MAX_ERROR_TYPES else ""
    return [
        first,
        "errors: " + (", ".join(errors[:_MAX_ERROR_TYPES]) + more + f" (see {output}/errors)" if errors else "none"),
        speed,
        f'next: batch-inference verify {output}; or pandas.read_parquet("{output}/predictions")',
        f"output: {output} (fingerprint {result.fingerprint[:12]}, report {result.report or output + '/_report/summary.json'})",
    ]


def verdict_of_failure(exc: BatchInferenceError, output: str, progress: Progress) -> list[str]:
    """Return the five lines that end a run that failed or was stopped."""
    tally = progress.tally
    state = "INTERRUPTED" if exc.exit_code == 130 else "FAILED"
    reason = exc.message.strip().splitlines() or ["no reason given"]
    errors = describe_errors(tally.errors_by)
    return [
        f"{state} (exit {exc.exit_code}): {reason[0]}" + (" (all of it above)" if len(reason) > 1 else ""),
        f"rows: {tally.rows:,} of {progress.rows_total:,} came back, {progress.shards_done:,} of {progress.shards_total:,} shards "
        f"are committed and stay"
        if progress.rows_total
        else "rows: none; nothing was started",
        "errors: " + (", ".join(errors[:_MAX_ERROR_TYPES]) if errors else "none"),
        f"remedy: {exc.remedy or 'start the same command again'}",
        f"output: {display_uri(output) if output else 'none'}"
        + (f" (report {progress.report})" if progress.report else ""),
    ]


def print_verdict(lines: list[str]) -> None:
    """Print the verdict to stdout, after everything that is on its way to stderr."""
    sys.stderr.flush()
    # Lines are broken between words on a terminal, and not at all elsewhere.
    console = Console(highlight=False)
    console.soft_wrap = not console.is_terminal
    for index, line in enumerate(lines):
        style = (
            "" if index else "green" if line.startswith("SUCCEEDED:") else "yellow" if "SUCCEEDED" in line else "red"
        )
        console.print(Text(printable(line), style=style))


def _counts(result: RunResult) -> str:
    exceeded_limit = result.excess.partition(", ")[2]
    return (
        f"{result.rows:,} of {format_count(result.rows, 'image')} accounted for, {format_count(result.predictions, 'prediction')} and "
        f"{format_count(result.errors, 'error')}" + (f", {exceeded_limit}" if exceeded_limit else "")
    )


def _success(result: RunResult) -> str:
    return "SUCCEEDED" + (f" WITH {result.excess.partition(', ')[0].upper()}" if result.excess else "")
