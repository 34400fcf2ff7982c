"""Which version of an object is meant: a number that is another one when the object was replaced.

Listing finds it, the manifest keeps it, and whoever reads compares. It is made of the object's entity tag, which a store changes with
the content. Files on disks that are inputs by themselves have none: asking a network's disk for each of them can take longer than all
else that a plan does.
"""

from __future__ import annotations

import hashlib

from batch_inference.errors import RowFailure


def version_of(etag: str | None) -> int | None:
    """The version that an entity tag stands for, int32; None where the store has none.

    Four bytes, of which there is one for each input of a job; that two tags share a version happens once in four thousand million times.
    Azure writes tags with quotation marks in one answer and without them in another.

    >>> version_of('"0x8DC"') == version_of("0x8DC") != version_of("0x8DD")
    True
    """
    if not etag:
        return None
    text = etag.removeprefix("W/").strip('"')
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little", signed=True)


def replaced(wanted: int | None, found: int | None) -> bool:
    """Whether what was found is another version than what is wanted; not where one of them is not known."""
    return wanted is not None and found is not None and wanted != found


def changed(uri: str) -> RowFailure:
    """What became of an input that is another one now."""
    return RowFailure("fetch", "CHANGED", f"{uri} was replaced after the job was planned")
