"""From complete shards to commits: gather predictions, write files, commit."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.config import JobConfig
from batch_inference.driver.collector import OpenShard, by_shard
from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.errors import AccountingError, InfrastructureError
from batch_inference.output.ledger import Ledger
from batch_inference.output.manifest import shard_name
from batch_inference.output.records import Commit
from batch_inference.output.retries import RetryShard
from batch_inference.output.tally import Tally, count_errors
from batch_inference.pipeline.schemas import RESULT_SCHEMA
from batch_inference.storage.store import Store

# Complete shards that wait for the store at the same time; more would only pile up in memory.
_MAX_UNCOMMITTED = 8
# One writer keeps up with CLIP-sized outputs of this many actors.
_ACTORS_PER_WRITER = 4
# The store is asked at most this often whether other drivers have committed the rest.
_ASK_EVERY_S = 5.0


class PredictionWriters:
    """Gathers predictions and writes the files of shards: in this process, or in Ray actors where rows may be wide."""

    def __init__(self, local: ShardWriter | None, handles: list[Any]) -> None:
        self._local = local
        self.handles = handles

    @classmethod
    def start(
        cls, store: Store, config: JobConfig, attempt: str, tries_column: str, generation: int, *, custom: bool
    ) -> PredictionWriters:
        """Start the writers of one attempt: Ray actors where a custom predictor's columns may be of any width."""
        options = (attempt, config.output.compression, tries_column, generation)
        if not custom:
            return cls(ShardWriter(store, *options), [])
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Beside the driver: an attempt that loses a writer ends, and the driver's node is none that may go at any time.
        # Not soft: with that, Ray was seen to put one on a worker, which was killed.
        beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        count = -(-config.inference.actors // _ACTORS_PER_WRITER)
        remote = ray.remote(num_cpus=0, max_restarts=0)(ShardWriter).options(scheduling_strategy=beside)
        return cls(None, [remote.remote(store, *options) for _ in range(count)])

    def close(self) -> None:
        """End the actors. In a process that stays in the cluster, as a notebook does, they would hold their rows in memory."""
        if self.handles:
            import ray

            for handle in self.handles:
                with contextlib.suppress(Exception):  # it has ended before, or Ray has
                    ray.kill(handle)

    def add(self, table: pa.Table) -> None:
        """Gather the predictions in rows that came back to the driver."""
        if self._local is None:
            return
        good = table.select(["shard", "row", *table.column_names[len(RESULT_SCHEMA) :]])
        if table["error_type"].null_count < table.num_rows:
            good = good.filter(pc.is_null(table["error_type"]))
        for shard, rows in by_shard(good):
            self._local.add(shard, rows)

    def write(self, shard: int, errors: pa.Table, retry_shard: RetryShard | None) -> Commit:
        """Write the files of a complete shard; return its commit, not made yet."""
        if self._local is not None:
            return self._local.write(shard, errors, retry_shard)
        import ray

        handle = self.handles[shard % len(self.handles)]
        commit: Commit = ray.get(handle.write.remote(shard, errors, retry_shard))
        return commit


@dataclass(frozen=True)
class _CommitOutcome:
    """The outcome of committing a shard.

    Attributes:
        commit: The commit that counts.
        own: Whether it is this driver's.
        seconds: Time that it took.
        misfits: Errors that only the writer has seen.
    """

    commit: Commit
    own: bool
    seconds: float
    misfits: dict[str, dict[str, int]]


class Committer:
    """Writes and commits complete shards beside the main loop, a few at a time.

    Args:
        ledger: Of the job.
        writers: Have the predictions.
        on_commit: Called with each commit, whether it is this driver's, and the seconds that writing it took.
        retried: Shards of which only some rows are done.
        tally: Counts, to which rows are added that turned out not to fit the job's columns.
        pending: Generation of the commit that each of the other shards is to get.
    """

    def __init__(
        self,
        ledger: Ledger,
        writers: PredictionWriters,
        on_commit: Callable[[Commit, bool, float], None],
        retried: dict[int, RetryShard] | None = None,
        tally: Tally | None = None,
        pending: dict[int, int] | None = None,
    ) -> None:
        self.lost_race = False
        self.blocked_s = 0.0
        """Seconds for which :meth:`add` waited for the store."""
        self._ledger = ledger
        self._writers = writers
        self._on_commit = on_commit
        self._retried = retried or {}
        self._generations = (pending or {}) | {shard: again.generation for shard, again in self._retried.items()}
        self._pool = ThreadPoolExecutor(_MAX_UNCOMMITTED // 2, thread_name_prefix="commit")
        self._tally = tally or Tally()
        self._running: deque[Future[_CommitOutcome]] = deque()
        self._asked = 0.0

    def __enter__(self) -> Committer:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An interrupted job keeps all that is complete. If it stops for another reason, what is under way is finished, and the
        # next attempt does again what waits.
        interrupted = error_type is not None and issubclass(error_type, KeyboardInterrupt)
        self._pool.shutdown(wait=True, cancel_futures=error_type is not None and not interrupted)
        for future in self._running:
            if not future.cancelled() and future.exception() is None:
                self._tell(future.result())

    def add(self, shard: int, part: OpenShard) -> None:
        """Start to commit a complete shard; wait where too many are on their way."""
        self._running.append(self._pool.submit(self._write_and_commit, shard, part.error_table()))
        begun = time.monotonic()
        self._collect(_MAX_UNCOMMITTED)
        self.blocked_s += time.monotonic() - begun

    def wait(self) -> None:
        """Wait until everything is committed; raise what went wrong."""
        self._collect(0)

    def everything_committed(self, shards: int) -> bool:
        """Return whether this and other drivers together have committed all; ask the store every few seconds at most."""
        if time.monotonic() - self._asked < _ASK_EVERY_S:
            return False
        self._asked = time.monotonic()
        committed = self._ledger.generations()
        return len(committed) == shards and all(committed[s] >= least for s, least in self._generations.items())

    def _collect(self, allowed: int) -> None:
        """Take the outcomes of commits that are done; wait until at most ``allowed`` are under way."""
        while self._running and (len(self._running) > allowed or self._running[0].done()):
            self._tell(self._running.popleft().result())

    def _tell(self, outcome: _CommitOutcome) -> None:
        # Before the callback, which shows the counts.
        self._tally.add_errors(outcome.misfits)
        self._on_commit(outcome.commit, outcome.own, outcome.seconds)

    def _write_and_commit(self, shard: int, errors: pa.Table) -> _CommitOutcome:
        begun = time.monotonic()
        retry_shard = self._retried.get(shard)
        commit, own = self._commit(shard, errors, retry_shard)
        misfits = _unknown_errors(commit.errors_by, errors, retry_shard) if own else {}
        return _CommitOutcome(commit, own, time.monotonic() - begun, misfits)

    def _commit(self, shard: int, errors: pa.Table, retry_shard: RetryShard | None) -> tuple[Commit, bool]:
        # Before anything is written that another job in this output would take for its own.
        self._ledger.begin_committing()
        try:
            commit = self._writers.write(shard, errors, retry_shard)
        except AccountingError:
            self._ledger.refresh([shard])
            newest = self._ledger.generations().get(shard, 0)
            if retry_shard is None or newest <= retry_shard.commit.generation:
                raise
            if newest < retry_shard.generation:
                raise InfrastructureError(
                    f"{shard_name(shard, newest)} was committed before this attempt began, and the store's listing did not show it",
                    "Start the same command again; it resumes.",
                ) from None
            # Another driver has finished this retry, and swept the errors that it took the place of.
            self.lost_race = True
            return self._ledger.commits({shard: retry_shard.generation})[0], False
        own = self._ledger.commit(commit)
        if not own:
            self.lost_race = True
            # Without this a reader of the folder would find the loser's rows beside the winner's.
            files_before = retry_shard.commit.files if retry_shard else ()
            self._ledger.store.delete([file.path for file in commit.files if file not in files_before])
        return commit, own


def _unknown_errors(
    committed: dict[str, dict[str, int]], errors: pa.Table, retry_shard: RetryShard | None
) -> dict[str, dict[str, int]]:
    """Return the errors of a commit beyond those that were known before it was written."""
    known = Tally()
    known.add_errors(retry_shard.commit.errors_by if retry_shard else {})
    known.remove_errors(retry_shard.errors_by if retry_shard else {})
    known.add_errors(count_errors(errors))
    unknown: dict[str, dict[str, int]] = {}
    for stage, counts in committed.items():
        for error_type, count in counts.items():
            more = count - known.errors_by.get(stage, {}).get(error_type, 0)
            if more > 0:
                unknown.setdefault(stage, {})[error_type] = more
    return unknown
