"""What is in folders and buckets, and what globs match."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import obstore
import structlog

from batch_inference.config import StorageConfig
from batch_inference.errors import UserError
from batch_inference.storage import answered, classify, is_local, local_path, open_bucket, split_bucket
from batch_inference.versions import replaced, version_of

log = structlog.get_logger()

WILDCARDS = re.compile(r"[*?\[]")


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


def list_uris(uri: str, recursive: bool, storage: StorageConfig) -> Iterator[Listed]:
    """What is below one given location."""
    if is_local(uri):
        yield from _list_local(uri, recursive)
    else:
        yield from _list_bucket(uri, recursive, storage)


def _list_local(uri: str, recursive: bool) -> Iterator[Listed]:
    path = local_path(uri)
    if os.path.isfile(path):
        yield Listed("file://" + path, True, None)
    elif os.path.isdir(path):
        yield from (Listed("file://" + found, False, None) for found in _walk(path, recursive))
    elif WILDCARDS.search(path):
        folders = files = 0
        for match in glob.iglob(path, recursive=True):  # noqa: PTH207 - a Path would collapse the `**` that the user wrote
            if os.path.isfile(match):
                files += 1
                yield Listed("file://" + match, False, None)
            else:
                folders += 1
        if folders and not files:
            raise UserError(f"{path} matches {folders} folders and no file", f"Write {path}/** for what is in them.")
    else:
        raise UserError(
            f"there is no file or folder {path}", "Check the path; relative ones start at the current directory."
        )


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
            answered(root)
            if comparable is None and chunk:
                comparable = _comparable(bucket, chunk)
                if not comparable:
                    log.warning(
                        f"the listings of {root} show other entity tags than its objects have, or these are not to be read: an object "
                        "that is replaced before it is read is not noticed"
                    )
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
                yield Listed(f"{root}/{path}", False, version_of(meta["e_tag"]) if comparable else None)
        if not found and key and not wildcard:
            yield Listed(uri, True, version_of(obstore.head(bucket, key)["e_tag"]))
    except UserError:
        raise
    except Exception as exc:
        if isinstance(exc, FileNotFoundError):
            return  # no object of that name either; a bucket that is not there is another exception
        failure = classify(exc, root, storage, verb="list")
        raise failure.ending(f"cannot list {uri}") from None


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
