"""All commits of a job, and the rules that keep them right.

Readers trust the ledger, never a folder listing. A shard is done when its commit exists; a commit is made by
put-if-absent, so that of any number of drivers one wins and the others leave files that nobody reads. The same holds for
``_job.json``, which makes a plan the plan.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa

from batch_inference import manifest
from batch_inference.errors import CountsDoNotClose, UserError
from batch_inference.storage import Store, display

# Requests that are independent of one another go out together; a store answers each in some ten milliseconds.
_PARALLEL_REQUESTS = 16
_FORMAT = 1
#: Folder of the marks of tasks under way.
BEGUN = "_begun"


def now() -> str:
    """This moment in UTC, ISO 8601, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class DataFile:
    """One Parquet file that a commit names."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """The record that a shard is done.

    Attributes:
        shard: Its number.
        rows: Inputs in it; always ``predictions + errors``.
        predictions: Rows with a prediction.
        errors: Rows with an error.
        files: The data files, at most one of each kind.
        attempt: Which attempt made it.
        errors_by: ``{stage: {error_type: count}}``.
        committed_at: UTC, ISO 8601.
    """

    shard: int
    rows: int
    predictions: int
    errors: int
    files: tuple[DataFile, ...]
    attempt: str
    errors_by: dict[str, dict[str, int]] = field(default_factory=dict)
    committed_at: str = ""

    def to_json(self) -> bytes:
        """The bytes of ``_commits/shard-N.json``."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Commit:
        """Reads what :meth:`to_json` wrote; raises ValueError or KeyError or TypeError on anything else."""
        raw = json.loads(data)
        raw["files"] = tuple(DataFile(**f) for f in raw["files"])
        return cls(**raw)


@dataclass(frozen=True)
class Job:
    """What ``_job.json`` says: made once, never changed."""

    config: dict[str, Any]
    fingerprint: str
    identity: dict[str, str]
    shards: int
    rows: int
    plan: str
    versions: dict[str, str]
    created_at: str
    skipped: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    repeated: int = 0
    passthrough: tuple[str, ...] = ()
    format: int = _FORMAT

    def rows_of(self, shard: int) -> int:
        """Number of inputs of a shard."""
        return min(self.shard_size, self.rows - shard * self.shard_size)

    @property
    def shard_size(self) -> int:
        """Inputs of every shard but the last."""
        return int(self.config["shard_size"])


def fingerprint(identity: dict[str, str]) -> str:
    """Digest of everything that makes two rows comparable: SHA-256 of the identity's canonical JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Ledger:
    """The records of one output folder."""

    def __init__(self, store: Store) -> None:
        self.store = store

    # --- the job ---

    def job(self) -> Job | None:
        """The job of this output, or None before there is one."""
        data = self.store.get_or_none("_job.json")
        if data is None:
            return None
        try:
            raw = json.loads(data)
            if raw.get("format") != _FORMAT:
                raise ValueError(f"format {raw.get('format')!r}, this version reads {_FORMAT}")
            raw["passthrough"] = tuple(raw["passthrough"])
            return Job(**raw)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise UserError(
                f"{display(self.store.uri)}/_job.json is not a job of this program: {exc}",
                "Choose another output, or the version of the program that made this one.",
            ) from None

    def require_job(self) -> Job:
        """The job of this output; raises UserError where there is none."""
        job = self.job()
        if job is None:
            raise UserError(
                f"there is no job in {display(self.store.uri)} (no _job.json)", "Check the location of the output."
            )
        return job

    def create_job(self, table: pa.Table, job: Job, attempt: str) -> Job:
        """Writes manifest and ``_job.json``; where another driver was first, its job holds.

        The plan is written under a name of its own before ``_job.json`` makes it *the* plan, so that two drivers that
        listed different inputs at the same moment cannot mix their shards.

        Returns:
            The job that holds, ours or the other driver's.
        """
        digest = hashlib.sha256()
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for shard, part in manifest.cut(table, int(job.config["shard_size"])):
                data = manifest.encode_shard(part)
                digest.update(hashlib.sha256(data).digest())
                info = tarfile.TarInfo(f"{manifest.shard_name(shard)}.parquet")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        plan = f"_manifest/plan-{attempt}.tar"
        self.store.put(plan, buffer.getvalue())
        identity = {**job.identity, "manifest.sha256": digest.hexdigest()}
        mine = Job(**{**asdict(job), "plan": plan, "identity": identity, "fingerprint": fingerprint(identity)})
        if not self.store.create("_job.json", json.dumps(asdict(mine), indent=1).encode()):
            job = self.require_job()
            # A create whose answer got lost is sent again and meets itself; then the plan is needed.
            if job.plan != plan:
                self.store.delete([plan])
            return job
        return mine

    def complete_manifest(self, job: Job) -> None:
        """Makes sure that every manifest shard is there, unpacking those that an earlier attempt did not get to.

        Raises:
            CountsDoNotClose: If shards are missing and the plan they come from is gone.
        """
        missing = self._missing_manifest(job)
        if not missing:
            return
        packed = self.store.get_or_none(job.plan)
        if packed is None:
            # Another driver may just have finished the same work and deleted the plan.
            missing = self._missing_manifest(job)
            if not missing:
                return
            raise CountsDoNotClose(
                f"{len(missing)} of {job.shards} manifest shards are missing, the first is {manifest.shard_name(min(missing))}",
                "Restore _manifest from a backup, or start a new output.",
            )
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar, ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            puts = []
            for member in tar:
                content = tar.extractfile(member)
                if content is not None:
                    puts.append(pool.submit(self.store.put, f"_manifest/{member.name}", content.read()))
            for put in puts:
                put.result()
        self.store.delete([job.plan])

    def _missing_manifest(self, job: Job) -> set[int]:
        present = {_shard_of(info.path) for info in self.store.objects("_manifest") if info.path.endswith(".parquet")}
        return set(range(job.shards)) - present

    # --- commits ---

    def committed(self) -> set[int]:
        """Numbers of the shards that are done; one listing."""
        found = {_shard_of(info.path) for info in self.store.objects("_commits") if info.path.endswith(".json")}
        return found - {-1}

    def commits(self, shards: set[int] | None = None) -> list[Commit]:
        """The commits of ``shards`` (default: all), in order.

        Raises:
            CountsDoNotClose: If one can't be read or contradicts itself.
        """
        wanted = sorted(self.committed() if shards is None else shards)
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            return list(pool.map(self._read_commit, wanted))

    def commit(self, commit: Commit) -> bool:
        """Commits a shard; False if another driver has committed it."""
        path, data = f"_commits/{manifest.shard_name(commit.shard)}.json", commit.to_json()
        # A create whose answer got lost is sent again and meets itself; taken for another's, it would cost its files.
        return self.store.create(path, data) or self.store.get(path) == data

    def _read_commit(self, shard: int) -> Commit:
        path = f"_commits/{manifest.shard_name(shard)}.json"
        try:
            commit = Commit.from_json(self.store.get(path))
            named = sum(f.rows for f in commit.files)
            if commit.shard != shard or not commit.rows == commit.predictions + commit.errors == named:
                raise ValueError(
                    f"rows {commit.rows}, predictions {commit.predictions}, errors {commit.errors}, in files {named}"
                )
        except (ValueError, TypeError, KeyError, FileNotFoundError) as exc:
            raise CountsDoNotClose(
                f"{path} is not a valid commit: {exc}",
                f"Delete {path} and run the same command again; the shard will be done anew.",
            ) from None
        return commit

    # --- the end ---

    def check_closed(self, job: Job, commits: list[Commit]) -> None:
        """Checks that every input is accounted for once, and that the files the ledger names are there.

        Raises:
            CountsDoNotClose: With what is missing.
        """
        problems = []
        missing = sorted(set(range(job.shards)) - {c.shard for c in commits})
        if missing:
            problems.append(
                f"{len(missing)} of {job.shards} shards have no commit, the first is {manifest.shard_name(missing[0])}"
            )
        for commit in commits:
            expected = job.rows_of(commit.shard)
            if commit.rows != expected:
                problems.append(
                    f"{manifest.shard_name(commit.shard)} has {commit.rows} rows committed, {expected} in the manifest"
                )
        sizes = {info.path: info.size for kind in ("predictions", "errors") for info in self.store.objects(kind)}
        for commit in commits:
            for file in commit.files:
                if file.path not in sizes:
                    problems.append(f"{file.path} is committed but missing")
                elif sizes[file.path] != file.bytes:
                    problems.append(f"{file.path} has {sizes[file.path]} bytes, its commit says {file.bytes}")
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise CountsDoNotClose(
                f"the counts do not close: {shown}",
                "Delete the _commits/ files of the shards named, and run the same command again; they will be done "
                "anew.",
            )

    def finish(self, job: Job, commits: list[Commit], totals: dict[str, Any]) -> int:
        """Deletes what no commit names, then writes ``_SUCCESS``.

        Safe beside another driver: once every shard is committed, no file that is unnamed now can be named later.

        Returns:
            Number of files deleted.
        """
        deleted = self.delete_unnamed(commits)
        self.store.delete(["_FAILED"])
        record = {"fingerprint": job.fingerprint, **totals, "finished_at": now()}
        self.store.create("_SUCCESS", json.dumps(record, indent=1).encode())
        return deleted

    def data_files(self) -> int:
        """Number of data files there are, named by a commit or not."""
        return sum(1 for kind in ("predictions", "errors") for _ in self.store.objects(kind))

    def delete_unnamed(self, commits: list[Commit]) -> int:
        """Deletes data files that no commit names and plans that did not win; returns how many.

        Only right when every shard is committed: before, a file may be waiting for its commit.
        """
        named = {file.path for commit in commits for file in commit.files}
        garbage = [
            i.path for kind in ("predictions", "errors") for i in self.store.objects(kind) if i.path not in named
        ]
        garbage += [i.path for i in self.store.objects("_manifest") if i.path.endswith(".tar")]
        garbage += [i.path for i in self.store.objects(BEGUN)]
        self.store.delete(garbage)
        return len(garbage)

    def success(self) -> dict[str, Any] | None:
        """What ``_SUCCESS`` says, or None; raises CountsDoNotClose if it can't be read."""
        data = self.store.get_or_none("_SUCCESS")
        try:
            return None if data is None else dict(json.loads(data))
        except (ValueError, TypeError) as exc:
            raise CountsDoNotClose(
                f"_SUCCESS is not readable: {exc}", "Delete _SUCCESS and run the same command again; it recounts."
            ) from None


def _shard_of(path: str) -> int:
    """The shard number in a file name such as ``_commits/shard-00042.json``; -1 for other names."""
    stem = path.rpartition("/")[2].partition(".")[0]
    number = stem.removeprefix("shard-").partition("-")[0]
    return int(number) if number.isdigit() else -1
