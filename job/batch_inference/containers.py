"""Files that hold many images, tar and Parquet: their members as inputs of their own.

A member's URI is its file's, then ``#``, then its name (tar) or the number of its row from 0 (Parquet). Where it lies
goes into internal columns of the manifest, so that tasks read it without looking at the file's table of contents again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from batch_inference import parquet_files, tar_files
from batch_inference.config import InputConfig, StorageConfig
from batch_inference.errors import RowError, RowFailure, SystemFault, UserError
from batch_inference.fetcher import Fetcher
from batch_inference.names import canonical
from batch_inference.prefixes import Prefixes
from batch_inference.storage import display

_MEMBER = r"\.(?:tar|parquet)#"
_SPLIT = re.compile(_MEMBER, re.IGNORECASE)
# Endings of compressed archives, and what unpacks them: their members cannot be read by range.
COMPRESSED = {
    ".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tbz2": "bunzip2", ".tar.xz": "unxz", ".txz": "unxz",
    ".tar.zst": "unzstd", ".tzst": "unzstd", ".tar.lz4": "unlz4", ".zip": "unzip", ".7z": "7z x", ".rar": "unrar x",
    ".gz": "gunzip", ".bz2": "bunzip2", ".xz": "unxz", ".zst": "unzstd", ".lz4": "unlz4",
}  # fmt: skip
# Where a member lies. Null: an object by itself. A tar's member: place and size of its data in bytes. A Parquet file's:
# the number of its row, and the column's path. An offset of -1: there is no such member. Then the version of the object or
# of the member's file, null if it is not known. Then why the input cannot be read, if listing has found that out: stage,
# error type, fact and remedy, a line each; so fail members, and files of which not all members are known.
PLACE_SCHEMA = pa.schema(
    [
        ("_offset", pa.int64()),
        ("_size", pa.int64()),
        ("_version", pa.int32()),
        ("_column", pa.dictionary(pa.int32(), pa.string())),
        ("_error", pa.dictionary(pa.int32(), pa.string())),
    ]
)
PLACE_COLUMNS = tuple(PLACE_SCHEMA.names)
NO_SUCH_MEMBER = -1
_FILES_AT_ONCE = 16
# Files that one message names; the errors table has them all.
_MOST_NAMED = 50
_MOST_NOTES = 10

T = TypeVar("T")


@dataclass
class Contents:
    """What one file holds.

    Attributes:
        table: ``uri``, the columns of :data:`PLACE_SCHEMA`, then passthrough columns; in the order of the file. The file itself
            is the last row, with its ``_error``, where not all of its members are known.
        skipped: Members that are no images, by file name ending.
        duplicates: Members that a later one of the same name replaces.
        notes: What a user should know.
        lacking: Passthrough columns that the file does not have, each with the names of those that it has.
    """

    table: pa.Table
    skipped: dict[str, int] = field(default_factory=dict)
    duplicates: int = 0
    notes: list[str] = field(default_factory=list)
    lacking: dict[str, str] = field(default_factory=dict)


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
        raise UserError(f"{display(uri)}: {ending} is not supported: {tar_files.NOT_BY_RANGE}", unpacking([uri]))


def left_out(uris: list[str]) -> str:
    """Return a sentence that names compressed archives which are no inputs; "" if there are none."""
    if not uris:
        return ""
    named = ", ".join(display(uri) for uri in sorted(uris)[:_MOST_NAMED])
    more = f" and {len(uris) - _MOST_NAMED:,} more" if len(uris) > _MOST_NAMED else ""
    return f"left out, because {tar_files.NOT_BY_RANGE}: {named}{more}"


def unpacking(uris: Iterable[str]) -> str:
    """Return how to unpack compressed archives, one command for each kind."""
    commands: dict[str, str] = {}
    for uri in sorted(uris):
        name, ending = display(uri).rpartition("/")[2], compressed_ending(uri)
        # What `gunzip` leaves of a .tar.gz is the .tar that can be read.
        folder = {"unzip": f" -d '{name[: -len(ending)]}'"}.get(COMPRESSED[ending], "")
        commands.setdefault(COMPRESSED[ending], f"{COMPRESSED[ending]} '{name}'{folder}")
    return f"Unpack: {', '.join(commands.values())}. Images hardly get smaller by compression."


def contents(uris: list[str], section: InputConfig, storage: StorageConfig) -> list[Contents]:
    """Return what is in tar and Parquet files; several are looked at together.

    A file of which no member can be known is one row, with the reason; it keeps no other from being listed.

    Raises:
        UserError: If there are no valid credentials.
        SystemFault: If the store fails, which another start may overcome.
    """
    fetcher = Fetcher(storage)

    def look(uri: str) -> Contents:
        try:
            if _SPLIT.search(uri + "#").end() != len(uri) + 1:  # type: ignore[union-attr]
                raise RowFailure(
                    "list",
                    "INVALID_URI",
                    "the file has '.tar#' or '.parquet#' in its name, where its members' names would begin",
                    remedy="Rename it",
                )
            return _read(uri, lambda: (_tar if uri.lower().endswith(".tar") else _parquet)(uri, section, fetcher))
        except RowFailure as exc:
            return Contents(_failed(uri, exc))

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return list(pool.map(look, uris))


def _read(uri: str, read: Callable[[], T]) -> T:
    """Return what reading a file's table of contents gives; tried again where the file was replaced meanwhile.

    Raises:
        RowFailure: If it cannot be read; stage ``list``.
        UserError: If there are no valid credentials.
        SystemFault: If the store fails.
    """
    try:
        try:
            return read()
        except RowFailure as exc:
            if exc.error.error_type != "CHANGED":
                raise
            return read()
    except RowFailure as exc:
        error = exc.error
        if error.stage == "list":
            raise
        if error.retryable:
            raise SystemFault(
                f"cannot read {display(uri)}: {error.message}",
                "Check the store, its endpoint and the network, then start the same command again.",
            ) from None
        if error.error_type == "UNAUTHENTICATED":
            raise UserError(
                f"cannot read {display(uri)}: {error.message}", "Give valid credentials in the environment."
            ) from None
        raise RowFailure(
            "list",
            "UNREADABLE",
            f"what is in the file cannot be read: {error.message}",
            remedy="Make it readable and start a new job",
        ) from exc


def _failed(uri: str, exc: RowFailure) -> pa.Table:
    """Return the row of a file, or of members of one, that listing has found to fail."""
    values = (uri, None, None, None, None, _text(exc))
    schema = pa.schema([("uri", pa.string()), *PLACE_SCHEMA])
    return pa.table([pa.array([value], f.type) for value, f in zip(values, schema, strict=True)], schema=schema)


def _text(exc: RowFailure) -> str:
    return "\n".join((exc.error.stage, exc.error.error_type, exc.fact, exc.remedy))


def error_of(text: str | None) -> RowError | None:
    """Return the failure that a value of the column ``_error`` stands for."""
    if text is None:
        return None
    stage, kind, fact, remedy = text.split("\n")
    return RowError(stage, kind, f"{fact}. {remedy}" if remedy else fact)  # type: ignore[arg-type]


def refuse_failed(table: pa.Table) -> str:
    """Return a sentence that names the files which fail because of what listing has found in them; "" if there are none.

    Raises:
        UserError: If no input is left beside them.
    """
    if "_error" not in table.column_names or table["_error"].null_count == table.num_rows:
        return ""
    failed = table.filter(pc.is_valid(table["_error"]))
    reasons: dict[str, str] = {}
    remedies: dict[str, None] = {}
    files: set[str] = set()
    for uri, text in zip(failed["uri"].to_pylist(), failed["_error"].to_pylist(), strict=True):
        _, kind, fact, remedy = text.split("\n")
        # Members that a manifest names share their file's reason; a sparse member has its own.
        file = uri if kind == "SPARSE_MEMBER" else (split_member(uri) or (uri,))[0]
        files.add(file)
        if len(reasons) < _MOST_NAMED:
            reasons.setdefault(file, fact)
            remedies.setdefault(remedy + "." if remedy else "")
    named = "; ".join(f"{display(file)}: {fact}" for file, fact in reasons.items())
    if len(files) > len(reasons):
        named += f"; and {len(files) - len(reasons):,} more"
    if failed.num_rows == table.num_rows:
        raise UserError(
            named if len(files) == 1 else f"none of the {len(files):,} files that were found can be used: {named}",
            " ".join(list(remedies)[:4]).strip(),
        )
    return (
        f"{failed.num_rows:,} of {table.num_rows:,} inputs will be rows of errors, because their files cannot be read, or not as a "
        f"whole: {named}"
    )


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
    """Return inputs in files, and single members of files that were named.

    Raises:
        UserError: If a member is not there, or there are no valid credentials.
        SystemFault: If the store fails.
    """
    distinct = sorted(set(files))
    found = contents(distinct, section, storage)
    tables = {uri: one.table for uri, one in zip(distinct, found, strict=True)}
    lacking = _check_columns(dict(zip(distinct, found, strict=True)))
    duplicates = sum(one.duplicates for one in found)
    duplicates += sum(tables[uri].num_rows * (files.count(uri) - 1) for uri in distinct if len(files) > len(distinct))
    notes = [note for one in found for note in one.notes] + lacking
    # A member that was named itself and whose file is listed as well.
    single = list(dict.fromkeys(uri for uri in members if split_member(uri)[0] not in tables))  # type: ignore[index]
    duplicates += len(members) - len(single)
    where, more = places(pa.chunked_array([pa.array(single, pa.string())]), section, storage)
    if where is not None:
        named = pa.table([pa.array(single, pa.string()), *where.columns], names=["uri", *where.column_names])
        gone = named.filter(pc.and_(pc.equal(named["_offset"], NO_SUCH_MEMBER), pc.is_null(named["_error"])))
        if gone.num_rows:
            raise UserError(
                f"there is no {display(gone['uri'][0].as_py())}", "Correct these inputs, or leave them out."
            )
        for line, uri in enumerate(single):
            file = split_member(uri)[0]  # type: ignore[index]
            one = named.slice(line, 1)
            tables[file] = pa.concat_tables([tables[file], one]) if file in tables else one
    return Listed(tables, merged(one.skipped for one in found), duplicates, notes + more)


def _check_columns(found: dict[str, Contents]) -> list[str]:
    """Return notes on passthrough columns that some files lack, whose rows have nulls in their place.

    Raises:
        UserError: If no file has a column, or types differ so that one column cannot hold them.
    """
    notes = []
    lacking = [(uri, name, there) for uri, one in found.items() for name, there in one.lacking.items()]
    for uri, name, there in lacking:
        if not any(name in one.table.column_names for one in found.values()):
            raise UserError(
                f"{display(uri)} has no column {name}; it has: {there}", "Correct input.passthrough_columns."
            )
        notes.append(f"{display(uri)} has no column {name} (input.passthrough_columns); its rows have null there")
    schema = pa.schema([])
    for uri, one in found.items():
        try:
            schema = pa.unify_schemas([schema, one.table.schema], promote_options="permissive")
        except pa.ArrowException:
            names = [f.name for f in one.table.schema if f.name in schema.names and f.type != schema.field(f.name).type]
            kinds = ", ".join(
                f"{name} as {one.table.schema.field(name).type}, files before it as {schema.field(name).type}"
                for name in names
            )
            raise UserError(
                f"{display(uri)} has passthrough columns of other types: {kinds}",
                "Give the files one type for each column, or leave it out of input.passthrough_columns.",
            ) from None
    return notes


def places(uris: pa.ChunkedArray, section: InputConfig, storage: StorageConfig) -> tuple[pa.Table | None, list[str]]:
    """Where the members lie that a manifest names; each file is looked at once.

    Args:
        uris: The manifest's URIs.
        section: Says which column of Parquet files holds images.
        storage: How to reach the files.

    Returns:
        Columns of :data:`PLACE_SCHEMA` for every line, or None if none is a member; then what a user should know.

    Raises:
        UserError: If there are no valid credentials. A file that is missing or damaged is the failure of its members.
        SystemFault: If the store fails.
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

    def look(item: tuple[str, dict[str, list[int]]]) -> _Places:
        uri, names = item
        try:
            return _read(uri, lambda: inside(uri, names))
        except RowFailure as exc:
            # Of a file that is not there its members are not there either.
            gone = isinstance(exc.__cause__, RowFailure) and exc.__cause__.error.error_type == "NOT_FOUND"
            return _Places({}, {}, None if gone else _text(exc))

    def inside(uri: str, names: dict[str, list[int]]) -> _Places:
        if uri.lower().endswith(".tar"):
            found = tar_files.index(uri, fetcher, names.__contains__)
            failed = {name: _text(exc) for name, exc in found.failed.items()}
            return _Places(
                dict(found.places), failed, _text(found.rest) if found.rest else None, found.version, "", found.notes
            )
        footer = parquet_files.footer(fetcher, uri)
        column = parquet_files.bytes_column(footer, fetcher, uri, section.bytes_column)
        rows = int(footer.starts[-1])
        given = {name: int(name) for name in names if name.isascii() and name.isdigit()}
        there: dict[str, tuple[int, int | None]] = {name: (row, None) for name, row in given.items() if row < rows}
        return _Places(there, {}, None, footer.version, column)

    lines = len(uris)
    offsets: list[int | None] = [None] * lines
    sizes: list[int | None] = [None] * lines
    versions: list[int | None] = [None] * lines
    columns: list[str | None] = [None] * lines
    errors: list[str | None] = [None] * lines
    notes = []
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for names, found in zip(wanted.values(), pool.map(look, wanted.items()), strict=True):
            notes += found.notes
            for name, where in names.items():
                offset, size = found.places.get(name, (NO_SUCH_MEMBER, None))
                error = None if name in found.places else found.failed.get(name, found.rest)
                for line in where:
                    offsets[line], sizes[line], versions[line] = offset, size, found.version
                    columns[line], errors[line] = found.column, error
    values = (offsets, sizes, versions, columns, errors)
    table = pa.table([pa.array(c, f.type) for c, f in zip(values, PLACE_SCHEMA, strict=True)],
                     schema=PLACE_SCHEMA)  # fmt: skip
    return table, notes


@dataclass
class _Places:
    """Where the members of one file lie that a manifest names.

    Attributes:
        places: By name, as in the columns ``_offset`` and ``_size``.
        failed: By name, why a member cannot be read.
        rest: Why any other may be missing; None if it is just not there.
        version: The file's.
        column: Path of the column of images.
        notes: What a user should know.
    """

    places: dict[str, tuple[int, int | None]]
    failed: dict[str, str]
    rest: str | None
    version: int | None = None
    column: str = ""
    notes: list[str] = field(default_factory=list)


def _tar(uri: str, section: InputConfig, fetcher: Fetcher) -> Contents:
    def wanted(name: str) -> bool:
        return not section.extensions or PurePosixPath(name).suffix.lower() in section.extensions

    found = tar_files.index(uri, fetcher, wanted)
    names = pa.array(found.places, pa.string())
    offsets = pa.array([offset for offset, _ in found.places.values()], pa.int64())
    sizes = pa.array([size for _, size in found.places.values()], pa.int64())
    table = _table(uri, names, offsets, sizes, found.version, "")
    failed = [_failed(f"{uri}#{name}", exc) for name, exc in found.failed.items()]
    failed += [_failed(uri, found.rest)] if found.rest else []
    return Contents(_concatenated([table, *failed]), found.skipped, found.replaced, found.notes)


def _parquet(uri: str, section: InputConfig, fetcher: Fetcher) -> Contents:
    footer = parquet_files.footer(fetcher, uri)
    column = parquet_files.bytes_column(footer, fetcher, uri, section.bytes_column)
    rows = pa.array(range(int(footer.starts[-1])), pa.int64())
    table = _table(uri, rows.cast(pa.string()), rows, pa.nulls(len(rows), pa.int64()), footer.version, column)
    names = section.passthrough_columns
    lacking = {}
    if names and len(rows):
        more, there = parquet_files.read_columns(uri, fetcher, names)
        for field_of in more.schema:
            table = table.append_column(field_of, more[field_of.name])
        lacking = {name: ", ".join(there) for name in names if name not in there}
    notes = []
    nulls, named = footer.nulls(column), parquet_files.path_column(footer, column)
    if nulls and named:
        notes.append(
            f"{display(uri)} has {nulls:,} images of {len(rows):,} without bytes, only with a path in {named}: to read the files that the "
            f"paths name, {parquet_files.PATHS_AS_MANIFEST}"
        )
    largest = max((b - a for a, b in (footer.chunk(g, column) for g in range(len(footer.starts) - 1))), default=0)
    if largest > parquet_files.LARGE_ROW_GROUP_BYTES:
        notes.append(
            f"{display(uri)} has row groups of up to {footer.largest_rows:,} images, {largest / 2**20:,.0f} MiB; a task reads one "
            "from its start, so write it with smaller ones (row_group_size=1000)"
        )
    return Contents(table, notes=notes, lacking=lacking)


def _table(uri: str, names: pa.Array, offsets: pa.Array, sizes: pa.Array, version: int | None, column: str) -> pa.Table:
    columns = pa.DictionaryArray.from_arrays(pa.array([0] * len(names), pa.int32()), pa.array([column], pa.string()))
    versions = pa.repeat(pa.scalar(version, pa.int32()), len(names))
    full = pc.binary_join_element_wise(uri + "#", names, "")
    errors = pa.nulls(len(names), PLACE_SCHEMA.field("_error").type)
    return pa.table(
        [full, offsets, sizes, versions, columns, errors], schema=pa.schema([("uri", pa.string()), *PLACE_SCHEMA])
    )


def _concatenated(tables: list[pa.Table]) -> pa.Table:
    return (
        tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="permissive").unify_dictionaries()
    )


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


def told(notes: list[str]) -> list[str]:
    """Return notes, no more than people read."""
    more = len(notes) - _MOST_NOTES
    return notes if more <= 0 else [*notes[:_MOST_NOTES], f"and {more:,} more files of which there is something to say"]


def merged(given: Iterable[dict[str, int]]) -> dict[str, int]:
    """Counts added up."""
    out: dict[str, int] = {}
    for counts in given:
        for key, count in counts.items():
            out[key] = out.get(key, 0) + count
    return out
