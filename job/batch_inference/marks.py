"""What was begun and has not ended, remembered in the output folder, where the death of a process does not reach."""

from __future__ import annotations

from batch_inference.ledger import BEGUN
from batch_inference.storage import Store


class Marks:
    """The marks of one attempt.

    Args:
        store: The output folder.
        attempt: Of the job's driver; what another attempt has begun says nothing.
    """

    def __init__(self, store: Store, attempt: str) -> None:
        self._store = store
        self._attempt = attempt

    def begin(self, what: str, most: int = 1) -> int:
        """Marks that something is begun.

        Args:
            what: A name for it.
            most: Where to stop counting.

        Returns:
            How often it was begun before without an end, ``most`` for so often and more.
        """
        for number in range(most):
            if self._store.create(self._path(what, number), b"begun"):
                return number
        return most

    def end(self, what: str, most: int = 1) -> None:
        """Takes the marks of something away, of which there are no more than ``most``."""
        self._store.delete([self._path(what, number) for number in range(most)])

    def _path(self, what: str, number: int) -> str:
        return f"{BEGUN}/{what}-{self._attempt}-{number}"
