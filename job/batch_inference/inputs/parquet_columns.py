"""Choose the column of a Parquet file that holds the images, and say what to do if there is none."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pyarrow as pa

from batch_inference.errors import RowError
from batch_inference.inputs.parquet_contents import Footer, read_first_texts
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.uris import display_uri

# Values of a fixed size up to this are identifiers and digests, not images.
_DIGEST_BYTES = 64
_IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
# Text columns of which the first value is read.
_MAX_TEXT_COLUMNS = 8
PATHS_AS_MANIFEST = "write the paths into a text file, one a line, and name it as input.manifest"


def image_column(footer: Footer, fetcher: Fetcher, uri: str, wanted: str | None) -> str:
    """Return the path of the column that holds the images.

    The column is of bytes (binary, large_binary, binary_view), or a struct with such ``bytes`` as Hugging Face's datasets write it. If
    there is none, it is of fixed_size_binary, of a dictionary of bytes, or of lists of uint8 or int8.

    Args:
        footer: The file's footer.
        fetcher: Reads the first text of a column, to tell what it holds.
        uri: Its URI.
        wanted: Name of the column, None for the only one there is.

    Raises:
        RowError: ``list`` NO_IMAGE_COLUMN: if there is none, or more than one and none is named.
    """
    schema = footer.metadata.schema.to_arrow_schema()
    leaves = footer.column_paths
    paths = {field.name: path for field in schema if (path := _leaf_path(field, leaves, _is_bytes))}
    less_likely = {field.name: path for field in schema if (path := _leaf_path(field, leaves, _may_be_bytes))}
    if wanted is not None and wanted in {**less_likely, **paths}:
        return {**less_likely, **paths}[wanted]
    if wanted is None and not paths:
        widths = {field.name: _value_bytes(field.type) for field in schema}
        paths = {name: path for name, path in less_likely.items() if not 0 < widths[name] <= _DIGEST_BYTES}
    if wanted is None and len(paths) == 1:
        return next(iter(paths.values()))
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if wanted is None and not paths:
        fact, remedy = _no_images(schema, fetcher, uri)
        raise RowError("list", "NO_IMAGE_COLUMN", f"{fact}; it has: {columns}", remedy=remedy)
    if wanted is not None and wanted in schema.names:
        fact, remedy = _no_images(pa.schema([schema.field(wanted)]), fetcher, uri)
        raise RowError("list", "NO_IMAGE_COLUMN", f"{fact}; it has: {columns}", remedy=remedy)
    candidates = "several columns of bytes" if wanted is None else f"no column of bytes {wanted!r}"
    raise RowError(
        "list",
        "NO_IMAGE_COLUMN",
        f"the file has {candidates}; it has: {columns}",
        remedy="Set input.image_column to the one that holds the encoded images",
    )


def path_column(footer: Footer, column: str) -> str:
    """Return the path of the column beside a struct's ``bytes`` that names each image's file, "" if there is none."""
    head, _, rest = column.rpartition(".bytes")
    path = f"{head}.path"
    return path if head and rest[:1] in ("", ".") and path in footer.column_paths else ""


# --- Arrow types -----------------------------------------------------------------------------------------------------------


def _leaf_path(field: pa.Field, leaves: list[str], fits: Callable[[pa.DataType], bool]) -> str:
    """Return the path of a column of encoded images: of a field whose type fits, or of ``bytes`` in it; else ""."""
    name, arrow_type = str(field.name), field.type
    if pa.types.is_struct(arrow_type) and (index := arrow_type.get_field_index("bytes")) >= 0:
        name, arrow_type = f"{name}.bytes", arrow_type.field(index).type
    # A list's values have a path of their own, which writers spell in several ways.
    below = [leaf for leaf in leaves if leaf == name or leaf.startswith(f"{name}.")]
    return below[0] if fits(arrow_type) and len(below) == 1 else ""


def _is_bytes(arrow_type: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(arrow_type) or pa.types.is_large_binary(arrow_type) or pa.types.is_binary_view(arrow_type)
    )


def _may_be_bytes(arrow_type: pa.DataType) -> bool:
    if pa.types.is_dictionary(arrow_type):
        return _is_bytes(arrow_type.value_type)
    if is_list(arrow_type):
        return bool(arrow_type.value_type in (pa.uint8(), pa.int8()))
    return bool(pa.types.is_fixed_size_binary(arrow_type) and not pa.types.is_decimal(arrow_type))


def is_list(arrow_type: pa.DataType) -> bool:
    """Return whether a type is one of Arrow's lists."""
    return bool(
        pa.types.is_list(arrow_type)
        or pa.types.is_large_list(arrow_type)
        or pa.types.is_fixed_size_list(arrow_type)
        or pa.types.is_list_view(arrow_type)
        or pa.types.is_large_list_view(arrow_type)
    )


def _is_text(arrow_type: pa.DataType) -> bool:
    value_type = arrow_type.value_type if pa.types.is_dictionary(arrow_type) else arrow_type
    return bool(
        pa.types.is_string(value_type) or pa.types.is_large_string(value_type) or pa.types.is_string_view(value_type)
    )


def _value_bytes(arrow_type: pa.DataType) -> int:
    """Return the bytes of each value of fixed_size_binary, 0 for any other type."""
    return int(arrow_type.byte_width) if pa.types.is_fixed_size_binary(arrow_type) else 0


# --- no images -------------------------------------------------------------------------------------------------------------


def _no_images(schema: pa.Schema, fetcher: Fetcher, uri: str) -> tuple[str, str]:
    """Return why columns are no images, and how to make images of the one that comes nearest."""
    path = display_uri(uri)
    out = path.rpartition("/")[2].rpartition(".")[0] + "-images.parquet"
    for field in schema:
        value_type = field.type.value_type if is_list(field.type) else None
        if value_type is not None and (
            _is_bytes(value_type) or (pa.types.is_struct(value_type) and value_type.get_field_index("bytes") >= 0)
        ):
            return f"the column {field.name} has lists of images, not one a row", (
                'Write one a row: python -c "import pyarrow as pa, pyarrow.parquet as pq; '
                f"pq.write_table(pa.table({{'image': pq.read_table({path!r})[{field.name!r}].combine_chunks().flatten()}}), {out!r}, "
                'row_group_size=1000)", then name that file'
            )
    texts = [field.name for field in schema if _is_text(field.type)]
    for name, text in read_first_texts(fetcher, uri, texts[:_MAX_TEXT_COLUMNS]).items():
        if _is_base64(text):
            return f"the column {name} holds images as base64 text, not as bytes", (
                'Decode it: python -c "import base64, pyarrow as pa, pyarrow.parquet as pq; '
                f"t = pq.read_table({path!r}).to_pandas(); t[{name!r}] = [v and base64.b64decode(v.split(',')[-1]) for v in t[{name!r}]]; "
                f'pq.write_table(pa.Table.from_pandas(t), {out!r}, row_group_size=1000)", then name that file'
            )
    fact = "the file has no column of encoded images"
    if not texts:
        return fact, "Leave it out, or write the encoded images into a column of binary"
    return (
        fact,
        f"If its column {texts[0]} lists images, name it as input.manifest instead of input.uris, with input.uri_column={texts[0]}",
    )


def _is_base64(text: str) -> bool:
    """Return whether a text is an encoded image in base64, perhaps as a data URI."""
    try:
        head = base64.b64decode(text.partition(";base64,")[2][:64] or text[: len(text) // 4 * 4][:64], validate=True)
    except ValueError:
        return False
    return head.startswith(_IMAGE_MAGIC)
