"""Keep each URI once, in tables that may hold more text than one Arrow array with 32-bit offsets."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

# Bytes that one Arrow array of strings can hold: about 30 million URIs.
_SHORT_OFFSETS = 2**31 - 1


def sort_distinct(objects: pa.Table) -> pa.Table:
    """Return objects in the order of their URIs, each once."""
    uris = objects["uri"]
    if uris.nbytes > _SHORT_OFFSETS:
        objects = objects.set_column(0, "uri", uris.cast(pa.large_string()))
    objects = objects.combine_chunks()
    objects = objects.take(pc.sort_indices(objects["uri"]))
    uris = objects["uri"]
    if len(uris) < 2:
        return objects
    is_new = pc.not_equal(uris.slice(1), uris.slice(0, len(uris) - 1))
    if pc.all(is_new).as_py():
        return objects
    return objects.filter(pa.chunked_array([pa.array([True]), *is_new.chunks]))


def distinct(uris: pa.ChunkedArray) -> pa.Array:
    """Return each URI once, in order of appearance, in one array: with 64-bit offsets where 32 bits are too few."""
    return pc.unique(uris.cast(pa.large_string()) if uris.nbytes > _SHORT_OFFSETS else uris)
