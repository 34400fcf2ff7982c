"""The frozen manifest: shards of inputs in ``_manifest/``, with the locations of members of files."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batch_inference.output.column_types import plain_inputs
from batch_inference.storage.store import Store

# Location of an input, and what is known of it. For an object by itself only its ETag's hash and its error are set.
#   _offset: Position of a tar's member in bytes, or the row of a Parquet file; NO_SUCH_MEMBER: there is no such member.
#   _size: Size of a tar's member in bytes.
#   _version: Hash of the ETag of the object, or of the member's file; null if it is not known.
#   _column: Path of the Parquet column.
#   _error: Why the input cannot be read, if listing knows: stage, error type, fact and remedy, a line each. Set for
#     members that cannot be read, and for files of which not all members are known.
LOCATION_SCHEMA = pa.schema(
    [
        ("_offset", pa.int64()),
        ("_size", pa.int64()),
        ("_version", pa.int32()),
        ("_column", pa.dictionary(pa.int32(), pa.string())),
        ("_error", pa.dictionary(pa.int32(), pa.string())),
    ]
)
LOCATION_COLUMNS = tuple(LOCATION_SCHEMA.names)
NO_SUCH_MEMBER = -1
# Names of a shard's files: shard-00042.json, shard-00042-g1-4f2a91c0.parquet.
_SHARD_NAME = re.compile(r"(?:^|/)shard-(\d+)(?:-g(\d+))?(?=[-.]|$)")


def shard_name(shard: int, generation: int = 0) -> str:
    """Return how the names of a shard's files begin; those that retry N wrote have generation N.

    >>> shard_name(42), shard_name(42, 1)
    ('shard-00042', 'shard-00042-g1')
    """
    return f"shard-{shard:05d}" + (f"-g{generation}" if generation else "")


def parse_shard_name(path: str) -> tuple[int, int]:
    """Return shard and generation of a file of a shard; -1 and 0 for any other file.

    >>> parse_shard_name("_commits/shard-00042-g1.json"), parse_shard_name("errors/notes.txt")
    ((42, 1), (-1, 0))
    """
    match = _SHARD_NAME.search(path)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def shard_path(shard: int) -> str:
    """Return the path of a manifest shard."""
    return f"_manifest/{shard_name(shard)}.parquet"


def cut_shards(table: pa.Table, shard_size: int) -> Iterator[tuple[int, pa.Table]]:
    """Cut inputs into shards of ``shard_size`` rows, the last one shorter.

    Yields:
        Shard number and its table: ``uri``, ``shard`` int32, ``row`` int32, then the other columns.
    """
    for shard, start in enumerate(range(0, table.num_rows, shard_size)):
        part = table.slice(start, shard_size).unify_dictionaries()
        numbered = pa.table(
            {
                "uri": part["uri"].cast(pa.string()),
                "shard": pa.array(np.full(part.num_rows, shard, np.int32)),
                "row": pa.array(np.arange(part.num_rows, dtype=np.int32)),
            }
        )
        for name in part.column_names:
            if name != "uri":
                numbered = numbered.append_column(part.schema.field(name), part[name])
        yield shard, numbered


def encode_shard(table: pa.Table) -> bytes:
    """Return a manifest shard as the bytes of a Parquet file."""
    sink = io.BytesIO()
    # Hashes of ETags all differ, so a dictionary of them would be as long as the column.
    names = [name for name in table.column_names if name != "_version"]
    pq.write_table(table, sink, compression="zstd", use_dictionary=names)
    return sink.getvalue()


def read_shard(store: Store, shard: int) -> pa.Table:
    """Read a manifest shard as the output shows it: ``uri``, ``shard``, ``row``, passthrough columns.

    Raises:
        FileNotFoundError: If it is missing.
    """
    inputs, _ = read_with_locations(store, shard)
    return inputs


def read_with_locations(store: Store, shard: int) -> tuple[pa.Table, pa.Table | None]:
    """Read a manifest shard and the locations of its inputs, as :func:`split_locations` returns them.

    Raises:
        FileNotFoundError: If it is missing.
    """
    return split_locations(read_stored(store, shard))


def read_stored(store: Store, shard: int) -> pa.Table:
    """Read a manifest shard with all columns that it is stored with.

    Raises:
        FileNotFoundError: If it is missing.
    """
    # Outputs that an older version has begun may have columns of types without kernels.
    return plain_inputs(read_parquet(store.get(shard_path(shard))))


def split_locations(table: pa.Table) -> tuple[pa.Table, pa.Table | None]:
    """Split a table into inputs and their locations, columns of :data:`LOCATION_SCHEMA`; None without any of them."""
    columns = [name for name in LOCATION_COLUMNS if name in table.column_names]
    return (table.drop_columns(columns), table.select(columns)) if columns else (table, None)


def without_etags(table: pa.Table) -> pa.Table:
    """Return inputs, or their locations, without the ETags of objects by themselves, which are then read as they are.

    Members of files keep their file's: nothing is known of where members lie in another version of it.
    """
    if "_version" not in table.column_names:
        return table
    unknown = pa.nulls(table.num_rows, pa.int32())
    etags = unknown
    if "_offset" in table.column_names:
        etags = pc.if_else(pc.is_valid(table["_offset"]), table["_version"], unknown)
    return table.set_column(table.column_names.index("_version"), "_version", etags)


def read_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Read the bytes of a small Parquet file.

    Read in the calling thread only. Arrow's scanner, which ``pyarrow.parquet.read_table`` uses, now and then leaves a
    thread behind that aborts the process at its end.

    Raises:
        KeyError: If a column is missing.
    """
    file = pq.ParquetFile(io.BytesIO(data))
    missing = set(columns or ()) - set(file.schema_arrow.names)
    if missing:
        raise KeyError(f"there are no columns {', '.join(sorted(missing))}")
    return file.read(columns=columns, use_threads=False)
