"""From complete shards to commits: gathering predictions, writing files, committing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.collection import OpenShard, Tally, by_shard, count_errors
from batch_inference.config import JobConfig
from batch_inference.errors import CountsDoNotClose, SystemFault
from batch_inference.generations import Again
from batch_inference.inference import RESULT_SCHEMA
from batch_inference.ledger import Commit, Ledger, shard_name
from batch_inference.storage import Store
from batch_inference.writer import ShardWriter

# Shards that may be on their way to the store at the same time; more would only pile up in memory.
_CLOSING = 8
# CLIP-sized outputs of four actors are what one writer takes easily.
_ACTORS_PER_WRITER = 4


class Writers:
    """Where predictions are gathered: in this process, or in Ray actors where they may be wide."""

    def __init__(self, local: ShardWriter | None, handles: list[Any]) -> None:
        self._local = local
        self.handles = handles

    @classmethod
    def start(cls, store: Store, config: JobConfig, attempt: str, *, custom: bool) -> Writers:
        """Writers for one attempt: Ray actors where a custom predictor's columns may be of any width."""
        if not custom:
            return cls(ShardWriter(store, attempt, config.output.compression), [])
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Beside the driver: an attempt that loses a writer ends, and of the nodes that may go at any time the driver's is none.
        # Not soft: with that Ray was seen to put one on a worker, which was killed.
        beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        count = -(-config.inference.actors // _ACTORS_PER_WRITER)
        remote = ray.remote(num_cpus=0, max_restarts=0)(ShardWriter).options(scheduling_strategy=beside)
        return cls(None, [remote.remote(store, attempt, config.output.compression) for _ in range(count)])

    def keep(self, table: pa.Table) -> None:
        """Gathers the predictions in rows that came back to the driver."""
        if self._local is None:
            return
        good = table.select(["shard", "row", *table.column_names[len(RESULT_SCHEMA) :]])
        if table["error_type"].null_count < table.num_rows:
            good = good.filter(pc.is_null(table["error_type"]))
        for shard, mine in by_shard(good):
            self._local.add(shard, mine)

    def close(self, shard: int, errors: pa.Table, again: Again | None) -> Commit:
        """Writes a shard's files."""
        if self._local is not None:
            return self._local.close(shard, errors, again)
        import ray

        handle = self.handles[shard % len(self.handles)]
        commit: Commit = ray.get(handle.close.remote(shard, errors, again))
        return commit


@dataclass(frozen=True)
class _Closed:
    """What became of a shard: a commit, whether it is ours, the seconds that it took, and errors that only its writer has seen."""

    commit: Commit
    mine: bool
    seconds: float
    misfits: dict[str, dict[str, int]]


def _more(committed: dict[str, dict[str, int]], errors: pa.Table, again: Again | None) -> dict[str, dict[str, int]]:
    """Errors of a commit beyond those that were known before it was written."""
    known = Tally()
    known.add_errors(again.commit.errors_by if again else {})
    known.remove(again.errors_by if again else {})
    known.add_errors(count_errors(errors))
    more = {
        stage: {kind: count - known.errors_by.get(stage, {}).get(kind, 0) for kind, count in kinds.items()}
        for stage, kinds in committed.items()
    }
    return {stage: left for stage, kinds in more.items() if (left := {k: n for k, n in kinds.items() if n > 0})}


class Closing:
    """Writes and commits closed shards beside the main loop, so many at a time.

    Args:
        ledger: Of the job.
        writers: Where the predictions are.
        on_commit: Called with each commit, whether it is ours or another driver's, and the seconds that writing it took.
        again: Shards of which only some rows are done.
        tally: Counts, to which rows are added that turned out not to fit the job's columns.
    """

    def __init__(
        self,
        ledger: Ledger,
        writers: Writers,
        on_commit: Callable[[Commit, bool, float], None],
        again: dict[int, Again] | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.ledger = ledger
        self.lost_race = False
        self.blocked_s = 0.0
        """Seconds for which :meth:`add` waited for the store."""
        self._writers = writers
        self._on_commit = on_commit
        self._again = again or {}
        self._pool = ThreadPoolExecutor(_CLOSING // 2, thread_name_prefix="close")
        self._tally = tally or Tally()
        self._running: deque[Future[_Closed]] = deque()
        self._asked = 0.0

    def __enter__(self) -> Closing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Whoever interrupts a job keeps all that is complete. If it stops for another reason, what is under way is finished, and
        # what waits is done anew by the next attempt.
        self._pool.shutdown(wait=True, cancel_futures=kind is not None and not issubclass(kind, KeyboardInterrupt))
        for future in self._running:
            if not future.cancelled() and future.exception() is None:
                self._done(future.result())

    def add(self, shard: int, part: OpenShard) -> None:
        """Starts closing a shard; waits where too many are on their way."""
        self._running.append(self._pool.submit(self._close, shard, part.error_table()))
        begun = time.monotonic()
        self._reap(_CLOSING)
        self.blocked_s += time.monotonic() - begun

    def wait(self) -> None:
        """Waits until everything is committed; raises what went wrong."""
        self._reap(0)

    def everything_committed(self, shards: int) -> bool:
        """Whether this and other drivers together have committed all; asks the store every few seconds at most."""
        if time.monotonic() - self._asked < 5:
            return False
        self._asked = time.monotonic()
        there = self.ledger.generations()
        return len(there) == shards and all(there[s] >= again.generation for s, again in self._again.items())

    def _reap(self, allowed: int) -> None:
        while self._running and (len(self._running) > allowed or self._running[0].done()):
            self._done(self._running.popleft().result())

    def _done(self, closed: _Closed) -> None:
        # Before the callback, which shows the counts.
        self._tally.add_errors(closed.misfits)
        self._on_commit(closed.commit, closed.mine, closed.seconds)

    def _close(self, shard: int, errors: pa.Table) -> _Closed:
        begun = time.monotonic()
        commit, mine = self._commit(shard, errors)
        misfits = _more(commit.errors_by, errors, self._again.get(shard)) if mine else {}
        return _Closed(commit, mine, time.monotonic() - begun, misfits)

    def _commit(self, shard: int, errors: pa.Table) -> tuple[Commit, bool]:
        again = self._again.get(shard)
        # Before anything is written that another job in this output would take for its own.
        self.ledger.begin_committing()
        try:
            commit = self._writers.close(shard, errors, again)
        except CountsDoNotClose:
            self.ledger.look([shard])
            newest = self.ledger.generations().get(shard, 0)
            if again is None or newest <= again.commit.generation:
                raise
            if newest < again.generation:
                raise SystemFault(
                    f"{shard_name(shard, newest)} was committed before this attempt began, and the store's listing did not show it",
                    "Start the same command again; it resumes.",
                ) from None
            # Another driver has finished this retry, and swept the errors that it took the place of.
            self.lost_race = True
            return self.ledger.commits({shard: again.generation})[0], False
        mine = self.ledger.commit(commit)
        if not mine:
            self.lost_race = True
            # Without this the loser's rows would stand beside the winner's for whoever reads the folder.
            before = again.commit.files if again else ()
            self.ledger.store.delete([file.path for file in commit.files if file not in before])
        return commit, mine
