"""Recount a job from its files: every row of the manifest exactly once."""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_inference.config import StorageConfig
from batch_inference.errors import AccountingError
from batch_inference.output import manifest
from batch_inference.output.column_types import plain_type
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit, DataFile, JobRecord
from batch_inference.output.schema import SCHEMA_PATH, OutputSchema, first_schema, open_columns, written_schema
from batch_inference.storage.store import Store
from batch_inference.text import format_count

_PARALLEL_SHARDS = 8
# Problems of a broken output that are named; the rest is counted.
_MAX_PROBLEMS = 100


@dataclass(frozen=True)
class Verification:
    """Result of recounting an output.

    Attributes:
        rows: Inputs in the manifest.
        predictions: Rows in committed files of predictions.
        errors: Rows in committed files of errors.
        shards: Number of shards.
        shards_done: Number of shards with a commit.
        finished: Whether there is a ``_SUCCESS``.
        problems: Everything that is wrong, each line with its shard or file; empty if everything agrees.
        uncommitted: Data files that no commit names.
    """

    rows: int
    predictions: int
    errors: int
    shards: int
    shards_done: int
    finished: bool
    problems: tuple[str, ...] = ()
    uncommitted: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every input of every committed shard is there exactly once, and nothing else is."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``verify --json``."""
        return {**vars(self), "ok": self.ok}


def verify(output: str, storage: StorageConfig | None = None) -> Verification:
    """Read every file of an output and compare it with the manifest, row by row.

    Args:
        output: The output folder.
        storage: Settings of its store.

    Raises:
        UserError: If there is no job.
        InfrastructureError: If the store fails.
    """
    ledger = Ledger(Store(output, storage or StorageConfig(), must_exist=True))
    job = ledger.require_job()
    problems: list[str] = []
    commits = _read_commits(ledger, job, problems)
    columns = _expected_columns(ledger, commits, problems)
    foreign = sorted(set(commits) - set(range(job.shards)))
    problems += [f"{manifest.shard_name(shard)} is committed but not in the manifest" for shard in foreign]
    counts = _recount(ledger, job, commits, columns, problems)
    named = {file.path for commit in commits.values() for file in commit.files}
    uncommitted = [
        info.path
        for folder in ("predictions", "errors")
        for info in ledger.store.objects(folder)
        if info.path not in named
    ]
    success: dict[str, Any] | None = None
    try:
        success = ledger.success_record()
    except AccountingError as exc:
        problems.append(exc.message)
    if success is not None:
        problems += [f"{path} is not committed, but stands among the finished output" for path in uncommitted]
        missing = sorted(set(range(job.shards)) - set(commits))
        problems += [
            f"{manifest.shard_name(shard)} has no commit, although _SUCCESS says that all is done" for shard in missing
        ]
        problems += _check_success(success, job, counts, agree=not problems)
    if len(problems) > _MAX_PROBLEMS:
        problems = [*problems[:_MAX_PROBLEMS], f"and {len(problems) - _MAX_PROBLEMS} more"]
    return Verification(
        rows=job.rows,
        predictions=counts.predictions,
        errors=counts.errors,
        shards=job.shards,
        shards_done=len(commits),
        finished=success is not None,
        problems=tuple(problems),
        uncommitted=tuple(uncommitted),
    )


@dataclass
class _ShardCounts:
    """Rows of one shard, or of all, counted from the files.

    Attributes:
        predictions: Rows in files of predictions.
        errors: Rows in files of errors.
        sha256: Digest of the manifest shard.
        problems: Everything that is wrong.
    """

    predictions: int = 0
    errors: int = 0
    sha256: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _ExpectedColumns:
    """The columns that every file of predictions must have.

    Attributes:
        schema: The columns in plain types; None if there are no predictions.
        source: Object that says so, for messages.
        guessed: Whether a column that a file calls open may have any type, because it is corrected at the end of the
            job.
    """

    schema: pa.Schema | None
    source: str = SCHEMA_PATH
    guessed: bool = False

    def problems(self, file: DataFile, schema: pa.Schema) -> list[str]:
        """Return what is wrong with the columns of a file."""
        if self.schema is None:
            return []
        problems = []
        for column in self.schema:
            index = schema.get_field_index(column.name)
            if index < 0:
                problems.append(f"{file.path} has no column {column.name!r}, which is {column.type} in {self.source}")
                continue
            actual = schema.field(index).type
            if not (self.guessed and column.name in file.open) and not _same_type(actual, column.type):
                problems.append(
                    f"{file.path}: the column {column.name!r} is {actual}, in {self.source} it is {column.type}"
                )
        return problems + [
            f"{file.path} has a column {name!r} ({schema.field(name).type}), which is not in {self.source}"
            for name in schema.names
            if name not in self.schema.names
        ]


def _same_type(a: pa.DataType, b: pa.DataType) -> bool:
    return bool(a == b or plain_type(a) == plain_type(b))


def _read_commits(ledger: Ledger, job: JobRecord, problems: list[str]) -> dict[int, Commit]:
    """Return the commits that count, by shard; add those that are unreadable to the problems."""
    generations = ledger.generations()
    if len(generations) < job.shards and ledger.success_record() is not None:
        ledger.refresh(set(range(job.shards)) - set(generations))
        generations = ledger.generations()
    commits: dict[int, Commit] = {}
    for shard, generation in sorted(generations.items()):
        try:
            commits[shard] = ledger.commits({shard: generation})[0]
        except AccountingError as exc:
            problems.append(exc.message)
    return commits


def _expected_columns(ledger: Ledger, commits: dict[int, Commit], problems: list[str]) -> _ExpectedColumns:
    try:
        output = OutputSchema(ledger.store)
        schema = output.known()
        if schema is not None:
            first = output.first()
            guessed = first is not None and bool(open_columns(first))
            return _ExpectedColumns(written_schema(schema), SCHEMA_PATH, guessed)
    except AccountingError as exc:
        problems.append(exc.message)
    # Outputs of older versions have no schema.
    schema = first_schema(ledger.store, (commits[shard] for shard in sorted(commits)))
    return _ExpectedColumns(schema, "the first file of predictions")


def _recount(
    ledger: Ledger, job: JobRecord, commits: dict[int, Commit], columns: _ExpectedColumns, problems: list[str]
) -> _ShardCounts:
    """Recount all shards; add everything that is wrong to the problems."""

    def check(shard: int) -> _ShardCounts:
        return _check_shard(ledger, shard, commits.get(shard), job.rows_of(shard), columns)

    digest = hashlib.sha256()
    total = _ShardCounts()
    with ThreadPoolExecutor(_PARALLEL_SHARDS) as pool:
        for counts in pool.map(check, range(job.shards)):
            digest.update(bytes.fromhex(counts.sha256))
            problems += counts.problems
            total.predictions += counts.predictions
            total.errors += counts.errors
    if digest.hexdigest() != job.identity.get("manifest.sha256") and not problems:
        problems.append("the manifest's files are not those that the job was planned with (digest differs)")
    return total


def _check_success(success: dict[str, Any], job: JobRecord, counts: _ShardCounts, *, agree: bool) -> list[str]:
    """Return what ``_SUCCESS`` says wrong; its counts are compared only if the files agree with one another."""
    problems = []
    if success.get("fingerprint") != job.fingerprint:
        problems.append(
            f"_SUCCESS belongs to the fingerprint {str(success.get('fingerprint'))[:12]}, the job's is {job.fingerprint[:12]}"
        )
    for key, value in (("predictions", counts.predictions), ("errors", counts.errors)):
        if success.get(key) != value and agree and not problems:
            problems.append(f"_SUCCESS says {success.get(key)} {key}, the files hold {value}")
    return problems


def _check_shard(
    ledger: Ledger, shard: int, commit: Commit | None, expected: int, columns: _ExpectedColumns
) -> _ShardCounts:
    name = manifest.shard_name(shard)
    counts = _ShardCounts(sha256=hashlib.sha256().hexdigest())
    try:
        data = ledger.store.get(manifest.shard_path(shard))
        inputs = manifest.read_parquet(data, ["uri"])
    except (OSError, pa.ArrowException, ValueError) as exc:
        counts.problems.append(f"{manifest.shard_path(shard)} is missing or unreadable ({type(exc).__name__})")
        return counts
    counts.sha256 = hashlib.sha256(data).hexdigest()
    if inputs.num_rows != expected:
        rows = format_count(inputs.num_rows, "row")
        counts.problems.append(f"{manifest.shard_path(shard)} has {rows}, the job says {expected}")
    if commit is None:
        return counts
    seen = np.zeros(inputs.num_rows, np.int64)
    uris = inputs["uri"].to_pylist()
    for file in commit.files:
        table = _read_file(ledger.store, file, counts, columns)
        if table is None:
            continue
        if file.path.startswith("predictions/"):
            counts.predictions += table.num_rows
        else:
            counts.errors += table.num_rows
        _mark_rows(table, shard, uris, seen, file.path, counts)
    for problem, indexes in (
        ("missing", np.flatnonzero(seen == 0)),
        ("there more than once", np.flatnonzero(seen > 1)),
    ):
        if len(indexes):
            first = int(indexes[0])
            are = "is" if len(indexes) == 1 else "are"
            counts.problems.append(
                f"{name}: {len(indexes)} of {format_count(len(seen), 'row')} {are} {problem}, the first is row {first}, {uris[first]}"
            )
    if (counts.predictions, counts.errors) != (commit.predictions, commit.errors) and not counts.problems:
        counts.problems.append(
            f"{name}: its commit says {format_count(commit.predictions, 'prediction')} and {format_count(commit.errors, 'error')}, "
            f"its files hold {counts.predictions} and {counts.errors}"
        )
    return counts


def _read_file(store: Store, file: DataFile, counts: _ShardCounts, columns: _ExpectedColumns) -> pa.Table | None:
    try:
        data = store.get(file.path)
    except FileNotFoundError:
        counts.problems.append(f"{file.path} is committed but missing")
        return None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        counts.problems.append(f"{file.path} is not what was committed (its SHA-256 differs)")
    try:
        table = manifest.read_parquet(data, ["uri", "shard", "row"])
        if file.path.startswith("predictions/"):
            counts.problems += columns.problems(file, pq.read_schema(io.BytesIO(data)))
        return table
    except (pa.ArrowException, OSError, KeyError) as exc:
        counts.problems.append(f"{file.path} can't be read: {' '.join(str(exc).split())[:120]}")
        return None


def _mark_rows(table: pa.Table, shard: int, uris: list[str], seen: np.ndarray, path: str, counts: _ShardCounts) -> None:
    """Count in ``seen`` how often each row of the shard is in a file; note rows that do not belong there."""
    for uri, number, row in zip(*(table[name].to_pylist() for name in ("uri", "shard", "row")), strict=True):
        if number != shard or row is None or not 0 <= row < len(uris):
            counts.problems.append(f"{path}: row {row} of shard {number} does not belong here")
        elif uris[row] != uri:
            counts.problems.append(f"{path}: row {row} is {uri}, the manifest says {uris[row]}")
        else:
            seen[row] += 1
