"""A 32-bit hash of an object's ETag, used to detect that an input was replaced after planning.

Listing computes it, the manifest keeps it, and every reader compares it. Files on disks that are inputs by themselves
have none: asking a network disk for each of them can take longer than the rest of the plan.
"""

from __future__ import annotations

import hashlib

from batch_inference.errors import RowError


def hash_etag(etag: str | None) -> int | None:
    """Return the hash of an ETag, int32; None if the store has none.

    It takes four bytes for each input of a job. Two ETags have the same hash once in four thousand million times. Azure
    writes ETags with quotation marks in one answer and without them in another.

    >>> hash_etag('"0x8DC"') == hash_etag("0x8DC") != hash_etag("0x8DD")
    True
    """
    if not etag:
        return None
    text = etag.removeprefix("W/").strip('"')
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little", signed=True)


def is_replaced(planned: int | None, current: int | None) -> bool:
    """Return whether an object was replaced since it was planned, by its hashes; False if one of them is not known."""
    return planned is not None and current is not None and planned != current


def replaced_error(uri: str) -> RowError:
    """Return the error of an input that was replaced."""
    return RowError("fetch", "CHANGED", f"{uri} was replaced after the job was planned")
