"""Object stores and local folders behind one small interface.

Everything goes through obstore, which has conditional puts on every store, with one exception: inputs on local disks are
opened directly, since obstore refuses some file names that Linux allows. How inputs are read is in :mod:`fetcher`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import obstore
from obstore import exceptions as obx
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from batch_inference.config import JobConfig, StorageConfig
from batch_inference.errors import SystemFault, UserError

SCHEMES = ("file", "s3", "gs", "az")
_STAGING_TRIES = 5
_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "azure": "az", "abfs": "az"}


@dataclass(frozen=True)
class ObjectInfo:
    """One object in a listing: its path below the store's root, and its size in bytes."""

    path: str
    size: int


def canonical_uri(uri: str) -> str:
    """Gives every location one spelling, with its scheme.

    A local path becomes ``file:///absolute/path``. Names are kept as they are, never percent-encoded.

    >>> canonical_uri("s3a://bucket/a.jpg")
    's3://bucket/a.jpg'

    Raises:
        UserError: For a scheme that is not one of file, s3, gs, az.
    """
    scheme, sign, rest = uri.partition("://")
    if not sign:
        try:
            return "file://" + str(Path(uri).expanduser().absolute())
        except (RuntimeError, ValueError):
            raise UserError(
                f"{uri} begins with the home folder of somebody who is not known here", "Write its path."
            ) from None
    scheme = _ALIASES.get(scheme.lower(), scheme.lower())
    if scheme not in SCHEMES:
        raise UserError(
            f"{uri} has the scheme {scheme}://, which is not supported",
            "Use a local path or one of " + ", ".join(s + "://" for s in SCHEMES) + ".",
        )
    bucket = rest.partition("/")[0]
    # Not repeated here: what is printed is logged.
    if scheme != "file" and ":" in bucket and "@" in bucket:
        raise UserError(
            f"a {scheme}:// URI has credentials before its bucket {bucket.rpartition('@')[2]}",
            "Give them in the environment; a URI is stored with the job and in each row.",
        )
    # Asked of each input, and hardly any has a "=", which is found ten times as fast as a pattern is not.
    if scheme != "file" and "=" in rest and _SIGNATURE.search(rest):
        raise UserError(
            f"a {scheme}:// URI of {bucket} has a signature behind its name",
            "Name the object alone, and give credentials in the environment; a URI is stored with the job and in each row.",
        )
    if scheme == "file" and not rest.startswith("/"):
        raise UserError(f"{uri} is not an absolute file URI", f"Write file:///{rest} or a plain path.")
    if scheme != "file" and not rest.partition("/")[0]:
        raise UserError(f"{uri} names no bucket", f"Write {scheme}://BUCKET/PATH.")
    return f"{scheme}://{rest}"


def is_local(uri: str) -> bool:
    """Whether a canonical URI is on the local disk."""
    return uri.startswith("file://")


def local_path(uri: str) -> str:
    """The path of a canonical ``file://`` URI."""
    return uri[len("file://") :]


def is_file(uri: str) -> bool:
    """Whether a canonical URI is a file on the local disk."""
    return is_local(uri) and Path(local_path(uri)).is_file()


def display(uri: str) -> str:
    """A location as a person would type it: local ones without the scheme."""
    return local_path(uri) if is_local(uri) else uri


def split_bucket(uri: str) -> tuple[str, str]:
    """Splits a canonical URI into ``scheme://bucket`` and the key below it."""
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        return "file://", rest.lstrip("/")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}", key


def open_bucket(root: str, storage: StorageConfig, prefix: str = "") -> Any:
    """The obstore store of ``scheme://bucket``, below ``prefix``. Credentials come from the environment.

    Raises:
        UserError: If the environment lacks what the store needs before the first request.
    """
    scheme, _, bucket = root.partition("://")
    if scheme == "file":
        return LocalStore(prefix or "/", mkdir=False)
    endpoint = storage.endpoint_url or (os.environ.get("AWS_ENDPOINT_URL") if scheme == "s3" else None)
    if endpoint and scheme == "gs":
        raise UserError(
            f"storage.endpoint_url is set, but {root} is on Google Cloud Storage, which has no other endpoint",
            "Remove storage.endpoint_url, or use the store's S3 interface with s3://.",
        )
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
    if storage.anonymous:
        options["skip_signature"] = True
    if endpoint:
        options["endpoint"] = endpoint
    if scheme == "s3":
        in_environment = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        options["region"] = storage.region or in_environment or "us-east-1"
    kind: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    try:
        return kind(bucket, prefix=prefix or None, **options)
    except Exception as exc:
        raise UserError(
            f"cannot open {root}: {exc_line(exc)}",
            {
                "s3": "Set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION, or run where a role gives them.",
                "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run where a service account gives access.",
                "az": "Set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or run with a managed identity.",
            }[scheme],
        ) from None


# What makes a presigned URL of S3 or GCS, or one with a SAS of Azure's, one that opens the object for whoever has it.
_SIGNATURE = re.compile(r"[?&](?:x-amz-signature|x-amz-security-token|x-goog-signature|sig)=", re.IGNORECASE)
# What S3 answers, with 400, where credentials were good once.
_EXPIRED = re.compile(r"<code>(?:expiredtoken|invalidtoken|tokenrefreshrequired)</code>")
# An answer of S3's or Azure's: all but code and message may repeat what was sent, a token too.
_ANSWER = re.compile(r"(?:<\?xml[^>]*>\s*)?<Error\b.*(?:</Error>|\Z)", re.DOTALL)
# Asked for credentials where the environment has none; its answer says nothing about the bucket.
_METADATA_SERVICE = re.compile(r"169\.254\.169\.254|metadata\.google\.internal")


@dataclass(frozen=True)
class Failure:
    """A store's exception, classified."""

    error_type: str
    message: str
    retryable: bool


# Buckets that have answered this process: for them a machine's role gives credentials, and a metadata service that has none now
# fails for the moment.
_answered: set[str] = set()


def answered(root: str) -> None:
    """Notes that a bucket has answered."""
    _answered.add(root)


def classify(exc: Exception, root: str = "") -> Failure:
    """Sorts whatever a store or the operating system raised into one of a few kinds.

    Args:
        exc: What was raised.
        root: The bucket that was asked, "" if that is not known.
    """
    text = _said(exc) or type(exc).__name__
    low = str(exc).lower()
    if isinstance(exc, (FileNotFoundError, NotADirectoryError, obx.NotFoundError)):
        return Failure("NOT_FOUND", "there is no such object", False)
    if isinstance(exc, IsADirectoryError):
        return Failure("NOT_FOUND", "this is a folder, not a file", False)
    if _METADATA_SERVICE.search(low):
        if root in _answered:
            return Failure("STORE_UNREACHABLE", f"the metadata service gives no new credentials: {text}", True)
        return Failure(
            "UNAUTHENTICATED",
            "there are no credentials in the environment, and this machine has no role that gives some",
            False,
        )
    if isinstance(exc, (PermissionError, obx.PermissionDeniedError)) or "403 forbidden" in low:
        return Failure("ACCESS_DENIED", f"access denied: {text}", False)
    if isinstance(exc, obx.UnauthenticatedError) or "401 unauthorized" in low or _EXPIRED.search(low):
        return Failure("UNAUTHENTICATED", f"not authenticated: {text}", False)
    if "429 too many requests" in low or "503 service unavailable" in low:
        return Failure("THROTTLED", f"the store asked to slow down: {text}", True)
    too_long = isinstance(exc, OSError) and exc.errno in (errno.ENAMETOOLONG, errno.ELOOP)
    if too_long or isinstance(exc, (obx.InvalidPathError, ValueError)):
        return Failure("INVALID_URI", text, False)
    # The dump that follows an error of obstore's always speaks of a timeout, the one that it allows for retries.
    if isinstance(exc, TimeoutError) or any(sign in low for sign in ("timed out", "timedout", "408 request timeout")):
        return Failure("TIMEOUT", text, True)
    return Failure("STORE_UNREACHABLE", text, True)


def _said(exc: BaseException) -> str:
    """An exception's message without a library's debug dump, and of a store's answer only the code and the message."""

    def short(answer: re.Match[str]) -> str:
        found = [re.search(rf"<{tag}>([^<]*)</{tag}>", answer[0]) for tag in ("Code", "Message")]
        return ": ".join(part[1].strip() for part in found if part) or "an error without a code"

    return _ANSWER.sub(short, str(exc).partition("\n\nDebug source")[0]).strip()


class Store:
    """A folder on a disk or in a bucket, in which the program keeps its objects.

    Args:
        uri: Canonical or plain location of the folder; it need not exist.
        storage: Endpoint, retries and timeouts.
        must_exist: Do not make a local folder that is not there.

    Raises:
        UserError: From any method, when access is denied or credentials are missing.
        SystemFault: From any method, when the store fails after all retries.
    """

    def __init__(self, uri: str, storage: StorageConfig, *, must_exist: bool = False) -> None:
        self.uri = canonical_uri(uri).rstrip("/")
        self.storage = storage
        self._lock = threading.Lock()
        self._staging = 0  # writes of this process that are in the staging folder
        root, key = split_bucket(self.uri)
        self._root = root
        if root == "file://":
            folder = Path("/" + key)
            if must_exist and not folder.is_dir():
                raise UserError(f"there is no folder {folder}", "Check the location of the output.")
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                if (file := next((p for p in (folder, *folder.parents) if p.is_file()), None)) is not None:
                    raise UserError(
                        f"{file} is a file, and an output is a folder",
                        f"Write another --output, such as {file}-output.",
                    ) from None
                raise UserError(
                    f"cannot create the folder {folder}: {exc.strerror}", "Choose a place that you may write to."
                ) from None
            self._store = open_bucket(root, storage, str(folder))
        else:
            self._store = open_bucket(root, storage, key)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.uri, self.storage)

    def get(self, path: str) -> bytes:
        """Reads an object whole; raises FileNotFoundError if there is none."""
        try:
            data = bytes(obstore.get(self._store, path).bytes())
        except Exception as exc:
            raise self._error("read", path, exc) from exc
        answered(self._root)
        return data

    def get_or_none(self, path: str) -> bytes | None:
        """Reads an object whole, or gives None if there is none."""
        try:
            return self.get(path)
        except FileNotFoundError:
            return None

    def size(self, path: str) -> int | None:
        """Bytes of an object, or None if there is none."""
        try:
            return int(obstore.head(self._store, path)["size"])
        except Exception as exc:
            error = self._error("read", path, exc)
            if isinstance(error, FileNotFoundError):
                return None
            raise error from exc

    def get_range(self, path: str, start: int, end: int) -> bytes:
        """Reads the bytes of an object from ``start`` to before ``end``; raises FileNotFoundError if there is none."""
        try:
            return bytes(obstore.get_range(self._store, path, start=start, end=end))
        except Exception as exc:
            raise self._error("read", path, exc) from exc

    def put(self, path: str, data: bytes) -> None:
        """Writes an object, over an older one if there is one."""
        try:
            if is_local(self.uri):
                self._put_local(path, data)
            else:
                obstore.put(self._store, path, data, mode="overwrite")
        except Exception as exc:
            raise self._error("write", path, exc) from exc
        answered(self._root)

    def _put_local(self, path: str, data: bytes) -> None:
        # obstore writes a local file beside its target first. What a killed process leaves of one must not stand among
        # the predictions, where no listing of obstore's shows it but pandas and Spark would read it.
        staged = f"_staging/{uuid4().hex}"
        with self._lock:
            self._staging += 1
        try:
            for left in reversed(range(_STAGING_TRIES)):
                try:
                    obstore.put(self._store, staged, data, mode="overwrite")
                    obstore.rename(self._store, staged, path)
                    break
                except Exception:
                    # Another process may have removed the folder just after this one had found it there.
                    if not left:
                        raise
        finally:
            with self._lock:
                self._staging -= 1
                if not self._staging:
                    with contextlib.suppress(OSError):  # other processes may be writing
                        Path(local_path(self.uri), "_staging").rmdir()

    def create(self, path: str, data: bytes) -> bool:
        """Writes an object if there is none of that name: put-if-absent.

        S3 and Azure: ``If-None-Match: *``; GCS: ``ifGenerationMatch=0``; disks: a hard link from a temporary file.

        Returns:
            True if this call made the object, False if it was there already.
        """
        try:
            obstore.put(self._store, path, data, mode="create")
        except obx.AlreadyExistsError:
            return False
        except Exception as exc:
            if isinstance(exc, obx.PreconditionError) or "412 precondition" in str(exc).lower():
                return False
            raise self._error("create", path, exc) from exc
        answered(self._root)
        return True

    def objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects below ``prefix`` (a folder), in no particular order."""
        try:
            for chunk in obstore.list(self._store, prefix=prefix or None, chunk_size=1000):
                for meta in chunk:
                    yield ObjectInfo(str(meta["path"]), int(meta["size"]))
        except FileNotFoundError:
            return
        except Exception as exc:
            raise self._error("list", prefix, exc) from exc

    def delete(self, paths: list[str]) -> None:
        """Deletes objects; those that are gone already do not matter."""
        for path in paths:
            try:
                obstore.delete(self._store, path)
            except (FileNotFoundError, obx.NotFoundError):
                continue
            except Exception as exc:
                raise self._error("delete", path, exc) from exc

    def probe(self) -> None:
        """Checks that the store honours put-if-absent, on which every promise of the ledger rests.

        Raises:
            UserError: Where a second create of the same name does not fail, or the first does not work.
        """
        name = f"_probe/{uuid4().hex}"
        # A create whose answer was lost is sent again, and then meets itself.
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
                f"{display(self.uri)} does not honour put-if-absent: a second create of the same object "
                f"{'succeeded' if second else 'failed at the first try' if not first else 'changed its content'}",
                "Use a store that supports If-None-Match on PUT (S3, GCS, Azure, a recent MinIO or SeaweedFS, a local disk); "
                "without it two drivers could both commit a shard.",
            )

    def _error(self, verb: str, path: str, exc: Exception) -> Exception:
        """What to raise for ``exc``: kinds of failure that the caller can tell apart."""
        failure = classify(exc, self._root)
        where = f"{display(self.uri)}/{path}".rstrip("/")
        if failure.error_type == "NOT_FOUND":
            # A bucket that does not exist is a 404 as well, but writing can't meet any other.
            if verb in ("write", "create"):
                return UserError(f"cannot {verb} {where}: {exc_line(exc)}", "Check that the bucket or folder exists.")
            return FileNotFoundError(where)
        if failure.error_type in ("ACCESS_DENIED", "UNAUTHENTICATED"):
            return UserError(
                f"cannot {verb} {where}: {failure.message}",
                "Check the credentials in the environment and that they allow to list, read, write and delete there.",
            )
        if failure.error_type == "INVALID_URI":
            return UserError(f"cannot {verb} {where}: {failure.message}", "Check the location.")
        return SystemFault(
            f"cannot {verb} {where}: {failure.message}",
            "Check the store and the network, then start the same command again.",
        )


def exc_line(exc: BaseException) -> str:
    """An exception's message on one line, without a library's debug dump."""
    return " ".join(_said(exc).split())[:500] or type(exc).__name__


def read_object(uri: str, storage: StorageConfig, what: str) -> bytes:
    """Reads one object that the job needs as a whole, such as a manifest or weights.

    Args:
        uri: Its location.
        storage: How to reach it.
        what: What it is, for messages ("the manifest").

    Raises:
        UserError: If it is missing or access is denied.
        SystemFault: If the store fails.
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
        failure = classify(exc)
        message = f"cannot read {what} {uri}: {failure.message}"
        if failure.retryable:
            raise SystemFault(message, "Check the store and the network, then start the same command again.") from None
        raise UserError(message, "Check the location and the credentials.") from None


def open_output(config: JobConfig) -> Store:
    """The store of ``output.uri``; raises UserError if that or the input is not set."""
    missing = [
        what
        for what, there in (("input", config.input.uris or config.input.manifest), ("output", config.output.uri))
        if not there
    ]
    if missing:
        raise UserError(
            f"no {' and no '.join(missing)} is given",
            "Write batch-inference run INPUT --output URI, or set input.uris (or input.manifest) and output.uri.",
        )
    return Store(config.output.uri, config.storage)
