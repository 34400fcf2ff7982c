"""The report for people: everything about a job in one HTML file that asks nobody for anything.

Made from the output's files alone, so at any time, of any job: finished, failed, or under way. It is bounded in size however large the
job is, and no part of the job's outcome: what of it can't be made is said in it, and a report that can't be made at all costs a warning.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa

from batch_inference import census, failures, history, page
from batch_inference.apart import REPORT
from batch_inference.collection import Tally
from batch_inference.config import JobConfig
from batch_inference.errors import BatchInferenceError
from batch_inference.ledger import Commit, Job, Ledger
from batch_inference.status import Outcome, outcome
from batch_inference.storage import Store, display
from batch_inference.thumbnails import Thumbnail, thumbnails


@dataclass(frozen=True)
class Report:
    """What a report was made of.

    Attributes:
        uri: Where it is.
        state: ``succeeded``, ``failed``, ``unfinished`` or ``planned``.
        rows: Inputs.
        predictions: Committed predictions.
        errors: Committed errors.
        bytes: Size of the file.
        notes: What could not be shown, and why.
    """

    uri: str
    state: str
    rows: int
    predictions: int
    errors: int
    bytes: int
    notes: tuple[str, ...] = ()


@dataclass
class Facts:
    """What a report shows.

    Attributes:
        output: The output's location.
        job: What ``_job.json`` says.
        config: Its configuration, with what changes no row as it is now.
        state: See :class:`Report`.
        failed: What ``_FAILED`` says.
        verdict: Of a job that succeeded: that more rows failed than ``errors.max_percent``, "" where they did not.
        commits: The commits that count.
        tally: Their counts.
        spent: The attempts.
        done: When how many rows were done.
        census: What the predictions add up to; None where they can't be read.
        failures: Failed rows of each kind.
        pictures: Pictures of samples by shard and row.
        notes: What can't be shown, and why.
        made_at: When the report was made.
    """

    output: str
    job: Job
    config: JobConfig
    state: str
    failed: dict[str, Any]
    commits: list[Commit]
    tally: Tally
    spent: list[history.Spent] = field(default_factory=list)
    done: list[tuple[float, int]] = field(default_factory=list)
    census: census.Census | None = None
    failures: list[failures.Kind] = field(default_factory=list)
    pictures: dict[tuple[int, int], Thumbnail] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    verdict: str = ""
    made_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))


def make(
    output: str,
    config: JobConfig,
    *,
    read_s: float = math.inf,
    images_s: float = 120.0,
    commits: list[Commit] | None = None,
) -> Report:
    """Makes the report of an output, and writes it there.

    Args:
        output: The output folder.
        config: How to reach it, and ``report``.
        read_s: Seconds after which no more predictions are read.
        images_s: Seconds for reading images.
        commits: Those that count, where they are known; else they are read.

    Raises:
        UserError: If there is no job, or access is denied.
        SystemFault: If the store fails.
    """
    store = Store(output, config.storage, must_exist=True)
    facts = gather(store, config, read_s=read_s, images_s=images_s, commits=commits)
    data = page.render(facts).encode("utf-8", "replace")
    store.put(REPORT, data)
    return Report(
        uri=f"{display(store.uri)}/{REPORT}",
        state=facts.state,
        rows=facts.job.rows,
        predictions=facts.tally.predictions,
        errors=facts.tally.errors,
        bytes=len(data),
        notes=tuple(facts.notes),
    )


def gather(
    store: Store, config: JobConfig, *, read_s: float, images_s: float, commits: list[Commit] | None = None
) -> Facts:
    """Reads what a report shows; see :func:`make`."""
    ledger = Ledger(store)
    job = ledger.require_job()
    notes: list[str] = []
    if commits is None:
        commits = []
        with _noting(notes, "the ledger can't be read whole, so that nothing is counted"):
            commits = ledger.commits()
    tally = Tally()
    tally.add_commits(commits)
    found = Outcome("unfinished" if commits else "planned", "", {})
    with contextlib.suppress(BatchInferenceError):
        found = outcome(ledger, job, tally, config.errors)
    facts = Facts(
        output=display(store.uri),
        job=job,
        config=config,
        state=found.state,
        failed=found.failed,
        verdict=found.verdict,
        commits=commits,
        tally=tally,
        notes=notes,
    )
    with _noting(notes, "how long it took can't be shown"):
        facts.spent = history.attempts(store)
        facts.done = history.done_at(ledger, commits)
    most = config.report.thumbnails
    with _noting(notes, "the predictions can't be read"):
        facts.census = census.take(
            store,
            commits,
            most=most,
            passthrough=job.passthrough,
            deadline=time.monotonic() + read_s,
        )
    with _noting(notes, "the failed rows can't be read"):
        facts.failures = failures.examples(store, commits, tally.errors_by, most)
    with _noting(notes, "the images can't be shown"):
        facts.pictures = thumbnails(
            store,
            _with_input_of(job, config),
            _wanted(facts, most),
            read=most > 0,
            deadline=time.monotonic() + images_s,
        )
    return facts


def _wanted(facts: Facts, most: int) -> Iterable[tuple[int, int]]:
    if facts.census is not None:
        for sample in (*facts.census.highest, *facts.census.lowest, *facts.census.some):
            yield sample.shard, sample.row
    for one in failures.wall(facts.failures, most):
        # What could not be read will not be read now; what failed later can be looked at.
        if one.stage in ("infer", "postprocess", "write"):
            yield one.shard, one.row


def _with_input_of(job: Job, config: JobConfig) -> JobConfig:
    """The configuration with the job's own rules for where inputs may lie, whatever is given now."""
    with contextlib.suppress(ValueError):
        return config.model_copy(update={"input": JobConfig.model_validate(job.config).input})
    return config


@contextlib.contextmanager
def _noting(notes: list[str], what: str) -> Any:
    """Turns what goes wrong with a part of the report into a note in it."""
    try:
        yield
    except (BatchInferenceError, OSError, ValueError, KeyError, IndexError, TypeError, pa.ArrowException) as exc:
        notes.append(f"{what}: {getattr(exc, 'message', None) or f'{type(exc).__name__}: {exc}'}")
