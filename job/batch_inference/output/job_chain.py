"""Which job an output belongs to: ``_job.json``, the plans that it replaced, and the manifest.

An output in which nothing is committed may be taken over by another configuration. One object decides,
``_jobs/PLAN.json``, created if absent. Either a driver of that plan creates it before its first commit; then no other
configuration can take over the output. Or another configuration creates it with its own job in it; then the drivers of
the old plan cannot commit. The chain of these records never changes. A slow driver that writes an old ``_job.json``
therefore changes nothing: :meth:`JobChain.job` follows the chain.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pyarrow as pa

from batch_inference.errors import AccountingError, UserError
from batch_inference.output import manifest, plan_archive
from batch_inference.output.manifest import parse_shard_name
from batch_inference.output.records import CRASH_JOURNAL, JobRecord, fingerprint, now
from batch_inference.storage.store import Store, object_sizes
from batch_inference.storage.uris import display_uri
from batch_inference.text import format_count

# Left in an output without a commit, and not to be taken over by the next job: folders, and objects.
_LEFTOVER_FOLDERS = ("_decisions", CRASH_JOURNAL, "_report", "_schema")
_LEFTOVER_OBJECTS = ("_FAILED", "_schema.json")


class TakenOverError(UserError):
    """Another configuration has taken over the output of a job that had committed nothing."""


class JobChain:
    """The job of one output, its manifest, and which job may commit.

    Args:
        store: The output folder.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._job: JobRecord | None = None  # the job whose rows this process commits
        self._may_commit = False

    def job(self) -> JobRecord | None:
        """Return the job of this output, None if there is none yet."""
        data = self.store.get_or_none("_job.json")
        if data is None:
            return None
        try:
            job = JobRecord.from_json(data)
            while successor := self._successor_record(job).get("job"):
                job = JobRecord.from_json(successor)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise UserError(
                f"{display_uri(self.store.uri)}/_job.json is not a job of this program: {exc}",
                "Choose another output, or the version of the program that made this one.",
            ) from None
        return job

    def require_job(self) -> JobRecord:
        """Return the job of this output; raise UserError if there is none."""
        job = self.job()
        if job is None:
            raise UserError(
                f"there is no job in {display_uri(self.store.uri)} (no _job.json)", "Check the location of the output."
            )
        return job

    def check_not_taken_over(self, job: JobRecord) -> None:
        """Raise TakenOverError if another configuration has taken over the output of a job."""
        if self._successor_record(job).get("job"):
            raise TakenOverError(
                f"another configuration has taken over {display_uri(self.store.uri)}, in which this job had committed nothing",
                "Start this job with an --output of its own.",
            )

    def begin_committing(self) -> None:
        """Make sure that no other configuration can take over the output; call this before the first commit.

        Raises:
            TakenOverError: If one has taken it over.
        """
        if self._may_commit:
            return
        job = self._job or self.require_job()
        if job.plan and not self.store.create(job.successor_path, b'{"committing": true}'):
            self.check_not_taken_over(job)
        self._may_commit = True

    def create_job(self, table: pa.Table, job: JobRecord, attempt: str, replaces: JobRecord | None = None) -> JobRecord:
        """Write the plan and create the job; if another driver was first, its job holds.

        Args:
            table: The inputs.
            job: The job, as far as it is known before the plan.
            attempt: Identifier of the attempt that creates it.
            replaces: The job whose output is taken over; it has no commit. If one of its drivers has begun to commit
                meanwhile, it stays the job.

        Returns:
            The job that holds: this one, or another driver's.
        """
        packed, digest = plan_archive.pack(table, int(job.config["shard_size"]))
        plan = f"_manifest/plan-{attempt}.tar"
        self.store.put(plan, packed)
        identity = {**job.identity, "manifest.sha256": digest}
        planned = replace(
            job,
            plan=plan,
            identity=identity,
            fingerprint=fingerprint(identity),
            replaces=replaces.plan if replaces else "",
        )
        if replaces is None:
            won = self.store.create("_job.json", json.dumps(planned.to_json(), indent=1).encode())
        else:
            record = {"replaced_at": now(), "job": planned.to_json()}
            won = self.store.create(replaces.successor_path, json.dumps(record, indent=1).encode())
        if won:
            return planned
        holder = self.require_job()
        # A create whose answer was lost is sent again and finds its own object; then the plan is needed.
        if holder.plan != plan:
            self.store.delete([plan])
        return holder

    def complete_manifest(self, job: JobRecord) -> None:
        """Make sure that every manifest shard exists; unpack those that an earlier attempt did not write.

        From here on, this process commits rows of this job only.

        Raises:
            AccountingError: If shards are missing and the plan they come from is gone.
        """
        self._job = job
        if job.replaces and (packed := self.store.get_or_none(job.plan)) is not None:
            self._replace_manifest(job, packed)
            return
        paths = [info.path for info in self.store.objects("_manifest") if info.path.endswith(".parquet")]
        missing = set(range(job.shards)) - {parse_shard_name(path)[0] for path in paths}
        if not missing:
            return
        packed = self.store.get_or_none(job.plan)
        if packed is None:
            # Another driver may just have finished the same work and deleted the plan.
            sizes = object_sizes(self.store, [manifest.shard_path(shard) for shard in sorted(missing)])
            missing = {parse_shard_name(path)[0] for path, size in sizes.items() if size is None}
            if not missing:
                return
            self.check_not_taken_over(job)
            are = "is" if len(missing) == 1 else "are"
            raise AccountingError(
                f"{len(missing)} of {format_count(job.shards, 'manifest shard')} {are} missing, the first is "
                f"{manifest.shard_name(min(missing))}",
                "Restore _manifest from a backup, or start a new output.",
            )
        # Created, not overwritten: a slow driver must not replace the shards of the plan that replaced its own.
        plan_archive.unpack(packed, self.store.create)
        self.store.delete([job.plan])

    def _replace_manifest(self, job: JobRecord, packed: bytes) -> None:
        """Delete what the replaced job has left, and write this job's manifest over the one before."""
        self._write_job(job)
        leftovers = [name for name in _LEFTOVER_OBJECTS if self.store.size(name) is not None]
        leftovers += [
            info.path
            for folder in _LEFTOVER_FOLDERS
            for info in self.store.objects(folder)
            if not info.path.startswith("_report/logs/")
        ]
        leftovers += [
            info.path
            for info in self.store.objects("_manifest")
            if (info.path.endswith(".tar") and info.path != job.plan) or parse_shard_name(info.path)[0] >= job.shards
        ]

        def put(path: str, content: bytes) -> None:
            if not self.store.create(path, content) and self.store.get_or_none(path) != content:
                self.check_not_taken_over(job)
                self.store.put(path, content)

        if self.store.size(job.plan) is None:
            return  # another driver of this job has done all of it, and may be at work
        self.store.delete(leftovers)
        plan_archive.unpack(packed, put)
        self.store.delete([job.plan])

    def _settle_takeover(self, job: JobRecord) -> None:
        """Check the manifest of a job that took over its output, and make ``_job.json`` name that job.

        Raises:
            AccountingError: If the manifest is not the one that the job was planned with.
        """
        if plan_archive.stored_digest(self.store, job.shards) != job.identity.get("manifest.sha256"):
            raise AccountingError(
                "the manifest's files are not those that the job was planned with (digest differs)",
                "Start a new output; this one was taken over while another driver was writing to it.",
            )
        self._write_job(job)

    def _write_job(self, job: JobRecord) -> None:
        """Write ``_job.json`` of a job that took over an output, for readers that do not follow the chain."""
        self.store.put("_job.json", json.dumps(job.to_json(), indent=1).encode())

    def _successor_record(self, job: JobRecord) -> dict[str, Any]:
        """Return ``{"committing": true}``, ``{"job": …}`` of the job that replaced this one, or {} for neither."""
        data = self.store.get_or_none(job.successor_path) if job.plan else None
        return {} if data is None else dict(json.loads(data))
