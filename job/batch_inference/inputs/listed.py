"""The results of a listing: objects, kinds of what is left out, and the outputs of earlier jobs among the inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

# Kinds of what is left out, as they are counted beside file name endings.
FOLDER_MARKERS = "folder markers"
SPECIAL_FILES = "not regular files"
OUTPUT_FILES = "files of earlier outputs"
# Names that the program writes into an output folder, which may lie among the inputs.
OUTPUT_NAMES = frozenset(
    [
        "_job.json",
        "_schema.json",
        "_manifest",
        "_commits",
        "_retries",
        "_decisions",
        "_begun",
        "_probe",
        "_staging",
        "_report",
        "_SUCCESS",
        "_FAILED",
        "predictions",
        "errors",
    ]
)


class ListedObject(NamedTuple):
    """An object or local file that a listing has found.

    Attributes:
        uri: Its canonical URI.
        named: Whether it was named itself rather than found below what was named.
        etag_hash: See :mod:`batch_inference.storage.etags`; None for a local file, and if it is not known.
    """

    uri: str
    named: bool
    etag_hash: int | None


def count_skipped(skipped: dict[str, int], kind: str, number: int = 1) -> None:
    """Add to the counts of what is left out."""
    if number:
        skipped[kind] = skipped.get(kind, 0) + number


class OutputFolders:
    """Tell which of the listed folders are outputs of earlier jobs.

    Args:
        read_job: Returns the bytes of a folder's ``_job.json``, None if there is none.
    """

    def __init__(self, read_job: Callable[[str], bytes | None]) -> None:
        self._read_job = read_job
        self._known: dict[str, bool] = {}

    def is_output(self, folder: str) -> bool:
        """Return whether a folder is an output."""
        if folder not in self._known:
            try:
                job = json.loads(self._read_job(folder) or b"{}")
            except ValueError:
                job = None
            self._known[folder] = isinstance(job, dict) and {"fingerprint", "identity", "shards"} <= job.keys()
        return self._known[folder]

    def contain(self, path: str, start: int) -> bool:
        """Return whether the part of a path behind ``start`` leads into the files of a job's output."""
        parts = path[start:].split("/")
        if OUTPUT_NAMES.isdisjoint(parts):
            return False
        return any(
            part in OUTPUT_NAMES and self.is_output(path[:start] + "".join(f"{folder}/" for folder in parts[:index]))
            for index, part in enumerate(parts)
        )
