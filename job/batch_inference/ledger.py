"""All commits of a job, and the rules that keep them right.

Readers trust the ledger, never a folder listing. A shard is done when its commit exists; a commit is made by
put-if-absent, so that of any number of drivers one wins and the others leave files that nobody reads. The same holds for
``_job.json``, which makes a plan the plan, and for ``_retries/N.json``, which makes the N-th generation: a shard's commit of the
highest generation is the one that counts.

A listing may lag behind what was written, with some stores and some caches before them. A commit that it does not show yet is made once
more and loses, and what one ledger has seen it does not forget; nothing is called missing before it was asked for by its name.

An output in which nothing is committed may be taken over by another configuration. One object decides, ``_jobs/PLAN.json``, created if
absent: either a driver of that plan makes it before its first commit, and no other configuration can take the output over any more; or
another configuration makes it with its own job in it, and the drivers of the old plan can't commit any more. The chain of these records
is never changed, so that a driver that was slow and writes an old ``_job.json`` changes nothing: :meth:`Ledger.job` follows the chain.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from batch_inference import manifest
from batch_inference.errors import CountsDoNotClose, SystemFault, UserError
from batch_inference.storage import Store, display

# Requests that are independent of one another go out together; a store answers each in some ten milliseconds.
_PARALLEL_REQUESTS = 16
_FORMAT = 1
_MOST_LOOKED_FOR = 1000
#: Folder of the marks of tasks under way.
BEGUN = "_begun"
# What an output without a commit may hold that another job must not take for its own: folders, and objects.
_LEFT_FOLDERS = ("_decisions", BEGUN, "_report", "_schema")
_LEFT_OBJECTS = ("_FAILED", "_schema.json")
# Names of a shard's files: shard-00042.json, shard-00042-g1-4f2a91c0.parquet.
_RETRY = re.compile(r"_retries/[1-9]\d{0,8}\.json$")
_NAME = re.compile(r"(?:^|/)shard-(\d+)(?:-g(\d+))?(?=[-.]|$)")


def now() -> str:
    """This moment in UTC, ISO 8601, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class DataFile:
    """One Parquet file that a commit names.

    Attributes:
        open: Columns of which the job knew no type when it was written; as text, they hold nothing but nulls and empty lists.
    """

    path: str
    rows: int
    bytes: int
    sha256: str
    open: tuple[str, ...] = ()


@dataclass(frozen=True)
class Commit:
    """The record that a shard is done.

    Attributes:
        shard: Its number.
        rows: Inputs in it; always ``predictions + errors``.
        predictions: Rows with a prediction.
        errors: Rows with an error.
        files: The data files: predictions, at most one file of each generation, and at most one of errors.
        attempt: Which attempt made it.
        errors_by: ``{stage: {error_type: count}}``.
        committed_at: UTC, ISO 8601.
        generation: 0, or the number of the retry that it belongs to.
    """

    shard: int
    rows: int
    predictions: int
    errors: int
    files: tuple[DataFile, ...]
    attempt: str
    errors_by: dict[str, dict[str, int]] = field(default_factory=dict)
    committed_at: str = ""
    generation: int = 0

    def to_json(self) -> bytes:
        """The bytes of ``_commits/shard-N.json``."""
        raw = asdict(self)
        for file in raw["files"]:
            if not file["open"]:
                del file["open"]
        return json.dumps(raw, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Commit:
        """Reads what :meth:`to_json` wrote; raises ValueError or KeyError or TypeError on anything else."""
        raw = json.loads(data)
        raw["files"] = tuple(DataFile(**{**f, "open": tuple(f.get("open", ()))}) for f in raw["files"])
        return cls(**raw)


@dataclass(frozen=True)
class Job:
    """What ``_job.json`` says: made once, never changed, replaced at most while nothing is committed.

    Attributes:
        replaces: The plan of the job whose output this one took over, "" if it was the first.
    """

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
    replaces: str = ""

    def to_json(self) -> dict[str, Any]:
        """The content of ``_job.json``."""
        raw = asdict(self)
        if not self.replaces:
            del raw["replaces"]  # earlier versions do not know the key
        return raw

    @classmethod
    def from_json(cls, data: bytes | dict[str, Any]) -> Job:
        """Read what :meth:`to_json` gave; raise ValueError, KeyError, TypeError or AttributeError on anything else."""
        raw = json.loads(data) if isinstance(data, bytes) else dict(data)
        if raw.get("format") != _FORMAT:
            raise ValueError(f"format {raw.get('format')!r}, this version reads {_FORMAT}")
        raw["passthrough"] = tuple(raw["passthrough"])
        return cls(**raw)

    @property
    def record(self) -> str:
        """Path of the object that says what became of this plan: it has commits, or another job replaced it."""
        return f"_jobs/{PurePosixPath(self.plan).stem}.json"

    def rows_of(self, shard: int) -> int:
        """Number of inputs of a shard."""
        return min(self.shard_size, self.rows - shard * self.shard_size)

    @property
    def shard_size(self) -> int:
        """Inputs of every shard but the last."""
        return int(self.config["shard_size"])


@dataclass(frozen=True)
class Retry:
    """What ``_retries/N.json`` says: failed rows are done again as generation N; made once, never changed.

    Attributes:
        generation: N, from 1.
        stages: Stages whose failures are done again; empty: all.
        error_types: Types likewise.
        retryable: Only rows that are marked ``retryable``.
        rows: How many rows these were when it began.
        attempt: Who began it.
        created_at: UTC, ISO 8601.
        types: Whether no row is done again, but files are written again with the job's types.
    """

    generation: int
    stages: tuple[str, ...]
    error_types: tuple[str, ...]
    retryable: bool
    rows: int
    attempt: str
    created_at: str
    types: bool = False


class TakenOver(UserError):  # noqa: N818 - named after the fact
    """Another configuration has taken over the output of a job that had committed nothing."""


def fingerprint(identity: dict[str, str]) -> str:
    """Digest of everything that makes two rows comparable: SHA-256 of the identity's canonical JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Ledger:
    """The records of one output folder."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._seen: dict[int, int] = {}
        self._lock = threading.Lock()
        self._job: Job | None = None  # whose rows this ledger commits
        self._may_commit = False

    # --- the job ---

    def job(self) -> Job | None:
        """The job of this output, or None before there is one."""
        data = self.store.get_or_none("_job.json")
        if data is None:
            return None
        try:
            job = Job.from_json(data)
            while after := self._became(job).get("job"):
                job = Job.from_json(after)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise UserError(
                f"{display(self.store.uri)}/_job.json is not a job of this program: {exc}",
                "Choose another output, or the version of the program that made this one.",
            ) from None
        return job

    def _became(self, job: Job) -> dict[str, Any]:
        """What became of a plan: empty, ``{"committing": true}``, or ``{"job": …}`` of the job that replaced it."""
        data = self.store.get_or_none(job.record) if job.plan else None
        return {} if data is None else dict(json.loads(data))

    def untouched(self, job: Job) -> bool:
        """Whether nothing of a job is committed, nor about to be: then another configuration may take its output over."""
        if self._became(job) or self._success() or self.retry() is not None or self.generations():
            return False
        # Of an earlier version of the program, whose commits a listing may not show yet.
        self.look(range(min(job.shards, _MOST_LOOKED_FOR)))
        return not self._seen

    def check_empty(self) -> None:
        """Raise UserError where an output without a job holds what a job would count as its own, or delete."""
        where = display(self.store.uri)
        remedy = "Choose another --output, or move these files away."
        if any(shard >= 0 for shard, _ in self.places()):
            raise UserError(f"{where} has commits of a job, but its _job.json is gone", f"Restore it. {remedy}")
        for kind in ("predictions", "errors"):
            other = next((i.path for i in self.store.objects(kind) if _place(i.path)[0] < 0), None)
            if other is not None:
                raise UserError(f"{where}/{other} is not of a job, and a job deletes what is not its own there", remedy)

    def check_not_taken_over(self, job: Job) -> None:
        """Raise TakenOver where another configuration has taken a job's output over."""
        if self._became(job).get("job"):
            raise TakenOver(
                f"another configuration has taken over {display(self.store.uri)}, in which this job had committed nothing",
                "Start this job with an --output of its own.",
            )

    def require_job(self) -> Job:
        """The job of this output; raises UserError where there is none."""
        job = self.job()
        if job is None:
            raise UserError(
                f"there is no job in {display(self.store.uri)} (no _job.json)", "Check the location of the output."
            )
        return job

    def create_job(self, table: pa.Table, job: Job, attempt: str, replaces: Job | None = None) -> Job:
        """Write the plan and make it the job; where another driver was first, its job holds.

        The plan is written under a name of its own before ``_job.json`` makes it *the* plan, so that two drivers that
        listed different inputs at the same moment cannot mix their shards.

        Args:
            table: The inputs.
            job: What is known of the job before the plan.
            attempt: Who creates it.
            replaces: The job whose output is taken over; nothing of it is committed. Where a driver of it has begun to commit
                meanwhile, it stays the job.

        Returns:
            The job that holds: ours, or another's.
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
        mine = replace(
            job,
            plan=plan,
            identity=identity,
            fingerprint=fingerprint(identity),
            replaces=replaces.plan if replaces else "",
        )
        if replaces is None:
            won = self.store.create("_job.json", json.dumps(mine.to_json(), indent=1).encode())
        else:
            record = {"replaced_at": now(), "job": mine.to_json()}
            won = self.store.create(replaces.record, json.dumps(record, indent=1).encode())
        if not won:
            job = self.require_job()
            # A create whose answer got lost is sent again and meets itself; then the plan is needed.
            if job.plan != plan:
                self.store.delete([plan])
            return job
        return mine

    def complete_manifest(self, job: Job) -> None:
        """Make sure that every manifest shard is there, unpacking those that an earlier attempt did not get to.

        From here on, this ledger commits rows of this job alone.

        Raises:
            CountsDoNotClose: If shards are missing and the plan they come from is gone.
        """
        self._job = job
        if job.replaces and (packed := self.store.get_or_none(job.plan)) is not None:
            self._replace_manifest(job, packed)
            return
        present = {_place(info.path)[0] for info in self.store.objects("_manifest") if info.path.endswith(".parquet")}
        missing = set(range(job.shards)) - present
        if not missing:
            return
        packed = self.store.get_or_none(job.plan)
        if packed is None:
            # Another driver may just have finished the same work and deleted the plan.
            sizes = self._sizes([f"_manifest/{manifest.shard_name(shard)}.parquet" for shard in sorted(missing)])
            missing = {_place(path)[0] for path, size in sizes.items() if size is None}
            if not missing:
                return
            self.check_not_taken_over(job)
            raise CountsDoNotClose(
                f"{len(missing)} of {job.shards} manifest shards are missing, the first is {manifest.shard_name(min(missing))}",
                "Restore _manifest from a backup, or start a new output.",
            )
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar, ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            # Created, not overwritten: a slow driver can't put shards of a plan over those of one that replaced it.
            puts = [
                pool.submit(self.store.create, f"_manifest/{member.name}", content.read())
                for member in tar
                if (content := tar.extractfile(member)) is not None
            ]
            for put in puts:
                put.result()
        self.store.delete([job.plan])

    def _replace_manifest(self, job: Job, packed: bytes) -> None:
        """Clear away what the job before has left, and put this one's manifest in the place of its."""
        self._write_job(job)
        leftovers = [name for name in _LEFT_OBJECTS if self.store.size(name) is not None]
        leftovers += [
            i.path
            for folder in _LEFT_FOLDERS
            for i in self.store.objects(folder)
            if not i.path.startswith("_report/logs/")
        ]
        leftovers += [
            i.path
            for i in self.store.objects("_manifest")
            if (i.path.endswith(".tar") and i.path != job.plan) or _place(i.path)[0] >= job.shards
        ]

        def put(path: str, content: bytes) -> None:
            if not self.store.create(path, content) and self.store.get_or_none(path) != content:
                self.check_not_taken_over(job)
                self.store.put(path, content)

        if self.store.size(job.plan) is None:
            return  # another driver of this job has done all of it, and may be at work
        self.store.delete(leftovers)
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar, ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            puts = [
                pool.submit(put, f"_manifest/{member.name}", content.read())
                for member in tar
                if (content := tar.extractfile(member)) is not None
            ]
            for each in puts:
                each.result()
        self.store.delete([job.plan])

    def _write_job(self, job: Job) -> None:
        """Write ``_job.json`` of a job that took an output over, for readers that know nothing of the chain."""
        self.store.put("_job.json", json.dumps(job.to_json(), indent=1).encode())

    def _check_manifest(self, job: Job) -> None:
        """Raise CountsDoNotClose where the manifest is not the one that the job was planned with."""
        digest = hashlib.sha256()
        paths = [f"_manifest/{manifest.shard_name(shard)}.parquet" for shard in range(job.shards)]
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            for data in pool.map(self.store.get_or_none, paths):
                digest.update(hashlib.sha256(data or b"").digest())
        if digest.hexdigest() != job.identity.get("manifest.sha256"):
            raise CountsDoNotClose(
                "the manifest's files are not those that the job was planned with (digest differs)",
                "Start a new output; this one was taken over while another driver was writing to it.",
            )

    def _sizes(self, paths: list[str]) -> dict[str, int | None]:
        """The sizes of objects, each asked for by its name; None of one that is not there."""
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            return dict(zip(paths, pool.map(self.store.size, paths), strict=True))

    # --- commits ---

    def generations(self) -> dict[int, int]:
        """The shards that are done, each with the generation of the commit that counts; one listing, and what was seen before."""
        for place in self.places():
            self._see(*place)
        return dict(self._seen)

    def look(self, shards: Collection[int]) -> None:
        """Asks for commits of some shards by their names, as far as retries have got: a listing may not show them yet."""
        if not shards:
            return
        retry = self.retry()
        last = retry.generation if retry else 0
        places = {
            f"_commits/{shard_name(shard, generation)}.json": (shard, generation)
            for shard in shards
            for generation in range(self._seen.get(shard, -1) + 1, last + 1)
        }
        for path, size in self._sizes(list(places)).items():
            if size is not None:
                self._see(*places[path])

    def _see(self, shard: int, generation: int) -> None:
        with self._lock:
            self._seen[shard] = max(generation, self._seen.get(shard, 0))

    def places(self) -> list[tuple[int, int]]:
        """Shard and generation of every commit, also of those that a later generation took the place of; one listing."""
        found = [_place(info.path) for info in self.store.objects("_commits") if info.path.endswith(".json")]
        return [(shard, generation) for shard, generation in found if shard >= 0]

    def committed(self) -> set[int]:
        """Numbers of the shards that are done; one listing."""
        return set(self.generations())

    def commits(self, generations: dict[int, int] | None = None) -> list[Commit]:
        """The commits that count (or those of the shards and generations given), in order of their shards.

        Raises:
            CountsDoNotClose: If one can't be read or contradicts itself.
        """
        wanted = sorted((self.generations() if generations is None else generations).items())
        with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
            return list(pool.map(self._read_commit, wanted))

    def commit(self, commit: Commit) -> bool:
        """Commit a shard; False if another driver has committed it.

        Raises:
            TakenOver: If another configuration has taken the output over.
        """
        self.begin_committing()
        path, data = f"_commits/{shard_name(commit.shard, commit.generation)}.json", commit.to_json()
        # A create whose answer got lost is sent again and meets itself; taken for another's, it would cost its files.
        mine = self.store.create(path, data) or self.store.get(path) == data
        self._see(commit.shard, commit.generation)
        return mine

    def begin_committing(self) -> None:
        """Make sure, before a driver writes what a job has in common, that no other configuration can take the output over.

        Raises:
            TakenOver: If one has.
        """
        if self._may_commit:
            return
        job = self._job or self.require_job()
        if job.plan and not self.store.create(job.record, b'{"committing": true}'):
            self.check_not_taken_over(job)
        self._may_commit = True

    def _read_commit(self, place: tuple[int, int]) -> Commit:
        path = f"_commits/{shard_name(*place)}.json"
        try:
            commit = Commit.from_json(self.store.get(path))
            named = sum(f.rows for f in commit.files)
            if (
                commit.shard,
                commit.generation,
            ) != place or not commit.rows == commit.predictions + commit.errors == named:
                raise ValueError(
                    f"rows {commit.rows}, predictions {commit.predictions}, errors {commit.errors}, in files {named}"
                )
        except (ValueError, TypeError, KeyError, FileNotFoundError) as exc:
            raise CountsDoNotClose(
                f"{path} is not a valid commit: {exc}",
                f"Delete {path} and run the same command again; the shard will be done anew.",
            ) from None
        return commit

    # --- retries ---

    def retry(self) -> Retry | None:
        """The latest retry, or None if there was none; raises CountsDoNotClose if it can't be read."""
        numbers = [
            int(i.path[len("_retries/") : -len(".json")])
            for i in self.store.objects("_retries")
            if _RETRY.match(i.path)
        ]
        last = max(numbers, default=0)
        while self.store.size(f"_retries/{last + 1}.json") is not None:
            last += 1
        if not last:
            return None
        path = f"_retries/{last}.json"
        try:
            raw = json.loads(self.store.get(path))
            return Retry(**{**raw, "stages": tuple(raw["stages"]), "error_types": tuple(raw["error_types"])})
        except (ValueError, TypeError, KeyError, FileNotFoundError) as exc:
            raise CountsDoNotClose(
                f"{path} is not readable: {exc}", f"Delete {path}, and start the retry again."
            ) from None

    def begin_retry(self, retry: Retry) -> bool:
        """Begins a generation; False if another driver has begun one of the same number."""
        name, content = f"_retries/{retry.generation}.json", json.dumps(asdict(retry), indent=1).encode()
        # A create whose answer was lost is sent again, and then meets itself.
        return self.store.create(name, content) or self.store.get_or_none(name) == content

    # --- the end ---

    def closed(self, job: Job) -> list[Commit]:
        """The commits that count, checked as :meth:`check_closed` does."""
        while True:
            generations = self.generations()
            commits = self.commits(generations)
            try:
                self.check_closed(job, commits)
            except CountsDoNotClose:
                # A retry that ended meanwhile has deleted what its commits do not name any more.
                self.look(range(job.shards))
                if self.generations() == generations:
                    raise
            else:
                if job.replaces:
                    self._check_manifest(job)
                    self._write_job(job)
                return commits

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
        unlisted = [file.path for commit in commits for file in commit.files if file.path not in sizes]
        sizes |= {path: size for path, size in self._sizes(unlisted).items() if size is not None}
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

    def finish(self, job: Job, commits: list[Commit], totals: dict[str, Any], generation: int = 0) -> int:
        """Deletes what no commit names, then writes ``_SUCCESS``.

        Safe beside another driver: once every shard is committed, no file that is unnamed now can be named later, but for those
        of a retry that this driver does not know of.

        Args:
            job: The job.
            commits: Those that count.
            totals: For ``_SUCCESS``.
            generation: The latest that this driver knew when it read the commits.

        Returns:
            Number of files deleted.
        """
        deleted = self.delete_unnamed(commits, generation)
        self.store.delete(["_FAILED"])
        record = {"fingerprint": job.fingerprint, "generation": generation, **totals, "finished_at": now()}
        data = json.dumps(record, indent=1).encode()
        if not self.store.create("_SUCCESS", data) and self._success().get("generation", 0) < generation:
            # Of the generation before, by a driver that was slow.
            self.store.put("_SUCCESS", data)
        return deleted

    def data_files(self) -> int:
        """Number of data files there are, named by a commit or not."""
        return sum(1 for kind in ("predictions", "errors") for _ in self.store.objects(kind))

    def delete_unnamed(self, commits: list[Commit], generation: int = 0) -> int:
        """Deletes data files up to a generation that no commit names, and plans that did not win; returns how many.

        Only right when every shard is committed: before, a file may be waiting for its commit.

        Raises:
            SystemFault: If a commit counts that is newer than one of those given.
        """
        named = {file.path for commit in commits for file in commit.files}
        counting = {commit.shard: commit.generation for commit in commits}
        garbage = [
            i.path
            for kind in ("predictions", "errors")
            for i in self.store.objects(kind)
            if i.path not in named and _place(i.path)[1] <= generation
        ]
        later = {shard for shard, of in map(_place, garbage) if of > counting.get(shard, of)}
        self.look(later)
        newer = sorted(shard for shard in later if self._seen[shard] > counting[shard])
        if newer:
            raise SystemFault(
                f"the store's listing did not show the newest commits of {len(newer)} shards, the first is {manifest.shard_name(newer[0])}",
                "Start the same command again; it resumes.",
            )
        garbage += [i.path for i in self.store.objects("_manifest") if i.path.endswith(".tar")]
        garbage += [i.path for i in self.store.objects(BEGUN)]
        self.store.delete(garbage)
        self.store.sweep_staged("", "_commits", "_retries", "_schema", "_decisions", "_jobs", "_manifest")
        return len(garbage)

    def success(self) -> dict[str, Any] | None:
        """What ``_SUCCESS`` says; None if there is none, or a retry has begun since; raises CountsDoNotClose if it can't be read."""
        found = self._success()
        retry = self.retry() if found else None
        return None if not found or (retry and found.get("generation", 0) < retry.generation) else found

    def _success(self) -> dict[str, Any]:
        data = self.store.get_or_none("_SUCCESS")
        try:
            return {} if data is None else dict(json.loads(data))
        except (ValueError, TypeError) as exc:
            raise CountsDoNotClose(
                f"_SUCCESS is not readable: {exc}", "Delete _SUCCESS and run the same command again; it recounts."
            ) from None


def shard_name(shard: int, generation: int) -> str:
    """How the names of a shard's files of a generation begin.

    >>> shard_name(42, 0), shard_name(42, 1)
    ('shard-00042', 'shard-00042-g1')
    """
    return manifest.shard_name(shard) + (f"-g{generation}" if generation else "")


def _place(path: str) -> tuple[int, int]:
    """Shard and generation in a file name such as ``_commits/shard-00042-g1.json``; -1 and 0 for other names."""
    found = _NAME.search(path)
    return (int(found[1]), int(found[2] or 0)) if found else (-1, 0)
