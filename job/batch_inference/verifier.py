"""Recounts a job from its files: every manifest row exactly once."""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batch_inference import manifest
from batch_inference.column_types import plain_type
from batch_inference.config import StorageConfig
from batch_inference.errors import CountsDoNotClose
from batch_inference.ledger import Commit, DataFile, Ledger
from batch_inference.output_schema import SCHEMA, OutputSchema, as_written, first_schema, open_columns
from batch_inference.storage import Store

_PARALLEL_SHARDS = 8
# A broken output names so many problems; the rest is counted.
_MAX_PROBLEMS = 100


@dataclass(frozen=True)
class Verification:
    """What the files of an output add up to.

    Attributes:
        rows: Inputs in the manifest.
        predictions: Rows found in committed prediction files.
        errors: Rows found in committed error files.
        shards: Number of shards.
        shards_done: Those with a commit.
        finished: Whether there is a ``_SUCCESS``.
        problems: What is wrong, each naming shard or file; empty if everything agrees.
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
        """Whether every input of every shard is there exactly once and nothing else is."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """For ``verify --json``."""
        return {**vars(self), "ok": self.ok}


@dataclass
class _Shard:
    rows: int = 0
    predictions: int = 0
    errors: int = 0
    sha256: str = ""
    problems: list[str] = field(default_factory=list)


def verify(output: str, storage: StorageConfig | None = None) -> Verification:
    """Reads every file of an output and compares them with the manifest, row by row.

    Args:
        output: The output folder.
        storage: How to reach it.

    Raises:
        UserError: If there is no job.
        SystemFault: If the store fails.
    """
    ledger = Ledger(Store(output, storage or StorageConfig(), must_exist=True))
    job = ledger.require_job()
    problems: list[str] = []
    commits: dict[int, Commit] = {}
    generations = ledger.generations()
    if len(generations) < job.shards and ledger.success() is not None:
        ledger.look(set(range(job.shards)) - set(generations))
        generations = ledger.generations()
    for shard, generation in sorted(generations.items()):
        try:
            commits[shard] = ledger.commits({shard: generation})[0]
        except CountsDoNotClose as exc:
            problems.append(exc.message)
    types = _types(ledger, commits, problems)
    foreign = sorted(set(commits) - set(range(job.shards)))
    problems += [f"{manifest.shard_name(s)} is committed but not in the manifest" for s in foreign]

    def check(shard: int) -> _Shard:
        return _check_shard(ledger, shard, commits.get(shard), job.rows_of(shard), types)

    digest = hashlib.sha256()
    total = _Shard()
    with ThreadPoolExecutor(_PARALLEL_SHARDS) as pool:
        for found in pool.map(check, range(job.shards)):
            digest.update(bytes.fromhex(found.sha256))
            problems += found.problems
            total.rows += found.rows
            total.predictions += found.predictions
            total.errors += found.errors
    if digest.hexdigest() != job.identity.get("manifest.sha256") and not problems:
        problems.append("the manifest's files are not those that the job was planned with (digest differs)")
    named = {file.path for commit in commits.values() for file in commit.files}
    uncommitted = [
        i.path for kind in ("predictions", "errors") for i in ledger.store.objects(kind) if i.path not in named
    ]
    finished: dict[str, Any] | None = None
    try:
        finished = ledger.success()
    except CountsDoNotClose as exc:
        problems.append(exc.message)
    if finished is not None:
        problems += [f"{path} is not committed, but stands among the finished output" for path in uncommitted]
        missing = sorted(set(range(job.shards)) - set(commits))
        problems += [
            f"{manifest.shard_name(s)} has no commit, although _SUCCESS says that all is done" for s in missing
        ]
        if finished.get("fingerprint") != job.fingerprint:
            problems.append(
                f"_SUCCESS belongs to the fingerprint {str(finished.get('fingerprint'))[:12]}, the job's is {job.fingerprint[:12]}"
            )
        for key, value in (("predictions", total.predictions), ("errors", total.errors)):
            if finished.get(key) != value and not problems:
                problems.append(f"_SUCCESS says {finished.get(key)} {key}, the files hold {value}")
    if len(problems) > _MAX_PROBLEMS:
        problems = [*problems[:_MAX_PROBLEMS], f"and {len(problems) - _MAX_PROBLEMS} more"]
    return Verification(
        job.rows,
        total.predictions,
        total.errors,
        job.shards,
        len(commits),
        finished is not None,
        tuple(problems),
        tuple(uncommitted),
    )


@dataclass(frozen=True)
class _Types:
    """The columns that every file of predictions has to have, and where that is said.

    Attributes:
        schema: In plain types; None where there are no predictions.
        source: For messages.
        guessed: Whether a column that a file calls open may have any type: its guess is put right at the end of the job.
    """

    schema: pa.Schema | None
    source: str = SCHEMA
    guessed: bool = False

    def problems(self, file: DataFile, schema: pa.Schema) -> list[str]:
        """What is wrong with the columns of a file."""
        if self.schema is None:
            return []
        found = []
        for column in self.schema:
            place = schema.get_field_index(column.name)
            if place < 0:
                found.append(f"{file.path} has no column {column.name!r}, which is {column.type} in {self.source}")
            elif not (self.guessed and column.name in file.open) and not _alike(schema.field(place).type, column.type):
                there = schema.field(place).type
                found.append(
                    f"{file.path}: the column {column.name!r} is {there}, in {self.source} it is {column.type}"
                )
        return found + [
            f"{file.path} has a column {name!r} ({schema.field(name).type}), which is not in {self.source}"
            for name in schema.names
            if name not in self.schema.names
        ]


def _alike(a: pa.DataType, b: pa.DataType) -> bool:
    return bool(a == b or plain_type(a) == plain_type(b))


def _types(ledger: Ledger, commits: dict[int, Commit], problems: list[str]) -> _Types:
    try:
        output = OutputSchema(ledger.store)
        schema = output.known()
        if schema is not None:
            first = output.first()
            return _Types(as_written(schema), SCHEMA, guessed=first is not None and bool(open_columns(first)))
    except CountsDoNotClose as exc:
        problems.append(exc.message)
    # Outputs of older versions have none.
    found = first_schema(ledger.store, (commits[shard] for shard in sorted(commits)))
    return _Types(found, "the first file of predictions")


def _check_shard(ledger: Ledger, shard: int, commit: Commit | None, expected: int, types: _Types) -> _Shard:
    name = manifest.shard_name(shard)
    out = _Shard(sha256=hashlib.sha256().hexdigest())
    try:
        data = ledger.store.get(f"_manifest/{name}.parquet")
        inputs = manifest.read_parquet(data, ["uri"])
    except (OSError, pa.ArrowException, ValueError) as exc:
        out.problems.append(f"_manifest/{name}.parquet is missing or unreadable ({type(exc).__name__})")
        return out
    out.sha256 = hashlib.sha256(data).hexdigest()
    out.rows = inputs.num_rows
    if inputs.num_rows != expected:
        out.problems.append(f"_manifest/{name}.parquet has {inputs.num_rows} rows, the job says {expected}")
    if commit is None:
        return out
    seen = np.zeros(inputs.num_rows, np.int64)
    uris = inputs["uri"].to_pylist()
    for file in commit.files:
        table = _read_file(ledger.store, file, out, types)
        if table is None:
            continue
        kind = "predictions" if file.path.startswith("predictions/") else "errors"
        setattr(out, kind, getattr(out, kind) + table.num_rows)
        _count_rows(table, shard, uris, seen, file.path, out)
    missing, double = np.flatnonzero(seen == 0), np.flatnonzero(seen > 1)
    for what, places in (("missing", missing), ("there more than once", double)):
        if len(places):
            first = int(places[0])
            out.problems.append(
                f"{name}: {len(places)} of {len(seen)} rows are {what}, the first is row {first}, {uris[first]}"
            )
    if (out.predictions, out.errors) != (commit.predictions, commit.errors) and not out.problems:
        out.problems.append(
            f"{name}: its commit says {commit.predictions} predictions and {commit.errors} errors, "
            f"its files hold {out.predictions} and {out.errors}"
        )
    return out


def _read_file(store: Store, file: DataFile, out: _Shard, types: _Types) -> pa.Table | None:
    try:
        data = store.get(file.path)
    except FileNotFoundError:
        out.problems.append(f"{file.path} is committed but missing")
        return None
    if hashlib.sha256(data).hexdigest() != file.sha256:
        out.problems.append(f"{file.path} is not what was committed (its SHA-256 differs)")
    try:
        table = manifest.read_parquet(data, ["uri", "shard", "row"])
        if file.path.startswith("predictions/"):
            out.problems += types.problems(file, pq.read_schema(io.BytesIO(data)))
        return table
    except (pa.ArrowException, OSError, KeyError) as exc:
        out.problems.append(f"{file.path} can't be read: {' '.join(str(exc).split())[:120]}")
        return None


def _count_rows(table: pa.Table, shard: int, uris: list[str], seen: np.ndarray, path: str, out: _Shard) -> None:
    for uri, number, row in zip(*(table[c].to_pylist() for c in ("uri", "shard", "row")), strict=True):
        if number != shard or row is None or not 0 <= row < len(uris):
            out.problems.append(f"{path}: row {row} of shard {number} has no place here")
        elif uris[row] != uri:
            out.problems.append(f"{path}: row {row} is {uri}, the manifest says {uris[row]}")
        else:
            seen[row] += 1
