"""The frozen list of inputs: found once, cut into shards, written beside the output."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import io
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from batch_inference.config import InputConfig, JobConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.storage import (
    Store,
    canonical_uri,
    classify,
    display,
    is_local,
    local_path,
    open_bucket,
    read_object,
    split_bucket,
)

# Columns that the output has of its own; a manifest's column of the same name could not pass through.
RESERVED_COLUMNS = ("shard", "row", "stage", "error_type", "message", "retryable", "attempts")
_WILDCARDS = re.compile(r"[*?\[]")
_PIECE = 65536
_MANIFEST_ENDINGS = (".parquet", ".csv", ".jsonl", ".ndjson", ".txt")


@dataclass(frozen=True)
class Inputs:
    """What listing found.

    Attributes:
        table: One row an input: ``uri`` string, then the manifest's passthrough columns.
        skipped: Objects left out, by file name ending ("" for none).
        duplicates: Inputs that were listed more than once; each was kept once.
        repeated: URIs that several manifest lines share; those lines are all kept, since their other columns may differ.
        manifest_sha256: Digest of the manifest file that the inputs were read from, "" if there was none.
    """

    table: pa.Table
    skipped: dict[str, int]
    duplicates: int = 0
    repeated: int = 0
    manifest_sha256: str = ""


def shard_name(shard: int) -> str:
    """The stem that all files of a shard share.

    >>> shard_name(42)
    'shard-00042'
    """
    return f"shard-{shard:05d}"


def find_inputs(config: JobConfig) -> Inputs:
    """Lists folders and globs, or reads the manifest.

    Returns:
        Listed inputs in the order of their URIs, manifest lines in their own order.

    Raises:
        UserError: If there is nothing, or it can't be read.
    """
    section = config.input
    if section.manifest:
        found = _from_manifest(section, config.storage)
    elif section.uris:
        found = _from_listing(section, config.storage)
    else:
        raise UserError(
            "no input is given", "Name folders, globs or images after `run`, or set input.uris or input.manifest."
        )
    if found.table.num_rows == 0:
        raise UserError(_nothing_found(section, found), "Check the location, input.extensions and input.recursive.")
    if section.limit is not None:
        return Inputs(
            found.table.slice(0, section.limit), found.skipped, found.duplicates, found.repeated, found.manifest_sha256
        )
    return found


def source_digest(config: JobConfig) -> str:
    """Digest of the manifest file as it is now, to be compared with the one that was frozen.

    Raises:
        UserError: If it can't be read any more.
    """
    sha256 = hashlib.sha256()
    for part in _manifest_files(canonical_uri(str(config.input.manifest)), config.storage):
        sha256.update(read_object(part, config.storage, "the manifest"))
    return sha256.hexdigest()


def looks_like_manifest(uri: str) -> bool:
    """Whether a name ends like a manifest rather than like an image."""
    return uri.lower().endswith(_MANIFEST_ENDINGS)


def cut(table: pa.Table, shard_size: int) -> Iterator[tuple[int, pa.Table]]:
    """Cuts inputs into shards of ``shard_size`` rows, the last one shorter.

    Yields:
        Shard number and its table: ``uri``, ``shard`` int32, ``row`` int32, then the passthrough columns.
    """
    for shard, start in enumerate(range(0, table.num_rows, shard_size)):
        part = table.slice(start, shard_size)
        place = pa.table(
            {
                "uri": part["uri"],
                "shard": pa.array(np.full(part.num_rows, shard, np.int32)),
                "row": pa.array(np.arange(part.num_rows, dtype=np.int32)),
            }
        )
        for name in part.column_names:
            if name != "uri":
                place = place.append_column(part.schema.field(name), part[name])
        yield shard, place


def encode_shard(table: pa.Table) -> bytes:
    """A manifest shard as the bytes of a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_shard(store: Store, shard: int) -> pa.Table:
    """Reads a manifest shard back; raises FileNotFoundError if it is missing."""
    return read_parquet(store.get(f"_manifest/{shard_name(shard)}.parquet"))


def read_parquet(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """Reads the bytes of a small Parquet file; raises KeyError where a column is missing.

    In this thread alone: Arrow's scanner, which ``pyarrow.parquet.read_table`` uses, now and then leaves a thread of its own
    behind that aborts the process at its end.
    """
    file = pq.ParquetFile(io.BytesIO(data))
    missing = set(columns or ()) - set(file.schema_arrow.names)
    if missing:
        raise KeyError(f"there are no columns {', '.join(sorted(missing))}")
    return file.read(columns=columns, use_threads=False)


# --- listing -----------------------------------------------------------------------------------------------------------


def _from_listing(section: InputConfig, storage: StorageConfig) -> Inputs:
    skipped: dict[str, int] = {}
    chunks: list[pa.Array] = []
    batch: list[str] = []
    empty: list[str] = []
    for given in section.uris:
        before = len(batch) + 65536 * len(chunks) + sum(skipped.values())
        for uri, explicit in _list_one(canonical_uri(given), section.recursive, storage):
            ending = PurePosixPath(uri).suffix.lower()
            if not explicit and section.extensions and ending not in section.extensions:
                skipped[ending] = skipped.get(ending, 0) + 1
                continue
            # Names that are not UTF-8 can't be columns' values; so spelt, they end as error rows like anything else missing.
            batch.append(uri if uri.isascii() else uri.encode("utf-8", "backslashreplace").decode())
            if len(batch) == 65536:
                chunks.append(pa.array(batch, pa.string()))
                batch = []
        if before == len(batch) + 65536 * len(chunks) + sum(skipped.values()):
            empty.append(given)
    if empty and len(section.uris) > 1:
        raise UserError(f"nothing was found in {', '.join(empty)}", "Correct these inputs, or leave them out.")
    chunks.append(pa.array(batch, pa.string()))
    every = pa.chunked_array(chunks, pa.string())
    distinct = pc.unique(every)
    order = pc.sort_indices(distinct)
    return Inputs(pa.table({"uri": distinct.take(order)}), skipped, len(every) - len(distinct))


def _list_one(uri: str, recursive: bool, storage: StorageConfig) -> Iterator[tuple[str, bool]]:
    """URIs below one given location, each with whether it was named itself rather than found."""
    if is_local(uri):
        yield from _list_local(uri, recursive)
    else:
        yield from _list_bucket(uri, recursive, storage)


def _list_local(uri: str, recursive: bool) -> Iterator[tuple[str, bool]]:
    path = local_path(uri)
    if os.path.isfile(path):
        yield "file://" + path, True
    elif os.path.isdir(path):
        yield from (("file://" + p, False) for p in _walk(path, recursive))
    elif _WILDCARDS.search(path):
        folders = files = 0
        for match in glob.iglob(path, recursive=True):  # noqa: PTH207 - a Path would collapse the `**` that the user wrote
            if os.path.isfile(match):
                files += 1
                yield "file://" + match, False
            else:
                folders += 1
        if folders and not files:
            raise UserError(f"{path} matches {folders} folders and no file", f"Write {path}/** for what is in them.")
    else:
        raise UserError(
            f"there is no file or folder {path}", "Check the path; relative ones start at the current directory."
        )


def _walk(folder: str, recursive: bool) -> Iterator[str]:
    def refuse(exc: OSError) -> None:
        raise UserError(f"cannot list the folder {exc.filename}: {exc.strerror}", "Make it readable, or leave it out.")

    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        # Hidden files and folders are tools' own (.git, .DS_Store), as in every lister.
        folders[:] = [f for f in folders if recursive and not f.startswith(".") and not _leads_back(root, f)]
        for name in files:
            if not name.startswith("."):
                yield os.path.join(root, name)  # noqa: PTH118


def _leads_back(root: str, folder: str) -> bool:
    """Whether a link to a folder would send the walk round in circles."""
    path = os.path.join(root, folder)  # noqa: PTH118
    if not os.path.islink(path):  # noqa: PTH114
        return False
    return (os.path.realpath(root) + "/").startswith(os.path.realpath(path) + "/")


def _list_bucket(uri: str, recursive: bool, storage: StorageConfig) -> Iterator[tuple[str, bool]]:
    import obstore

    root, key = split_bucket(uri)
    bucket = open_bucket(root, storage)
    wildcard = _WILDCARDS.search(key)
    # Everything before the first wildcard, up to a slash, is a prefix that the store itself can list by.
    prefix = key[: wildcard.start()].rpartition("/")[0] if wildcard else key.rstrip("/")
    pattern = _glob_regex(key) if wildcard else None
    try:
        found = False
        for chunk in obstore.list(bucket, prefix=prefix or None, chunk_size=1000):
            for meta in chunk:
                path = str(meta["path"])
                if pattern is not None and not pattern.match(path):
                    continue
                below = path[len(prefix) :].lstrip("/")
                if pattern is None and not recursive and "/" in below:
                    continue
                if any(part.startswith(".") for part in below.split("/")):
                    continue
                found = True
                yield f"{root}/{path}", False
        if not found and key and not wildcard:
            obstore.head(bucket, key)
            yield uri, True
    except UserError:
        raise
    except Exception as exc:
        failure = classify(exc)
        if failure.error_type == "NOT_FOUND":
            return
        raise UserError(
            f"cannot list {uri}: {failure.message}",
            "Check bucket, endpoint and the credentials in the environment (list permission is needed).",
        ) from None


def _glob_regex(pattern: str) -> re.Pattern[str]:
    """A glob in which ``*`` stays within a folder and ``**`` does not, as in a shell."""
    out = ""
    for piece in re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", pattern):
        if piece.startswith("**"):
            out += "(?:.*/)?" if piece.endswith("/") else ".*"
        elif piece == "*":
            out += "[^/]*"
        elif piece == "?":
            out += "[^/]"
        elif piece.startswith("["):
            out += fnmatch.translate(piece).removeprefix("(?s:").removesuffix(r")\Z").removesuffix(r")\z")
        else:
            out += re.escape(piece)
    return re.compile(out + r"\Z")


def _nothing_found(section: InputConfig, found: Inputs) -> str:
    if section.manifest:
        return f"the manifest {section.manifest} has no lines"
    where = ", ".join(section.uris)
    if not found.skipped:
        return f"nothing was found in {where}"
    endings = ", ".join(
        f"{n} {e or 'without an ending'}" for e, n in sorted(found.skipped.items(), key=lambda i: -i[1])[:5]
    )
    return f"no images in {where}: only files with other endings ({endings}); images end with {', '.join(section.extensions)}"


# --- manifests ---------------------------------------------------------------------------------------------------------


def _from_manifest(section: InputConfig, storage: StorageConfig) -> Inputs:
    given = str(section.manifest)
    uri = canonical_uri(given)
    sha256 = hashlib.sha256()
    tables = []
    parts = _manifest_files(uri, storage)
    for part in parts:
        data = read_object(part, storage, "the manifest")
        sha256.update(data)
        tables.append(_parse_manifest(part, data, section.uri_column))
    table = pa.concat_tables(tables, promote_options="permissive") if len(tables) > 1 else tables[0]
    table = _checked_columns(table, section, given)
    folder = uri.rpartition("/")[0] if parts == [uri] else uri.rstrip("/")
    table = table.set_column(0, "uri", _canonical_column(table["uri"], folder))
    distinct = pc.count_distinct(table["uri"], mode="all").as_py()
    again = table.num_rows - distinct
    if again and table.num_columns == 1:
        return Inputs(pa.table({"uri": pc.unique(table["uri"])}), {}, again, 0, sha256.hexdigest())
    return Inputs(table, {}, 0, again, sha256.hexdigest())


def _manifest_files(uri: str, storage: StorageConfig) -> list[str]:
    if uri.lower().endswith(_MANIFEST_ENDINGS) and not (is_local(uri) and os.path.isdir(local_path(uri))):
        return [uri]
    if is_local(uri) and os.path.isfile(local_path(uri)):
        raise UserError(
            f"{display(uri)} has no ending that says what kind of manifest it is",
            "Name it .parquet, .csv, .jsonl, .ndjson or .txt.",
        )
    parts = sorted(u for u, _ in _list_one(uri, True, storage) if u.lower().endswith(".parquet"))
    if not parts:
        raise UserError(
            f"there is no manifest at {display(uri)}",
            "Give a .parquet, .csv, .jsonl or .txt file, or a folder of Parquet.",
        )
    return parts


def _parse_manifest(uri: str, data: bytes, uri_column: str) -> pa.Table:
    ending = posixpath.splitext(uri.lower())[1]
    try:
        if ending == ".parquet":
            return read_parquet(data)
        if ending == ".txt":
            lines = data.decode("utf-8-sig").replace("\r", "\n").split("\n")
            return pa.table({uri_column: pa.array([line.strip() for line in lines if line.strip()], pa.string())})
        if ending == ".csv":
            return _parse_csv(data)
        return _parse_json(data)
    except (pa.ArrowException, UnicodeDecodeError, OSError, ValueError) as exc:
        raise UserError(
            f"{display(uri)} is not a readable {ending.lstrip('.')} manifest: {' '.join(str(exc).split())[:300]}",
            "Mend the file, or name it by its real format.",
        ) from None


def _parse_json(data: bytes) -> pa.Table:
    table = pa_json.read_json(io.BytesIO(data))
    # Arrow takes texts that look like dates for dates.
    texts = [pa.field(f.name, pa.string()) for f in table.schema if pa.types.is_timestamp(f.type)]
    if not texts:
        return table
    return pa_json.read_json(
        io.BytesIO(data), parse_options=pa_json.ParseOptions(explicit_schema=pa.schema(texts))
    ).select(table.column_names)


def _parse_csv(data: bytes) -> pa.Table:
    # Every column is read as text: guessing types would turn an id of 007 into 7.
    parse = pa_csv.ParseOptions(newlines_in_values=True)
    with pa_csv.open_csv(io.BytesIO(data), parse_options=parse) as reader:
        names = reader.schema.names
    return pa_csv.read_csv(
        io.BytesIO(data),
        parse_options=parse,
        convert_options=pa_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        ),
    )


def _checked_columns(table: pa.Table, section: InputConfig, given: str) -> pa.Table:
    names = table.column_names
    if section.uri_column not in names:
        raise UserError(
            f"the manifest {given} has no column {section.uri_column!r}; it has: {', '.join(names)}",
            "Set input.uri_column to the one that holds the images' URIs.",
        )
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise UserError(
            f"the manifest {given} has several columns of the same name: {', '.join(double)}", "Rename them."
        )
    kind = table.schema.field(section.uri_column).type
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    if text not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
        raise UserError(
            f"the column {section.uri_column!r} of {given} holds {kind}, not text",
            "Set input.uri_column to the one that holds the images' URIs.",
        )
    column = table[section.uri_column].cast(pa.string())
    rest = [name for name in names if name != section.uri_column]
    clashes = [name for name in rest if name in (*RESERVED_COLUMNS, "uri")]
    if clashes:
        raise UserError(
            f"the manifest {given} has columns that the output has of its own: {', '.join(clashes)}", "Rename them."
        )
    out = pa.table({"uri": column})
    for name in rest:
        out = out.append_column(name, table[name])
    return out


def _canonical_column(column: pa.ChunkedArray, folder: str) -> pa.ChunkedArray:
    """One spelling for each URI; what has none stays as it is and fails later, as a row of its own."""
    chunks = [
        part if _all_canonical(part) else pa.array(list(_canonical_values(part.to_pylist(), folder)), pa.string())
        for chunk in column.chunks
        # In pieces: Python's texts take several times the memory of Arrow's.
        for part in (chunk.slice(start, _PIECE) for start in range(0, len(chunk), _PIECE))
    ]
    return pa.chunked_array(chunks, pa.string())


def _all_canonical(part: pa.Array) -> bool:
    """Whether every URI is spelt as it should be already, as a manifest that a program wrote has them."""
    if part.null_count:
        return False
    return bool(pc.all(pc.match_substring_regex(part, r"^(s3://|gs://|az://|file:///)(\S|\S.*\S)$")).as_py())


def _canonical_values(values: Iterable[Any], folder: str) -> Iterator[str]:
    for value in values:
        text = (value or "").strip()
        if text.startswith(("s3://", "gs://", "az://", "file:///")) or not text:
            yield text
        elif "://" in text:
            try:
                yield canonical_uri(text)
            except UserError:
                yield text
        elif text.startswith("/"):
            yield "file://" + text
        else:
            # Relative names start at the manifest, so that it means the same wherever it is read.
            yield f"{folder}/{text}"
