"""Weights files: fetched once per node, however many actors start there, and checked against a digest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import obstore

from batch_inference.config import StorageConfig
from batch_inference.errors import BatchInferenceError, InfrastructureError, UserError
from batch_inference.storage.failures import classify
from batch_inference.storage.store import open_bucket
from batch_inference.storage.uris import canonical_uri, display_uri, is_local, local_path, split_bucket

_CHUNK = 8 << 20
# Long enough to download many gigabytes over a slow connection.
_LOCK_S = 3600.0


def local_weights_file(location: str, storage: StorageConfig, sha256: str | None = None) -> Path:
    """Return the path of a weights file on this node's disk.

    A local file stays where it is. A remote file is downloaded into the node's cache once per version of the object, or once
    per digest if one is given, no matter how many processes ask at the same time.

    Args:
        location: Local path, ``file://``, ``s3://``, ``gs://`` or ``az://``.
        storage: Options to reach it.
        sha256: Expected digest in lower-case hexadecimal, or None to accept any content.

    Raises:
        UserError: If the file is missing, access is denied, or the digest differs.
        InfrastructureError: If the store fails, or another process holds the lock for more than an hour.
    """
    uri = canonical_uri(location)
    if is_local(uri):
        path = Path(local_path(uri))
        if not path.is_file():
            problem = "is a folder, not a file" if path.is_dir() else "does not exist"
            raise UserError(
                f"the weights file {display_uri(uri)} {problem}",
                "Check model.weights; a relative path starts at the current directory.",
            )
        if sha256 is not None:
            _check_digest(file_digest(path), sha256, location)
        return path
    name = uri.rpartition("/")[2]
    # If the digest is known, the name depends on it alone, and a cached file needs no network.
    version = sha256 or _object_version(uri, storage)
    key = hashlib.sha256(f"{uri}\n{version}".encode()).hexdigest()[:16]
    target = cache_folder() / f"{key}-{name}"
    with node_lock(key):
        if not target.is_file():
            partial = target.with_name(f".{target.name}.{uuid4().hex}")
            try:
                _download(uri, storage, partial)
                if sha256 is not None:
                    _check_digest(file_digest(partial), sha256, location)
                # Atomic: a process that is killed here leaves no partial file under the final name.
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
    return target


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file's content in lower-case hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return the node's cache folder: ``BATCH_INFERENCE_CACHE`` or ``~/.cache/batch-inference``, else one in /tmp.

    Raises:
        UserError: If none of them is writable.
    """
    chosen = os.environ.get("BATCH_INFERENCE_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    # Users of one machine cannot write to each other's folders, so the name has the user's number.
    fallback = Path(tempfile.gettempdir(), f"batch-inference-{os.getuid()}")
    candidates = [Path(chosen)] if chosen else [Path(home, "batch-inference")]
    for folder in [*candidates, fallback]:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            owned = folder.stat().st_uid == os.getuid() or folder != fallback
        except OSError:
            continue
        if owned and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise UserError(
        f"no cache folder can be written to, tried {', '.join(str(c) for c in [*candidates, fallback])}",
        "Set BATCH_INFERENCE_CACHE to a folder with room for the weights.",
    )


@contextlib.contextmanager
def node_lock(name: str) -> Iterator[None]:
    """Hold a lock that all processes of this node share. The system releases it if its holder dies.

    Raises:
        InfrastructureError: If another process holds it for more than an hour.
    """
    with (cache_folder() / f"{name}.lock").open("a") as file:
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise InfrastructureError(
                        f"another process of this node has held {file.name} for {_LOCK_S:,.0f} s",
                        "It downloads the weights, or hangs: `fuser` on that file names it.",
                    ) from None
                time.sleep(0.1)
        yield


def _object_version(uri: str, storage: StorageConfig) -> str:
    """Return ETag, size and time of an object, which change if its content is replaced."""
    root, key = split_bucket(uri)
    try:
        meta: Any = obstore.head(open_bucket(root, storage), key)
    except Exception as exc:
        raise _read_error(uri, storage, exc) from exc
    return f"{meta.get('e_tag')} {meta.get('size')} {meta.get('last_modified')}"


def _download(uri: str, storage: StorageConfig, target: Path) -> None:
    root, key = split_bucket(uri)
    try:
        # In chunks: weights may be larger than the memory that an actor has.
        stream = obstore.get(open_bucket(root, storage), key).stream(min_chunk_size=_CHUNK)
        with target.open("wb") as file:
            for chunk in stream:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        if exc.errno is not None and exc.filename is not None:
            raise InfrastructureError(
                f"cannot write {target}: {exc.strerror}", "Make room in the node's cache folder."
            ) from exc
        raise _read_error(uri, storage, exc) from exc
    except Exception as exc:
        raise _read_error(uri, storage, exc) from exc


def _read_error(uri: str, storage: StorageConfig, exc: Exception) -> Exception:
    if isinstance(exc, BatchInferenceError):
        return exc
    canonical = canonical_uri(uri)
    root = "file://" if is_local(canonical) else split_bucket(canonical)[0]
    return classify(exc, root, storage).job_error(f"cannot read the weights {uri}")


def _check_digest(actual: str, expected: str, location: str) -> None:
    if actual != expected:
        raise UserError(
            f"{location} has the SHA-256 {actual}, but model.sha256 says {expected}",
            "This is another file than expected: correct model.weights or model.sha256.",
        )
