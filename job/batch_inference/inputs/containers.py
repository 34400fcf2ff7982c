"""List files that hold many images, tar and Parquet: their members become inputs of their own.

A member's location goes into internal columns of the manifest, so that tasks read it without the file's table of contents.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.config import InputConfig, StorageConfig
from batch_inference.errors import RowError, UserError
from batch_inference.inputs import parquet_columns, parquet_contents, tar
from batch_inference.inputs.file_errors import failed_row
from batch_inference.inputs.member_locations import FILES_AT_ONCE, locate_members, read_contents_table
from batch_inference.inputs.member_uris import has_ambiguous_members, split_member
from batch_inference.output.manifest import LOCATION_SCHEMA, NO_SUCH_MEMBER
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.uris import display_uri
from batch_inference.text import format_count

_MAX_NOTES = 10


@dataclass
class FileContents:
    """The members of one file.

    Attributes:
        table: ``uri``, the columns of :data:`LOCATION_SCHEMA`, then passthrough columns; in the order of the file. If not all of its
            members are known, the last row is the file itself, with its ``_error``.
        skipped: Members that are no images, by file name ending.
        duplicates: Members that a later one of the same name replaces.
        notes: Sentences for the user.
        lacking: Passthrough columns that the file does not have, each with the names of those that it has.
    """

    table: pa.Table
    skipped: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    notes: list[str] = field(default_factory=list)
    lacking: dict[str, str] = field(default_factory=dict)


@dataclass
class ContainerInputs:
    """The inputs in all files.

    Attributes:
        tables: By file, its inputs.
        skipped: Members that are no images, by file name ending.
        duplicates: Files and members that were listed more than once, counted in inputs.
        notes: Sentences for the user.
    """

    tables: dict[str, pa.Table]
    skipped: dict[str, int]
    duplicates: int
    notes: list[str]


def list_containers(
    files: list[str], members: list[str], config: InputConfig, storage: StorageConfig
) -> ContainerInputs:
    """Return the inputs in files, and single members that were named.

    Raises:
        UserError: If a member is not there, or there are no valid credentials.
        InfrastructureError: If the store fails.
    """
    distinct = sorted(set(files))
    contents = dict(zip(distinct, read_contents(distinct, config, storage), strict=True))
    tables = {uri: file.table for uri, file in contents.items()}
    notes = [note for file in contents.values() for note in file.notes] + _check_columns(contents)
    duplicates = sum(file.duplicates for file in contents.values())
    duplicates += sum(tables[uri].num_rows * (files.count(uri) - 1) for uri in distinct if len(files) > len(distinct))
    # A member that was named itself and whose file is listed as well is one input.
    single = list(dict.fromkeys(uri for uri in members if split_member(uri)[0] not in tables))  # type: ignore[index]
    duplicates += len(members) - len(single)
    locations, more_notes = locate_members(pa.chunked_array([pa.array(single, pa.string())]), config, storage)
    if locations is not None:
        named = pa.table([pa.array(single, pa.string()), *locations.columns], names=["uri", *locations.column_names])
        missing = named.filter(pc.and_(pc.equal(named["_offset"], NO_SUCH_MEMBER), pc.is_null(named["_error"])))
        if missing.num_rows:
            raise UserError(
                f"there is no {display_uri(missing['uri'][0].as_py())}", "Correct these inputs, or leave them out."
            )
        for index, uri in enumerate(single):
            file = split_member(uri)[0]  # type: ignore[index]
            row = named.slice(index, 1)
            tables[file] = pa.concat_tables([tables[file], row]) if file in tables else row
    skipped = sum_counts(file.skipped for file in contents.values())
    return ContainerInputs(tables, skipped, duplicates, notes + more_notes)


def read_contents(uris: list[str], config: InputConfig, storage: StorageConfig) -> list[FileContents]:
    """Return the members of tar and Parquet files; several files are read at the same time.

    A file without a known member is one row, with the reason; it keeps no other file from being listed.

    Raises:
        UserError: If there are no valid credentials.
        InfrastructureError: If the store fails; another start may succeed.
    """
    fetcher = Fetcher(storage)

    def read(uri: str) -> FileContents:
        try:
            if has_ambiguous_members(uri):
                raise RowError(
                    "list",
                    "INVALID_URI",
                    "the file has '.tar#' or '.parquet#' in its name, where its members' names would begin",
                    remedy="Rename it",
                )
            list_members = _list_tar if uri.lower().endswith(".tar") else _list_parquet
            return read_contents_table(uri, lambda: list_members(uri, config, fetcher))
        except RowError as exc:
            return FileContents(failed_row(uri, exc))

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        return list(pool.map(read, uris))


def _check_columns(contents: dict[str, FileContents]) -> list[str]:
    """Return notes on passthrough columns that some files lack; their rows have nulls there.

    Raises:
        UserError: If no file has a column, or types differ so that one column cannot hold them.
    """
    notes = []
    lacking = [(uri, name, present) for uri, file in contents.items() for name, present in file.lacking.items()]
    for uri, name, present in lacking:
        if not any(name in file.table.column_names for file in contents.values()):
            raise UserError(
                f"{display_uri(uri)} has no column {name}; it has: {present}", "Correct input.passthrough_columns."
            )
        notes.append(f"{display_uri(uri)} has no column {name} (input.passthrough_columns); its rows have null there")
    schema = pa.schema([])
    for uri, file in contents.items():
        try:
            schema = pa.unify_schemas([schema, file.table.schema], promote_options="permissive")
        except pa.ArrowException:
            names = [
                f.name for f in file.table.schema if f.name in schema.names and f.type != schema.field(f.name).type
            ]
            types = ", ".join(
                f"{name} as {file.table.schema.field(name).type}, files before it as {schema.field(name).type}"
                for name in names
            )
            raise UserError(
                f"{display_uri(uri)} has passthrough columns of other types: {types}",
                "Give the files one type for each column, or leave it out of input.passthrough_columns.",
            ) from None
    return notes


def _list_tar(uri: str, config: InputConfig, fetcher: Fetcher) -> FileContents:
    def wanted(name: str) -> bool:
        return not config.extensions or PurePosixPath(name).suffix.lower() in config.extensions

    index = tar.read_index(uri, fetcher, wanted)
    names = pa.array(index.locations, pa.string())
    offsets = pa.array([offset for offset, _ in index.locations.values()], pa.int64())
    sizes = pa.array([size for _, size in index.locations.values()], pa.int64())
    table = _member_table(uri, names, offsets, sizes, index.etag_hash, "")
    failed = [failed_row(f"{uri}#{name}", exc) for name, exc in index.failed.items()]
    failed += [failed_row(uri, index.rest_error)] if index.rest_error else []
    if failed:
        table = pa.concat_tables([table, *failed], promote_options="permissive").unify_dictionaries()
    return FileContents(table, index.skipped, index.replaced, index.notes)


def _list_parquet(uri: str, config: InputConfig, fetcher: Fetcher) -> FileContents:
    footer = parquet_contents.read_footer(fetcher, uri)
    column = parquet_columns.image_column(footer, fetcher, uri, config.image_column)
    rows = pa.array(range(footer.row_count), pa.int64())
    table = _member_table(uri, rows.cast(pa.string()), rows, pa.nulls(len(rows), pa.int64()), footer.etag_hash, column)
    names = config.passthrough_columns
    lacking = {}
    if names and len(rows):
        passthrough, present = parquet_contents.read_columns(uri, fetcher, names)
        for schema_field in passthrough.schema:
            table = table.append_column(schema_field, passthrough[schema_field.name])
        lacking = {name: ", ".join(present) for name in names if name not in present}
    return FileContents(table, notes=_parquet_notes(uri, footer, column), lacking=lacking)


def _parquet_notes(uri: str, footer: parquet_contents.Footer, column: str) -> list[str]:
    notes = []
    nulls, paths = footer.null_count(column), parquet_columns.path_column(footer, column)
    if nulls and paths:
        notes.append(
            f"{display_uri(uri)} has {format_count(nulls, 'image')} of {footer.row_count:,} without bytes, only with a path in {paths}: to "
            f"read the files that the paths name, {parquet_columns.PATHS_AS_MANIFEST}"
        )
    chunks = (footer.chunk(group, column) for group in range(footer.group_count))
    largest = max((end - start for start, end in chunks), default=0)
    if largest > parquet_contents.LARGE_ROW_GROUP_BYTES:
        notes.append(
            f"{display_uri(uri)} has row groups of up to {format_count(footer.max_group_rows, 'image')}, {largest / 2**20:,.0f} MiB; a "
            "task reads one from its start, so write it with smaller ones (row_group_size=1000)"
        )
    return notes


def _member_table(
    uri: str, names: pa.Array, offsets: pa.Array, sizes: pa.Array, etag_hash: int | None, column: str
) -> pa.Table:
    columns = pa.DictionaryArray.from_arrays(pa.array([0] * len(names), pa.int32()), pa.array([column], pa.string()))
    etag_hashes = pa.repeat(pa.scalar(etag_hash, pa.int32()), len(names))
    uris = pc.binary_join_element_wise(uri + "#", names, "")
    errors = pa.nulls(len(names), LOCATION_SCHEMA.field("_error").type)
    return pa.table(
        [uris, offsets, sizes, etag_hashes, columns, errors], schema=pa.schema([("uri", pa.string()), *LOCATION_SCHEMA])
    )


def first_notes(notes: list[str]) -> list[str]:
    """Return at most as many notes as people read, and the number of the others."""
    more = len(notes) - _MAX_NOTES
    if more <= 0:
        return notes
    return [*notes[:_MAX_NOTES], f"and {format_count(more, 'more file')} with such notes"]


def sum_counts(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """Return the sums of counts by key."""
    total: dict[str, int] = {}
    for part in counts:
        for key, count in part.items():
            total[key] = total.get(key, 0) + count
    return total
