"""The one schema of a job's predictions: ``_schema.json``.

The first shard that is written fixes it by put-if-absent: one of several writers wins, and the others read its schema.
Later values are cast if nothing is lost; a row that does not fit is a failed row.

A column without any value in the first shard (all null, or all lists empty) has no type yet. It stays *open*: files are
written as if it were text, and their commits say so. The first shard with a value fixes the type in ``_schema/2.json``,
again by put-if-absent, the next one in ``_schema/3.json``. At the end of the job
:func:`~batch_inference.driver.unify.unify` writes the files with a wrong guess again, as one more retry, and the
complete schema goes into ``_schema.json``.

The alternative is to hold such shards back until the type is known. If hardly any image has a value, that is the whole
job: memory would not hold it, and a killed driver would lose it.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from batch_inference.errors import AccountingError
from batch_inference.output.column_types import (
    cast_values,
    empty_mask,
    fill_open_parts,
    is_open,
    merge_types,
    plain_type,
    text_where_open,
)
from batch_inference.output.data_files import open_data_file
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import Commit
from batch_inference.storage.store import Store

SCHEMA_PATH = "_schema.json"
# Folder of the parts that later shards fix. It is never deleted, because a slow driver may still be reading it.
_LATER_PARTS = "_schema"
_FORMAT = 1
_MAX_TYPE_CHARS = 120


def encode_schema(schema: pa.Schema) -> bytes:
    """Return the bytes of ``_schema.json``.

    It has names and types for people, and Arrow's own form, because not every type can be parsed from its name.
    """
    columns: list[dict[str, object]] = [{"name": field.name, "type": str(field.type)} for field in schema]
    for column, field in zip(columns, schema, strict=True):
        if is_open(field.type):
            column["open"] = True
    arrow = base64.b64encode(schema.serialize().to_pybytes()).decode()
    return json.dumps({"format": _FORMAT, "columns": columns, "arrow": arrow}, indent=1).encode()


def decode_schema(data: bytes, path: str = SCHEMA_PATH) -> pa.Schema:
    """Read the bytes that :func:`encode_schema` returned.

    Raises:
        AccountingError: If they are any others.
    """
    try:
        raw = json.loads(data)
        if raw["format"] != _FORMAT:
            raise ValueError(f"format {raw['format']!r}, this version reads {_FORMAT}")
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(raw["arrow"], validate=True)))
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException) as exc:
        raise AccountingError(
            f"{path} is not readable: {' '.join(str(exc).split())[:200]}",
            f"Delete {path} and run the same command again; it is written again from the first committed file.",
        ) from None


def open_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Return the names of the columns whose type is not completely known yet."""
    return tuple(field.name for field in schema if is_open(field.type))


def written_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema of files that are written now, with text in place of open types."""
    return pa.schema([(field.name, text_where_open(field.type)) for field in schema])


@dataclass(frozen=True)
class FittedTable:
    """Predictions in the job's columns.

    Attributes:
        table: ``shard``, ``row`` and the columns; null if a row does not fit.
        reasons: For each row why it does not fit, None if it does; None if all rows fit.
    """

    table: pa.Table
    reasons: list[str | None] | None


class OutputSchema:
    """The schema of one output, kept in its store; safe to use from several threads and processes.

    Args:
        store: The output folder.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._schema: pa.Schema | None = None
        self._parts_read = 0

    def known(self) -> pa.Schema | None:
        """Return the schema as far as it is known; None if no shard has fixed one."""
        while self._schema is None or open_columns(self._schema):
            data = self._store.get_or_none(self._path(self._parts_read + 1))
            if data is None:
                break
            self._schema = decode_schema(data, self._path(self._parts_read + 1))
            self._parts_read += 1
        return self._schema

    def first(self) -> pa.Schema | None:
        """Return the content of ``_schema.json`` alone; None if there is none."""
        data = self._store.get_or_none(SCHEMA_PATH)
        return None if data is None else decode_schema(data)

    def settle(self, columns: pa.Schema) -> pa.Schema:
        """Fix open types from the columns of a shard.

        Args:
            columns: All columns of the shard's file, in plain types.

        Returns:
            The schema that holds, this one or a faster writer's. Types that are still open are null.
        """
        with self._lock:
            while True:
                known = self.known()
                if known is None:
                    known = self._of_older_version()
                    wanted = columns if known is None else known
                else:
                    types = {field.name: field.type for field in columns}
                    wanted = pa.schema([(f.name, fill_open_parts(f.type, types.get(f.name, f.type))) for f in known])
                    if wanted == known:
                        return known
                self._add(wanted)

    def close(self) -> pa.Schema:
        """Fix types that are still open as text, because no value came; return the schema."""
        with self._lock:
            while open_columns(known := self._require_known()):
                self._add(written_schema(known))
            return known

    def finish(self) -> None:
        """Write the complete schema into ``_schema.json``; call it when all files have it."""
        with self._lock:
            self._store.put(SCHEMA_PATH, encode_schema(self._require_known()))

    def _require_known(self) -> pa.Schema:
        known = self.known()
        if known is None:
            raise AccountingError(
                f"{SCHEMA_PATH} is gone",
                "Run the same command again; it is written again from the first committed file.",
            )
        return known

    def _add(self, schema: pa.Schema) -> None:
        # Whether this call or another writer created it, the next read returns the one that holds.
        self._store.create(self._path(self._parts_read + 1), encode_schema(schema))

    @staticmethod
    def _path(part: int) -> str:
        return SCHEMA_PATH if part == 1 else f"{_LATER_PARTS}/{part}.json"

    def _of_older_version(self) -> pa.Schema | None:
        """Return the schema of the first committed file, for an output of a version without ``_schema.json``."""
        ledger = Ledger(self._store)
        for shard, generation in sorted(ledger.commit_keys()):
            schema = first_schema(self._store, ledger.commits({shard: generation}))
            if schema is not None:
                return schema
        return None


def first_schema(store: Store, commits: Iterable[Commit]) -> pa.Schema | None:
    """Return the plain schema of the first readable file of predictions that commits name; None if there is none."""
    for commit in commits:
        for file in commit.files:
            if file.path.startswith("predictions/"):
                try:
                    return plain_schema(open_data_file(store, file).schema_arrow)
                except (OSError, pa.ArrowException):
                    continue
    return None


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Return a schema in plain types, without metadata."""
    return pa.schema([(field.name, plain_type(field.type)) for field in schema])


def storable_schema(schema: pa.Schema) -> pa.Schema:
    """Return the columns of a predictor's table in plain types, without those that Parquet cannot store."""
    fields = []
    for field in schema:
        try:
            fields.append((field.name, plain_type(field.type)))
        except pa.ArrowException:
            continue
    return pa.schema(fields)


def unite_schemas(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """Return the columns of several tables, each with a type that holds the values of all.

    If two types exclude each other, the first counts.
    """
    fields: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            fields[field.name] = merge_types(fields[field.name], field.type) if field.name in fields else field.type
    return pa.schema(list(fields.items()))


def fit_table(table: pa.Table, schema: pa.Schema) -> FittedTable:
    """Cast the columns of a predictor's table to the job's.

    A missing column becomes null, because nothing is lost. A value in a column that the job does not have would be
    lost, so its row does not fit.

    Args:
        table: Columns of any types, each name once.
        schema: The job's schema, in plain types with none of them open.
    """
    if table.schema.equals(schema):
        return FittedTable(table, None)
    reasons: list[str | None] = [None] * table.num_rows
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
            continue
        given = table[field.name]
        casts = [cast_values(chunk, field.type) for chunk in given.chunks]
        columns.append(pa.chunked_array([values for values, _ in casts], field.type))
        if any(fits is not None for _, fits in casts):
            _add_reason(
                reasons,
                np.concatenate([np.ones(len(values), bool) if fits is None else fits for values, fits in casts]),
                f"the predictor's column {field.name!r} is {_type_name(given.type)} here and {_type_name(field.type)} in this job "
                f"({SCHEMA_PATH}); the value cannot be cast without loss",
            )
    for field in table.schema:
        if field.name not in schema.names:
            _add_reason(
                reasons, np.concatenate([empty_mask(chunk) for chunk in table[field.name].chunks]), _extra_column(field)
            )
    return FittedTable(pa.Table.from_arrays(columns, schema=schema), reasons if any(reasons) else None)


def _extra_column(field: pa.Field) -> str:
    column = f"the predictor's column {field.name!r}"
    try:
        plain_type(field.type)
    except pa.ArrowException:
        return f"{column} is {_type_name(field.type)}, which Parquet cannot store"
    return f"{column} ({_type_name(field.type)}) is not among this job's columns ({SCHEMA_PATH}), which the first shard has fixed"


def _add_reason(reasons: list[str | None], fits: np.ndarray, reason: str) -> None:
    for row in np.flatnonzero(~fits).tolist():
        reasons[row] = reason if reasons[row] is None else f"{reasons[row]}; {reason}"


def _type_name(arrow_type: pa.DataType) -> str:
    text = str(arrow_type)
    return text if len(text) <= _MAX_TYPE_CHARS else text[: _MAX_TYPE_CHARS - 1] + "…"


def split_duplicate_columns(table: pa.Table) -> list[pa.Table]:
    """Split a table with several columns of one name into tables that have each name once.

    Parts of one batch may come back with different types, and :func:`join_tables` joins them. Of the columns of one
    name, each row has a value in at most one.
    """
    names = table.column_names
    if len(set(names)) == len(names):
        return [table]
    indexes_of: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        indexes_of.setdefault(name, []).append(index)
    groups: dict[tuple[int, ...], list[int]] = {}  # the rows that have their values in these columns
    valid = [table.column(index).is_valid().to_pylist() for index in range(len(names))]
    for row in range(table.num_rows):
        columns = tuple(
            next((index for index in indexes if valid[index][row]), indexes[0]) for indexes in indexes_of.values()
        )
        groups.setdefault(columns, []).append(row)
    return [
        pa.table([table.column(index) for index in columns], names=list(indexes_of)).take(pa.array(rows, pa.int64()))
        for columns, rows in groups.items()
    ]


def join_tables(tables: list[pa.Table]) -> pa.Table:
    """Concatenate the rows of tables; columns of one name whose types differ stay separate columns.

    :func:`split_duplicate_columns` splits them again.
    """
    if all(table.schema.equals(tables[0].schema) for table in tables):
        return pa.concat_tables(tables)
    fields: dict[tuple[str, pa.DataType], pa.Field] = {}
    for table in tables:
        for field in table.schema:
            fields.setdefault((field.name, field.type), field)
    parts = []
    for table in tables:
        index_of = {(field.name, field.type): index for index, field in enumerate(table.schema)}
        columns = [
            table.column(index_of[key]) if key in index_of else pa.chunked_array([pa.nulls(table.num_rows, key[1])])
            for key in fields
        ]
        parts.append(pa.Table.from_arrays(columns, schema=pa.schema(list(fields.values()))))
    return pa.concat_tables(parts)
