"""The frozen list of inputs: found once, cut into shards, written beside the output."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import io
import os
import posixpath
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
import structlog

from batch_inference import containers, names
from batch_inference.column_types import plain_inputs
from batch_inference.config import InputConfig, JobConfig, StorageConfig
from batch_inference.errors import UserError
from batch_inference.listing import alternatives, list_uris
from batch_inference.storage import (
    WILDCARDS,
    Store,
    canonical_uri,
    display,
    is_file,
    is_local,
    local_path,
    located,
    read_object,
)
from batch_inference.unreadable import Unreadable, refuse_all, unreadable
from batch_inference.wording import describe_skipped

log = structlog.get_logger()

# Columns that output or manifest have of their own; a user's column of the same name could not pass through.
RESERVED_COLUMNS = (
    "shard",
    "row",
    "stage",
    "error_type",
    "message",
    "retryable",
    "attempts",
    *containers.PLACE_COLUMNS,
)
_PIECE = 65536
# Bytes that one Arrow array of strings can hold: about 30 million URIs.
_SHORT_OFFSETS = 2**31 - 1
# Where pipes lie that a shell makes: `-`, `/dev/stdin`, `<(ls)`.
_STREAMS = ("/dev/", "/proc/")
_MANIFEST_ENDINGS = (".parquet", ".csv", ".jsonl", ".ndjson", ".txt")


@dataclass(frozen=True)
class Inputs:
    """What listing found.

    Attributes:
        table: One row an input: ``uri`` string; columns of ``PLACE_SCHEMA``, which stay within the manifest: all of them where there
            are members of tar or Parquet files, ``_version`` where inputs were listed; then the passthrough columns.
        skipped: Objects left out, by file name ending ("" for none), or by kind, as :mod:`listing` names them.
        duplicates: Inputs that were listed more than once; each was kept once.
        repeated: URIs that several manifest lines share; those lines are all kept, since their other columns may differ.
        manifest_sha256: Digest of the manifest file that the inputs were read from, "" if there was none.
        unreadable: Inputs whose URIs say that they can't be read; they are rows all the same, and fail.
    """

    table: pa.Table
    skipped: dict[str, int]
    duplicates: int = 0
    repeated: int = 0
    manifest_sha256: str = ""
    unreadable: tuple[Unreadable, ...] = ()

    @property
    def passthrough(self) -> tuple[str, ...]:
        """Names of the columns that go to the output."""
        return tuple(name for name in self.table.column_names[1:] if name not in containers.PLACE_COLUMNS)


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
    for given in (*section.uris, *([section.manifest] if section.manifest else [])):
        refuse_stream(given)
    if section.manifest:
        found = _from_manifest(section, config.storage)
    elif section.uris:
        found = _from_listing(section, config.storage)
    else:
        raise UserError(
            "no input is given", "Name folders, globs or images after `run`, or set input.uris or input.manifest."
        )
    if found.table.num_rows == 0:
        raise UserError(_nothing_found(section, found), _nothing_found_remedy(section, found))
    table = found.table
    if failing := containers.refuse_failed(table):
        log.warning(failing)
    if section.sample is not None and section.sample < table.num_rows:
        chosen = np.random.default_rng(section.sample_seed).choice(table.num_rows, section.sample, replace=False)
        table = table.take(np.sort(chosen))
    if section.limit is not None:
        table = table.slice(0, section.limit)
    odd = unreadable(table["uri"])
    refuse_all(odd, table.num_rows)
    return replace(found, table=table, unreadable=odd)


def refuse_stream(given: str) -> None:
    """Raise UserError for standard input and other pipes: a job is resumed, and its inputs are read more than once."""
    path = Path(given.removeprefix("file://"))
    with contextlib.suppress(OSError, ValueError):
        if given == "-" or (path.exists() and not (path.is_file() or path.is_dir()) and str(path).startswith(_STREAMS)):
            raise UserError(
                ("standard input (-)" if given == "-" else given)
                + " is a pipe, and a job reads its list of inputs more than once (it can be resumed)",
                "Write the list to a file first: ls photos/*.jpg > list.txt; batch-inference run --manifest list.txt --output out",
            )


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
    """Whether a name ends like a manifest rather than like an image. A glob of Parquet files means the images in them."""
    low = uri.lower()
    return low.endswith(_MANIFEST_ENDINGS) and not (low.endswith(".parquet") and WILDCARDS.search(low))


def cut(table: pa.Table, shard_size: int) -> Iterator[tuple[int, pa.Table]]:
    """Cuts inputs into shards of ``shard_size`` rows, the last one shorter.

    Yields:
        Shard number and its table: ``uri``, ``shard`` int32, ``row`` int32, then the other columns.
    """
    for shard, start in enumerate(range(0, table.num_rows, shard_size)):
        part = table.slice(start, shard_size).unify_dictionaries()
        place = pa.table(
            {
                "uri": part["uri"].cast(pa.string()),
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
    # Versions are all different, so that a dictionary of them is as long as they are.
    names = [name for name in table.column_names if name != "_version"]
    pq.write_table(table, sink, compression="zstd", use_dictionary=names)
    return sink.getvalue()


def read_shard(store: Store, shard: int) -> pa.Table:
    """A manifest shard as the output shows it: ``uri``, ``shard``, ``row``, passthrough; raises FileNotFoundError without it."""
    table, _ = read_places(store, shard)
    return table


def read_places(store: Store, shard: int) -> tuple[pa.Table, pa.Table | None]:
    """A manifest shard, and versions and places of its inputs: columns of ``PLACE_SCHEMA`` as :class:`Inputs` has them, or None."""
    return apart(read_stored(store, shard))


def read_stored(store: Store, shard: int) -> pa.Table:
    """A manifest shard with all columns that it is stored with; raises FileNotFoundError without it."""
    # Outputs that were begun by an older version may have columns that cannot be taken from.
    return plain_inputs(read_parquet(store.get(f"_manifest/{shard_name(shard)}.parquet")))


def apart(table: pa.Table) -> tuple[pa.Table, pa.Table | None]:
    """Inputs, and their versions and places, None if nothing is known of them."""
    columns = [name for name in containers.PLACE_COLUMNS if name in table.column_names]
    return (table.drop_columns(columns), table.select(columns)) if columns else (table, None)


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
    chunks: list[pa.Table] = []
    batch: list[str] = []
    versions: list[int | None] = []
    files: list[str] = []
    members: list[str] = []
    empty: list[str] = []
    packed: list[str] = []
    places = 0
    for place in [one for given in section.uris for one in alternatives(located(given), storage)]:
        if not (is_local(place) and os.path.isdir(local_path(place))):
            containers.refuse_compressed(place)
        if containers.split_member(place) and not is_file(place):
            members.append(place)
            continue
        # Beside images, a Parquet file is rather a table of something else: it has to be asked for.
        parquet = section.bytes_column is not None or place.lower().endswith(".parquet")
        nothing = True
        for uri, named, version in list_uris(place, section.recursive, storage, skipped):
            nothing = False
            ending = PurePosixPath(uri).suffix.lower()
            if ending == ".tar" or (ending == ".parquet" and parquet):
                files.append(uri)
                continue
            if not named and section.extensions and ending not in section.extensions:
                if archive := containers.compressed_ending(uri):
                    packed.append(uri)
                skipped[archive or ending] = skipped.get(archive or ending, 0) + 1
                continue
            batch.append(uri)
            versions.append(version)
            if len(batch) == _PIECE:
                chunks.append(_objects(batch, versions))
                batch, versions = [], []
        if nothing:
            empty.append(display(place))
        places += 1
    if empty and places > 1:
        more = f" and {len(empty) - 5:,} more" if len(empty) > 5 else ""
        raise UserError(
            f"nothing was found in {', '.join(empty[:5])}{more}", "Correct these inputs, or leave them out."
        )
    every = pa.concat_tables([*chunks, _objects(batch, versions)])
    if packed:
        archives, remedy = containers.left_out(packed), containers.unpacking(packed)
        if not every.num_rows and not files and not members:
            raise UserError(f"no images in {', '.join(section.uris)}; {archives}", remedy)
        log.warning(f"{archives}. {remedy}")
    objects = _sorted_distinct(every)
    duplicates = every.num_rows - objects.num_rows
    if objects["_version"].null_count == objects.num_rows:
        objects = objects.drop_columns(["_version"])
    if not files and not members:
        return Inputs(objects, skipped, duplicates)
    reserved = [name for name in section.passthrough_columns if name in (*RESERVED_COLUMNS, "uri")]
    if reserved:
        raise UserError(
            f"input.passthrough_columns names columns that the output has of its own: {', '.join(reserved)}",
            "Leave them out, or rename them in the files.",
        )
    found = containers.listed(files, members, section, storage)
    for note in containers.told(found.notes):
        log.warning(note)
    return Inputs(
        plain_inputs(_interleaved(objects, found.tables)),
        containers.merged([skipped, found.skipped]),
        duplicates + found.duplicates,
    )


def _objects(uris: list[str], versions: list[int | None]) -> pa.Table:
    return pa.table({"uri": pa.array(uris, pa.string()), "_version": pa.array(versions, pa.int32())})


def _sorted_distinct(objects: pa.Table) -> pa.Table:
    """Objects in the order of their URIs, each once."""
    uris = objects["uri"]
    if uris.nbytes > _SHORT_OFFSETS:
        objects = objects.set_column(0, "uri", uris.cast(pa.large_string()))
    objects = objects.combine_chunks()
    objects = objects.take(pc.sort_indices(objects["uri"]))
    uris = objects["uri"]
    if len(uris) < 2:
        return objects
    new = pc.not_equal(uris.slice(1), uris.slice(0, len(uris) - 1))
    if pc.all(new).as_py():
        return objects
    return objects.filter(pa.chunked_array([pa.array([True]), *new.chunks]))


def _distinct(uris: pa.ChunkedArray) -> pa.Array:
    """Each once, in order of appearance, in one array: with 64-bit offsets where those of 32 bits do not reach its end."""
    return pc.unique(uris.cast(pa.large_string()) if uris.nbytes > _SHORT_OFFSETS else uris)


def _interleaved(objects: pa.Table, tables: dict[str, pa.Table]) -> pa.Table:
    """Members of each file, in its order, where the file itself would stand among the sorted objects."""
    column = objects["uri"].combine_chunks()
    parts = []
    start = 0
    for uri in sorted(tables):
        stop = bisect.bisect_left(range(len(column)), uri, key=lambda place: column[place].as_py())
        parts += [objects.slice(start, stop - start), tables[uri]]
        start = stop
    return pa.concat_tables([*parts, objects.slice(start)], promote_options="permissive").select(
        list(
            dict.fromkeys(
                ["uri", *containers.PLACE_COLUMNS, *(name for t in tables.values() for name in t.column_names)]
            )
        )
    )


def _nothing_found(section: InputConfig, found: Inputs) -> str:
    if section.manifest:
        return f"the manifest {section.manifest} has no lines, so that there is nothing to do"
    where = ", ".join(section.uris)
    if not found.skipped:
        return f"nothing was found in {where}"
    return f"no images in {where}: only {', '.join(describe_skipped(found.skipped)[:5])}; images end with {', '.join(section.extensions)}"


def _nothing_found_remedy(section: InputConfig, found: Inputs) -> str:
    if section.manifest:
        where = shlex.quote(str(section.manifest))
        return f"Write one URI a line. In a script that may find nothing new: [ -s {where} ] && batch-inference run --manifest {where} …"
    return "Check the location, input.extensions and input.recursive."


# --- manifests ---------------------------------------------------------------------------------------------------------


def read_expected(manifest: str, storage: StorageConfig) -> pa.Table:
    """A manifest of predictions, such as an output's file: ``uri``, and the columns that are the predictor's or the input's.

    Raises:
        UserError: If it can't be read, or has no column ``uri``.
    """
    section = InputConfig(manifest=manifest)
    table, _, folder = _read_manifest(section, storage)
    if "uri" not in table.column_names:
        raise UserError(
            f"{manifest} has no column uri; it has: {', '.join(table.column_names)}", "Call its images' column uri."
        )
    table = table.drop_columns([name for name in table.column_names if name in RESERVED_COLUMNS])
    table = _checked_columns(table, section, manifest)
    return table.set_column(0, "uri", _canonical_column(table["uri"], folder, exact=True))


def _read_manifest(section: InputConfig, storage: StorageConfig) -> tuple[pa.Table, str, str]:
    """All lines, the digest of their files, and the folder that relative paths in them are of."""
    uri = canonical_uri(str(section.manifest))
    sha256 = hashlib.sha256()
    tables = []
    parts = _manifest_files(uri, storage)
    for part in parts:
        data = read_object(part, storage, "the manifest")
        sha256.update(data)
        tables.append(_parse_manifest(part, data, section.uri_column))
    table = pa.concat_tables(tables, promote_options="permissive") if len(tables) > 1 else tables[0]
    return table, sha256.hexdigest(), uri.rpartition("/")[0] if parts == [uri] else uri.rstrip("/")


def _from_manifest(section: InputConfig, storage: StorageConfig) -> Inputs:
    table, digest, folder = _read_manifest(section, storage)
    table = _checked_columns(table, section, str(section.manifest))
    exact = not str(section.manifest).lower().endswith(_MANIFEST_ENDINGS[1:])
    table = table.set_column(0, "uri", _canonical_column(table["uri"], folder, exact))
    distinct = pc.count_distinct(table["uri"], mode="all").as_py()
    again = table.num_rows - distinct
    if again and table.num_columns == 1:
        table = pa.table({"uri": _distinct(table["uri"])})
        return Inputs(with_places(table, section, storage), {}, again, 0, digest)
    return Inputs(with_places(table, section, storage), {}, 0, again, digest)


def with_places(table: pa.Table, section: InputConfig, storage: StorageConfig) -> pa.Table:
    """Adds the columns of ``PLACE_SCHEMA`` behind ``uri``, if any of the inputs is a member of a tar or Parquet file.

    Raises:
        UserError: If there are no valid credentials. A file that is missing or damaged is its members' failure.
        SystemFault: If the store fails.
    """
    places, notes = containers.places(table["uri"], section, storage)
    for note in containers.told(notes):
        log.warning(note)
    if places is None:
        return table
    columns = [table["uri"], *places.columns, *table.columns[1:]]
    names = ["uri", *places.column_names, *table.column_names[1:]]
    return pa.table(columns, names=names)


def _manifest_files(uri: str, storage: StorageConfig) -> list[str]:
    if uri.lower().endswith(_MANIFEST_ENDINGS) and not (is_local(uri) and os.path.isdir(local_path(uri))):
        return [uri]
    if is_local(uri) and os.path.isfile(local_path(uri)):
        raise UserError(
            f"{display(uri)} has no ending that says what kind of manifest it is",
            _ending_remedy(display(uri).rpartition("/")[2]),
        )
    parts = sorted(found.uri for found in list_uris(uri, True, storage) if found.uri.lower().endswith(".parquet"))
    if not parts:
        raise UserError(
            f"there is no manifest at {display(uri)}",
            "Give a .parquet, .csv, .jsonl or .txt file, or a folder of Parquet.",
        )
    return parts


def _ending_remedy(file: str) -> str:
    """Return what makes a manifest of a file whose ending is none of a manifest's."""
    stem, _, ending = file.rpartition(".")
    known = {
        "tsv": f'Make commas of its tabs: python -c "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, '
        f"delimiter='\\t'))\" < '{file}' > '{stem}.csv'",
        "json": f"Write one object a line: jq -c '.[]' '{file}' > '{stem}.jsonl'",
        "gz": f"Unpack it: gunzip '{file}'",
        "zst": f"Unpack it: unzstd '{file}'",
        "xlsx": "Save it as CSV in UTF-8.",
    }
    return known.get(ending.lower(), "Name it .parquet, .csv, .jsonl, .ndjson or .txt.")


def _parse_manifest(uri: str, data: bytes, uri_column: str) -> pa.Table:
    ending = posixpath.splitext(uri.lower())[1]
    _refuse_other_format(uri, data, ending)
    try:
        if ending == ".parquet":
            return plain_inputs(_valid(read_parquet(data)), whole=False)
        if ending == ".txt":
            lines = data.decode("utf-8-sig").replace("\r", "\n").split("\n")
            return pa.table({uri_column: pa.array([line.strip() for line in lines if line.strip()], pa.string())})
        if ending == ".csv":
            return _parse_csv(data)
        return _valid(_parse_json(data))
    except (pa.ArrowException, UnicodeDecodeError, OSError, ValueError) as exc:
        raise UserError(
            f"{display(uri)} is not a readable {ending.lstrip('.')} manifest: {' '.join(str(exc).split())[:300]}",
            "Fix the file, or name it by its real format.",
        ) from None


# What other files begin with that are named like manifests, and the command that makes a manifest of them.
_OTHER_FORMATS = (
    (b"\xff\xfe\0\0", "UTF-32 text", "iconv -f UTF-32 -t UTF-8 '{file}' > 'utf8-{file}'"),
    (b"\0\0\xfe\xff", "UTF-32 text", "iconv -f UTF-32 -t UTF-8 '{file}' > 'utf8-{file}'"),
    (b"\xff\xfe", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 '{file}' > 'utf8-{file}'"),
    (b"\xfe\xff", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 '{file}' > 'utf8-{file}'"),
    (b"\x1f\x8b", "compressed by gzip", "gunzip < '{file}' > 'plain-{file}'"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unzstd < '{file}' > 'plain-{file}'"),
    (b"PK\x03\x04", "a zip file or an Excel workbook", ""),
    (b"PAR1", "a Parquet file", "mv '{file}' '{stem}.parquet'"),
)


def _refuse_other_format(uri: str, data: bytes, ending: str) -> None:
    """Raise UserError for a manifest of text that begins like something else, with what makes text of it."""
    if ending == ".parquet":
        return
    file = display(uri).rpartition("/")[2]

    def refuse(what: str, command: str) -> None:
        raise UserError(
            f"{display(uri)} is {what}, not a {ending.lstrip('.')} manifest in UTF-8",
            f"Run: {command.format(file=file, stem=file.rpartition('.')[0])}   and name the new file."
            if command
            else "Save it as CSV in UTF-8 and name that file.",
        )

    for start, what, command in _OTHER_FORMATS:
        if data.startswith(start):
            refuse(what, command)
    # Without a mark at its start: a text of ASCII in UTF-16 is zeros at every second byte.
    head = data[:512]
    for zeros, order in ((head[1::2], "LE"), (head[::2], "BE")):
        if len(head) > 3 and not zeros.strip(b"\0"):
            refuse("UTF-16 text", f"iconv -f UTF-16{order} -t UTF-8 '{{file}}' > 'utf8-{{file}}'")
    if ending in (".jsonl", ".ndjson") and data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        refuse("one JSON array, not one object a line", "jq -c '.[]' '{file}' > 'lines-{file}'")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        refuse(
            f"text in another encoding than UTF-8 (byte {exc.object[exc.start]:#04x} in line {line:,})",
            "iconv -f WINDOWS-1252 -t UTF-8 '{file}' > 'utf8-{file}'",
        )


def _valid(table: pa.Table) -> pa.Table:
    """A table whose texts are UTF-8, which Arrow does not look at when it reads; raises ArrowInvalid for any other."""
    table.validate(full=True)
    return table


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
            _column_remedy(names, section.uri_column, given),
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
    return plain_inputs(out)


def _column_remedy(names: list[str], wanted: str, given: str) -> str:
    """Return what to do about a manifest without the column of URIs."""
    near = [name for name in names if name.strip().lower() == wanted.lower()]
    if near:
        return f"Set input.uri_column={near[0]!r}."
    delimiter = next((sign for sign in ";\t|" if len(names) == 1 and sign in names[0]), None)
    if delimiter is not None:
        return (
            f"Its columns are separated by {delimiter!r}; make commas of them: "
            f'python -c "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, delimiter={delimiter!r}))" '
            f"< {given} > commas.csv"
        )
    if len(names) == 1 and any(sign in names[0] for sign in "/.\\"):
        return "Its first line is no header: name a list of URIs alone .txt, or write a first line with the columns' names."
    return (
        "Set input.uri_column to the one that holds the images' URIs; if the file holds the images themselves, name it in "
        "input.uris."
    )


def _canonical_column(column: pa.ChunkedArray, folder: str, exact: bool = False) -> pa.ChunkedArray:
    """One spelling for each URI; what has none stays as it is and fails later, as a row of its own.

    Args:
        column: The URIs, of type string.
        folder: The one that relative names start at.
        exact: Whether spaces around an object's URI are part of it, as in a file that a program has written.
    """
    chunks = [
        part
        if _all_canonical(part)
        else pa.array([_canonical_value(value, folder, exact) for value in part.to_pylist()], pa.string())
        for chunk in column.chunks
        # In pieces: Python's texts take several times the memory of Arrow's.
        for part in (chunk.slice(start, _PIECE) for start in range(0, len(chunk), _PIECE))
    ]
    return pa.chunked_array(chunks, pa.string())


def _all_canonical(part: pa.Array) -> bool:
    """Whether every URI is spelt as it should be already, as a manifest that a program wrote has them."""
    if part.null_count:
        return False
    return bool(pc.all(pc.match_substring_regex(part, _CANONICAL)).as_py())


# Of local names without what may be an escape. No spaces at the ends.
_CANONICAL = r"^(?:(?:s3|gs|az)://(?:\S|\S.*\S)|file:///(?:[^\s\\%]|[^\s\\%][^\n\\%]*[^\s\\%]))$"


def _canonical_value(value: str | None, folder: str, exact: bool) -> str:
    text = (value or "").strip()
    if text.startswith(("s3://", "gs://", "az://")):
        return value if exact and value else text
    if not text:
        return text
    try:
        uri = _canonical_line(text, folder)
        if value != text and is_local(uri):
            # A name may begin or end with a space: literally first, as everywhere.
            literal = _canonical_line(value or "", folder)
            return literal if os.path.lexists(local_path(literal)) else uri
    except UserError:
        return text
    return uri


def _canonical_line(text: str, folder: str) -> str:
    if "://" in text or text[:6].lower() == "file:/":
        return located(text)
    if not text.startswith("/"):
        # Relative names start at the manifest, so that it means the same wherever it is read.
        while text.startswith("./"):
            text = text[2:].lstrip("/")
        text = f"{folder}/{text}"
        return names.canonical(text) if is_local(text) else text
    return "file://" + names.canonical(text)
