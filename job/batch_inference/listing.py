"""What is in folders and buckets, and what globs match."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import obstore

from batch_inference.config import StorageConfig
from batch_inference.errors import SystemFault, UserError
from batch_inference.storage import classify, is_local, local_path, open_bucket, split_bucket
from batch_inference.versions import replaced, version_of

WILDCARDS = re.compile(r"[*?\[]")


class Listed(NamedTuple):
    """Something that was found.

    Attributes:
        uri: Its canonical URI.
        named: Whether it was named itself rather than found below what was named.
        version: See :mod:`versions`; None where the store has none.
    """

    uri: str
    named: bool
    version: int | None


def list_uris(uri: str, recursive: bool, storage: StorageConfig) -> Iterator[Listed]:
    """What is below one given location."""
    if is_local(uri):
        yield from _list_local(uri, recursive)
    else:
        yield from _list_bucket(uri, recursive, storage)


def _list_local(uri: str, recursive: bool) -> Iterator[Listed]:
    path = local_path(uri)
    if os.path.isfile(path):
        yield _file(path, True)
    elif os.path.isdir(path):
        yield from (_file(found, False) for found in _walk(path, recursive))
    elif WILDCARDS.search(path):
        folders = files = 0
        for match in glob.iglob(path, recursive=True):  # noqa: PTH207 - a Path would collapse the `**` that the user wrote
            if os.path.isfile(match):
                files += 1
                yield _file(match, False)
            else:
                folders += 1
        if folders and not files:
            raise UserError(f"{path} matches {folders} folders and no file", f"Write {path}/** for what is in them.")
    else:
        raise UserError(
            f"there is no file or folder {path}", "Check the path; relative ones start at the current directory."
        )


def _file(path: str, named: bool) -> Listed:
    try:
        size = os.stat(path).st_size  # noqa: PTH116
    except OSError:
        size = None  # a link that leads nowhere, a file that is gone: whoever reads it says so
    return Listed("file://" + path, named, size)


def _walk(folder: str, recursive: bool) -> Iterator[str]:
    def refuse(exc: OSError) -> None:
        raise UserError(f"cannot list the folder {exc.filename}: {exc.strerror}", "Make it readable, or leave it out.")

    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        # Hidden files and folders are tools' own (.git, .DS_Store), as in every lister.
        folders[:] = [f for f in folders if recursive and not f.startswith(".") and not _leads_back(root, f)]
        for name in files:
            if not name.startswith("."):
                yield os.path.join(root, name)  # noqa: PTH118


def _leads_back(root: str, folder: str) -> bool:
    """Whether a link to a folder would send the walk round in circles."""
    path = os.path.join(root, folder)  # noqa: PTH118
    if not os.path.islink(path):  # noqa: PTH114
        return False
    return (os.path.realpath(root) + "/").startswith(os.path.realpath(path) + "/")


def _list_bucket(uri: str, recursive: bool, storage: StorageConfig) -> Iterator[Listed]:
    root, key = split_bucket(uri)
    bucket = open_bucket(root, storage)
    wildcard = WILDCARDS.search(key)
    # Everything before the first wildcard, up to a slash, is a prefix that the store itself can list by.
    prefix = key[: wildcard.start()].rpartition("/")[0] if wildcard else key.rstrip("/")
    pattern = glob_regex(key) if wildcard else None
    try:
        found = False
        comparable: bool | None = None
        for chunk in obstore.list(bucket, prefix=prefix or None, chunk_size=1000):
            if comparable is None:
                comparable = _comparable(bucket, chunk)
            for meta in chunk:
                path = str(meta["path"])
                if pattern is not None and not pattern.match(path):
                    continue
                below = path[len(prefix) :].lstrip("/")
                if pattern is None and not recursive and "/" in below:
                    continue
                if any(part.startswith(".") for part in below.split("/")):
                    continue
                found = True
                yield Listed(f"{root}/{path}", False, None if comparable is False else version_of(meta["e_tag"]))
        if not found and key and not wildcard:
            yield Listed(uri, True, version_of(obstore.head(bucket, key)["e_tag"]))
    except UserError:
        raise
    except Exception as exc:
        failure = classify(exc)
        if failure.error_type == "NOT_FOUND":
            return
        if failure.retryable:
            raise SystemFault(
                f"cannot list {uri}: {failure.message}",
                "Check the store, its endpoint and the network, then start the same command again.",
            ) from None
        raise UserError(
            f"cannot list {uri}: {failure.message}",
            "Check bucket, endpoint and the credentials in the environment (list permission is needed).",
        ) from None


def _comparable(bucket: Any, chunk: Sequence[Any]) -> bool | None:
    """Whether a store gives an object the same entity tag in a listing and when it is read; None: that is not known.

    Nearly all do. Of one that does not each object would count as replaced.
    """
    for meta in chunk[:1]:
        try:
            read = obstore.head(bucket, meta["path"])
        except Exception:  # this object is not ours to read, or gone
            return None
        return not replaced(version_of(meta["e_tag"]), version_of(read["e_tag"]))
    return None


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
