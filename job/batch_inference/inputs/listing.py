"""List folders, buckets and globs.

A location that names an existing file, folder or object is that; only one that names nothing is read as a pattern.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from batch_inference.config import StorageConfig
from batch_inference.errors import UserError
from batch_inference.inputs.bucket_listing import list_bucket, names_something
from batch_inference.inputs.listed import ListedObject
from batch_inference.inputs.local_listing import list_local
from batch_inference.storage import spellings
from batch_inference.storage.uris import display_uri, is_local, local_path


def list_uris(
    uri: str, recursive: bool, storage: StorageConfig, skipped: dict[str, int] | None = None
) -> Iterator[ListedObject]:
    """Yield the files or objects that one location names, or that are below it.

    Args:
        uri: Canonical.
        recursive: Whether folders in it count, too.
        storage: How to reach it.
        skipped: Receives counts of what is left out here, by kind.

    Raises:
        UserError: If it cannot be listed, or there is no such local file or folder.
        InfrastructureError: If the store fails.
    """
    skipped = {} if skipped is None else skipped
    if is_local(uri):
        yield from list_local(uri, recursive, skipped)
    else:
        yield from list_bucket(uri, recursive, storage, skipped)


def expand_location(uri: str, storage: StorageConfig) -> list[str]:
    """Return the locations that a canonical URI with braces stands for, such as ``x-{000..099}.tar``; itself if it names something.

    Raises:
        UserError: If braces stand for too many, or the URI joins several with ``::``.
    """
    if not spellings.has_braces(uri) and "::" not in uri:
        return [uri]
    if os.path.lexists(local_path(uri)) if is_local(uri) else names_something(uri, storage):
        return [uri]
    if "::" in uri:
        parts = display_uri(uri).split("::")
        raise UserError(
            f"{display_uri(uri)} joins {len(parts)} locations with '::'",
            f"Write them one after another: {' '.join(repr(part) for part in parts)}.",
        )
    return spellings.expand_braces(uri)
