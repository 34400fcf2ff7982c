"""Files that hold many images, tar and Parquet: their members as inputs of their own.

A member's URI is its file's, then ``#``, then its name (tar) or the number of its row from 0 (Parquet). Where it lies
goes into internal columns of the manifest, so that tasks read it without looking at the file's table of contents again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from batch_inference import parquet_files, tar_files
from batch_inference.config import InputConfig, StorageConfig
from batch_inference.errors import RowFailure, UserError
from batch_inference.fetcher import Fetcher
from batch_inference.names import canonical
from batch_inference.prefixes import Prefixes
from batch_inference.storage import display

_MEMBER = r"\.(?:tar|parquet)#"
_SPLIT = re.compile(_MEMBER, re.IGNORECASE)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
# Where a member lies. Null: an object by itself. A tar's member: place and size of its data in bytes. A Parquet file's:
# the number of its row, and the column's path. An offset of -1: there is no such member. Then the version of the object or
# of the member's file, null if it is not known.
PLACE_SCHEMA = pa.schema(
    [
        ("_offset", pa.int64()),
        ("_size", pa.int64()),
        ("_version", pa.int32()),
        ("_column", pa.dictionary(pa.int32(), pa.string())),
    ]
)
PLACE_COLUMNS = tuple(PLACE_SCHEMA.names)
NO_SUCH_MEMBER = -1
_FILES_AT_ONCE = 16


@dataclass
class Contents:
    """What one file holds.

    Attributes:
        table: ``uri``, the columns of :data:`PLACE_SCHEMA`, then passthrough columns; in the order of the file.
        skipped: Members that are no images, by file name ending.
        duplicates: Members that a later one of the same name replaces.
        notes: What a user should know.
    """

    table: pa.Table
    skipped: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    notes: list[str] = field(default_factory=list)


def split_member(uri: str) -> tuple[str, str] | None:
    """File and member of a URI such as ``s3://bucket/a.tar#name.jpg``, None for any other.

    >>> split_member("s3://bucket/a.tar#x/1.jpg")
    ('s3://bucket/a.tar', 'x/1.jpg')
    >>> split_member("s3://bucket/a#1.jpg")
    """
    found = _SPLIT.search(uri)
    return (uri[: found.end() - 1], uri[found.end() :]) if found else None


def are_members(uris: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Which of many URIs name members."""
    return pc.match_substring_regex(uris, _MEMBER, ignore_case=True)


def is_container(uri: str) -> bool:
    """Whether a file of that name is a tar or a Parquet file."""
    return uri.lower().endswith((".tar", ".parquet"))


def refuse_compressed(uri: str) -> None:
    """Raises UserError for a location whose name ends like a compressed archive's."""
    if uri.lower().endswith(COMPRESSED):
        raise UserError(f"{display(uri)}: {tar_files.NOT_BY_RANGE}", tar_files.REPACK)


def contents(uris: list[str], section: InputConfig, storage: StorageConfig) -> list[Contents]:
    """What is in tar and Parquet files; several are looked at together.

    Raises:
        UserError: If one is not what its name says or can't be read; names it.
    """
    fetcher = Fetcher(storage)

    def look(uri: str) -> Contents:
        if _SPLIT.search(uri + "#").end() != len(uri) + 1:  # type: ignore[union-attr]
            raise UserError(
                f"{display(uri)} has '.tar#' or '.parquet#' in its name, where its members' names would begin",
                "Rename it.",
            )
        try:
            if uri.lower().endswith(".tar"):
                return _tar(uri, section, fetcher)
            return _parquet(uri, section, fetcher)
        except RowFailure as exc:
            raise UserError(
                f"cannot read {display(uri)}: {exc.error.message}",
                "Check the location, the credentials and that the file is whole, or leave it out.",
            ) from None

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return list(pool.map(look, uris))


@dataclass
class Listed:
    """What listing found in files.

    Attributes:
        tables: By file, its inputs.
        skipped: Members that are no images, by file name ending.
        duplicates: Files and members that were listed more than once, counted in inputs.
        notes: What a user should know.
    """

    tables: dict[str, pa.Table]
    skipped: dict[str, int]
    duplicates: int
    notes: list[str]


def listed(files: list[str], members: list[str], section: InputConfig, storage: StorageConfig) -> Listed:
    """Inputs in files, and single members of files that were named.

    Raises:
        UserError: If a file is not what its name says, or a member is not there.
    """
    distinct = sorted(set(files))
    found = contents(distinct, section, storage)
    tables = {uri: one.table for uri, one in zip(distinct, found, strict=True)}
    duplicates = sum(one.duplicates for one in found)
    duplicates += sum(tables[uri].num_rows * (files.count(uri) - 1) for uri in distinct if len(files) > len(distinct))
    notes = [note for one in found for note in one.notes]
    # A member that was named itself and whose file is listed as well.
    single = list(dict.fromkeys(uri for uri in members if split_member(uri)[0] not in tables))  # type: ignore[index]
    duplicates += len(members) - len(single)
    where, more = places(pa.chunked_array([pa.array(single, pa.string())]), section, storage)
    if where is not None:
        named = pa.table([pa.array(single, pa.string()), *where.columns], names=["uri", *where.column_names])
        gone = named.filter(pc.equal(named["_offset"], NO_SUCH_MEMBER))
        if gone.num_rows:
            raise UserError(
                f"there is no {display(gone['uri'][0].as_py())}", "Correct these inputs, or leave them out."
            )
        for line, uri in enumerate(single):
            file = split_member(uri)[0]  # type: ignore[index]
            one = named.slice(line, 1)
            tables[file] = pa.concat_tables([tables[file], one]) if file in tables else one
    return Listed(tables, merged(one.skipped for one in found), duplicates, notes + more)


def places(uris: pa.ChunkedArray, section: InputConfig, storage: StorageConfig) -> tuple[pa.Table | None, list[str]]:
    """Where the members lie that a manifest names; each file is looked at once.

    Args:
        uris: The manifest's URIs.
        section: Says which column of Parquet files holds images.
        storage: How to reach the files.

    Returns:
        Columns of :data:`PLACE_SCHEMA` for every line, or None if none is a member; then what a user should know.

    Raises:
        UserError: If a file is not what its name says. One that is missing is the failure of its members.
    """
    if not pc.any(are_members(uris)).as_py():
        return None, []
    wanted: dict[str, dict[str, list[int]]] = {}
    prefixes = Prefixes.of(section)
    for line, uri in enumerate(uris.to_pylist()):
        # Files that are not allowed are not opened either; their members fail as inputs.
        if (split := split_member(uri)) and not (prefixes and prefixes.refusal(uri)):
            wanted.setdefault(split[0], {}).setdefault(canonical(split[1]), []).append(line)
    fetcher = Fetcher(storage)

    def look(
        item: tuple[str, dict[str, list[int]]],
    ) -> tuple[dict[str, tuple[int, int | None]], int | None, str, list[str]]:
        uri, names = item
        try:
            if uri.lower().endswith(".tar"):
                found = tar_files.index(uri, fetcher, names.__contains__)
                return dict(found.places), found.version, "", found.notes
            footer = parquet_files.footer(fetcher, uri)
            column = parquet_files.bytes_column(footer, uri, section.bytes_column)
            rows = int(footer.starts[-1])
            given = {name: int(name) for name in names if name.isascii() and name.isdigit()}
            return {name: (row, None) for name, row in given.items() if row < rows}, footer.version, column, []
        except RowFailure as exc:
            if exc.error.error_type == "NOT_FOUND":
                return {}, None, "", []
            raise UserError(
                f"cannot read {display(uri)}: {exc.error.message}", "Check the location and the credentials."
            ) from None

    lines = len(uris)
    offsets: list[int | None] = [None] * lines
    sizes: list[int | None] = [None] * lines
    versions: list[int | None] = [None] * lines
    columns: list[str | None] = [None] * lines
    notes = []
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for names, (found, version, column, said) in zip(wanted.values(), pool.map(look, wanted.items()), strict=True):
            notes += said
            for name, where in names.items():
                offset, size = found.get(name, (NO_SUCH_MEMBER, None))
                for line in where:
                    offsets[line], sizes[line], versions[line], columns[line] = offset, size, version, column
    table = pa.table([pa.array(c, f.type) for c, f in zip((offsets, sizes, versions, columns), PLACE_SCHEMA, strict=True)],
                     schema=PLACE_SCHEMA)  # fmt: skip
    return table, notes


def _tar(uri: str, section: InputConfig, fetcher: Fetcher) -> Contents:
    def wanted(name: str) -> bool:
        return not section.extensions or PurePosixPath(name).suffix.lower() in section.extensions

    found = tar_files.index(uri, fetcher, wanted)
    names = pa.array(found.places, pa.string())
    offsets = pa.array([offset for offset, _ in found.places.values()], pa.int64())
    sizes = pa.array([size for _, size in found.places.values()], pa.int64())
    return Contents(_table(uri, names, offsets, sizes, found.version, ""), found.skipped, found.replaced, found.notes)


def _parquet(uri: str, section: InputConfig, fetcher: Fetcher) -> Contents:
    footer = parquet_files.footer(fetcher, uri)
    column = parquet_files.bytes_column(footer, uri, section.bytes_column)
    rows = pa.array(range(int(footer.starts[-1])), pa.int64())
    table = _table(uri, rows.cast(pa.string()), rows, pa.nulls(len(rows), pa.int64()), footer.version, column)
    names = section.passthrough_columns
    if names and len(rows):
        more = parquet_files.read_columns(uri, fetcher, names)
        for name in names:
            table = table.append_column(more.schema.field(name), more[name])
    notes = []
    largest = max((b - a for a, b in (footer.chunk(g, column) for g in range(len(footer.starts) - 1))), default=0)
    if largest > parquet_files.LARGE_ROW_GROUP_BYTES:
        notes.append(
            f"{display(uri)} has row groups of up to {footer.largest_rows:,} images, {largest / 2**20:,.0f} MiB; a task reads one "
            "from its start, so write it with smaller ones (row_group_size=1000)"
        )
    return Contents(table, notes=notes)


def _table(uri: str, names: pa.Array, offsets: pa.Array, sizes: pa.Array, version: int | None, column: str) -> pa.Table:
    columns = pa.DictionaryArray.from_arrays(pa.array([0] * len(names), pa.int32()), pa.array([column], pa.string()))
    versions = pa.repeat(pa.scalar(version, pa.int32()), len(names))
    full = pc.binary_join_element_wise(uri + "#", names, "")
    return pa.table([full, offsets, sizes, versions, columns], schema=pa.schema([("uri", pa.string()), *PLACE_SCHEMA]))


def without_versions(table: pa.Table) -> pa.Table:
    """Inputs, or their places, with no version of objects by themselves: those are taken as they are then.

    Members of files keep theirs: what lies where in another version is not known.
    """
    if "_version" not in table.column_names:
        return table
    place = table.column_names.index("_version")
    none = pa.nulls(table.num_rows, pa.int32())
    kept = (
        pc.if_else(pc.is_valid(table["_offset"]), table["_version"], none) if "_offset" in table.column_names else none
    )
    return table.set_column(place, "_version", kept)


def merged(given: Iterable[dict[str, int]]) -> dict[str, int]:
    """Counts added up."""
    out: dict[str, int] = {}
    for counts in given:
        for key, count in counts.items():
            out[key] = out.get(key, 0) + count
    return out
