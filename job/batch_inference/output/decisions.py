"""Decisions that the actors of a job share: the first answer is recorded, and holds for all of them.

Records lie in ``_decisions/`` of the output and are created if absent, so that actors, attempts and machines agree, and
people can read the reason. A job without them works; each actor then decides again.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from batch_inference.errors import BatchInferenceError
from batch_inference.output.records import now
from batch_inference.storage.store import Store

log = logging.getLogger(__name__)


class Decisions:
    """The decisions of one output folder.

    Args:
        store: The output folder; None to record nothing, as for predictors without a job.
    """

    def __init__(self, store: Store | None) -> None:
        self._store = store

    def known(self, name: str) -> dict[str, Any] | None:
        """Return the record of a decision; None if there is none or it is unreadable."""
        if self._store is None:
            return None
        try:
            data = self._store.get_or_none(_path(name))
            record = None if data is None else json.loads(data)
        except (BatchInferenceError, ValueError) as exc:
            log.warning("%s of the output cannot be read: %s", _path(name), exc)
            return None
        return record if isinstance(record, dict) else None

    def decide(self, name: str, record: dict[str, Any]) -> dict[str, Any] | None:
        """Record a decision unless there is one.

        Returns:
            The record that holds, this one or another actor's; None if it cannot be recorded, so that actors could
            disagree.
        """
        if self._store is None:
            return record
        try:
            if self._store.create(_path(name), json.dumps({**record, "decided_at": now()}, indent=1).encode()):
                return record
        except BatchInferenceError as exc:
            log.warning("%s of the output cannot be written: %s", _path(name), exc)
            return None
        return self.known(name)


def _path(name: str) -> str:
    return f"_decisions/{re.sub(r'[^A-Za-z0-9.-]+', '-', name)}.json"
