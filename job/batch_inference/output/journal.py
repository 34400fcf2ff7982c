"""Crash journals: record in the output folder what each task or actor works on.

After a crash the next process finds there what killed the one before. The crashed process itself cannot write anything.
"""

from __future__ import annotations

import json
from collections import Counter

from batch_inference.output.records import CRASH_JOURNAL
from batch_inference.storage.store import Store


class StartedMarker:
    """Tells a task whether an earlier one of the same name has begun and not ended.

    Args:
        store: The output folder.
        name: Name of the work.
        attempt: Identifier of the attempt; markers of other attempts do not count.
    """

    def __init__(self, store: Store, name: str, attempt: str) -> None:
        self._store = store
        self._path = f"{CRASH_JOURNAL}/{name}-{attempt}"

    def begin(self) -> bool:
        """Create the marker; return whether it existed, so that an earlier task has crashed."""
        return not self._store.create(self._path, b"begun")

    def end(self) -> None:
        """Delete the marker."""
        self._store.delete([self._path])


class CrashJournal:
    """The steps at which an actor's processes have crashed: one small object, written before each step.

    Args:
        store: The output folder.
        name: Name of the actor.
        attempt: Identifier of the attempt.
        fatal_at: Number of crashes after which a step is fatal.

    Attributes:
        fatal: Number of fatal steps in a row, with no success in between.
    """

    def __init__(self, store: Store, name: str, attempt: str, fatal_at: int) -> None:
        self._store = store
        self._path = f"{CRASH_JOURNAL}/actor-{name}-{attempt}.json"
        record = json.loads(store.get_or_none(self._path) or b"{}")
        self._crashes: Counter[str] = Counter(record.get("deaths", {}))
        self.fatal: int = record.get("fatal", 0)
        if step := record.get("step"):
            self._crashes[step] += 1
            self.fatal += self._crashes[step] == fatal_at

    def crash_count(self, step: str) -> int:
        """Return how many processes have crashed during a step, because of it or by chance."""
        return self._crashes[step]

    def begin(self, step: str) -> None:
        """Record that a step begins."""
        record = {"step": step, "deaths": self._crashes, "fatal": self.fatal}
        self._store.put(self._path, json.dumps(record).encode())

    def succeeded(self) -> None:
        """Note that the step ended without a crash; the next :meth:`begin` records it."""
        self.fatal = 0
