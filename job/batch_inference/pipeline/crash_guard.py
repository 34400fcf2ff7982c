"""Crash guard: find the images that kill an actor's process, with a journal in the output folder.

Ray restarts an actor whose process has died, and sends it the same tables again, without limit. From its second process on, an
actor writes down what it works on, so that its next process knows what killed this one.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import structlog

from batch_inference.errors import InfrastructureError, RowError
from batch_inference.models.batch_size import PADDING_ROW
from batch_inference.output.journal import CrashJournal
from batch_inference.pipeline.result_rows import join_predictions, result_table
from batch_inference.storage.store import Store

#: Rows of ``RESULT_SCHEMA``, and the predictions of those without an error, in their order; None: there are no predictions.
Predicted: TypeAlias = tuple[pa.Table, pa.Table | None]

# An image alone may be the victim of a lost node or of a neighbor's memory, so it gets a second try.
_TRIES_ALONE = 2
# After this many consecutive crashes the images are no longer the likely cause; the predictor or the node is.
_HOPELESS_CRASHES = 4


@dataclass(frozen=True)
class JournalConfig:
    """Configuration of an actor's crash journal.

    Attributes:
        store: The output folder.
        attempt: Identifier of the driver's attempt.
        gives_up: Whether consecutive crashes end the job; False for a retry, whose images are known to fail.
    """

    store: Store
    attempt: str
    gives_up: bool = True

    def journal(self) -> CrashJournal | None:
        """Open the journal of the actor that calls this; return None in its first process."""
        import ray

        context = ray.get_runtime_context()
        try:
            if not context.was_current_actor_reconstructed:
                return None
        except Exception as exc:  # Ray cannot be asked now; an unneeded journal does no harm
            structlog.get_logger().warning("unknown whether this actor had a process before", error=str(exc))
        return CrashJournal(self.store, str(context.get_actor_id()), self.attempt, _TRIES_ALONE)


class CrashGuard:
    """Predicts tables so that a crash of the process costs no more than the image that causes it.

    A batch that a process has died of is predicted image by image. An image that two processes have died of alone is a failed
    row.

    Args:
        journal: The actor's.
        predict: Predicts a table of ``PREPARED_SCHEMA``.
        decodes: Whether ``predict`` also decodes, so that a row without pixels may still get some.
    """

    def __init__(
        self, journal: CrashJournal, predict: Callable[[pa.Table], Predicted], *, decodes: bool = False
    ) -> None:
        self._journal = journal
        self._predict = predict
        self._decodes = decodes

    def raise_if_hopeless(self) -> None:
        """Raise InfrastructureError if several images in a row have each killed a process."""
        if self._journal.fatal >= _HOPELESS_CRASHES:
            raise InfrastructureError(
                f"the process that runs the predictor died of {self._journal.fatal} images one after the other, each alone, on "
                f"node {platform.node()}",
                "Look in the actors' logs for what it died of: a GPU that does not work, or too little memory, ends with the "
                "node, and the same command resumes; a fault of the predictor's own, such as os._exit, has to be fixed in the class.",
            )

    def predict(self, table: pa.Table) -> Predicted:
        """Predict a table, and record it in the journal until that is done.

        A restarted task sends batches again that are done, so the journal keeps what it knows of each.
        """
        if not table.num_rows:
            return self._predict(table)
        # The batch is named by its first row that stands for an input.
        first = pc.index(pc.not_equal(table["row"], PADDING_ROW), True).as_py()
        if first < 0:
            return self._predict(table)
        batch = f"batch {table['shard'][first]} {table['row'][first]} {table.num_rows}"
        if self._journal.crash_count(batch):
            return self._one_by_one(table)
        return self._recorded(batch, table)

    def _one_by_one(self, table: pa.Table) -> Predicted:
        """Predict each row of a table alone; a row that has killed enough processes fails."""
        results, predictions = [], []
        for index in range(table.num_rows):
            row = table.slice(index, 1)
            if not self._decodes and not row["pixels"][0].is_valid:
                results.append(self._predict(row)[0])  # it has failed before and cannot crash the predictor
                continue
            image = f"image {row['shard'][0]} {row['row'][0]}"
            if self._journal.crash_count(image) < _TRIES_ALONE:
                result, prediction = self._recorded(image, row)
                predictions.append(prediction)
            else:
                result = _crashed(row)
            results.append(result)
        return pa.concat_tables(results), join_predictions(predictions)

    def _recorded(self, step: str, table: pa.Table) -> Predicted:
        self._journal.begin(step)
        predicted = self._predict(table)
        self._journal.succeeded()
        return predicted


def _crashed(row: pa.Table) -> pa.Table:
    """Return a prepared row as a failed one."""
    message = f"the process that runs the predictor died of this image {_TRIES_ALONE} times, when it was alone"
    failure = RowError("infer", "PREDICTOR_CRASH", message).error
    return result_table(row, {0: failure}, np.zeros(1, np.float32))
