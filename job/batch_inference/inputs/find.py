"""Find a job's inputs: list folders, buckets and globs, or read a manifest."""

from __future__ import annotations

import bisect
import contextlib
import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import structlog

from batch_inference.config import InputConfig, JobConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.inputs import containers, member_uris
from batch_inference.inputs.distinct import distinct, sort_distinct
from batch_inference.inputs.file_errors import check_failed_files
from batch_inference.inputs.listing import expand_location, list_uris
from batch_inference.inputs.manifest_files import RESERVED_COLUMNS, read_manifest, with_locations
from batch_inference.inputs.unreadable import UnreadableInputs, find_unreadable, refuse_if_all_unreadable
from batch_inference.output import manifest
from batch_inference.output.column_types import plain_inputs
from batch_inference.storage.store import resolve_uri
from batch_inference.storage.uris import display_uri, is_file, is_local, local_path
from batch_inference.text import describe_skipped

log = structlog.get_logger()

_CHUNK_ROWS = 65536
# Where the pipes of a shell lie: `-`, `/dev/stdin`, `<(ls)`.
_STREAM_FOLDERS = ("/dev/", "/proc/")


@dataclass(frozen=True)
class Inputs:
    """A job's inputs.

    Attributes:
        table: One row an input: ``uri`` string; columns of ``LOCATION_SCHEMA``, which stay within the manifest: all of them where there
            are members of tar or Parquet files, ``_version`` where inputs were listed; then the passthrough columns.
        skipped: Objects left out, by file name ending ("" for none), or by kind, as :mod:`batch_inference.inputs.listed` names them.
        duplicates: Inputs that were listed more than once; each was kept once.
        repeated: URIs that several manifest lines share; those lines are all kept, since their other columns may differ.
        manifest_sha256: Digest of the manifest file that the inputs were read from, "" if there was none.
        unreadable: Inputs whose URIs alone show that they can't be read; they are rows all the same, and fail.
    """

    table: pa.Table
    skipped: dict[str, int]
    duplicates: int = 0
    repeated: int = 0
    manifest_sha256: str = ""
    unreadable: tuple[UnreadableInputs, ...] = ()

    @property
    def passthrough(self) -> tuple[str, ...]:
        """Names of the columns that go to the output."""
        return tuple(name for name in self.table.column_names[1:] if name not in manifest.LOCATION_COLUMNS)


def find_inputs(config: JobConfig) -> Inputs:
    """List folders and globs, or read the manifest.

    Returns:
        Listed inputs in the order of their URIs, manifest lines in their own order.

    Raises:
        UserError: If there is nothing, or it can't be read.
    """
    input_config = config.input
    for location in (*input_config.uris, *([input_config.manifest] if input_config.manifest else [])):
        refuse_stream(location)
    if input_config.manifest:
        inputs = _from_manifest(input_config, config.storage)
    elif input_config.uris:
        inputs = _from_listing(input_config, config.storage)
    else:
        raise UserError(
            "no input is given", "Name folders, globs or images after `run`, or set input.uris or input.manifest."
        )
    if inputs.table.num_rows == 0:
        raise UserError(_nothing_found(input_config, inputs), _nothing_found_remedy(input_config))
    table = inputs.table
    if warning := check_failed_files(table):
        log.warning(warning)
    if input_config.sample is not None and input_config.sample < table.num_rows:
        generator = np.random.default_rng(input_config.sample_seed)
        table = table.take(np.sort(generator.choice(table.num_rows, input_config.sample, replace=False)))
    if input_config.limit is not None:
        table = table.slice(0, input_config.limit)
    unreadable = find_unreadable(table["uri"])
    refuse_if_all_unreadable(unreadable, table.num_rows)
    return replace(inputs, table=table, unreadable=unreadable)


def refuse_stream(location: str) -> None:
    """Raise UserError for standard input and other pipes: a job is resumed, and its inputs are read more than once."""
    path = Path(location.removeprefix("file://"))
    with contextlib.suppress(OSError, ValueError):
        if location == "-" or (
            path.exists() and not (path.is_file() or path.is_dir()) and str(path).startswith(_STREAM_FOLDERS)
        ):
            raise UserError(
                ("standard input (-)" if location == "-" else location)
                + " is a pipe, and a job reads its list of inputs more than once (it can be resumed)",
                "Write the list to a file first: ls photos/*.jpg > list.txt; batch-inference run --manifest list.txt --output out",
            )


# --- listing -----------------------------------------------------------------------------------------------------------


def _from_listing(config: InputConfig, storage: StorageConfig) -> Inputs:
    listing = _Listing(config, storage)
    for given in config.uris:
        for location in expand_location(resolve_uri(given), storage):
            listing.add(location)
    listing.refuse_empty()
    listed = listing.objects()
    if listing.archives:
        left_out = member_uris.describe_left_out(listing.archives)
        remedy = member_uris.unpack_remedy(listing.archives)
        if not listed.num_rows and not listing.files and not listing.members:
            raise UserError(f"no images in {', '.join(config.uris)}; {left_out}", remedy)
        log.warning(f"{left_out}. {remedy}")
    objects = sort_distinct(listed)
    duplicates = listed.num_rows - objects.num_rows
    if objects["_version"].null_count == objects.num_rows:
        objects = objects.drop_columns(["_version"])
    if not listing.files and not listing.members:
        return Inputs(objects, listing.skipped, duplicates)
    reserved = [name for name in config.passthrough_columns if name in (*RESERVED_COLUMNS, "uri")]
    if reserved:
        raise UserError(
            f"input.passthrough_columns names columns that the output has of its own: {', '.join(reserved)}",
            "Leave them out, or rename them in the files.",
        )
    in_files = containers.list_containers(listing.files, listing.members, config, storage)
    for note in containers.first_notes(in_files.notes):
        log.warning(note)
    return Inputs(
        plain_inputs(_insert_members(objects, in_files.tables)),
        containers.sum_counts([listing.skipped, in_files.skipped]),
        duplicates + in_files.duplicates,
    )


class _Listing:
    """The objects, files and members at the given locations.

    Attributes:
        files: Tar and Parquet files whose members are inputs.
        members: Members of such files that were named one by one.
        archives: Compressed archives, which are left out.
        skipped: Objects left out, by file name ending or kind.
    """

    def __init__(self, config: InputConfig, storage: StorageConfig) -> None:
        self._config = config
        self._storage = storage
        self.files: list[str] = []
        self.members: list[str] = []
        self.archives: list[str] = []
        self.skipped: dict[str, int] = {}
        self._locations = 0
        self._empty: list[str] = []
        self._chunks: list[pa.Table] = []
        self._uris: list[str] = []
        self._etag_hashes: list[int | None] = []

    def add(self, location: str) -> None:
        """List one location."""
        if not (is_local(location) and os.path.isdir(local_path(location))):
            member_uris.refuse_compressed(location)
        if member_uris.split_member(location) and not is_file(location):
            self.members.append(location)
            return
        extensions = self._config.extensions
        # A Parquet file beside images is more likely a table of something else: it is an input only if it is asked for.
        with_parquet = self._config.image_column is not None or location.lower().endswith(".parquet")
        is_empty = True
        for uri, named, etag_hash in list_uris(location, self._config.recursive, self._storage, self.skipped):
            is_empty = False
            ending = PurePosixPath(uri).suffix.lower()
            if ending == ".tar" or (ending == ".parquet" and with_parquet):
                self.files.append(uri)
            elif not named and extensions and ending not in extensions:
                self._skip(uri, ending)
            else:
                self._add_object(uri, etag_hash)
        if is_empty:
            self._empty.append(display_uri(location))
        self._locations += 1

    def refuse_empty(self) -> None:
        """Raise UserError if some of several locations have nothing."""
        if self._empty and self._locations > 1:
            more = f" and {len(self._empty) - 5:,} more" if len(self._empty) > 5 else ""
            raise UserError(
                f"nothing was found in {', '.join(self._empty[:5])}{more}", "Correct these inputs, or leave them out."
            )

    def objects(self) -> pa.Table:
        """Return the objects that are inputs by themselves, with the hashes of their ETags."""
        return pa.concat_tables([*self._chunks, self._chunk()])

    def _skip(self, uri: str, ending: str) -> None:
        if archive := member_uris.compressed_ending(uri):
            self.archives.append(uri)
        self.skipped[archive or ending] = self.skipped.get(archive or ending, 0) + 1

    def _add_object(self, uri: str, etag_hash: int | None) -> None:
        self._uris.append(uri)
        self._etag_hashes.append(etag_hash)
        # In chunks: Python's texts take several times the memory of Arrow's.
        if len(self._uris) == _CHUNK_ROWS:
            self._chunks.append(self._chunk())
            self._uris, self._etag_hashes = [], []

    def _chunk(self) -> pa.Table:
        return pa.table({"uri": pa.array(self._uris, pa.string()), "_version": pa.array(self._etag_hashes, pa.int32())})


def _insert_members(objects: pa.Table, tables: dict[str, pa.Table]) -> pa.Table:
    """Return sorted objects and, where each file itself would stand among them, its members in the file's order."""
    uris = objects["uri"].combine_chunks()
    parts = []
    start = 0
    for uri in sorted(tables):
        stop = bisect.bisect_left(range(len(uris)), uri, key=lambda index: uris[index].as_py())
        parts += [objects.slice(start, stop - start), tables[uri]]
        start = stop
    names = ["uri", *manifest.LOCATION_COLUMNS, *(name for table in tables.values() for name in table.column_names)]
    return pa.concat_tables([*parts, objects.slice(start)], promote_options="permissive").select(
        list(dict.fromkeys(names))
    )


# --- manifests ---------------------------------------------------------------------------------------------------------


def _from_manifest(config: InputConfig, storage: StorageConfig) -> Inputs:
    table, digest = read_manifest(config, storage)
    repeats = table.num_rows - pc.count_distinct(table["uri"], mode="all").as_py()
    if repeats and table.num_columns == 1:
        table = pa.table({"uri": distinct(table["uri"])})
        return Inputs(with_locations(table, config, storage), {}, repeats, 0, digest)
    return Inputs(with_locations(table, config, storage), {}, 0, repeats, digest)


# --- nothing -----------------------------------------------------------------------------------------------------------


def _nothing_found(config: InputConfig, inputs: Inputs) -> str:
    if config.manifest:
        return f"the manifest {config.manifest} has no lines: there is nothing to do"
    locations = ", ".join(config.uris)
    if not inputs.skipped:
        return f"nothing was found in {locations}"
    skipped = ", ".join(describe_skipped(inputs.skipped)[:5])
    return f"no images in {locations}: only {skipped}; images end with {', '.join(config.extensions)}"


def _nothing_found_remedy(config: InputConfig) -> str:
    if config.manifest:
        path = shlex.quote(str(config.manifest))
        return f"Write one URI a line. In a script that may find nothing new: [ -s {path} ] && batch-inference run --manifest {path} …"
    return "Check the location, input.extensions and input.recursive."
