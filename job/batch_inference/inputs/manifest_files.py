"""Read the manifest that a user names: its lines, their URIs in one spelling, and its digest.

The frozen manifest that a job makes of its inputs is :mod:`batch_inference.output.manifest`.
"""

from __future__ import annotations

import hashlib
import os

import pyarrow as pa
import pyarrow.compute as pc
import structlog

from batch_inference.config import InputConfig, JobConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.inputs.containers import first_notes
from batch_inference.inputs.listing import list_uris
from batch_inference.inputs.manifest_formats import ENDINGS, ending_remedy, parse_manifest
from batch_inference.inputs.member_locations import locate_members
from batch_inference.output import manifest
from batch_inference.output.column_types import plain_inputs
from batch_inference.storage import names
from batch_inference.storage.store import read_object, resolve_uri
from batch_inference.storage.uris import WILDCARDS, canonical_uri, display_uri, is_local, local_path

log = structlog.get_logger()

# Columns that output or manifest have of their own; a user's column of the same name could not pass through.
RESERVED_COLUMNS = (
    "shard",
    "row",
    "stage",
    "error_type",
    "message",
    "retryable",
    "tries",
    *manifest.LOCATION_COLUMNS,
)
_CHUNK_ROWS = 65536
# URIs that are spelled as they should be. Local names without what may be an escape. No spaces at the ends.
_CANONICAL = r"^(?:(?:s3|gs|az)://(?:\S|\S.*\S)|file:///(?:[^\s\\%]|[^\s\\%][^\n\\%]*[^\s\\%]))$"


def looks_like_manifest(uri: str) -> bool:
    """Return whether a name ends like a manifest rather than like an image. A glob of Parquet files names the images in them."""
    low = uri.lower()
    return low.endswith(ENDINGS) and not (low.endswith(".parquet") and WILDCARDS.search(low))


def manifest_digest(config: JobConfig) -> str:
    """Return the digest of the manifest file as it is now, to be compared with that of the file that the job was planned with.

    Raises:
        UserError: If it can't be read any more.
    """
    sha256 = hashlib.sha256()
    for part in _manifest_parts(canonical_uri(str(config.input.manifest)), config.storage):
        sha256.update(read_object(part, config.storage, "the manifest"))
    return sha256.hexdigest()


def read_manifest(config: InputConfig, storage: StorageConfig) -> tuple[pa.Table, str]:
    """Return all lines of a manifest, with ``uri`` first, and its digest.

    Raises:
        UserError: If it can't be read, or its columns are not usable.
    """
    table, digest, folder = _read_parts(config, storage)
    table = select_columns(table, config, str(config.manifest))
    written_by_program = not str(config.manifest).lower().endswith(ENDINGS[1:])
    uris = canonical_column(table["uri"], folder, exact=written_by_program)
    return table.set_column(0, "uri", uris), digest


def read_expected(path: str, storage: StorageConfig) -> pa.Table:
    """Return a manifest of predictions, such as an output's file: ``uri``, and the columns that are the predictor's or the input's.

    Raises:
        UserError: If it can't be read, or has no column ``uri``.
    """
    config = InputConfig(manifest=path)
    table, _, folder = _read_parts(config, storage)
    if "uri" not in table.column_names:
        raise UserError(
            f"{path} has no column uri; it has: {', '.join(table.column_names)}", "Call its images' column uri."
        )
    table = table.drop_columns([name for name in table.column_names if name in RESERVED_COLUMNS])
    table = select_columns(table, config, path)
    return table.set_column(0, "uri", canonical_column(table["uri"], folder, exact=True))


def with_locations(table: pa.Table, config: InputConfig, storage: StorageConfig) -> pa.Table:
    """Return a table with the columns of ``LOCATION_SCHEMA`` behind ``uri``, if any of its inputs is a member of a file.

    Raises:
        UserError: If there are no valid credentials. A file that is missing or damaged is its members' failure.
        InfrastructureError: If the store fails.
    """
    locations, notes = locate_members(table["uri"], config, storage)
    for note in first_notes(notes):
        log.warning(note)
    if locations is None:
        return table
    columns = [table["uri"], *locations.columns, *table.columns[1:]]
    return pa.table(columns, names=["uri", *locations.column_names, *table.column_names[1:]])


def _read_parts(config: InputConfig, storage: StorageConfig) -> tuple[pa.Table, str, str]:
    """Return all lines, the digest of their files, and the folder that relative paths in them are of."""
    uri = canonical_uri(str(config.manifest))
    sha256 = hashlib.sha256()
    tables = []
    parts = _manifest_parts(uri, storage)
    for part in parts:
        data = read_object(part, storage, "the manifest")
        sha256.update(data)
        tables.append(parse_manifest(part, data, config.uri_column))
    table = pa.concat_tables(tables, promote_options="permissive") if len(tables) > 1 else tables[0]
    return table, sha256.hexdigest(), uri.rpartition("/")[0] if parts == [uri] else uri.rstrip("/")


def _manifest_parts(uri: str, storage: StorageConfig) -> list[str]:
    """Return the files of a manifest: itself, or the Parquet files of a folder."""
    if uri.lower().endswith(ENDINGS) and not (is_local(uri) and os.path.isdir(local_path(uri))):
        return [uri]
    if is_local(uri) and os.path.isfile(local_path(uri)):
        raise UserError(
            f"{display_uri(uri)} has no ending that says what kind of manifest it is",
            ending_remedy(display_uri(uri).rpartition("/")[2]),
        )
    parts = sorted(part.uri for part in list_uris(uri, True, storage) if part.uri.lower().endswith(".parquet"))
    if not parts:
        raise UserError(
            f"there is no manifest at {display_uri(uri)}",
            "Give a .parquet, .csv, .jsonl or .txt file, or a folder of Parquet.",
        )
    return parts


# --- columns -----------------------------------------------------------------------------------------------------------


def select_columns(table: pa.Table, config: InputConfig, path: str) -> pa.Table:
    """Return a manifest's table with the column of URIs first, as ``uri``.

    Raises:
        UserError: If that column is missing or holds no text, or other columns cannot pass through.
    """
    column_names = table.column_names
    if config.uri_column not in column_names:
        raise UserError(
            f"the manifest {path} has no column {config.uri_column!r}; it has: {', '.join(column_names)}",
            _column_remedy(column_names, config.uri_column, path),
        )
    duplicates = sorted({name for name in column_names if column_names.count(name) > 1})
    if duplicates:
        raise UserError(
            f"the manifest {path} has several columns of the same name: {', '.join(duplicates)}", "Rename them."
        )
    arrow_type = table.schema.field(config.uri_column).type
    value_type = arrow_type.value_type if pa.types.is_dictionary(arrow_type) else arrow_type
    if value_type not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise UserError(
            f"the column {config.uri_column!r} of {path} holds {arrow_type}, not text",
            "Set input.uri_column to the one that holds the images' URIs.",
        )
    passthrough = [name for name in column_names if name != config.uri_column]
    clashes = [name for name in passthrough if name in (*RESERVED_COLUMNS, "uri")]
    if clashes:
        raise UserError(
            f"the manifest {path} has columns that the output has of its own: {', '.join(clashes)}", "Rename them."
        )
    selected = pa.table({"uri": table[config.uri_column].cast(pa.string())})
    for name in passthrough:
        selected = selected.append_column(name, table[name])
    return plain_inputs(selected)


def _column_remedy(column_names: list[str], wanted: str, path: str) -> str:
    """Return what to do about a manifest without the column of URIs."""
    near = [name for name in column_names if name.strip().lower() == wanted.lower()]
    if near:
        return f"Set input.uri_column={near[0]!r}."
    only = column_names[0] if len(column_names) == 1 else ""
    delimiter = next((sign for sign in ";\t|" if sign in only), None)
    if delimiter is not None:
        return (
            f"Its columns are separated by {delimiter!r}; make commas of them: "
            f'python -c "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={delimiter!r}))" '
            f"< {path} > commas.csv"
        )
    if any(sign in only for sign in "/.\\"):
        return "Its first line is no header: name a list of URIs alone .txt, or write a first line with the columns' names."
    return (
        "Set input.uri_column to the one that holds the images' URIs; if the file holds the images themselves, name it in "
        "input.uris."
    )


# --- URIs --------------------------------------------------------------------------------------------------------------


def canonical_column(column: pa.ChunkedArray, folder: str, exact: bool = False) -> pa.ChunkedArray:
    """Return one spelling for each URI. A text that has none stays as it is and fails later, as a row of its own.

    Args:
        column: The URIs, of type string.
        folder: The folder that relative names start at.
        exact: Whether spaces around an object's URI are part of it, as in a file that a program has written.
    """
    chunks = [
        part
        if _all_canonical(part)
        else pa.array([_canonical_value(value, folder, exact) for value in part.to_pylist()], pa.string())
        for chunk in column.chunks
        # In parts: Python's texts take several times the memory of Arrow's.
        for part in (chunk.slice(start, _CHUNK_ROWS) for start in range(0, len(chunk), _CHUNK_ROWS))
    ]
    return pa.chunked_array(chunks, pa.string())


def _all_canonical(uris: pa.Array) -> bool:
    """Return whether every URI is spelled canonically already, as in manifests that programs write."""
    if uris.null_count:
        return False
    return bool(pc.all(pc.match_substring_regex(uris, _CANONICAL)).as_py())


def _canonical_value(value: str | None, folder: str, exact: bool) -> str:
    text = (value or "").strip()
    if text.startswith(("s3://", "gs://", "az://")):
        return value if exact and value else text
    if not text:
        return text
    try:
        uri = _canonical_line(text, folder)
        if value != text and is_local(uri):
            # A name may begin or end with a space: the literal name comes first, as everywhere.
            literal = _canonical_line(value or "", folder)
            return literal if os.path.lexists(local_path(literal)) else uri
    except UserError:
        return text
    return uri


def _canonical_line(text: str, folder: str) -> str:
    if "://" in text or text[:6].lower() == "file:/":
        return resolve_uri(text)
    if not text.startswith("/"):
        # Relative names start at the manifest, so that it names the same inputs wherever it is read.
        while text.startswith("./"):
            text = text[2:].lstrip("/")
        text = f"{folder}/{text}"
        return names.canonical_name(text) if is_local(text) else text
    return "file://" + names.canonical_name(text)
