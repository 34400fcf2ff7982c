"""What the predictions of a job add up to: classes, confidences, columns, and the images at both ends.

Read from the committed files, when a report is made, rather than added up while rows pass through the driver: so an attempt that is
killed has nothing to lose, a retry nothing to take back, and the columns of custom predictors, which the driver never sees, count
like all others. Only columns of single values are read, a few files at a time, so that memory does not grow with the job; of wide
columns (embeddings) not a byte is fetched. A job of 100,000 shards has more files than anyone wants to wait for. Files are
taken in random order, so that those which were read by the deadline are a fair sample, and the census says of how many it is.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batch_inference.data_files import opened
from batch_inference.ledger import Commit, DataFile
from batch_inference.storage import Store

BINS = 20
# A network's classes are some thousands; a predictor's texts may be of any number, and are no classes then.
MOST_CLASSES = 100_000
_LONGEST_CLASS = 200
# Columns beyond these are named by their type only.
_MOST_COLUMNS = 60
_PARALLEL_FILES = 8
_PLACE = ("uri", "shard", "row")


@dataclass(frozen=True)
class Sample:
    """One prediction.

    Attributes:
        shard: Its shard.
        row: Its place in it.
        confidence: How sure the predictor was; None where it does not say.
        text: What was predicted.
    """

    shard: int
    row: int
    confidence: float | None
    text: str


@dataclass
class Numbers:
    """A column of numbers.

    Attributes:
        count: Values that are numbers, without nulls and NaN.
        missing: Nulls and NaN.
        least: The smallest value.
        most: The largest value.
        total: Their sum.
    """

    count: int = 0
    missing: int = 0
    least: float = float("inf")
    most: float = float("-inf")
    total: float = 0.0

    @property
    def mean(self) -> float | None:
        """The mean, None without values."""
        return self.total / self.count if self.count else None

    def add(self, values: NDArray[np.float64], rows: int) -> None:
        """Adds values that are numbers, out of so many rows."""
        self.missing += rows - len(values)
        if len(values):
            self.count += len(values)
            self.least = min(self.least, float(values.min()))
            self.most = max(self.most, float(values.max()))
            self.total += float(values.sum())


@dataclass(frozen=True)
class Column:
    """A column of the predictions: its name, its Arrow type, and the shape of one value ("" for single ones)."""

    name: str
    type: str
    shape: str = ""


@dataclass
class Census:
    """Counts over the committed predictions.

    Attributes:
        most: How many samples are kept from each end.
        passthrough: Columns that come from the manifest.
        files: Number of prediction files.
        files_read: Those of them that were read.
        rows: Rows in these.
        columns: The predictor's columns.
        class_column: The column that ``classes`` counts, "" where there is none.
        classes: Rows of each class.
        too_many_classes: Whether there are more than :data:`MOST_CLASSES`, so that they are not counted.
        confidences: Rows by confidence: :data:`BINS` bins of equal width from 0 to 1; None without such a column.
        outside: Confidences that are not from 0 to 1.
        numbers: Columns of single numbers.
        highest: The most confident predictions, best first; those of equal confidence in order of shard and row.
        lowest: The least confident, least first.
        some: Predictions from anywhere, where there are no confidences.
    """

    most: int
    passthrough: tuple[str, ...] = ()
    files: int = 0
    files_read: int = 0
    rows: int = 0
    columns: list[Column] = field(default_factory=list)
    class_column: str = ""
    classes: Counter[str] = field(default_factory=Counter)
    too_many_classes: bool = False
    confidences: NDArray[np.int64] | None = None
    outside: int = 0
    numbers: dict[str, Numbers] = field(default_factory=dict)
    highest: list[Sample] = field(default_factory=list)
    lowest: list[Sample] = field(default_factory=list)
    some: list[Sample] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether every file was read."""
        return self.files_read == self.files

    def add(self, table: pa.Table) -> None:
        """Counts the rows of one file: ``shard``, ``row``, and columns of single values."""
        rows = table.num_rows
        self.rows += rows
        self.files_read += 1
        texts = self._classes(table)
        confidence = None
        for name in table.column_names:
            if name not in _PLACE and _is_number(table.schema.field(name).type):
                values, valid = _floats(table[name])
                self.numbers.setdefault(name, Numbers()).add(values[valid], rows)
                if name == "confidence":
                    confidence = (values, valid)
        if confidence is not None:
            self._confidences(table, *confidence, texts)
        elif len(self.some) < self.most and rows:
            # A few of each file, so that they are not all neighbours.
            number = min(max(2, -(-self.most // max(1, self.files))), rows, self.most - len(self.some))
            for place in range(0, rows - rows % number, rows // number):
                self.some.append(self._sample(table, place, None, texts))
            del self.some[self.most :]

    def _classes(self, table: pa.Table) -> pa.ChunkedArray | None:
        self.class_column = self.class_column or class_column(table.schema)
        if not self.class_column or self.class_column not in table.column_names:
            return None
        texts = table[self.class_column].cast(pa.string())
        if not self.too_many_classes:
            counts = pc.value_counts(texts.combine_chunks())
            for value, count in zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True):
                self.classes["" if value is None else value[:_LONGEST_CLASS]] += count
            if len(self.classes) > MOST_CLASSES:
                self.too_many_classes = True
                self.classes = Counter()
        return texts

    def _confidences(
        self,
        table: pa.Table,
        values: NDArray[np.float64],
        valid: NDArray[np.bool_],
        texts: pa.ChunkedArray | None,
    ) -> None:
        if self.confidences is None:
            self.confidences = np.zeros(BINS, np.int64)
        within = valid & (values >= 0) & (values <= 1)
        self.outside += int((valid & ~within).sum())
        bins = np.minimum((values[within] * BINS).astype(np.int64), BINS - 1)
        self.confidences += np.bincount(bins, minlength=BINS)
        places = np.flatnonzero(valid)
        for kept, sign in ((self.highest, -1.0), (self.lowest, 1.0)):
            wanted = places
            if len(kept) == self.most and self.most:
                bound = kept[-1].confidence
                assert bound is not None  # noqa: S101
                wanted = places[sign * values[places] <= sign * bound]
            order = np.lexsort((table["row"].to_numpy()[wanted], sign * values[wanted]))[: self.most]
            kept += [self._sample(table, int(place), float(values[place]), texts) for place in wanted[order]]
            kept.sort(key=lambda one: (sign * (one.confidence or 0.0), one.shard, one.row))
            del kept[self.most :]

    def _sample(self, table: pa.Table, place: int, confidence: float | None, texts: pa.ChunkedArray | None) -> Sample:
        if texts is not None:
            value = texts[place].as_py()
            text = "no label" if value is None else str(value)
            if self.class_column != "label":
                text = f"class {text}"
        else:
            names = [n for n in table.column_names if n not in (*_PLACE, "confidence")][:3]
            text = ", ".join(f"{name} {_short(table[name][place].as_py())}" for name in names)
            # Of wide columns alone there is nothing to read on a line but what they are.
            text = text or ", ".join(f"{column.name} {column.shape}".strip() for column in self.columns[:2])
        return Sample(table["shard"][place].as_py(), table["row"][place].as_py(), confidence, text[:_LONGEST_CLASS])


def take(
    store: Store,
    commits: Iterable[Commit],
    *,
    most: int,
    passthrough: tuple[str, ...] = (),
    deadline: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> Census:
    """Reads the prediction files that commits name.

    Args:
        store: The output folder.
        commits: Those that count.
        most: How many samples to keep from each end.
        passthrough: Columns of the manifest, which are left out.
        deadline: No file is begun after this moment of ``clock``; at least one is read.
        clock: Seconds.

    Raises:
        FileNotFoundError: If a committed file is gone.
        ArrowException: If one can't be read.
    """
    files = [file for commit in commits for file in commit.files if file.path.startswith("predictions/") and file.rows]
    census = Census(most, passthrough, files=len(files))
    order = [files[place] for place in np.random.default_rng(0).permutation(len(files))]
    if order:
        census.columns = _columns(opened(store, order[0]), passthrough)
    for table in _tables(store, order, passthrough, lambda: clock() > deadline):
        census.add(table)
    return census


def class_column(schema: pa.Schema) -> str:
    """The column that says what was predicted: texts in ``label``, else whole numbers in ``predicted_class_idx`` or ``label``."""
    types = {f.name: f.type for f in schema}
    for name in ("label", "predicted_class_idx"):
        if name in types and (_is_text(types[name]) or pa.types.is_integer(types[name])):
            return name
    return ""


def _tables(
    store: Store, files: list[DataFile], passthrough: tuple[str, ...], late: Callable[[], bool]
) -> Iterator[pa.Table]:
    def read(file: DataFile) -> pa.Table:
        source = opened(store, file)
        return source.read(columns=_single(source.schema_arrow, passthrough), use_threads=False)

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        running: deque[Future[pa.Table]] = deque()
        for file in files:
            if len(running) >= 2 * _PARALLEL_FILES:
                yield running.popleft().result()
            if running and late():
                break
            running.append(pool.submit(read, file))
        while running:
            yield running.popleft().result()


def _single(schema: pa.Schema, passthrough: tuple[str, ...]) -> list[str]:
    """Columns of single values, those that are always looked at first."""
    names = [f.name for f in schema if f.name not in passthrough and (_is_text(f.type) or _is_number(f.type))]
    known = ["shard", "row", "label", "predicted_class_idx", "confidence"]
    # Texts that are no labels may be long, and nothing is counted of them; without a label they are what a sample shows.
    texts = {f.name for f in schema if _is_text(f.type)} if class_column(schema) else set()
    names = [n for n in names if n not in texts or n == "label"]
    return sorted((n for n in names if n != "uri"), key=lambda n: n not in known)[:_MOST_COLUMNS]


def _columns(source: pq.ParquetFile, passthrough: tuple[str, ...]) -> list[Column]:
    fields = [f for f in source.schema_arrow if f.name not in (*_PLACE, *passthrough)]
    lists = [f.name for f in fields[:_MOST_COLUMNS] if not _is_text(f.type) and not _is_number(f.type)]
    group = source.metadata.row_group(0) if source.metadata.num_row_groups else None
    size = sum(group.column(i).total_uncompressed_size for i in range(group.num_columns)) if group else 0
    # Of a batch that is small enough the first value tells its shape; else the type has to.
    first = None
    if lists and 0 < size <= 64 << 20:
        first = next(source.iter_batches(1, row_groups=[0], columns=lists, use_threads=False), None)
    return [
        Column(f.name, _type_name(f.type), _shape(first.column(f.name)[0].as_py()) if first and f.name in lists else "")
        for f in fields
    ]


def _type_name(kind: pa.DataType) -> str:
    """An Arrow type, with its inside but without the names of list items."""
    text = str(kind)
    for word in ("item: ", "element: "):
        text = text.replace(word, "")
    return text if len(text) <= 120 else text[:119] + "…"


def _shape(value: Any) -> str:
    """The shape of nested lists: ``2 x 3``; of other things "".

    >>> _shape([[1, 2, 3], [4, 5, 6]])
    '2 x 3'
    """
    lengths = []
    while isinstance(value, list):
        lengths.append(str(len(value)))
        value = value[0] if value else None
    return " x ".join(lengths)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _floats(column: pa.ChunkedArray) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Values as float64, and which of them are numbers."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    values = pc.cast(column, pa.float64(), safe=False).combine_chunks()
    array = np.asarray(values.fill_null(np.nan).to_numpy(zero_copy_only=False), np.float64)
    return array, ~np.isnan(array)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:60]
