"""Object stores and local folders behind one small interface.

Everything goes through obstore, which has conditional puts on every store, with one exception: inputs on local disks are
opened directly, since obstore refuses some file names that Linux allows. How inputs are read is in :mod:`fetcher`.
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
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import obstore
from obstore import exceptions as obx
from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

from batch_inference import names
from batch_inference.aws_profiles import Profile, profile
from batch_inference.causes import CREDENTIALS, NO_LINKS, PUT_IF_ABSENT, Facts, Failure, facts_of, of_store, said
from batch_inference.config import JobConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.names import is_text
from batch_inference.spellings import AZURE_SCHEMES, azure, of_https, of_pipe

SCHEMES = ("file", "s3", "gs", "az")
_STAGING_TRIES = 5
WILDCARDS = re.compile(r"[*?\[]")
# As in :mod:`containers`.
_MEMBER = re.compile(r"\.(?:tar|parquet)#", re.IGNORECASE)
# Where storage.endpoint_url is not set; one for each store, for jobs that use several.
_ENDPOINT_VARIABLES = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ENDPOINT"}
# Writes of one name that meet are answered with 409 until one has won; S3 asks to send such again.
_CONFLICTS = frozenset({"ConditionalRequestConflict", "OperationAborted"})
_CONFLICT_TRIES = 6
# Of Linux, <fcntl.h> and <linux/fs.h>.
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1
_ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "azure": "az", "abfs": "az"}


@dataclass(frozen=True)
class ObjectInfo:
    """One object in a listing: its path below the store's root, and its size in bytes."""

    path: str
    size: int


def canonical_uri(uri: str) -> str:
    """Gives every location one spelling, with its scheme.

    A local path becomes ``file:///absolute/path``. Names are kept as they are, never percent-encoded; what is not UTF-8 in a local one
    is escaped (:mod:`names`).

    >>> canonical_uri("s3a://bucket/a.jpg")
    's3://bucket/a.jpg'

    Raises:
        UserError: For a scheme that is not one of file, s3, gs, az.
    """
    scheme, sign, rest = uri.partition("://")
    if not sign:
        return _canonical_path(uri)
    scheme = scheme.lower()
    if scheme in AZURE_SCHEMES and "@" in rest.partition("/")[0]:
        return azure(uri)
    scheme = _ALIASES.get(scheme, scheme)
    if scheme not in SCHEMES:
        if scheme.startswith("pipe:"):
            raise UserError(f"{uri} is a command, and commands are not run", of_pipe(uri))
        # Not repeated here: what is printed is logged.
        shown = uri.partition("?")[0] + "?…" if _SIGNATURE.search(uri) else uri
        raise UserError(
            f"{shown} has the scheme {scheme}://, which is not supported",
            of_https(uri) or "Use a local path or one of " + ", ".join(s + "://" for s in SCHEMES) + ".",
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
    if scheme == "file":
        return _canonical_file(uri, rest)
    if not rest.partition("/")[0]:
        raise UserError(f"{uri} names no bucket", f"Write {scheme}://BUCKET/PATH.")
    if not is_text(rest):
        raise UserError(f"{uri} is not UTF-8, as names in object stores are", "Correct the location.")
    return f"{scheme}://{rest}"


def _canonical_file(uri: str, rest: str) -> str:
    if rest[:10].lower() == "localhost/":
        rest = rest[9:]
    if not rest.startswith("/"):
        raise UserError(f"{uri} is not an absolute file URI", f"Write file:///{rest} or a plain path.")
    if "\\x" not in rest and rest.isascii():
        return f"file://{rest}"
    try:
        return f"file://{names.canonical(rest)}"
    except ValueError:
        raise UserError(f"{uri!a} holds characters that no file name can have", "Correct the location.") from None


def _canonical_path(path: str) -> str:
    if path[:6].lower() == "file:/":
        return canonical_uri(f"file://{path[5:]}")
    if path.startswith("pipe:") and not os.path.lexists(path):
        raise UserError(f"{path} is a command, and commands are not run", of_pipe(path))
    try:
        whole = str(Path(path).expanduser().absolute())
        # A path is what was typed, unless only the escape that messages and tables show for a name leads to a file.
        if "\\x" in whole and not os.path.lexists(whole) and os.path.lexists(names.to_path(whole)):
            return f"file://{names.canonical(whole)}"
        return f"file://{names.of_path(whole)}"
    except RuntimeError:
        raise UserError(
            f"{path} begins with the home folder of somebody who is not known here", "Write its path."
        ) from None
    except ValueError:
        raise UserError(f"{path!a} holds characters that no file name can have", "Correct the location.") from None


def is_local(uri: str) -> bool:
    """Whether a canonical URI is on the local disk."""
    return uri.startswith("file://")


def local_path(uri: str) -> str:
    """The path of a canonical ``file://`` URI, as the operating system's functions take it."""
    return names.to_path(uri[len("file://") :])


def file_uri(path: str) -> str:
    """The canonical URI of an absolute path, as the operating system's functions give it."""
    return "file://" + names.of_path(path)


def located(text: str) -> str:
    """Return the canonical URI of what is named; raises UserError as :func:`canonical_uri`.

    URIs of local files may have percent escapes, as those of ``Path.as_uri()``. A file whose name is spelt like the URI comes first.
    Only where there is none, and the decoded name leads to a file, that one is meant. Nothing is asked of the disk where there is no
    escape, and paths and names in object stores are never decoded.
    """
    uri = canonical_uri(text)
    if "%" not in uri or text[:5].lower() != "file:":
        return uri
    decoded = names.percent_decoded(uri)
    if decoded is None or _leads_somewhere(uri):
        return uri
    return decoded if _leads_somewhere(decoded) else uri


def _leads_somewhere(uri: str) -> bool:
    """Return whether there is a file or folder; of a member its file, of a glob the folder before its first wildcard."""
    found = _MEMBER.search(uri)
    path = local_path(uri[: found.end() - 1] if found else uri)
    wildcard = WILDCARDS.search(path)
    return os.path.lexists(path) or bool(
        wildcard and os.path.lexists(path[: wildcard.start()].rpartition("/")[0] or "/")
    )


def is_file(uri: str) -> bool:
    """Whether a canonical URI is a file on the local disk."""
    return is_local(uri) and Path(local_path(uri)).is_file()


def display(uri: str) -> str:
    """A location as a person would type it: local ones without the scheme."""
    return uri[len("file://") :] if is_local(uri) else uri


def split_bucket(uri: str) -> tuple[str, str]:
    """Splits a canonical URI into ``scheme://bucket`` and the key below it."""
    scheme, _, rest = uri.partition("://")
    if scheme == "file":
        return "file://", rest.lstrip("/")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}", key


_ODD_KEY = re.compile(r"(?:^|/)(?:\.{0,2})(?:/|$)")


def odd_key(key: str) -> str:
    """Return why no request can name a key, "" if one can: its clients would ask for another key, or for none."""
    if not _ODD_KEY.search(key):
        return ""
    return (
        f"the key {key!r} has a part that is empty, '.' or '..', or a slash at its end, which cannot be asked for; "
        "copy the object to another name"
    )


def open_bucket(root: str, storage: StorageConfig, prefix: str = "") -> Any:
    """The obstore store of ``scheme://bucket``, below ``prefix``. Credentials come from the environment.

    Raises:
        UserError: If the environment lacks what the store needs before the first request.
    """
    scheme, _, bucket = root.partition("://")
    if scheme == "file":
        return LocalStore(prefix or "/", mkdir=False)
    from_profile = profile(storage.anonymous) if scheme == "s3" else Profile({})
    endpoint = endpoint_of(scheme, storage) or from_profile.endpoint_url
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
        in_environment = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        options["region"] = storage.region or in_environment or from_profile.region or "us-east-1"
        options |= from_profile.keys
    kind: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    try:
        return kind(bucket, prefix=prefix or None, **options)
    except Exception as exc:
        raise UserError(
            f"cannot open {root}: {exc_line(exc)}",
            CREDENTIALS[scheme],
        ) from None


def endpoint_of(scheme: str, storage: StorageConfig) -> str | None:
    """Return the URL of a store that is not at the scheme's own place."""
    return storage.endpoint_url or os.environ.get(_ENDPOINT_VARIABLES.get(scheme, ""))


def _authorities(scheme: str) -> bytes | None:
    """Read the certificates that are trusted beside the system's: obstore itself knows ``SSL_CERT_FILE`` alone.

    Raises:
        UserError: If the file is not there.
    """
    names = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE") if scheme == "s3" else ("REQUESTS_CA_BUNDLE",)
    for name in names:
        file = os.environ.get(name)
        if file and not Path(file).is_dir():
            try:
                return Path(file).read_bytes()
            except OSError as exc:
                raise UserError(
                    f"{name} is {file}, which cannot be read: {exc.strerror}",
                    "Name a PEM file of certificates, or unset it.",
                ) from None
    return None


# What makes a presigned URL of S3 or GCS, or one with a SAS of Azure's, one that opens the object for anyone who has it.
_SIGNATURE = re.compile(r"[?&](?:x-amz-signature|x-amz-security-token|x-goog-signature|sig)=", re.IGNORECASE)
# Buckets that have answered this process: for them a machine's role gives credentials, and a metadata service that has none now
# fails for the moment.
_answered: set[str] = set()


def answered(root: str) -> None:
    """Notes that a bucket has answered."""
    _answered.add(root)


def classify(
    exc: Exception, root: str = "", storage: StorageConfig | None = None, *, verb: str = "read", where: str = ""
) -> Failure:
    """Sort whatever a store or the operating system raised by the table in :mod:`causes`.

    Args:
        exc: What was raised.
        root: The bucket that was asked, ``file://`` for disks, "" if that is not known.
        storage: How it was asked.
        verb: What was tried: read, write, create, list or delete.
        where: The local folder, for what is free there.
    """
    endpoint = endpoint_of(root.partition("://")[0], storage) if storage else None
    return of_store(exc, root, verb=verb, answered=root in _answered, endpoint=endpoint, where=where)


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
        self._no_links = False  # whether the disk was found to have no hard links
        root, key = split_bucket(self.uri)
        self._root = root
        if root == "file://":
            folder = Path(local_path(self.uri) or "/")
            if not is_text(str(folder)):
                raise UserError(
                    f"the name of the folder {display(self.uri)} is not UTF-8",
                    "Choose a folder whose name is, also those above it.",
                )
            if must_exist and not folder.is_dir():
                raise UserError(f"there is no folder {display(self.uri)}", "Check the location of the output.")
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                if (file := next((p for p in (folder, *folder.parents) if p.is_file()), None)) is not None:
                    raise UserError(
                        f"{file} is a file, and an output is a folder",
                        f"Write another --output, such as {file}-output.",
                    ) from None
                what = f"cannot create the folder {display(self.uri)}"
                if isinstance(exc, PermissionError):
                    raise UserError(f"{what}: {exc.strerror}", "Choose a place that you may write to.") from None
                raise classify(exc, root, storage, verb="write", where=str(folder)).ending(what) from None
            self._store = LocalStore(folder, mkdir=False)
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

    def _put_local(self, path: str, data: bytes, *, only_if_absent: bool = False) -> bool:
        """Write a file by way of the staging folder; return whether this did it.

        obstore writes a local file beside its target first. What a killed process leaves of one must not stand among the
        predictions, where no listing of obstore's shows it but pandas and Spark would read it.
        """
        staged = f"_staging/{uuid4().hex}"
        with self._lock:
            self._staging += 1
        try:
            for left in reversed(range(_STAGING_TRIES)):
                try:
                    obstore.put(self._store, staged, data, mode="overwrite")
                    if only_if_absent:
                        return self._rename_if_absent(staged, path)
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

        S3 and Azure: ``If-None-Match: *``; GCS: ``ifGenerationMatch=0``; disks: a hard link from a temporary file, or where there
        are no hard links (FAT, some network file systems) a rename that replaces nothing.

        Returns:
            True if this call made the object, False if it was there already.
        """
        for tries in range(1, _CONFLICT_TRIES + 1):
            try:
                if self._no_links:
                    return self._put_local(path, data, only_if_absent=True)
                obstore.put(self._store, path, data, mode="create")
            except Exception as exc:
                facts = facts_of(exc)
                if is_local(self.uri) and not self._no_links and facts.errno in NO_LINKS:
                    self._no_links = True
                    continue
                if facts.code in _CONFLICTS and tries < _CONFLICT_TRIES:
                    # Another write of the same name was under way, and neither has won.
                    time.sleep(0.1 * 2**tries * random.random())  # noqa: S311
                    continue
                if self._was_there(path, exc, facts):
                    return False
                raise self._error("create", path, exc) from exc
            answered(self._root)
            return True
        raise AssertionError("the last try returns or raises")

    def _was_there(self, path: str, exc: Exception, facts: Facts) -> bool:
        """Whether a create failed since there was such an object. obstore says so of every 409, and of a disabled account too."""
        if facts.status == 409 and "alreadyexists" not in facts.code.lower():
            return facts.code not in _CONFLICTS and self.size(path) is not None
        # Beside a driver that sweeps, the link's source may be gone; it sweeps only where the object is there.
        if is_local(self.uri) and Path(local_path(self.uri), path).is_file():
            return True
        return isinstance(exc, (obx.AlreadyExistsError, obx.PreconditionError)) or facts.status == 412

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

    def sweep_staged(self, *folders: str) -> None:
        """Delete what killed processes have left of objects on a disk that are there now.

        obstore writes a file ``NAME#1`` and links it to ``NAME``; where the process ends between the two, only the first stays, which no
        listing of obstore's shows.
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
        """Checks that the store honors put-if-absent, on which every promise of the ledger rests.

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
                f"{display(self.uri)} does not honor put-if-absent: a second create of the same object "
                f"{'succeeded' if second else 'failed at the first try' if not first else 'changed its content'}",
                PUT_IF_ABSENT,
            )

    def _error(self, verb: str, path: str, exc: Exception) -> Exception:
        """Return what to raise for ``exc``: kinds of failure that the caller can tell apart."""
        folder = local_path(self.uri) if is_local(self.uri) else ""
        failure = classify(exc, self._root, self.storage, verb=verb, where=folder)
        where = f"{display(self.uri)}/{path}".rstrip("/")
        if failure.error_type == "NOT_FOUND" and verb in ("read", "delete"):
            return FileNotFoundError(where)
        return failure.ending(f"cannot {verb} {where}")


def _rename_no_replace(source: Path, target: Path) -> None:
    """Rename a file in one step, and only if there is none of the new name.

    Raises:
        FileExistsError: If there is one.
        OSError: EINVAL or ENOSYS where the file system or the operating system cannot.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # macOS, a libc older than 2018
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(target))
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def exc_line(exc: BaseException) -> str:
    """An exception's message on one line, without a library's debug dump."""
    return " ".join(said(exc).split())[:500] or type(exc).__name__


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
        root = "file://" if is_local(canonical) else split_bucket(canonical)[0]
        raise classify(exc, root, storage).ending(f"cannot read {what} {uri}") from None


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
