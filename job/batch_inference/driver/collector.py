"""Count the rows that came back, and tell when a shard is complete."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.errors import (
    NOT_TRIED,
    PREDICTOR_ERROR_TYPES,
    STORE_ERROR_TYPES,
    SYSTEMIC_ERROR_TYPES,
    BatchInferenceError,
    InfrastructureError,
)
from batch_inference.output import manifest
from batch_inference.output.tally import Tally, count_errors, systemic_failure

ERROR_COLUMNS = ("row", "stage", "error_type", "message", "retryable", "traceback")


def by_shard(table: pa.Table) -> list[tuple[int, pa.Table]]:
    """Split rows by their ``shard``, in order of the shards; most tables hold one, which is not copied."""
    shards = table["shard"].to_numpy()
    distinct = np.unique(shards).tolist()
    if len(distinct) == 1:
        return [(distinct[0], table)]
    return [(shard, table.filter(pa.array(shards == shard))) for shard in distinct]


@dataclass
class OpenShard:
    """A shard of which rows are still missing.

    Attributes:
        seen: True for each row that is there, bool (n,); rows that are not to be done are there from the start.
        errors: Tables of failed rows.
        to_do: Number of rows to be done.
        failed: Number of these rows that failed.
        systemic: Number of failed rows that failed for a systemic reason.
        untried: Whether some rows were given up without being tried.
    """

    seen: np.ndarray
    errors: list[pa.Table] = field(default_factory=list)
    to_do: int = 0
    failed: int = 0
    systemic: int = 0
    untried: bool = False

    @property
    def complete(self) -> bool:
        """Whether every row came back."""
        return bool(self.seen.all())

    def error_table(self) -> pa.Table:
        """Return all failed rows, columns ``ERROR_COLUMNS``."""
        return pa.concat_tables(self.errors)


class Collector:
    """Takes result rows in any order and tells which shards they complete.

    Shards without a prediction, in which a row failed for a systemic reason, are held back until other rows show that the
    store answers and the predictor works; where none does, the job stops with that one reason instead of writing it once
    for each image. An image that cannot be decoded shows that the store answers, and says nothing of the predictor.

    Of failed rows that run again, nothing is held back: there is an error in their place already, and that the predictor
    fails on them is known.

    Args:
        rows: Number of rows to be done, by shard.
        tally: Counts, updated here.
        chosen: Row numbers to be done, of shards of which these are not all.
        worked: Whether the predictor has worked in an earlier attempt.
    """

    # After this many systemic failures with nothing else between them, single images are no longer the likely cause.
    WINDOW = 128

    def __init__(
        self, rows: dict[int, int], tally: Tally, chosen: dict[int, np.ndarray] | None = None, *, worked: bool = False
    ) -> None:
        self._rows = rows
        self._chosen = chosen or {}
        self._open: dict[int, OpenShard] = {}
        self._held: dict[int, OpenShard] = {}
        self._untried: list[int] = []
        # For each of the last rows, whether it failed because of the store; for those that reached the predictor, because of that.
        self._store_failed: deque[bool] = deque(maxlen=self.WINDOW)
        self._predictor_failed: deque[bool] = deque([False] * worked, maxlen=self.WINDOW)
        # Stage, error type, message and traceback of the last systemic failure of each.
        self._last_failures: dict[Literal["store", "predictor"], tuple[str, str, str, str | None]] = {}
        self.tally = tally

    def add(self, table: pa.Table) -> list[tuple[int, OpenShard]]:
        """Count rows of ``RESULT_SCHEMA``.

        Returns:
            The shards that are complete now and may be committed.

        Raises:
            UserError: If all of the last rows failed with denied access or in the predictor.
            InfrastructureError: If all of the last rows failed with an unreachable store, or a row came back twice or is not in its
                shard.
        """
        failed = pc.is_valid(table["error_type"])
        self._count(table, failed)
        complete: list[tuple[int, OpenShard]] = []
        for shard, rows in by_shard(table):
            complete += self._add_shard(shard, rows)
        self._check_systemic(table)
        if self._held and self._is_healthy:
            complete += self._held.items()
            self._held = {}
        return complete

    def finish(self) -> None:
        """Check, when all rows are in, that no shard is left open.

        Raises:
            UserError: If every row of this attempt failed with denied access or in the predictor.
            InfrastructureError: If every row failed because of the store, or rows never came back.
        """
        if self._untried or (self._held and not self._is_healthy):
            raise self._systemic_failure()
        if self._open:
            shard, part = next(iter(self._open.items()))
            raise InfrastructureError(
                f"{len(self._open)} shards did not come back complete, {manifest.shard_name(shard)} has "
                f"{int(part.seen.sum())} of {len(part.seen)} rows",
                "They are not committed; running the same command again does them from scratch.",
            )

    def _count(self, table: pa.Table, failed: pa.ChunkedArray) -> None:
        tally = self.tally
        tally.rows += table.num_rows
        tally.seen += table.num_rows
        for name in ("bytes", "retries", "fetch_s", "decode_s", "infer_s"):
            setattr(tally, name, getattr(tally, name) + (pc.sum(table[name]).as_py() or 0))
        if table["error_type"].null_count < table.num_rows:
            tally.add_errors(count_errors(table.filter(failed)))

    def _add_shard(self, shard: int, table: pa.Table) -> list[tuple[int, OpenShard]]:
        if shard not in self._open:
            if shard not in self._rows:
                raise InfrastructureError(
                    f"rows of {manifest.shard_name(shard)} came back, which is complete or was not to be done",
                    "What is committed stands; running the same command again does the rest.",
                )
            to_do = self._rows.pop(shard)
            seen = np.zeros(to_do, bool)
            if shard in self._chosen:
                seen = np.ones(int(self._chosen[shard].max()) + 1, bool)
                seen[self._chosen[shard]] = False
            self._open[shard] = OpenShard(seen, [table.select(list(ERROR_COLUMNS)).slice(0, 0)], to_do)
        part = self._open[shard]
        rows = table["row"].to_numpy()
        if rows.max(initial=0) >= len(part.seen) or part.seen[rows].any() or len(np.unique(rows)) < len(rows):
            # Ray matches the blocks of a task that it runs again by their number, and failures move the ends of blocks.
            raise InfrastructureError(
                f"a row of {manifest.shard_name(shard)} came back twice or is not one of its rows",
                "The shard is not committed; running the same command again does it from scratch.",
            )
        part.seen[rows] = True
        if table["error_type"].null_count < len(rows):
            failed = table.select(list(ERROR_COLUMNS)).filter(pc.is_valid(table["error_type"]))
            error_types = failed["error_type"].to_pylist()
            part.errors.append(failed)
            part.untried |= NOT_TRIED in error_types
            part.failed += len(error_types)
            part.systemic += sum(error_type in SYSTEMIC_ERROR_TYPES for error_type in error_types)
        if not part.complete:
            return []
        del self._open[shard]
        if part.untried:
            self._untried.append(shard)
            return []
        if part.systemic and part.failed == part.to_do and shard not in self._chosen:
            self._held[shard] = part
            return []
        return [(shard, part)]

    def _check_systemic(self, table: pa.Table) -> None:
        """Note whether the store and the predictor work; raise where all of the last rows say they do not."""
        if table["error_type"].null_count == table.num_rows:
            succeeded = [False] * min(table.num_rows, self.WINDOW)
            self._store_failed.extend(succeeded)
            self._predictor_failed.extend(succeeded)
            return
        error_types, stages = table["error_type"].to_pylist(), table["stage"].to_pylist()
        self._store_failed.extend(error_type in STORE_ERROR_TYPES for error_type in error_types)
        self._predictor_failed.extend(
            error_type in PREDICTOR_ERROR_TYPES
            for error_type, stage, shard in zip(error_types, stages, table["shard"].to_pylist(), strict=True)
            if error_type is None or (stage in ("infer", "postprocess") and shard not in self._chosen)
        )
        for index, error_type in enumerate(error_types):
            if error_type in SYSTEMIC_ERROR_TYPES and error_type != NOT_TRIED:
                self._last_failures["store" if error_type in STORE_ERROR_TYPES else "predictor"] = (
                    stages[index],
                    error_type,
                    table["message"][index].as_py(),
                    table["traceback"][index].as_py(),
                )
        if self._all_failed(self._store_failed) or self._all_failed(self._predictor_failed):
            raise self._systemic_failure()

    @property
    def _is_healthy(self) -> bool:
        """Whether the store answers and the predictor works, judged by the last rows."""
        return not (all(self._store_failed) or (self._predictor_failed and all(self._predictor_failed)))

    def _all_failed(self, window: deque[bool]) -> bool:
        return len(window) == self.WINDOW and all(window)

    def _systemic_failure(self) -> BatchInferenceError:
        cause: Literal["store", "predictor"] = "store"
        if self._all_failed(self._store_failed):
            failed = f"every one of the last {self.WINDOW} rows"
        elif self._untried:
            failed = f"every row of {manifest.shard_name(self._untried[0])}"
        elif self._all_failed(self._predictor_failed):
            cause, failed = "predictor", f"every one of the last {self.WINDOW} images that came to the predictor"
        elif self._predictor_failed and all(self._predictor_failed):
            cause, failed = "predictor", "every image that could be read"
        else:
            failed = "everything"
        stage, error_type, message, traceback = self._last_failures.get(cause) or (
            "fetch",
            "STORE_UNREACHABLE",
            "",
            None,
        )
        return systemic_failure(failed, stage, error_type, message, traceback)
