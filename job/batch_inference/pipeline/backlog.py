"""Read how many rows wait before the actor pool from Ray Data's executor."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

#: Seconds between updates: Ray exports every ten seconds, and forgets a gauge that was not set for twenty.
INTERVAL_S = 5.0
#: Part of the actor pool's operator name in Ray Data.
ACTOR_CLASS = "InferenceActor"


@dataclass
class _Queue:
    blocks: int = 0


#: Blocks that wait for an actor, as last counted in this process.
input_queue = _Queue()


class BacklogCallback:
    """Execution callback, constructed by Ray Data, that counts the blocks that wait for an actor."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def before_execution_starts(self, executor: Any) -> None:
        """Do nothing."""

    def after_execution_succeeds(self, executor: Any) -> None:
        """Do nothing."""

    def after_execution_fails(self, executor: Any, error: Exception) -> None:
        """Do nothing."""

    def on_execution_step(self, executor: Any) -> None:
        """Update :data:`input_queue` every few seconds; Ray Data calls this many times a second."""
        if (now := time.monotonic()) < self._next_s:
            return
        self._next_s = now + INTERVAL_S / 2
        # None of these names is part of Ray's public interface, and a job is worth more than a metric.
        with contextlib.suppress(Exception):
            input_queue.blocks = sum(
                state.total_enqueued_input_blocks()
                for operator, state in executor._topology.items()
                if ACTOR_CLASS in operator.name
            )
