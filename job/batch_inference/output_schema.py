"""The one schema of a job's predictions: ``_schema.json``.

The first shard that is written fixes it, by put-if-absent: of several writers one wins, and the others read what it wrote. What
comes later is cast where nothing is lost; a row that does not fit is a failed row.

A column of which the first shard has no value (all null, all lists empty) has no type yet. It stays *open*: the files are written
as if it were text, their commits say so, and the first shard with a value fixes the rest in ``_schema/2.json``, again by
put-if-absent, the next one in ``_schema/3.json``. At the end of the job :func:`~batch_inference.generations.unify` writes those
files again whose guess was wrong, as one more generation of commits, and the whole schema goes into ``_schema.json``. Holding such
shards back until the type is known was the other way: where hardly any image has a value, that is the whole job, which memory does
not hold and a killed driver would lose.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from batch_inference.column_types import closed, fit, is_open, merged, nothing, plain_type, refined
from batch_inference.data_files import opened
from batch_inference.errors import CountsDoNotClose
from batch_inference.ledger import Commit, Ledger
from batch_inference.storage import Store

SCHEMA = "_schema.json"
# Folder of what was fixed after the first shard. It stays: a driver that is slow reads on where it was.
_LATER = "_schema"
_FORMAT = 1
_SHOWN = 120


def encode(schema: pa.Schema) -> bytes:
    """Return the bytes of ``_schema.json``.

    It has names and types for people, and Arrow's own form, since not every type can be read back from its name.
    """
    columns: list[dict[str, object]] = [{"name": field.name, "type": str(field.type)} for field in schema]
    for column, field in zip(columns, schema, strict=True):
        if is_open(field.type):
            column["open"] = True
    arrow = base64.b64encode(schema.serialize().to_pybytes()).decode()
    return json.dumps({"format": _FORMAT, "columns": columns, "arrow": arrow}, indent=1).encode()


def decode(data: bytes, path: str = SCHEMA) -> pa.Schema:
    """Read what :func:`encode` wrote.

    Raises:
        CountsDoNotClose: If it is anything else.
    """
    try:
        raw = json.loads(data)
        if raw["format"] != _FORMAT:
            raise ValueError(f"format {raw['format']!r}, this version reads {_FORMAT}")
        return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(raw["arrow"], validate=True)))
    except (ValueError, KeyError, TypeError, OSError, pa.ArrowException) as exc:
        raise CountsDoNotClose(
            f"{path} is not readable: {' '.join(str(exc).split())[:200]}",
            f"Delete {path} and run the same command again; it is made again from the first committed file.",
        ) from None


def open_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Return the names of the columns whose type is not known yet, or not wholly."""
    return tuple(field.name for field in schema if is_open(field.type))


def as_written(schema: pa.Schema) -> pa.Schema:
    """Return the schema of files that are written now: what is open is text."""
    return pa.schema([(field.name, closed(field.type)) for field in schema])


@dataclass(frozen=True)
class Fitted:
    """Predictions in the job's columns.

    Attributes:
        table: ``shard``, ``row`` and the columns; null where a row does not fit.
        reasons: Why a row does not fit, None where it does; None if all do.
    """

    table: pa.Table
    reasons: list[str | None] | None


class OutputSchema:
    """The schema of one output, kept in its store; safe to use from several threads, and beside other processes.

    Args:
        store: The output folder.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._schema: pa.Schema | None = None
        self._place = 0  # of the last part that was read, from 1

    def known(self) -> pa.Schema | None:
        """Return the schema as far as it is known; None where nothing has fixed one."""
        while self._schema is None or open_columns(self._schema):
            data = self._store.get_or_none(self._path(self._place + 1))
            if data is None:
                break
            self._schema = decode(data, self._path(self._place + 1))
            self._place += 1
        return self._schema

    def first(self) -> pa.Schema | None:
        """Return what ``_schema.json`` alone says; None if there is none."""
        data = self._store.get_or_none(SCHEMA)
        return None if data is None else decode(data)

    def settle(self, columns: pa.Schema) -> pa.Schema:
        """Fix what is not known yet by the columns of a shard.

        Args:
            columns: All columns of the shard's file, in plain types.

        Returns:
            What holds, ours or that of a writer that was faster. What is still open is null in it.
        """
        with self._lock:
            while True:
                known = self.known()
                if known is None:
                    known = self._of_older_version()
                    wanted = columns if known is None else known
                else:
                    there = {field.name: field.type for field in columns}
                    wanted = pa.schema([(f.name, refined(f.type, there.get(f.name, f.type))) for f in known])
                    if wanted == known:
                        return known
                self._add(wanted)

    def close(self) -> pa.Schema:
        """Fix that what is still open is text, since nothing else came; returns the schema."""
        with self._lock:
            while open_columns(known := self._known_for_sure()):
                self._add(as_written(known))
            return known

    def finish(self) -> None:
        """Write the whole schema into ``_schema.json``, once all files have it."""
        with self._lock:
            self._store.put(SCHEMA, encode(self._known_for_sure()))

    def _known_for_sure(self) -> pa.Schema:
        known = self.known()
        if known is None:
            raise CountsDoNotClose(
                f"{SCHEMA} is gone", "Run the same command again; it is made again from the first committed file."
            )
        return known

    def _add(self, schema: pa.Schema) -> None:
        # Whether this call made it or another writer did, the next look shows what holds.
        self._store.create(self._path(self._place + 1), encode(schema))

    @staticmethod
    def _path(place: int) -> str:
        return SCHEMA if place == 1 else f"{_LATER}/{place}.json"

    def _of_older_version(self) -> pa.Schema | None:
        """Return the schema of the first committed file, in an output that was begun before there was a ``_schema.json``."""
        ledger = Ledger(self._store)
        for place in sorted(ledger.places()):
            for commit in ledger.commits(dict([place])):
                found = first_schema(self._store, [commit])
                if found is not None:
                    return found
        return None


def first_schema(store: Store, commits: Iterable[Commit]) -> pa.Schema | None:
    """Return the plain schema of the first readable file of predictions that commits name; None if there is none."""
    for commit in commits:
        for file in commit.files:
            if file.path.startswith("predictions/"):
                try:
                    return plain_schema(opened(store, file).schema_arrow)
                except (OSError, pa.ArrowException):
                    continue
    return None


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Return a schema in plain types, without metadata."""
    return pa.schema([(field.name, plain_type(field.type)) for field in schema])


def storable(schema: pa.Schema) -> pa.Schema:
    """Return the columns of a predictor's table in plain types; those that Parquet cannot hold are left out."""
    fields = []
    for field in schema:
        try:
            fields.append((field.name, plain_type(field.type)))
        except pa.ArrowException:
            continue
    return pa.schema(fields)


def united(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """Return the columns of several tables, each with a type that holds the values of all.

    Of types that exclude one another the first counts.
    """
    fields: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            fields[field.name] = merged(fields[field.name], field.type) if field.name in fields else field.type
    return pa.schema(list(fields.items()))


def fitted(table: pa.Table, schema: pa.Schema) -> Fitted:
    """Cast the columns of a predictor's table to the job's.

    A column that is missing is null: there is nothing that could be lost. A value of a column that the job does not have would be
    lost, so its row does not fit.

    Args:
        table: Columns of any types, each name once.
        schema: The job's, in plain types with nothing open.
    """
    if table.schema.equals(schema):
        return Fitted(table, None)
    reasons: list[str | None] = [None] * table.num_rows
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
            continue
        given = table[field.name]
        done = [fit(chunk, field.type) for chunk in given.chunks]
        columns.append(pa.chunked_array([part for part, _ in done], field.type))
        if any(ok is not None for _, ok in done):
            _note(
                reasons,
                np.concatenate([np.ones(len(part), bool) if ok is None else ok for part, ok in done]),
                f"the predictor's column {field.name!r} is {_short(given.type)} here and {_short(field.type)} in this job "
                f"({SCHEMA}); the value cannot be cast without loss",
            )
    for field in table.schema:
        if field.name not in schema.names:
            _note(reasons, np.concatenate([nothing(chunk) for chunk in table[field.name].chunks]), _stray(field))
    return Fitted(pa.Table.from_arrays(columns, schema=schema), reasons if any(reasons) else None)


def _stray(field: pa.Field) -> str:
    column = f"the predictor's column {field.name!r}"
    try:
        plain_type(field.type)
    except pa.ArrowException:
        return f"{column} is {_short(field.type)}, which Parquet cannot store"
    return (
        f"{column} ({_short(field.type)}) is not among this job's columns ({SCHEMA}), which the first shard has fixed"
    )


def _note(reasons: list[str | None], fits: np.ndarray, why: str) -> None:
    for place in np.flatnonzero(~fits).tolist():
        reasons[place] = why if reasons[place] is None else f"{reasons[place]}; {why}"


def _short(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def distinct_columns(table: pa.Table) -> list[pa.Table]:
    """Split a table that has columns of the same name into tables that have each name once.

    Parts of one batch may come back with different types, as :func:`beside` joins them; of columns of one name each row has a value
    in at most one.
    """
    names = table.column_names
    if len(set(names)) == len(names):
        return [table]
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    groups: dict[tuple[int, ...], list[int]] = {}
    valid = [table.column(place).is_valid().to_pylist() for place in range(len(names))]
    for row in range(table.num_rows):
        chosen = tuple(next((p for p in of if valid[p][row]), of[0]) for of in places.values())
        groups.setdefault(chosen, []).append(row)
    return [
        pa.table([table.column(place) for place in chosen], names=list(places)).take(pa.array(rows, pa.int64()))
        for chosen, rows in groups.items()
    ]


def beside(tables: list[pa.Table]) -> pa.Table:
    """Join tables, one behind the other; columns of one name whose types differ stand beside each other.

    :func:`distinct_columns` takes them apart again.
    """
    if all(table.schema.equals(tables[0].schema) for table in tables):
        return pa.concat_tables(tables)
    fields: dict[tuple[str, pa.DataType], pa.Field] = {}
    for table in tables:
        for field in table.schema:
            fields.setdefault((field.name, field.type), field)
    rows = []
    for table in tables:
        there = {(field.name, field.type): place for place, field in enumerate(table.schema)}
        columns = [
            table.column(there[key]) if key in there else pa.chunked_array([pa.nulls(table.num_rows, key[1])])
            for key in fields
        ]
        rows.append(pa.Table.from_arrays(columns, schema=pa.schema(list(fields.values()))))
    return pa.concat_tables(rows)
