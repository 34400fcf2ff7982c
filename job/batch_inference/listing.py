"""What is in folders and buckets, and what globs match.

A location that names an existing file, folder or object is that; only what names nothing is read as a pattern.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import obstore
import structlog
from obstore import exceptions as obx

from batch_inference import spellings
from batch_inference.config import StorageConfig
from batch_inference.errors import SystemFault, UserError
from batch_inference.fetcher import special
from batch_inference.storage import (
    WILDCARDS,
    answered,
    classify,
    display,
    endpoint_of,
    exc_line,
    file_uri,
    is_local,
    local_path,
    odd_key,
    open_bucket,
    split_bucket,
)
from batch_inference.versions import replaced, version_of

log = structlog.get_logger()

# Kinds of what is left out, as they are counted beside file name endings.
FOLDER_MARKERS = "folder markers"
SPECIAL_FILES = "not regular files"
OUTPUT_FILES = "files of earlier outputs"
# What the program writes into an output folder, which may lie among the inputs.
_OUTPUT_PARTS = frozenset(
    [
        *(
            "_job.json",
            "_schema.json",
            "_manifest",
            "_commits",
            "_retries",
            "_decisions",
            "_begun",
            "_probe",
            "_staging",
        ),
        *("_report", "_SUCCESS", "_FAILED", "predictions", "errors"),
    ]
)
# Objects of zero bytes of which the store is asked whether they are folder markers, and how many at once.
_MOST_ASKED = 10_000
_ASKED_AT_ONCE = 16


class Listed(NamedTuple):
    """Something that was found.

    Attributes:
        uri: Its canonical URI.
        named: Whether it was named itself rather than found below what was named.
        version: See :mod:`versions`; None of a local file, and where it is not known.
    """

    uri: str
    named: bool
    version: int | None


def list_uris(
    uri: str, recursive: bool, storage: StorageConfig, skipped: dict[str, int] | None = None
) -> Iterator[Listed]:
    """Return what is below one given location.

    Args:
        uri: Canonical.
        recursive: Whether folders in it count, too.
        storage: How to reach it.
        skipped: Takes counts of what is left out here, by kind.

    Raises:
        UserError: If it cannot be listed, or there is no such local file or folder.
        SystemFault: If the store fails.
    """
    skipped = {} if skipped is None else skipped
    if is_local(uri):
        yield from _list_local(uri, recursive, skipped)
    else:
        yield from _list_bucket(uri, recursive, storage, skipped)


def alternatives(uri: str, storage: StorageConfig) -> list[str]:
    """Return the locations that a canonical URI with braces stands for, such as ``x-{000..099}.tar``; itself where it names something.

    Raises:
        UserError: If braces stand for too many, or the URI joins several with ``::``.
    """
    braces = spellings.has_braces(uri)
    if not braces and "::" not in uri:
        return [uri]
    if os.path.lexists(local_path(uri)) if is_local(uri) else _names_something(uri, storage):
        return [uri]
    if "::" in uri:
        parts = display(uri).split("::")
        raise UserError(
            f"{display(uri)} joins {len(parts)} locations with '::'",
            f"Write them one after another: {' '.join(repr(part) for part in parts)}.",
        )
    return spellings.expanded(uri)


def _names_something(uri: str, storage: StorageConfig) -> bool:
    root, key = split_bucket(uri)
    try:
        return _is_there(root, open_bucket(root, storage), key, storage)
    except Exception:  # said when it is listed
        return False


def _count(skipped: dict[str, int], kind: str, number: int = 1) -> None:
    if number:
        skipped[kind] = skipped.get(kind, 0) + number


class _Outputs:
    """Folders that are outputs of earlier jobs, among those that are listed.

    Args:
        read: Returns the bytes of a folder's ``_job.json``, None if there is none.
    """

    def __init__(self, read: Callable[[str], bytes | None]) -> None:
        self._read = read
        self._known: dict[str, bool] = {}

    def have(self, folder: str) -> bool:
        """Return whether a folder is an output."""
        if folder not in self._known:
            try:
                found = json.loads(self._read(folder) or b"{}")
            except ValueError:
                found = None
            self._known[folder] = isinstance(found, dict) and {"fingerprint", "identity", "shards"} <= found.keys()
        return self._known[folder]

    def hold(self, path: str, start: int) -> bool:
        """Return whether the part of a path behind ``start`` leads into what a job has written."""
        parts = path[start:].split("/")
        if _OUTPUT_PARTS.isdisjoint(parts):
            return False
        return any(
            part in _OUTPUT_PARTS and self.have(path[:start] + "".join(f"{folder}/" for folder in parts[:place]))
            for place, part in enumerate(parts)
        )


# --- folders -------------------------------------------------------------------------------------------------------------


def _list_local(uri: str, recursive: bool, skipped: dict[str, int]) -> Iterator[Listed]:
    path = local_path(uri)
    wildcard = WILDCARDS.search(path)
    if os.path.isfile(path):
        yield Listed(file_uri(path), True, None)
    elif os.path.isdir(path):
        for found in _walk(path, recursive, _Outputs(_local_job), skipped):
            yield Listed(file_uri(found), False, None)
    elif os.path.exists(path):  # noqa: PTH110
        mode = os.stat(path).st_mode  # noqa: PTH116
        raise UserError(
            f"{display(uri)} is {special(mode)}, not a regular file",
            "Name the file or folder of the images.",
        )
    elif wildcard:
        outputs = _Outputs(_local_job)
        start = path.rfind("/", 0, wildcard.start()) + 1
        folders = files = 0
        for match in glob.iglob(path, recursive=True):  # noqa: PTH207 - a Path would collapse the `**` that the user wrote
            if os.path.isdir(match):
                folders += 1
            elif outputs.hold(match, start):
                _count(skipped, OUTPUT_FILES)
            elif os.path.exists(match) and not os.path.isfile(match):  # noqa: PTH110
                _count(skipped, SPECIAL_FILES)
            else:
                files += 1
                yield Listed(file_uri(match), False, None)
        if folders and not files:
            raise UserError(
                f"{display(uri)} matches {folders} folders and no file", f"Write {display(uri)}/** for what is in them."
            )
    else:
        begin = next(glob.iglob(glob.escape(path) + "*"), None)  # noqa: PTH207
        raise UserError(
            f"there is no file or folder {display(uri)}",
            f"Names begin so; write {display(uri)}* for them."
            if begin and not path.endswith("/")
            else "Check the path; relative ones start at the current directory.",
        )


def _walk(folder: str, recursive: bool, outputs: _Outputs, skipped: dict[str, int]) -> Iterator[str]:
    """Yield files below a folder, and links that lead nowhere, which fail as inputs."""
    folders = [folder.rstrip("/") or "/"]
    while folders:
        root = folders.pop()
        try:
            with os.scandir(root) as entries:
                for entry in entries:
                    name = entry.name
                    # Hidden files and folders are tools' own (.git, .DS_Store), as in every lister.
                    if name.startswith("."):
                        continue
                    if name in _OUTPUT_PARTS and outputs.have(root.rstrip("/") + "/"):
                        _count(skipped, OUTPUT_FILES, _files(entry.path))
                    elif _leads_to(entry.is_file):
                        yield entry.path
                    elif _leads_to(entry.is_dir):
                        if recursive and not _leads_back(root, name):
                            folders.append(entry.path)
                    elif os.path.exists(entry.path):  # noqa: PTH110
                        _count(skipped, SPECIAL_FILES)
                    else:
                        yield entry.path
        except OSError as exc:
            where = display(file_uri(root))
            raise UserError(
                f"cannot list the folder {where}: {exc.strerror}", "Make it readable, or leave it out."
            ) from None


def _leads_to(asked: Callable[[], bool]) -> bool:
    """Ask a directory's entry what it is; nothing, where its links go round in circles."""
    try:
        return asked()
    except OSError:
        return False


def _files(path: str) -> int:
    return sum(len(files) for _, _, files in os.walk(path)) if os.path.isdir(path) else 1


def _local_job(folder: str) -> bytes | None:
    try:
        path = folder + "_job.json"
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return None


def _leads_back(root: str, folder: str) -> bool:
    """Whether a link to a folder would send the walk round in circles."""
    path = os.path.join(root, folder)  # noqa: PTH118
    if not os.path.islink(path):  # noqa: PTH114
        return False
    return (os.path.realpath(root) + "/").startswith(os.path.realpath(path) + "/")


# --- buckets -------------------------------------------------------------------------------------------------------------


def _list_bucket(uri: str, recursive: bool, storage: StorageConfig, skipped: dict[str, int]) -> Iterator[Listed]:
    root, key = split_bucket(uri)
    if key.startswith("/"):
        raise UserError(
            f"{uri} begins with a slash behind its bucket, and such keys can be neither listed nor read",
            f"Write {root}/{key.lstrip('/')}; copy objects whose keys begin so to other names.",
        )
    bucket = open_bucket(root, storage)
    try:
        # Most names with an ending are those of single objects.
        if key and PurePosixPath(key).suffix and (head := _head(bucket, key)):
            yield Listed(uri, True, version_of(head["e_tag"]))
            return
        wildcard = WILDCARDS.search(key)
        if wildcard and _is_there(root, bucket, key, storage):
            wildcard = None
        # A store lists by whole folders here; of what lies beside each other in one, it can begin at a name.
        literal = key[: wildcard.start()] if wildcard else key
        prefix = literal.rpartition("/")[0] if wildcard else key.removesuffix("/")
        odd = bool(prefix and odd_key(prefix))
        begin = literal if wildcard and not odd and literal != prefix + "/" else ""
        if odd:
            prefix, literal = _even(prefix), prefix
        pattern = glob_regex(key) if wildcard else None
        outputs = _Outputs(lambda folder: _bucket_job(bucket, folder))
        found = left_out = False
        comparable: bool | None = None
        asked = 0
        for chunk in _pages(root, bucket, prefix, begin, storage):
            answered(root)
            if comparable is None and chunk and chunk[0]["e_tag"]:
                comparable = _comparable(bucket, chunk)
                if not comparable:
                    log.warning(
                        f"the listings of {root} show other entity tags than its objects have, or these are not to be read: an object "
                        "that is replaced before it is read is not noticed"
                    )
            kept = []
            for meta in chunk:
                path = str(meta["path"])
                if pattern is not None and not pattern.match(path):
                    continue
                if odd and pattern is None and not _is_below(path, literal):
                    continue
                below = path[len(prefix) :].removeprefix("/") if prefix else path
                if pattern is None and not recursive and "/" in below:
                    continue
                if "." in below and any(part.startswith(".") and part not in (".", "..") for part in below.split("/")):
                    continue
                if outputs.hold(path, len(path) - len(below)):
                    _count(skipped, OUTPUT_FILES)
                    left_out = True
                    continue
                kept.append(meta)
            empty = [str(meta["path"]) for meta in kept if meta["size"] == 0][: max(0, _MOST_ASKED - asked)]
            asked += len(empty)
            markers = _markers(bucket, empty)
            _count(skipped, FOLDER_MARKERS, len(markers))
            left_out = left_out or bool(markers)
            for meta in kept:
                path = str(meta["path"])
                if meta["size"] == 0 and path in markers:
                    continue
                found = True
                yield Listed(f"{root}/{path}", False, version_of(meta["e_tag"]) if comparable else None)
        if not (found or left_out or wildcard or odd) and key and not key.endswith("/"):
            if begun := _beginning(bucket, key):
                folders = "/**" if "/" in begun[len(key) :] else ""
                raise UserError(
                    f"there is no object and no folder {uri}, but names begin so: {root}/{begun}",
                    f"Write {uri}*{folders} for what begins so.",
                )
            yield Listed(uri, True, version_of(obstore.head(bucket, key)["e_tag"]))
    except (UserError, SystemFault):
        raise
    except Exception as exc:
        if isinstance(exc, FileNotFoundError):
            return  # no object of that name either; a bucket that is not there is another exception
        failure = classify(exc, root, storage, verb="list")
        raise failure.ending(f"cannot list {uri}") from None


def _pages(root: str, bucket: Any, prefix: str, begin: str, storage: StorageConfig) -> Iterator[Sequence[Any]]:
    """Yield what is below a folder of a bucket, of which at least all keys that begin with ``begin``.

    obstore lists by whole folders: it puts a slash behind each prefix. So a listing starts just before the first key that begins so, and
    ends behind the last one. One key that obstore refuses ends its listing; then another client goes on.
    """
    last = ""
    try:
        for chunk in obstore.list(bucket, prefix=prefix or None, offset=_before(begin), chunk_size=1000):
            if not prefix and not last and root.startswith("s3://") and _hides_slashes(chunk):
                yield from _pages_with_odd_keys(root, prefix, last, "one that begins with a slash", storage)
                return
            yield chunk
            last = str(chunk[-1]["path"])
            # Stores sort by the whole key or by folders; a bucket of S3 Express One Zone is not sorted.
            behind = last > begin and not last.startswith(begin) and last.split("/") > begin.split("/")
            if begin and behind and not root.endswith("--x-s3"):
                return
    except obx.InvalidPathError as exc:
        refused = exc_line(exc).removeprefix("Encountered object with invalid path: ")
        yield from _pages_with_odd_keys(root, prefix, last, refused, storage)


def _hides_slashes(chunk: Sequence[Any]) -> bool:
    """Return whether some keys of a bucket's first page begin with a slash: obstore shows them without it, at a place where none is due."""
    paths = [str(meta["path"]) for meta in chunk if meta["size"]]
    return any(b <= a and b.split("/") <= a.split("/") for a, b in itertools.pairwise(paths))


def _before(begin: str) -> str | None:
    """Return a key that is just smaller than all that begin with ``begin``, and can be asked for; None where there is no such."""
    if not begin or ord(begin[-1]) < 0x22:
        return None
    before = ord(begin[-1]) - 1
    while before > 0x20 and (0xD800 <= before < 0xE000 or odd_key(begin[:-1] + chr(before))):
        before -= 1
    offset = begin[:-1] + chr(before)
    return None if odd_key(offset) else offset


def _pages_with_odd_keys(
    root: str, prefix: str, after: str, refused: str, storage: StorageConfig
) -> Iterator[Sequence[Any]]:
    """Yield the keys behind ``after`` as pyarrow's client lists them: any key, but no entity tags, and the whole list in memory."""
    remedy = (
        "Copy that object to a name without empty, '.' and '..' parts and remove it, name folders beside it, or name the objects in a "
        "manifest (--manifest)."
    )
    # pyarrow's client of Azure's store walks folders without a name in circles.
    if root.startswith("az://"):
        raise UserError(f"cannot list {root}/{prefix} to its end: {refused}", remedy)
    from pyarrow import fs

    name = root.partition("://")[2]
    selector = fs.FileSelector(f"{name}/{prefix}".rstrip("/"), recursive=True)
    try:
        infos = _arrow_store(root, storage).get_file_info(selector)
        found = [(info.path[len(name) + 1 :], info.size) for info in infos if info.is_file]
    except Exception as exc:
        raise UserError(f"cannot list {root}/{prefix} to its end: {refused} ({exc_line(exc)})", remedy) from None
    # Those before were listed; stores sort by the whole key or by folders.
    keys = sorted((key, size) for key, size in found if key > after or key.split("/") > after.split("/"))
    odd = sum(bool(odd_key(key)) for key, _ in keys)
    log.warning(
        f"{root} has keys that no request can name ({odd:,}), such as {refused}; each is a row of errors. Below {root}/{prefix} an object "
        "that is replaced before it is read is not noticed"
    )
    for start in range(0, len(keys), 1000):
        yield [{"path": key, "size": size, "e_tag": None} for key, size in keys[start : start + 1000]]


def _arrow_store(root: str, storage: StorageConfig) -> Any:
    """Return pyarrow's client of a bucket's store, S3 or Google's, with the environment's credentials."""
    from pyarrow import fs

    endpoint = endpoint_of(root.partition("://")[0], storage)
    if root.startswith("gs://"):
        scheme, _, host = (endpoint or "").rpartition("://")
        options = {"scheme": scheme, "endpoint_override": host} if endpoint else {}
        limit = timedelta(seconds=storage.retry_timeout_s)
        return fs.GcsFileSystem(anonymous=storage.anonymous, retry_time_limit=limit, **options)
    return fs.S3FileSystem(
        region=storage.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
        anonymous=storage.anonymous,
        connect_timeout=min(10.0, storage.timeout_s),
        request_timeout=storage.timeout_s,
        **({"endpoint_override": endpoint} if endpoint else {}),
    )


def _even(prefix: str) -> str:
    """Return the longest folder of an odd prefix that can be asked for."""
    parts = prefix.split("/")
    even = next(place for place, part in enumerate(parts) if part in ("", ".", ".."))
    return "/".join(parts[:even])


def _head(bucket: Any, key: str) -> Any:
    """Return an object's metadata, None where there is none, or it is not ours to read."""
    if odd_key(key):
        return None
    try:
        return obstore.head(bucket, key)
    except Exception:
        return None


def _is_there(root: str, bucket: Any, key: str, storage: StorageConfig) -> bool:
    """Return whether there is an object of that name, or anything below a folder of it."""
    if _head(bucket, key):
        return True
    folder = key.removesuffix("/")
    if odd_key(folder):
        pages = _pages(root, bucket, _even(folder), "", storage)
        return any(_is_below(str(meta["path"]), folder) for chunk in pages for meta in chunk)
    try:
        return next(iter(obstore.list(bucket, prefix=folder, chunk_size=1)), None) is not None
    except obx.InvalidPathError:
        return True


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _beginning(bucket: Any, key: str) -> str | None:
    """Return one of the keys that begin with ``key``."""
    if odd_key(key):
        return None
    try:
        prefix = key.rpartition("/")[0] or None
        for chunk in obstore.list(bucket, prefix=prefix, offset=_before(key), chunk_size=1000):
            return next((str(meta["path"]) for meta in chunk if str(meta["path"]).startswith(key)), None)
    except Exception:
        return None
    return None


def _markers(bucket: Any, empty: list[str]) -> set[str]:
    """Return which of the paths of objects without bytes are folder markers: keys that end with a slash, which obstore does not show."""

    def is_marker(path: str) -> bool:
        if path.endswith("_$folder$"):
            return True
        try:
            # Beside an object of that name, its size tells.
            return bool(obstore.head(bucket, path)["size"])
        except FileNotFoundError:
            return True
        except Exception:
            return False

    if not empty:
        return set()
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        return {path for path, marker in zip(empty, pool.map(is_marker, empty), strict=True) if marker}


def _bucket_job(bucket: Any, folder: str) -> bytes | None:
    try:
        return bytes(obstore.get(bucket, folder + "_job.json").bytes())
    except Exception:
        return None


def _comparable(bucket: Any, chunk: Sequence[Any]) -> bool:
    """Whether a store gives objects the same entity tags in a listing and when they are read.

    Nearly all do. Of one that does not each object would count as replaced. A few are asked for, the largest and one that was uploaded
    in parts among them, since tags of such are made in another way.
    """
    parts = next((meta for meta in chunk if "-" in (meta["e_tag"] or "")), chunk[0])
    asked = {meta["path"]: meta for meta in (*chunk[:2], max(chunk, key=lambda meta: meta["size"]), parts)}
    known = False
    for path, meta in asked.items():
        try:
            read = obstore.head(bucket, path)
        except Exception:  # noqa: S112 - this object is not ours to read, or gone
            continue
        if replaced(version_of(meta["e_tag"]), version_of(read["e_tag"])):
            return False
        known = True
    return known


def glob_regex(pattern: str) -> re.Pattern[str]:
    """A glob in which ``*`` stays within a folder and ``**`` does not, as in a shell."""
    out = ""
    for piece in re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", pattern):
        if piece.startswith("**"):
            out += "(?:.*/)?" if piece.endswith("/") else ".*"
        elif piece == "*":
            out += "[^/]*"
        elif piece == "?":
            out += "[^/]"
        elif piece.startswith("["):
            out += fnmatch.translate(piece).removeprefix("(?s:").removesuffix(r")\Z").removesuffix(r")\z")
        else:
            out += re.escape(piece)
    return re.compile(out + r"\Z")
