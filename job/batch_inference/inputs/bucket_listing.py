"""List buckets: objects, folders of keys and globs.

An odd key is one that no request can name, such as one with an empty part. A listing shows it, and it becomes a row of errors.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import PurePosixPath
from typing import Any

import obstore
import structlog
from obstore import exceptions as obx

from batch_inference.config import StorageConfig
from batch_inference.errors import InfrastructureError, UserError
from batch_inference.inputs.listed import FOLDER_MARKERS, OUTPUT_FILES, ListedObject, OutputFolders, count_skipped
from batch_inference.storage.addresses import bucket_address
from batch_inference.storage.etags import hash_etag, is_replaced
from batch_inference.storage.failures import classify, mark_reachable
from batch_inference.storage.store import exception_line, key_problem, open_bucket
from batch_inference.storage.uris import WILDCARDS, split_bucket

log = structlog.get_logger()

# Objects of zero bytes of which the store is asked whether they are folder markers, and how many at once.
_MAX_MARKER_REQUESTS = 10_000
_MARKER_REQUESTS_AT_ONCE = 16
_PAGE_KEYS = 1000


def list_bucket(uri: str, recursive: bool, storage: StorageConfig, skipped: dict[str, int]) -> Iterator[ListedObject]:
    """Yield the objects that a location in a bucket names.

    Raises:
        UserError: If it cannot be listed.
        InfrastructureError: If the store fails.
    """
    root, key = split_bucket(uri)
    if key.startswith("/"):
        raise UserError(
            f"{uri} begins with a slash after its bucket, and such keys can be neither listed nor read",
            f"Write {root}/{key.lstrip('/')}; copy objects whose keys begin so to other names.",
        )
    bucket = open_bucket(root, storage)
    try:
        # Most names with an ending are those of single objects.
        if key and PurePosixPath(key).suffix and (head := _head(bucket, key)):
            yield ListedObject(uri, True, hash_etag(head["e_tag"]))
            return
        is_glob = WILDCARDS.search(key) is not None and not _exists(root, bucket, key, storage)
        selection = _KeySelection.of(key, is_glob, recursive)
        listing = _BucketListing(root, bucket, selection, skipped)
        for page in _pages(root, bucket, selection.prefix, selection.begin, storage):
            yield from listing.select(page)
        is_name = bool(key) and not is_glob and selection.odd_folder is None and not key.endswith("/")
        if listing.is_empty and is_name:
            if longer := _key_beginning_with(bucket, key):
                folders = "/**" if "/" in longer[len(key) :] else ""
                raise UserError(
                    f"there is no object and no folder {uri}, but names begin so: {root}/{longer}",
                    f"Write {uri}*{folders} for what begins so.",
                )
            yield ListedObject(uri, True, hash_etag(obstore.head(bucket, key)["e_tag"]))
    except (UserError, InfrastructureError):
        raise
    except Exception as exc:
        if isinstance(exc, FileNotFoundError):
            return  # no object of that name either; a bucket that is not there is another exception
        failure = classify(exc, root, storage, verb="list")
        raise failure.job_error(f"cannot list {uri}") from None


def names_something(uri: str, storage: StorageConfig) -> bool:
    """Return whether a location in a bucket is an object or a folder of objects."""
    root, key = split_bucket(uri)
    try:
        return _exists(root, open_bucket(root, storage), key, storage)
    except Exception:  # reported when it is listed
        return False


@dataclass(frozen=True)
class _KeySelection:
    """The keys that a location names.

    Attributes:
        prefix: The folder that the store lists: stores list by whole folders here.
        begin: The beginning of the keys in that folder that are wanted, "" for all: a store can begin at a name.
        odd_folder: The folder itself if no request can name it; then ``prefix`` is the longest one above it that a request can name.
        pattern: The glob, None if the location is a folder.
        recursive: Whether folders in a folder count, too.
    """

    prefix: str
    begin: str
    odd_folder: str | None
    pattern: re.Pattern[str] | None
    recursive: bool

    @classmethod
    def of(cls, key: str, is_glob: bool, recursive: bool) -> _KeySelection:
        wildcard = WILDCARDS.search(key) if is_glob else None
        literal = key[: wildcard.start()] if wildcard else key
        prefix = literal.rpartition("/")[0] if wildcard else key.removesuffix("/")
        pattern = glob_regex(key) if wildcard else None
        if prefix and key_problem(prefix):
            return cls(_longest_even_folder(prefix), "", prefix, pattern, recursive)
        begin = literal if wildcard and literal != prefix + "/" else ""
        return cls(prefix, begin, None, pattern, recursive)

    def matches(self, path: str) -> bool:
        """Return whether a listed key is wanted."""
        if self.pattern is not None and not self.pattern.match(path):
            return False
        if self.odd_folder is not None and self.pattern is None and not _is_below(path, self.odd_folder):
            return False
        below = self.below(path)
        if self.pattern is None and not self.recursive and "/" in below:
            return False
        return "." not in below or not any(
            part.startswith(".") and part not in (".", "..") for part in below.split("/")
        )

    def below(self, path: str) -> str:
        """Return the part of a key behind the listed folder."""
        return path[len(self.prefix) :].removeprefix("/") if self.prefix else path


class _BucketListing:
    """The pages of a bucket's listing, reduced to inputs.

    Attributes:
        is_empty: Whether nothing was found so far, neither an input nor something that is left out and counted.
    """

    def __init__(self, root: str, bucket: Any, selection: _KeySelection, skipped: dict[str, int]) -> None:
        self._root = root
        self._bucket = bucket
        self._selection = selection
        self._skipped = skipped
        self._outputs = OutputFolders(lambda folder: _read_job(bucket, folder))
        self._etags_comparable: bool | None = None
        self._marker_requests = 0
        self.is_empty = True

    def select(self, page: Sequence[Any]) -> Iterator[ListedObject]:
        """Yield the inputs of a page."""
        mark_reachable(self._root)
        self._compare_etags(page)
        wanted = [meta for meta in page if self._is_wanted(str(meta["path"]))]
        markers = self._folder_markers(wanted)
        for meta in wanted:
            path = str(meta["path"])
            if meta["size"] == 0 and path in markers:
                continue
            self.is_empty = False
            yield ListedObject(
                f"{self._root}/{path}", False, hash_etag(meta["e_tag"]) if self._etags_comparable else None
            )

    def _compare_etags(self, page: Sequence[Any]) -> None:
        """Warn once if the ETags of a listing cannot be compared with those of reads."""
        if self._etags_comparable is not None or not page or not page[0]["e_tag"]:
            return
        self._etags_comparable = _are_comparable(self._bucket, page)
        if not self._etags_comparable:
            log.warning(
                f"the listings of {self._root} show other ETags than its objects have, or reading the objects is denied: it is not "
                "noticed if an object is replaced before it is read"
            )

    def _is_wanted(self, path: str) -> bool:
        if not self._selection.matches(path):
            return False
        if self._outputs.contain(path, len(path) - len(self._selection.below(path))):
            count_skipped(self._skipped, OUTPUT_FILES)
            self.is_empty = False
            return False
        return True

    def _folder_markers(self, wanted: list[Any]) -> set[str]:
        """Return the paths of folder markers among objects, and count them."""
        left = max(0, _MAX_MARKER_REQUESTS - self._marker_requests)
        empty = [str(meta["path"]) for meta in wanted if meta["size"] == 0][:left]
        self._marker_requests += len(empty)
        markers = _find_markers(self._bucket, empty)
        if markers:
            count_skipped(self._skipped, FOLDER_MARKERS, len(markers))
            self.is_empty = False
        return markers


# --- pages ---------------------------------------------------------------------------------------------------------------


def _pages(root: str, bucket: Any, prefix: str, begin: str, storage: StorageConfig) -> Iterator[Sequence[Any]]:
    """Yield the keys below a folder of a bucket, at least all that begin with ``begin``.

    obstore lists by whole folders: it puts a slash behind each prefix. So a listing starts just before the first key that begins so, and
    ends behind the last one. One key that obstore refuses ends its listing; then another client goes on.
    """
    last = ""
    try:
        for page in obstore.list(bucket, prefix=prefix or None, offset=_before(begin), chunk_size=_PAGE_KEYS):
            if not prefix and not last and root.startswith("s3://") and _hides_slashes(page):
                yield from _pages_with_odd_keys(root, prefix, last, "one that begins with a slash", storage)
                return
            yield page
            last = str(page[-1]["path"])
            # Stores sort by the whole key or by folders; a bucket of S3 Express One Zone is not sorted.
            is_behind = last > begin and not last.startswith(begin) and last.split("/") > begin.split("/")
            if begin and is_behind and not root.endswith("--x-s3"):
                return
    except obx.InvalidPathError as exc:
        refused = exception_line(exc).removeprefix("Encountered object with invalid path: ")
        yield from _pages_with_odd_keys(root, prefix, last, refused, storage)


def _hides_slashes(page: Sequence[Any]) -> bool:
    """Return whether some keys of a bucket's first page begin with a slash: obstore shows them without it, out of order."""
    paths = [str(meta["path"]) for meta in page if meta["size"]]
    return any(b <= a and b.split("/") <= a.split("/") for a, b in itertools.pairwise(paths))


def _before(begin: str) -> str | None:
    """Return a key just smaller than all that begin with ``begin``, and that a request can name; None if there is no such key."""
    if not begin or ord(begin[-1]) < 0x22:
        return None
    before = ord(begin[-1]) - 1
    while before > 0x20 and (0xD800 <= before < 0xE000 or key_problem(begin[:-1] + chr(before))):
        before -= 1
    offset = begin[:-1] + chr(before)
    return None if key_problem(offset) else offset


def _pages_with_odd_keys(
    root: str, prefix: str, after: str, refused: str, storage: StorageConfig
) -> Iterator[Sequence[Any]]:
    """Yield the keys behind ``after`` as pyarrow's client lists them: any key, but no ETags, and the whole list in memory."""
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
        objects = [(info.path[len(name) + 1 :], info.size) for info in infos if info.is_file]
    except Exception as exc:
        raise UserError(f"cannot list {root}/{prefix} to its end: {refused} ({exception_line(exc)})", remedy) from None
    # Those before were listed; stores sort by the whole key or by folders.
    keys = sorted((key, size) for key, size in objects if key > after or key.split("/") > after.split("/"))
    odd = sum(bool(key_problem(key)) for key, _ in keys)
    log.warning(
        f"{root} has keys that no request can name ({odd:,}), such as {refused}; each is a row of errors. Below {root}/{prefix} it is not "
        "noticed if an object is replaced before it is read"
    )
    for start in range(0, len(keys), _PAGE_KEYS):
        yield [{"path": key, "size": size, "e_tag": None} for key, size in keys[start : start + _PAGE_KEYS]]


def _arrow_store(root: str, storage: StorageConfig) -> Any:
    """Return pyarrow's client of a bucket's store, S3 or Google's, with the environment's credentials."""
    from pyarrow import fs

    address = bucket_address(root.partition("://")[0], storage)
    if root.startswith("gs://"):
        scheme, _, host = (address.endpoint or "").rpartition("://")
        options = {"scheme": scheme, "endpoint_override": host} if address.endpoint else {}
        limit = timedelta(seconds=storage.retry_timeout_s)
        return fs.GcsFileSystem(anonymous=storage.anonymous, retry_time_limit=limit, **options)
    return fs.S3FileSystem(
        region=address.region,
        anonymous=storage.anonymous,
        connect_timeout=min(10.0, storage.timeout_s),
        request_timeout=storage.timeout_s,
        **({"endpoint_override": address.endpoint} if address.endpoint else {}),
    )


def _longest_even_folder(prefix: str) -> str:
    """Return the longest folder above an odd one that a request can name."""
    parts = prefix.split("/")
    first_odd = next(index for index, part in enumerate(parts) if part in ("", ".", ".."))
    return "/".join(parts[:first_odd])


# --- single keys ---------------------------------------------------------------------------------------------------------


def _head(bucket: Any, key: str) -> Any:
    """Return an object's metadata; None if there is no such object, or reading it is denied."""
    if key_problem(key):
        return None
    try:
        return obstore.head(bucket, key)
    except Exception:
        return None


def _exists(root: str, bucket: Any, key: str, storage: StorageConfig) -> bool:
    """Return whether there is an object of that name, or anything below a folder of it."""
    if _head(bucket, key):
        return True
    folder = key.removesuffix("/")
    if key_problem(folder):
        pages = _pages(root, bucket, _longest_even_folder(folder), "", storage)
        return any(_is_below(str(meta["path"]), folder) for page in pages for meta in page)
    try:
        return next(iter(obstore.list(bucket, prefix=folder, chunk_size=1)), None) is not None
    except obx.InvalidPathError:
        return True


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _key_beginning_with(bucket: Any, key: str) -> str | None:
    """Return one of the keys that begin with ``key``."""
    if key_problem(key):
        return None
    try:
        prefix = key.rpartition("/")[0] or None
        for page in obstore.list(bucket, prefix=prefix, offset=_before(key), chunk_size=_PAGE_KEYS):
            return next((str(meta["path"]) for meta in page if str(meta["path"]).startswith(key)), None)
    except Exception:
        return None
    return None


def _find_markers(bucket: Any, empty: list[str]) -> set[str]:
    """Return which paths of empty objects are folder markers: keys that end with a slash, which obstore does not show."""

    def is_marker(path: str) -> bool:
        if path.endswith("_$folder$"):
            return True
        try:
            # An object of that name beside the marker has a size.
            return bool(obstore.head(bucket, path)["size"])
        except FileNotFoundError:
            return True
        except Exception:
            return False

    if not empty:
        return set()
    with ThreadPoolExecutor(_MARKER_REQUESTS_AT_ONCE) as pool:
        return {path for path, marker in zip(empty, pool.map(is_marker, empty), strict=True) if marker}


def _read_job(bucket: Any, folder: str) -> bytes | None:
    try:
        return bytes(obstore.get(bucket, folder + "_job.json").bytes())
    except Exception:
        return None


def _are_comparable(bucket: Any, page: Sequence[Any]) -> bool:
    """Return whether a store gives objects the same ETags in a listing and when they are read.

    Nearly all stores do. With one that does not, each object would count as replaced. A few objects are compared, among them the
    largest and one that was uploaded in parts, since ETags of such are made in another way.
    """
    in_parts = next((meta for meta in page if "-" in (meta["e_tag"] or "")), page[0])
    sample = {meta["path"]: meta for meta in (*page[:2], max(page, key=lambda meta: meta["size"]), in_parts)}
    any_read = False
    for path, meta in sample.items():
        try:
            head = obstore.head(bucket, path)
        except Exception:  # noqa: S112 - reading this object is denied, or it is gone
            continue
        if is_replaced(hash_etag(meta["e_tag"]), hash_etag(head["e_tag"])):
            return False
        any_read = True
    return any_read


def glob_regex(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a glob in which ``*`` stays within a folder and ``**`` does not, as in a shell."""
    out = ""
    for part in re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", pattern):
        if part.startswith("**"):
            out += "(?:.*/)?" if part.endswith("/") else ".*"
        elif part == "*":
            out += "[^/]*"
        elif part == "?":
            out += "[^/]"
        elif part.startswith("["):
            out += fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z").removesuffix(r")\z")
        else:
            out += re.escape(part)
    return re.compile(out + r"\Z")
