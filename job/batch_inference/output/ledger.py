"""All commits of a job, and the rules that keep them right.

Readers trust the ledger, never a folder listing. A shard is done when its commit exists. A commit is made by
put-if-absent, so that of any number of drivers one wins and the others leave files that nobody reads. The same holds
for ``_job.json``, which makes a plan the plan, and for ``_retries/N.json``, which begins retry N.

The ledger has three parts: :mod:`~batch_inference.output.job_chain` says whose output it is,
:mod:`~batch_inference.output.commit_log` what is committed, and :class:`Ledger` adds what needs both, the end of a job
included.
"""

from __future__ import annotations

import json
from typing import Any

from batch_inference.errors import AccountingError, InfrastructureError, UserError
from batch_inference.output import manifest
from batch_inference.output.commit_log import CommitLog
from batch_inference.output.job_chain import JobChain
from batch_inference.output.manifest import parse_shard_name
from batch_inference.output.records import CRASH_JOURNAL, Commit, JobRecord, now
from batch_inference.storage.store import Store, object_sizes
from batch_inference.storage.uris import display_uri
from batch_inference.text import format_count

_MAX_REFRESHED_SHARDS = 1000
_MAX_PROBLEMS_SHOWN = 5


class Ledger(JobChain, CommitLog):
    """The records of one output folder: its job, its commits, and how it ended.

    Args:
        store: The output folder.
    """

    def __init__(self, store: Store) -> None:
        JobChain.__init__(self, store)
        CommitLog.__init__(self, store)

    def untouched(self, job: JobRecord) -> bool:
        """Return whether nothing of a job is committed or about to be, so that another configuration may take over."""
        if self._successor_record(job) or self._read_success() or self.retry() is not None or self.generations():
            return False
        # An earlier version of the program may have made commits that a listing does not show yet.
        self.refresh(range(min(job.shards, _MAX_REFRESHED_SHARDS)))
        return not self._seen

    def check_empty(self) -> None:
        """Raise UserError if an output without a job holds files that a job would count as its own, or delete."""
        output = display_uri(self.store.uri)
        remedy = "Choose another --output, or move these files away."
        if self.commit_keys():
            raise UserError(f"{output} has commits of a job, but its _job.json is gone", f"Restore it. {remedy}")
        for folder in ("predictions", "errors"):
            for info in self.store.objects(folder):
                if parse_shard_name(info.path)[0] < 0:
                    raise UserError(
                        f"{output}/{info.path} is not of a job, and a job deletes what is not its own there", remedy
                    )

    def commit(self, commit: Commit) -> bool:
        """Commit a shard; return False if another driver has committed it.

        Raises:
            TakenOverError: If another configuration has taken over the output.
        """
        self.begin_committing()
        return self._create_commit(commit)

    # --- the end of a job ---

    def verified_commits(self, job: JobRecord) -> list[Commit]:
        """Return the commits that count, after :meth:`check_complete`."""
        while True:
            generations = self.generations()
            commits = self.commits(generations)
            try:
                self.check_complete(job, commits)
            except AccountingError:
                # A retry that ended meanwhile has deleted the files that its commits no longer name.
                self.refresh(range(job.shards))
                if self.generations() == generations:
                    raise
            else:
                if job.replaces:
                    self._settle_takeover(job)
                return commits

    def check_complete(self, job: JobRecord, commits: list[Commit]) -> None:
        """Check that every input is accounted for once, and that the files that the commits name are there.

        Raises:
            AccountingError: If shards, rows or files are missing, with the first of them.
        """
        problems = _missing_commits(job, commits)
        problems += _wrong_row_counts(job, commits)
        sizes = {info.path: info.size for folder in ("predictions", "errors") for info in self.store.objects(folder)}
        unlisted = [file.path for commit in commits for file in commit.files if file.path not in sizes]
        sizes |= {path: size for path, size in object_sizes(self.store, unlisted).items() if size is not None}
        problems += _wrong_files(commits, sizes)
        if problems:
            shown = "; ".join(problems[:_MAX_PROBLEMS_SHOWN])
            more = len(problems) - _MAX_PROBLEMS_SHOWN
            raise AccountingError(
                f"the counts do not add up: {shown}{f'; and {more} more' if more > 0 else ''}",
                "Delete the _commits/ files of the shards named, and run the same command again; they will be processed again.",
            )

    def finish(self, job: JobRecord, commits: list[Commit], totals: dict[str, Any], generation: int = 0) -> int:
        """Delete the files that no commit names, then write ``_SUCCESS``.

        This is safe beside another driver. Once every shard is committed, a file that no commit names cannot be named
        later, except files of a retry that this driver does not know.

        Args:
            job: The job.
            commits: Those that count.
            totals: For ``_SUCCESS``.
            generation: The latest retry that this driver knew when it read the commits, 0 for none.

        Returns:
            Number of files deleted.
        """
        deleted = self.delete_unnamed(commits, generation)
        self.store.delete(["_FAILED"])
        record = {"fingerprint": job.fingerprint, "generation": generation, **totals, "finished_at": now()}
        data = json.dumps(record, indent=1).encode()
        if not self.store.create("_SUCCESS", data) and self._read_success().get("generation", 0) < generation:
            # A slow driver has written the record of an earlier retry.
            self.store.put("_SUCCESS", data)
        return deleted

    def data_file_count(self) -> int:
        """Return the number of data files, whether a commit names them or not."""
        return sum(1 for folder in ("predictions", "errors") for _ in self.store.objects(folder))

    def delete_unnamed(self, commits: list[Commit], generation: int = 0) -> int:
        """Delete plans that did not win, and data files up to a retry that no commit names; return how many.

        Call this only when every shard is committed: before, a file may be waiting for its commit.

        Raises:
            InfrastructureError: If a commit counts that is newer than one of those given.
        """
        named = {file.path for commit in commits for file in commit.files}
        counting = {commit.shard: commit.generation for commit in commits}
        garbage = [
            info.path
            for folder in ("predictions", "errors")
            for info in self.store.objects(folder)
            if info.path not in named and parse_shard_name(info.path)[1] <= generation
        ]
        later = {
            shard
            for shard, file_generation in map(parse_shard_name, garbage)
            if file_generation > counting.get(shard, file_generation)
        }
        self.refresh(later)
        newer = sorted(shard for shard in later if self._seen[shard] > counting[shard])
        if newer:
            raise InfrastructureError(
                f"the store's listing did not show the newest commits of {format_count(len(newer), 'shard')}, the first is "
                f"{manifest.shard_name(newer[0])}",
                "Start the same command again; it resumes.",
            )
        garbage += [info.path for info in self.store.objects("_manifest") if info.path.endswith(".tar")]
        garbage += [info.path for info in self.store.objects(CRASH_JOURNAL)]
        self.store.delete(garbage)
        self.store.sweep_staged("", "_commits", "_retries", "_schema", "_decisions", "_jobs", "_manifest")
        return len(garbage)

    def success_record(self) -> dict[str, Any] | None:
        """Return the content of ``_SUCCESS``; None if there is none, or a retry has begun since.

        Raises:
            AccountingError: If it is unreadable.
        """
        record = self._read_success()
        retry = self.retry() if record else None
        return None if not record or (retry and record.get("generation", 0) < retry.generation) else record

    def _read_success(self) -> dict[str, Any]:
        data = self.store.get_or_none("_SUCCESS")
        try:
            return {} if data is None else dict(json.loads(data))
        except (ValueError, TypeError) as exc:
            raise AccountingError(
                f"_SUCCESS is not readable: {exc}", "Delete _SUCCESS and run the same command again; it recounts."
            ) from None


def _missing_commits(job: JobRecord, commits: list[Commit]) -> list[str]:
    missing = sorted(set(range(job.shards)) - {commit.shard for commit in commits})
    if not missing:
        return []
    have = "has" if len(missing) == 1 else "have"
    return [
        f"{len(missing)} of {format_count(job.shards, 'shard')} {have} no commit, the first is {manifest.shard_name(missing[0])}"
    ]


def _wrong_row_counts(job: JobRecord, commits: list[Commit]) -> list[str]:
    return [
        f"{manifest.shard_name(commit.shard)} has {format_count(commit.rows, 'row')} committed, {expected} in the manifest"
        for commit in commits
        if commit.rows != (expected := job.rows_of(commit.shard))
    ]


def _wrong_files(commits: list[Commit], sizes: dict[str, int]) -> list[str]:
    """Return a line for each committed file that is missing or has another size than its commit says."""
    problems = []
    for file in (file for commit in commits for file in commit.files):
        if file.path not in sizes:
            problems.append(f"{file.path} is committed but missing")
        elif sizes[file.path] != file.bytes:
            problems.append(f"{file.path} has {sizes[file.path]} bytes, its commit says {file.bytes}")
    return problems
