"""Locate members of tar and Parquet files that a manifest names, or a user one by one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.config import InputConfig, StorageConfig
from batch_inference.errors import InfrastructureError, RowError, UserError
from batch_inference.inputs import parquet_columns, parquet_contents, tar
from batch_inference.inputs.allowlist import Allowlist
from batch_inference.inputs.file_errors import encode_error
from batch_inference.inputs.member_uris import are_members, split_member
from batch_inference.output.manifest import LOCATION_SCHEMA, NO_SUCH_MEMBER
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.names import canonical_name
from batch_inference.storage.uris import display_uri

FILES_AT_ONCE = 16

T = TypeVar("T")


@dataclass
class _FileLocations:
    """The locations of the wanted members of one file.

    Attributes:
        locations: By name, as in the columns ``_offset`` and ``_size``.
        failed: By name, why a member cannot be read.
        rest_error: Why any other member may be missing; None if it is just not there.
        etag_hash: The file's.
        column: Path of the column of images.
        notes: Sentences for the user.
    """

    locations: dict[str, tuple[int, int | None]]
    failed: dict[str, str]
    rest_error: str | None
    etag_hash: int | None = None
    column: str = ""
    notes: list[str] = field(default_factory=list)


def locate_members(
    uris: pa.ChunkedArray, config: InputConfig, storage: StorageConfig
) -> tuple[pa.Table | None, list[str]]:
    """Locate the members among a manifest's URIs; each file's table of contents is read once.

    Args:
        uris: The manifest's URIs.
        config: Names the column of Parquet files that holds images.
        storage: How to reach the files.

    Returns:
        Columns of :data:`LOCATION_SCHEMA` for every line, or None if no line names a member; then notes for the user.

    Raises:
        UserError: If there are no valid credentials. A file that is missing or damaged is the failure of its members.
        InfrastructureError: If the store fails.
    """
    if not pc.any(are_members(uris)).as_py():
        return None, []
    wanted = _wanted_members(uris, config)
    fetcher = Fetcher(storage)
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        files = list(pool.map(lambda item: _locate_in_file(item[0], item[1], config, fetcher), wanted.items()))
    return _location_table(len(uris), wanted, files), [note for file in files for note in file.notes]


def _wanted_members(uris: pa.ChunkedArray, config: InputConfig) -> dict[str, dict[str, list[int]]]:
    """Return by file, then by member, the lines that name it."""
    wanted: dict[str, dict[str, list[int]]] = {}
    allowlist = Allowlist.from_config(config)
    for line, uri in enumerate(uris.to_pylist()):
        # Files that are not allowed are not opened either; their members fail as inputs.
        if (parts := split_member(uri)) and not (allowlist and allowlist.refusal(uri)):
            wanted.setdefault(parts[0], {}).setdefault(canonical_name(parts[1]), []).append(line)
    return wanted


def _locate_in_file(uri: str, names: dict[str, list[int]], config: InputConfig, fetcher: Fetcher) -> _FileLocations:
    locate = _locate_in_tar if uri.lower().endswith(".tar") else _locate_in_parquet
    try:
        return read_contents_table(uri, lambda: locate(uri, names, config, fetcher))
    except RowError as exc:
        # A file that is not there has no such members either.
        gone = isinstance(exc.__cause__, RowError) and exc.__cause__.error.error_type == "NOT_FOUND"
        return _FileLocations({}, {}, None if gone else encode_error(exc))


def _locate_in_tar(uri: str, names: dict[str, list[int]], config: InputConfig, fetcher: Fetcher) -> _FileLocations:
    index = tar.read_index(uri, fetcher, names.__contains__)
    failed = {name: encode_error(exc) for name, exc in index.failed.items()}
    rest_error = encode_error(index.rest_error) if index.rest_error else None
    return _FileLocations(dict(index.locations), failed, rest_error, index.etag_hash, "", index.notes)


def _locate_in_parquet(uri: str, names: dict[str, list[int]], config: InputConfig, fetcher: Fetcher) -> _FileLocations:
    footer = parquet_contents.read_footer(fetcher, uri)
    column = parquet_columns.image_column(footer, fetcher, uri, config.image_column)
    rows = {name: int(name) for name in names if name.isascii() and name.isdigit()}
    locations: dict[str, tuple[int, int | None]] = {
        name: (row, None) for name, row in rows.items() if row < footer.row_count
    }
    return _FileLocations(locations, {}, None, footer.etag_hash, column)


def _location_table(lines: int, wanted: dict[str, dict[str, list[int]]], files: list[_FileLocations]) -> pa.Table:
    offsets: list[int | None] = [None] * lines
    sizes: list[int | None] = [None] * lines
    etag_hashes: list[int | None] = [None] * lines
    columns: list[str | None] = [None] * lines
    errors: list[str | None] = [None] * lines
    for names, file in zip(wanted.values(), files, strict=True):
        for name, lines_of_name in names.items():
            offset, size = file.locations.get(name, (NO_SUCH_MEMBER, None))
            error = None if name in file.locations else file.failed.get(name, file.rest_error)
            for line in lines_of_name:
                offsets[line], sizes[line], etag_hashes[line] = offset, size, file.etag_hash
                columns[line], errors[line] = file.column, error
    values = (offsets, sizes, etag_hashes, columns, errors)
    return pa.table([pa.array(c, f.type) for c, f in zip(values, LOCATION_SCHEMA, strict=True)], schema=LOCATION_SCHEMA)


def read_contents_table(uri: str, read: Callable[[], T]) -> T:
    """Return a file's table of contents as ``read`` returns it; read it again if the file was replaced meanwhile.

    Raises:
        RowError: If it cannot be read; stage ``list``.
        UserError: If there are no valid credentials.
        InfrastructureError: If the store fails.
    """
    try:
        try:
            return read()
        except RowError as exc:
            if exc.error.error_type != "CHANGED":
                raise
            return read()
    except RowError as exc:
        error = exc.error
        if error.stage == "list":
            raise
        if error.retryable:
            raise InfrastructureError(
                f"cannot read {display_uri(uri)}: {error.message}",
                "Check the store, its endpoint and the network, then start the same command again.",
            ) from None
        if error.error_type == "UNAUTHENTICATED":
            raise UserError(
                f"cannot read {display_uri(uri)}: {error.message}", "Give valid credentials in the environment."
            ) from None
        raise RowError(
            "list",
            "UNREADABLE",
            f"the file's contents cannot be read: {error.message}",
            remedy="Make it readable and start a new job",
        ) from exc
