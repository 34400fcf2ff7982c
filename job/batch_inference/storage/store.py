"""Object stores and local folders behind one small interface.

Everything goes through obstore, which has conditional puts on every store, with one exception: inputs on local disks
are opened directly, because obstore refuses some file names that Linux allows. :mod:`fetcher` reads inputs.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import obstore
from obstore import exceptions as obx
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from batch_inference.config import JobConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.storage import names
from batch_inference.storage.addresses import bucket_address
from batch_inference.storage.causes import CREDENTIALS_REMEDIES, NO_HARD_LINKS, PUT_IF_ABSENT_REMEDY, FailureFacts
from batch_inference.storage.failures import classify, gather_facts, mark_reachable, short_message
from batch_inference.storage.names import is_utf8
from batch_inference.storage.uris import (
    WILDCARDS,
    canonical_uri,
    display_uri,
    is_local,
    local_path,
    split_bucket,
)

_STAGING_TRIES = 5
# As in :mod:`batch_inference.inputs.containers`.
_MEMBER = re.compile(r"\.(?:tar|parquet)#", re.IGNORECASE)
# Simultaneous writes of one name are answered with 409 until one has won; S3 asks clients to send them again.
_CONFLICTS = frozenset({"ConditionalRequestConflict", "OperationAborted"})
_CONFLICT_TRIES = 6
# Constants of Linux, from <fcntl.h> and <linux/fs.h>.
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_ODD_KEY = re.compile(r"(?:^|/)(?:\.{0,2})(?:/|$)")
#: Requests that do not depend on one another are sent together; a store answers each in some ten milliseconds.
PARALLEL_REQUESTS = 16


@dataclass(frozen=True)
class ObjectInfo:
    """One object in a listing: its path below the store's root, and its size in bytes."""

    path: str
    size: int


def file_uri(path: str) -> str:
    """Return the canonical URI of an absolute path that a function of the operating system returned."""
    return "file://" + names.text_of_path(path)


def resolve_uri(text: str) -> str:
    """Return the canonical URI of a location that a user named.

    URIs of local files may have percent escapes, as those of ``Path.as_uri()`` do. A file whose name is spelled like
    the URI comes first; only if there is none, and the decoded name leads to a file, the decoded name is used. The disk
    is asked only if there is an escape. Paths, and names in object stores, are never decoded.

    Raises:
        UserError: As :func:`canonical_uri` does.
    """
    uri = canonical_uri(text)
    if "%" not in uri or text[:5].lower() != "file:":
        return uri
    decoded = names.percent_decode(uri)
    if decoded is None or _exists(uri):
        return uri
    return decoded if _exists(decoded) else uri


def _exists(uri: str) -> bool:
    """Return whether a path exists; of a member its file, of a glob the folder before its first wildcard."""
    member = _MEMBER.search(uri)
    path = local_path(uri[: member.end() - 1] if member else uri)
    wildcard = WILDCARDS.search(path)
    return os.path.lexists(path) or bool(
        wildcard and os.path.lexists(path[: wildcard.start()].rpartition("/")[0] or "/")
    )


def key_problem(key: str) -> str:
    """Return why no request can name a key, "" if one can. Clients would ask for another key, or for none."""
    if not _ODD_KEY.search(key):
        return ""
    return (
        f"the key {key!r} has a part that is empty, '.' or '..', or a slash at its end, which cannot be asked for; "
        "copy the object to another name"
    )


def open_bucket(root: str, storage: StorageConfig, prefix: str = "") -> Any:
    """Return the obstore store of ``scheme://bucket``, below ``prefix``, with credentials from the environment.

    Raises:
        UserError: If the environment lacks what the store needs before the first request.
    """
    scheme, _, bucket = root.partition("://")
    if scheme == "file":
        return LocalStore(prefix or "/", mkdir=False)
    address = bucket_address(scheme, storage)
    endpoint = address.endpoint
    options: dict[str, Any] = {
        "client_options": {
            "timeout": timedelta(seconds=storage.timeout_s),
            "connect_timeout": timedelta(seconds=min(10.0, storage.timeout_s)),
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
        },
        "retry_config": {
            "max_retries": storage.max_retries,
            "retry_timeout": timedelta(seconds=storage.retry_timeout_s),
            "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 2},
        },
    }
    authorities = _authorities(scheme)
    if authorities is not None:
        options["client_options"]["root_certificate"] = authorities
    if storage.anonymous:
        options["skip_signature"] = True
    if endpoint:
        options["base_url" if scheme == "gs" else "endpoint"] = endpoint
    if scheme == "s3":
        options |= {"region": address.region, **address.keys}
    store_type: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    try:
        return store_type(bucket, prefix=prefix or None, **options)
    except Exception as exc:
        raise UserError(f"cannot open {root}: {exception_line(exc)}", CREDENTIALS_REMEDIES[scheme]) from None


def _authorities(scheme: str) -> bytes | None:
    """Read the certificates that are trusted besides the system's; obstore itself knows only ``SSL_CERT_FILE``.

    Raises:
        UserError: If the file is unreadable.
    """
    variables = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE") if scheme == "s3" else ("REQUESTS_CA_BUNDLE",)
    for variable in variables:
        file = os.environ.get(variable)
        if file and not Path(file).is_dir():
            try:
                return Path(file).read_bytes()
            except OSError as exc:
                raise UserError(
                    f"{variable} is {file}, which cannot be read: {exc.strerror}",
                    "Name a PEM file of certificates, or unset it.",
                ) from None
    return None


class Store:
    """A folder on a disk or in a bucket, in which the program keeps its objects.

    Args:
        uri: Canonical or plain location of the folder; it need not exist.
        storage: Endpoint, retries and timeouts.
        must_exist: Whether to refuse a local folder that does not exist instead of creating it.

    Raises:
        UserError: From any method, if access is denied or credentials are missing.
        InfrastructureError: From any method, if the store fails after all retries.
    """

    def __init__(self, uri: str, storage: StorageConfig, *, must_exist: bool = False) -> None:
        self.uri = canonical_uri(uri).rstrip("/")
        self.storage = storage
        self._lock = threading.Lock()
        self._staging = 0  # number of writes of this process in the staging folder
        self._no_hard_links = False  # whether the disk has turned out to have none
        root, key = split_bucket(self.uri)
        self._root = root
        if root == "file://":
            self._store = LocalStore(_output_folder(self.uri, storage, must_exist=must_exist), mkdir=False)
        else:
            self._store = open_bucket(root, storage, key)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.uri, self.storage)

    def get(self, path: str) -> bytes:
        """Read an object; raise FileNotFoundError if there is none."""
        try:
            data = bytes(obstore.get(self._store, path).bytes())
        except Exception as exc:
            raise self._error("read", path, exc) from exc
        mark_reachable(self._root)
        return data

    def get_or_none(self, path: str) -> bytes | None:
        """Read an object; return None if there is none."""
        try:
            return self.get(path)
        except FileNotFoundError:
            return None

    def size(self, path: str) -> int | None:
        """Return the size of an object in bytes, None if there is none."""
        try:
            return int(obstore.head(self._store, path)["size"])
        except Exception as exc:
            error = self._error("read", path, exc)
            if isinstance(error, FileNotFoundError):
                return None
            raise error from exc

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """Read the bytes of an object from ``start`` to before ``end``; raise FileNotFoundError if there is none."""
        try:
            return bytes(obstore.get_range(self._store, path, start=start, end=end))
        except Exception as exc:
            raise self._error("read", path, exc) from exc

    def put(self, path: str, data: bytes) -> None:
        """Write an object, over the older one if there is one."""
        try:
            if is_local(self.uri):
                self._put_local(path, data)
            else:
                obstore.put(self._store, path, data, mode="overwrite")
        except Exception as exc:
            raise self._error("write", path, exc) from exc
        mark_reachable(self._root)

    def _put_local(self, path: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        """Write a file by way of the staging folder; return whether this call wrote it.

        obstore writes a temporary file beside its target first. A killed process must not leave one among the
            predictions: no
        listing of obstore's shows it, but pandas and Spark would read it.
        """
        staged = f"_staging/{uuid4().hex}"
        with self._lock:
            self._staging += 1
        try:
            for tries_left in reversed(range(_STAGING_TRIES)):
                try:
                    obstore.put(self._store, staged, data, mode="overwrite")
                    if only_if_absent:
                        return self._rename_if_absent(staged, path)
                    obstore.rename(self._store, staged, path)
                    break
                except Exception:
                    # Another process may have removed the folder just after this one had found it.
                    if not tries_left:
                        raise
        finally:
            with self._lock:
                self._staging -= 1
                if not self._staging:
                    with contextlib.suppress(OSError):  # other processes may be writing
                        Path(local_path(self.uri), "_staging").rmdir()
        return True

    def _rename_if_absent(self, staged: str, path: str) -> bool:
        folder = Path(local_path(self.uri))
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        try:
            _rename_no_replace(folder / staged, folder / path)
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                (folder / staged).unlink()
        return True

    def create(self, path: str, data: bytes) -> bool:
        """Write an object if there is none of that name: put-if-absent.

        S3 and Azure: ``If-None-Match: *``; GCS: ``ifGenerationMatch=0``; disks: a hard link from a temporary file, or a
            rename that
        replaces nothing if there are no hard links (FAT, some network file systems).

        Returns:
            True if this call created the object, False if it existed.
        """
        for tries in range(1, _CONFLICT_TRIES + 1):
            try:
                if self._no_hard_links:
                    return self._put_local(path, data, only_if_absent=True)
                obstore.put(self._store, path, data, mode="create")
            except Exception as exc:
                facts = gather_facts(exc)
                if is_local(self.uri) and not self._no_hard_links and facts.errno in NO_HARD_LINKS:
                    self._no_hard_links = True
                    continue
                if facts.code in _CONFLICTS and tries < _CONFLICT_TRIES:
                    # Another write of the same name was under way, and neither has won yet.
                    time.sleep(0.1 * 2**tries * random.random())  # noqa: S311
                    continue
                if self._was_there(path, exc, facts):
                    return False
                raise self._error("create", path, exc) from exc
            mark_reachable(self._root)
            return True
        raise AssertionError("the last try returns or raises")

    def _was_there(self, path: str, exc: Exception, facts: FailureFacts) -> bool:
        """Return whether a create failed because the object existed; obstore says so for every 409."""
        if facts.status == 409 and "alreadyexists" not in facts.code.lower():
            return facts.code not in _CONFLICTS and self.size(path) is not None
        # A driver that sweeps may have deleted the link's source; it sweeps only if the object exists.
        if is_local(self.uri) and Path(local_path(self.uri), path).is_file():
            return True
        return isinstance(exc, (obx.AlreadyExistsError, obx.PreconditionError)) or facts.status == 412

    def objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield all objects below ``prefix`` (a folder), in no particular order."""
        try:
            for chunk in obstore.list(self._store, prefix=prefix or None, chunk_size=1000):
                for meta in chunk:
                    yield ObjectInfo(str(meta["path"]), int(meta["size"]))
        except FileNotFoundError:
            return
        except Exception as exc:
            raise self._error("list", prefix, exc) from exc

    def delete(self, paths: list[str]) -> None:
        """Delete objects; ignore those that do not exist."""
        for path in paths:
            try:
                obstore.delete(self._store, path)
            except (FileNotFoundError, obx.NotFoundError):
                continue
            except Exception as exc:
                raise self._error("delete", path, exc) from exc

    def sweep_staged(self, *folders: str) -> None:
        """Delete temporary files that killed processes have left on a disk, if their objects exist by now.

        obstore writes a file ``NAME#1`` and links it to ``NAME``. If the process ends in between, the first one stays,
        and no listing of obstore's shows it.
        """
        if not is_local(self.uri):
            return
        for folder in (Path(local_path(self.uri), name) for name in folders):
            with contextlib.suppress(FileNotFoundError):
                for entry in list(os.scandir(folder)):
                    name, sign, number = entry.name.rpartition("#")
                    if sign and number.isdigit() and (folder / name).is_file():
                        Path(entry.path).unlink(missing_ok=True)

    def probe(self) -> None:
        """Check that the store honors put-if-absent, on which every promise of the ledger rests.

        Raises:
            UserError: If a second create of the same name succeeds, or the first one fails.
        """
        name = f"_probe/{uuid4().hex}"
        # A create whose answer was lost is sent again, and then finds its own object.
        first = self.create(name, b"1") or self.get_or_none(name) == b"1"
        try:
            second = self.create(name, b"2")
            content = self.get(name)
        finally:
            self.delete([name])
            if is_local(self.uri):
                with contextlib.suppress(OSError):  # another driver may be probing in the same folder
                    Path(local_path(self.uri), "_probe").rmdir()
        if not first or second or content != b"1":
            raise UserError(
                f"{display_uri(self.uri)} does not honor put-if-absent: a second create of the same object "
                f"{'succeeded' if second else 'failed at the first try' if not first else 'changed its content'}",
                PUT_IF_ABSENT_REMEDY,
            )

    def _error(self, verb: str, path: str, exc: Exception) -> Exception:
        """Return the exception to raise for ``exc``: FileNotFoundError, or the one that ends the job."""
        folder = local_path(self.uri) if is_local(self.uri) else ""
        failure = classify(exc, self._root, self.storage, verb=verb, where=folder)
        where = f"{display_uri(self.uri)}/{path}".rstrip("/")
        if failure.error_type == "NOT_FOUND" and verb in ("read", "delete"):
            return FileNotFoundError(where)
        return failure.job_error(f"cannot {verb} {where}")


def object_sizes(store: Store, paths: list[str]) -> dict[str, int | None]:
    """Return the sizes of objects, each asked for by name; None for those that do not exist."""
    with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return dict(zip(paths, pool.map(store.size, paths), strict=True))


def exception_line(exc: BaseException) -> str:
    """Return an exception's message on one line, without a library's debug dump."""
    return " ".join(short_message(exc).split())[:500] or type(exc).__name__


def read_object(uri: str, storage: StorageConfig, what: str) -> bytes:
    """Read a whole object that the job needs, such as a manifest or weights.

    Args:
        uri: Location of the object.
        storage: Settings of its store.
        what: Name of the object in messages ("the manifest").

    Raises:
        UserError: If it is missing or access is denied.
        InfrastructureError: If the store fails.
    """
    canonical = canonical_uri(uri)
    try:
        if is_local(canonical):
            return Path(local_path(canonical)).read_bytes()
        root, key = split_bucket(canonical)
        return bytes(obstore.get(open_bucket(root, storage), key).bytes())
    except UserError:
        raise
    except Exception as exc:
        root = "file://" if is_local(canonical) else split_bucket(canonical)[0]
        raise classify(exc, root, storage).job_error(f"cannot read {what} {uri}") from None


def open_output(config: JobConfig) -> Store:
    """Return the store of ``output.uri``; raise UserError if the output or the input is not set."""
    missing = [
        name
        for name, value in (("input", config.input.uris or config.input.manifest), ("output", config.output.uri))
        if not value
    ]
    if missing:
        raise UserError(
            f"no {' and no '.join(missing)} is given",
            "Write batch-inference run INPUT --output URI, or set input.uris (or input.manifest) and output.uri.",
        )
    return Store(config.output.uri, config.storage)


def _output_folder(uri: str, storage: StorageConfig, *, must_exist: bool) -> Path:
    """Return a local folder, created if it is missing; raise UserError if it cannot be an output."""
    folder = Path(local_path(uri) or "/")
    if not is_utf8(str(folder)):
        raise UserError(
            f"the name of the folder {display_uri(uri)} is not UTF-8",
            "Choose a folder whose name is, also those above it.",
        )
    if must_exist and not folder.is_dir():
        raise UserError(f"there is no folder {display_uri(uri)}", "Check the location of the output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        if (file := next((path for path in (folder, *folder.parents) if path.is_file()), None)) is not None:
            raise UserError(
                f"{file} is a file, and an output is a folder",
                f"Write another --output, such as {file}-output.",
            ) from None
        failed = f"cannot create the folder {display_uri(uri)}"
        if isinstance(exc, PermissionError):
            raise UserError(f"{failed}: {exc.strerror}", "Choose a folder that you may write to.") from None
        raise classify(exc, "file://", storage, verb="write", where=str(folder)).job_error(failed) from None
    return folder


def _rename_no_replace(source: Path, target: Path) -> None:
    """Rename a file atomically, only if there is none of the new name.

    Raises:
        FileExistsError: If there is one.
        OSError: EINVAL or ENOSYS if the file system or the operating system cannot.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # macOS, a libc older than 2018
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(target))
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))
