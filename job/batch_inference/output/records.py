"""The records of the output folder: job, commit, data file, retry; each is one JSON document."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import PurePosixPath
from typing import Any

from batch_inference.config import with_new_names

#: Format of ``_job.json`` and of errors files. Format 1 has earlier names: of some configuration keys, and of
#: ``tries``.
_FORMAT = 2
_FORMAT_OF_EARLIER_NAMES = 1
#: Folder of started markers and crash journals.
CRASH_JOURNAL = "_begun"


def now() -> str:
    """Return the current time in UTC, ISO 8601, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class DataFile:
    """One Parquet file that a commit names.

    Attributes:
        path: Its path in the output folder.
        rows: Number of rows.
        bytes: Size in bytes.
        sha256: Digest of its content, in hexadecimal.
        open: Columns whose type the job did not know when the file was written. They are stored as text, and hold only
            nulls and empty lists.
    """

    path: str
    rows: int
    bytes: int
    sha256: str
    open: tuple[str, ...] = ()


@dataclass(frozen=True)
class Commit:
    """The record that a shard is done.

    Attributes:
        shard: Number of the shard.
        rows: Inputs of the shard; always ``predictions + errors``.
        predictions: Rows with a prediction.
        errors: Rows with an error.
        files: Its data files: at most one file of predictions for the first run and for each retry, and at most one of
            errors.
        attempt: Identifier of the attempt that made it.
        errors_by: ``{stage: {error_type: count}}``.
        committed_at: When it was made, UTC, ISO 8601.
        generation: Number of the retry that it belongs to, 0 for the first run.
    """

    shard: int
    rows: int
    predictions: int
    errors: int
    files: tuple[DataFile, ...]
    attempt: str
    errors_by: dict[str, dict[str, int]] = field(default_factory=dict)
    committed_at: str = ""
    generation: int = 0

    def to_json(self) -> bytes:
        """Return the bytes of ``_commits/shard-N.json``."""
        raw = asdict(self)
        for file in raw["files"]:
            if not file["open"]:
                del file["open"]
        return json.dumps(raw, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Commit:
        """Read the bytes that :meth:`to_json` wrote; raise ValueError, KeyError or TypeError for any others."""
        raw = json.loads(data)
        raw["files"] = tuple(DataFile(**{**f, "open": tuple(f.get("open", ()))}) for f in raw["files"])
        return cls(**raw)


@dataclass(frozen=True)
class JobRecord:
    """The content of ``_job.json``: made once, never changed, replaced only while nothing is committed.

    Attributes:
        config: The configuration, as JSON has it.
        fingerprint: Digest of ``identity``.
        identity: Everything that makes two rows comparable, by name.
        shards: Number of shards.
        rows: Number of inputs.
        plan: Path of the plan's archive.
        versions: Versions of the program and of its most important libraries.
        created_at: UTC, ISO 8601.
        skipped: Files that listing left out, by file name ending or by kind.
        duplicates: Inputs that were listed more than once and are processed once.
        repeated: Lines of the user's manifest that name an input again.
        passthrough: Columns of the user's manifest that go to the output unchanged.
        format: Version of this format.
        replaces: The plan of the job whose output this one took over, "" if it was the first.
    """

    config: dict[str, Any]
    fingerprint: str
    identity: dict[str, str]
    shards: int
    rows: int
    plan: str
    versions: dict[str, str]
    created_at: str
    skipped: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    repeated: int = 0
    passthrough: tuple[str, ...] = ()
    format: int = _FORMAT
    replaces: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the content of ``_job.json``."""
        raw = asdict(self)
        if not self.replaces:
            del raw["replaces"]  # earlier versions do not know the key
        return raw

    @classmethod
    def from_json(cls, data: bytes | dict[str, Any]) -> JobRecord:
        """Read the content that :meth:`to_json` returned.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: If it is any other content.
        """
        raw = json.loads(data) if isinstance(data, bytes) else dict(data)
        if raw.get("format") not in (_FORMAT_OF_EARLIER_NAMES, _FORMAT):
            raise ValueError(
                f"format {raw.get('format')!r}, this version reads {_FORMAT_OF_EARLIER_NAMES} and {_FORMAT}"
            )
        if raw["format"] == _FORMAT_OF_EARLIER_NAMES:
            raw |= {"config": with_new_names(raw["config"]), "identity": _identity_with_new_names(raw["identity"])}
        raw["passthrough"] = tuple(raw["passthrough"])
        return cls(**raw)

    @property
    def tries_column(self) -> str:
        """Column of errors files that counts how often a row was tried; an output keeps the name it began with."""
        return "attempts" if self.format == _FORMAT_OF_EARLIER_NAMES else "tries"

    @property
    def successor_path(self) -> str:
        """Path of the object that says whether this plan has commits, or which job has replaced it."""
        return f"_jobs/{PurePosixPath(self.plan).stem}.json"

    def rows_of(self, shard: int) -> int:
        """Return the number of inputs of a shard."""
        return min(self.shard_size, self.rows - shard * self.shard_size)

    @property
    def shard_size(self) -> int:
        """Number of inputs of every shard but the last."""
        return int(self.config["shard_size"])


@dataclass(frozen=True)
class Retry:
    """The content of ``_retries/N.json``, which begins retry N: made once, never changed.

    Attributes:
        generation: N, from 1.
        stages: Stages whose failed rows are retried; empty for all.
        error_types: Error types whose failed rows are retried; empty for all.
        retryable: Whether only rows that are marked ``retryable`` are retried.
        rows: Number of these rows when it began.
        attempt: Identifier of the attempt that began it.
        created_at: UTC, ISO 8601.
        types: Whether no row is retried, but files are written again with the job's column types.
    """

    generation: int
    stages: tuple[str, ...]
    error_types: tuple[str, ...]
    retryable: bool
    rows: int
    attempt: str
    created_at: str
    types: bool = False


def _identity_with_new_names(stored: dict[str, str]) -> dict[str, str]:
    """Return the identity of a job of format 1 with today's keys; its digest stays the job's fingerprint."""
    identity = dict(stored)
    if identity.pop("preprocess.exact", None) is not None:
        # The name of the decoder, a dash, and its version.
        identity["preprocess.decoder"] = identity["preprocess.pixels"].partition("-")[0]
    if "input.bytes_column" in identity:
        identity["input.image_column"] = identity.pop("input.bytes_column")
    return identity


def fingerprint(identity: dict[str, str]) -> str:
    """Return the SHA-256 of an identity's canonical JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
