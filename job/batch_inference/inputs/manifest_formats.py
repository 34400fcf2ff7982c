"""Parse the formats of manifests: Parquet, CSV, JSON lines and text; refuse other formats with the command that converts them."""

from __future__ import annotations

import io
import posixpath

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json

from batch_inference.errors import UserError
from batch_inference.output.column_types import plain_inputs
from batch_inference.output.manifest import read_parquet
from batch_inference.storage.uris import display_uri

ENDINGS = (".parquet", ".csv", ".jsonl", ".ndjson", ".txt")
# First bytes of other files that are named like manifests, and the command that makes a manifest of them.
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


def parse_manifest(uri: str, data: bytes, uri_column: str) -> pa.Table:
    """Return the lines of a manifest file.

    Args:
        uri: Its ending names the format.
        data: The content.
        uri_column: The name for the only column of a list of URIs.

    Raises:
        UserError: If it is not readable in that format.
    """
    ending = posixpath.splitext(uri.lower())[1]
    _refuse_other_format(uri, data, ending)
    try:
        if ending == ".parquet":
            return plain_inputs(_valid(read_parquet(data)), complete=False)
        if ending == ".txt":
            lines = data.decode("utf-8-sig").replace("\r", "\n").split("\n")
            return pa.table({uri_column: pa.array([line.strip() for line in lines if line.strip()], pa.string())})
        if ending == ".csv":
            return _parse_csv(data)
        return _valid(_parse_json(data))
    except (pa.ArrowException, UnicodeDecodeError, OSError, ValueError) as exc:
        raise UserError(
            f"{display_uri(uri)} is not a readable {ending.lstrip('.')} manifest: {' '.join(str(exc).split())[:300]}",
            "Fix the file, or name it by its real format.",
        ) from None


def ending_remedy(file: str) -> str:
    """Return how to make a manifest of a file whose ending is none of a manifest's."""
    stem, _, ending = file.rpartition(".")
    remedies = {
        "tsv": f'Make commas of its tabs: python -c "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, '
        f"delimiter='\\t'))\" < '{file}' > '{stem}.csv'",
        "json": f"Write one object a line: jq -c '.[]' '{file}' > '{stem}.jsonl'",
        "gz": f"Unpack it: gunzip '{file}'",
        "zst": f"Unpack it: unzstd '{file}'",
        "xlsx": "Save it as CSV in UTF-8.",
    }
    return remedies.get(ending.lower(), "Name it .parquet, .csv, .jsonl, .ndjson or .txt.")


def _refuse_other_format(uri: str, data: bytes, ending: str) -> None:
    """Raise UserError for a manifest of text that begins like another format, with the command that converts it."""
    if ending == ".parquet":
        return
    file = display_uri(uri).rpartition("/")[2]

    def refuse(description: str, command: str) -> None:
        raise UserError(
            f"{display_uri(uri)} is {description}, not a {ending.lstrip('.')} manifest in UTF-8",
            f"Run: {command.format(file=file, stem=file.rpartition('.')[0])}   and name the new file."
            if command
            else "Save it as CSV in UTF-8 and name that file.",
        )

    for magic, description, command in _OTHER_FORMATS:
        if data.startswith(magic):
            refuse(description, command)
    # Without a byte order mark: ASCII text in UTF-16 has a zero at every second byte.
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
    """Return a table whose texts are UTF-8; raise ArrowInvalid for any other. Arrow does not check it when it reads."""
    table.validate(full=True)
    return table


def _parse_json(data: bytes) -> pa.Table:
    table = pa_json.read_json(io.BytesIO(data))
    # Arrow converts texts that look like dates: read them again as texts.
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
