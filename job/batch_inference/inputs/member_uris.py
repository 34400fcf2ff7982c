"""URIs of tar and Parquet files, of their members, and of compressed archives, told apart by name.

A member's URI is its file's, then ``#``, then its name (tar) or the index of its row (Parquet).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.errors import UserError
from batch_inference.inputs import tar
from batch_inference.storage.uris import display_uri

_MEMBER = r"\.(?:tar|parquet)#"
_SPLIT = re.compile(_MEMBER, re.IGNORECASE)
# Endings of compressed archives, and what unpacks them: their members cannot be read by range.
COMPRESSED = {
    ".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tbz2": "bunzip2", ".tar.xz": "unxz", ".txz": "unxz",
    ".tar.zst": "unzstd", ".tzst": "unzstd", ".tar.lz4": "unlz4", ".zip": "unzip", ".7z": "7z x", ".rar": "unrar x",
    ".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".lz4": "unlz4",
}  # fmt: skip
# Files that one message names; the errors table has them all.
MAX_NAMED = 50


def split_member(uri: str) -> tuple[str, str] | None:
    """Return file and member of a URI such as ``s3://bucket/a.tar#name.jpg``, None for any other.

    >>> split_member("s3://bucket/a.tar#x/1.jpg")
    ('s3://bucket/a.tar', 'x/1.jpg')
    >>> split_member("s3://bucket/a#1.jpg")
    """
    match = _SPLIT.search(uri)
    return (uri[: match.end() - 1], uri[match.end() :]) if match else None


def are_members(uris: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Return for each URI whether it names a member."""
    return pc.match_substring_regex(uris, _MEMBER, ignore_case=True)


def has_ambiguous_members(uri: str) -> bool:
    """Return whether a file's own name contains ``.tar#`` or ``.parquet#``, behind which a member's name would begin."""
    match = _SPLIT.search(uri + "#")
    return match is not None and match.end() != len(uri) + 1


def compressed_ending(uri: str) -> str:
    """Return the ending that makes a file a compressed archive, "" for any other.

    >>> compressed_ending("s3://b/A.TAR.GZ")
    '.tar.gz'
    """
    low = uri.lower()
    return next((ending for ending in COMPRESSED if low.endswith(ending)), "")


def refuse_compressed(uri: str) -> None:
    """Raise UserError for a location whose name ends like a compressed archive's."""
    if ending := compressed_ending(uri):
        raise UserError(f"{display_uri(uri)}: {ending} is not supported: {tar.NOT_BY_RANGE}", unpack_remedy([uri]))


def describe_left_out(uris: list[str]) -> str:
    """Return a sentence that names compressed archives which are no inputs; "" if there are none."""
    if not uris:
        return ""
    named = ", ".join(display_uri(uri) for uri in sorted(uris)[:MAX_NAMED])
    more = f" and {len(uris) - MAX_NAMED:,} more" if len(uris) > MAX_NAMED else ""
    return f"left out, because {tar.NOT_BY_RANGE}: {named}{more}"


def unpack_remedy(uris: Iterable[str]) -> str:
    """Return how to unpack compressed archives, one command for each kind."""
    commands: dict[str, str] = {}
    for uri in sorted(uris):
        name, ending = display_uri(uri).rpartition("/")[2], compressed_ending(uri)
        # `gunzip` makes of a .tar.gz the .tar that can be read.
        folder = {"unzip": f" -d '{name[: -len(ending)]}'"}.get(COMPRESSED[ending], "")
        commands.setdefault(COMPRESSED[ending], f"{COMPRESSED[ending]} '{name}'{folder}")
    return f"Unpack: {', '.join(commands.values())}. Images hardly get smaller by compression."
