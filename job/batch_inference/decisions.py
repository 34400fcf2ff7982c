"""What the actors of a job have found out about it: recorded once, the first one's answer holds for all.

Records lie in ``_decisions/`` of the output and are created if absent, so that actors, attempts and machines agree, and
people can read why. A job without them works; it only finds out again.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from batch_inference.errors import BatchInferenceError
from batch_inference.ledger import now
from batch_inference.storage import Store

log = logging.getLogger(__name__)


class Decisions:
    """The records of one output folder.

    Args:
        store: The output folder; None: nothing is recorded, as for predictors without a job.
    """

    def __init__(self, store: Store | None) -> None:
        self._store = store

    def known(self, name: str) -> dict[str, Any] | None:
        """The record of that name; None where there is none or it can't be read."""
        if self._store is None:
            return None
        try:
            data = self._store.get_or_none(_path(name))
            found = None if data is None else json.loads(data)
        except (BatchInferenceError, ValueError) as exc:
            log.warning("%s of the output cannot be read: %s", _path(name), exc)
            return None
        return found if isinstance(found, dict) else None

    def decide(self, name: str, record: dict[str, Any]) -> dict[str, Any] | None:
        """Records a finding unless there is one.

        Returns:
            The record that holds, ours or another's; None where it can't be recorded, so that nobody would agree.
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
