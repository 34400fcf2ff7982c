"""What was begun and has not ended, remembered in the output folder, where the death of a process does not reach."""

from __future__ import annotations

import json
from collections import Counter

from batch_inference.ledger import BEGUN
from batch_inference.storage import Store


class Mark:
    """Tells a task whether one before it was begun and did not end.

    Args:
        store: The output folder.
        name: Of what is begun.
        attempt: Of the job's driver; what another attempt has begun says nothing.
    """

    def __init__(self, store: Store, name: str, attempt: str) -> None:
        self._store = store
        self._path = f"{BEGUN}/{name}-{attempt}"

    def begin(self) -> bool:
        """Leaves the mark; whether there was one."""
        return not self._store.create(self._path, b"begun")

    def end(self) -> None:
        """Takes it away."""
        self._store.delete([self._path])


class Journal:
    """What an actor was doing whenever a process of its died: one small object, written before each step.

    Nobody can write it afterwards.

    Args:
        store: The output folder.
        name: Of the actor.
        attempt: Of the job's driver.
        fatal_at: After so many deaths a step is fatal.

    Attributes:
        fatal: Steps that were found to be fatal with none between them that went well.
    """

    def __init__(self, store: Store, name: str, attempt: str, fatal_at: int) -> None:
        self._store = store
        self._path = f"{BEGUN}/actor-{name}-{attempt}.json"
        kept = json.loads(store.get_or_none(self._path) or b"{}")
        self._deaths: Counter[str] = Counter(kept.get("deaths", {}))
        self.fatal: int = kept.get("fatal", 0)
        if step := kept.get("step"):
            self._deaths[step] += 1
            self.fatal += self._deaths[step] == fatal_at

    def deaths(self, step: str) -> int:
        """How many processes have died in a step, by it or by chance."""
        return self._deaths[step]

    def begin(self, step: str) -> None:
        """Says that a step is begun."""
        record = {"step": step, "deaths": self._deaths, "fatal": self.fatal}
        self._store.put(self._path, json.dumps(record).encode())

    def went_well(self) -> None:
        """Says that the process has lived through the step; kept with the next one."""
        self.fatal = 0
