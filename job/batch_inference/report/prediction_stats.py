"""Statistics of a job's predictions: classes, confidences, columns, and the most and least confident images.

They are read from the committed files when a report is made, not summed while rows pass through the driver. A killed attempt then has
nothing to lose, a retry nothing to take back, and the columns of custom predictors, which the driver never sees, count like all others.

Only columns of single values are read, a few files at a time, so memory does not grow with the job; wide columns such as embeddings are
not fetched at all. A job of 100,000 shards has more files than anyone wants to wait for: files are read in random order, so those that
were read by the deadline are a fair sample, and the statistics say how many files they are from.
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

from batch_inference.output.data_files import open_data_file
from batch_inference.output.records import Commit, DataFile
from batch_inference.storage.store import Store

#: Number of bins of the confidences from 0 to 1.
BINS = 20
#: Maximum number of classes. A network has some thousands of them; texts of a predictor that have more values are not classes.
MAX_CLASSES = 100_000
_MAX_CLASS_CHARACTERS = 200
# Further columns are listed with their type only.
_MAX_COLUMNS = 60
_PARALLEL_FILES = 8
_ROW_COLUMNS = ("uri", "shard", "row")


@dataclass(frozen=True)
class PredictionSample:
    """One prediction.

    Attributes:
        shard: Number of the shard.
        row: Index of the row in the shard.
        confidence: Confidence of the prediction; None if the predictor has none.
        text: The prediction as text.
    """

    shard: int
    row: int
    confidence: float | None
    text: str


@dataclass
class NumberStats:
    """Statistics of a column of numbers.

    Attributes:
        count: Number of values, without nulls and NaN.
        missing: Number of nulls and NaN.
        minimum: Smallest value.
        maximum: Largest value.
        total: Sum of the values.
    """

    count: int = 0
    missing: int = 0
    minimum: float = float("inf")
    maximum: float = float("-inf")
    total: float = 0.0

    @property
    def mean(self) -> float | None:
        """The mean; None without values."""
        return self.total / self.count if self.count else None

    def add(self, values: NDArray[np.float64], rows: int) -> None:
        """Add the values of ``rows`` rows, without those that are null or NaN."""
        self.missing += rows - len(values)
        if len(values):
            self.count += len(values)
            self.minimum = min(self.minimum, float(values.min()))
            self.maximum = max(self.maximum, float(values.max()))
            self.total += float(values.sum())


@dataclass(frozen=True)
class PredictionColumn:
    """A column of the predictions: its name, its Arrow type, and the shape of one value ("" for single values)."""

    name: str
    type: str
    shape: str = ""


@dataclass
class PredictionStats:
    """Statistics of the committed predictions.

    Attributes:
        max_samples: Maximum length of each list of samples.
        passthrough: Columns that come from the manifest.
        files: Number of prediction files.
        files_read: Number of files that were read.
        rows: Number of rows in the files that were read.
        columns: The predictor's columns.
        class_column: Name of the column that ``classes`` counts; "" if there is none.
        classes: Number of rows of each class.
        too_many_classes: Whether there are more than :data:`MAX_CLASSES` classes, which are then not counted.
        confidence_counts: Number of rows in each of :data:`BINS` bins of equal width from 0 to 1; None without confidences.
        confidences_out_of_range: Number of confidences that are not from 0 to 1.
        numbers: Statistics of the columns of single numbers, by name.
        highest: The most confident predictions, highest first; at equal confidence in order of shard and row.
        lowest: The least confident predictions, lowest first.
        samples: Some predictions if there are no confidences.
    """

    max_samples: int
    passthrough: tuple[str, ...] = ()
    files: int = 0
    files_read: int = 0
    rows: int = 0
    columns: list[PredictionColumn] = field(default_factory=list)
    class_column: str = ""
    classes: Counter[str] = field(default_factory=Counter)
    too_many_classes: bool = False
    confidence_counts: NDArray[np.int64] | None = None
    confidences_out_of_range: int = 0
    numbers: dict[str, NumberStats] = field(default_factory=dict)
    highest: list[PredictionSample] = field(default_factory=list)
    lowest: list[PredictionSample] = field(default_factory=list)
    samples: list[PredictionSample] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every file was read."""
        return self.files_read == self.files

    def add(self, table: pa.Table) -> None:
        """Add the rows of one file: ``shard``, ``row``, and columns of single values."""
        rows = table.num_rows
        self.rows += rows
        self.files_read += 1
        texts = self._count_classes(table)
        confidence = None
        for name in table.column_names:
            if name not in _ROW_COLUMNS and _is_number(table.schema.field(name).type):
                values, valid = _to_floats(table[name])
                self.numbers.setdefault(name, NumberStats()).add(values[valid], rows)
                if name == "confidence":
                    confidence = (values, valid)
        if confidence is not None:
            self._add_confidences(table, *confidence, texts)
        elif len(self.samples) < self.max_samples and rows:
            # A few of each file, so that they are not all neighbors.
            wanted = max(2, -(-self.max_samples // max(1, self.files)))
            number = min(wanted, rows, self.max_samples - len(self.samples))
            for index in range(0, rows - rows % number, rows // number):
                self.samples.append(self._sample(table, index, None, texts))
            del self.samples[self.max_samples :]

    def _count_classes(self, table: pa.Table) -> pa.ChunkedArray | None:
        """Count the classes of a file; return the column of classes as text, or None if there is none."""
        self.class_column = self.class_column or find_class_column(table.schema)
        if not self.class_column or self.class_column not in table.column_names:
            return None
        texts = table[self.class_column].cast(pa.string())
        if not self.too_many_classes:
            counts = pc.value_counts(texts.combine_chunks())
            for value, count in zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True):
                self.classes["" if value is None else value[:_MAX_CLASS_CHARACTERS]] += count
            if len(self.classes) > MAX_CLASSES:
                self.too_many_classes = True
                self.classes = Counter()
        return texts

    def _add_confidences(
        self,
        table: pa.Table,
        values: NDArray[np.float64],
        valid: NDArray[np.bool_],
        texts: pa.ChunkedArray | None,
    ) -> None:
        """Count the confidences of a file, and keep its most and least confident predictions."""
        if self.confidence_counts is None:
            self.confidence_counts = np.zeros(BINS, np.int64)
        within = valid & (values >= 0) & (values <= 1)
        self.confidences_out_of_range += int((valid & ~within).sum())
        bins = np.minimum((values[within] * BINS).astype(np.int64), BINS - 1)
        self.confidence_counts += np.bincount(bins, minlength=BINS)
        indices = np.flatnonzero(valid)
        for samples, sign in ((self.highest, -1.0), (self.lowest, 1.0)):
            candidates = indices
            if len(samples) == self.max_samples and self.max_samples:
                bound = samples[-1].confidence
                assert bound is not None  # noqa: S101
                candidates = indices[sign * values[indices] <= sign * bound]
            order = np.lexsort((table["row"].to_numpy()[candidates], sign * values[candidates]))[: self.max_samples]
            samples += [self._sample(table, int(i), float(values[i]), texts) for i in candidates[order]]
            samples.sort(key=lambda sample: (sign * (sample.confidence or 0.0), sample.shard, sample.row))
            del samples[self.max_samples :]

    def _sample(
        self, table: pa.Table, index: int, confidence: float | None, texts: pa.ChunkedArray | None
    ) -> PredictionSample:
        if texts is not None:
            value = texts[index].as_py()
            text = "no label" if value is None else str(value)
            if self.class_column != "label":
                text = f"class {text}"
        else:
            names = [n for n in table.column_names if n not in (*_ROW_COLUMNS, "confidence")][:3]
            text = ", ".join(f"{name} {_format_value(table[name][index].as_py())}" for name in names)
            # If there are only wide columns, the text is their names and shapes.
            text = text or ", ".join(f"{column.name} {column.shape}".strip() for column in self.columns[:2])
        return PredictionSample(
            table["shard"][index].as_py(), table["row"][index].as_py(), confidence, text[:_MAX_CLASS_CHARACTERS]
        )


def collect_stats(
    store: Store,
    commits: Iterable[Commit],
    *,
    max_samples: int,
    passthrough: tuple[str, ...] = (),
    deadline: float = float("inf"),
    clock: Callable[[], float] = time.monotonic,
) -> PredictionStats:
    """Read the prediction files of commits and return their statistics.

    Args:
        store: The output folder.
        commits: The valid commits.
        max_samples: Maximum number of the most confident and of the least confident predictions to keep.
        passthrough: Columns of the manifest, which are left out.
        deadline: Time of ``clock`` after which no more files are opened; at least one is read.
        clock: Returns the time in seconds.

    Raises:
        FileNotFoundError: If a committed file is missing.
        ArrowException: If a committed file cannot be read.
    """
    files = [file for commit in commits for file in commit.files if file.path.startswith("predictions/") and file.rows]
    stats = PredictionStats(max_samples, passthrough, files=len(files))
    order = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    if order:
        stats.columns = _describe_columns(open_data_file(store, order[0]), passthrough)
    for table in _read_tables(store, order, passthrough, lambda: clock() > deadline):
        stats.add(table)
    return stats


def find_class_column(schema: pa.Schema) -> str:
    """Return the column of classes: texts in ``label``, else integers in ``predicted_class_idx`` or ``label``; "" if there is none."""
    types = {f.name: f.type for f in schema}
    for name in ("label", "predicted_class_idx"):
        if name in types and (_is_text(types[name]) or pa.types.is_integer(types[name])):
            return name
    return ""


def _read_tables(
    store: Store, files: list[DataFile], passthrough: tuple[str, ...], is_late: Callable[[], bool]
) -> Iterator[pa.Table]:
    def read(file: DataFile) -> pa.Table:
        source = open_data_file(store, file)
        return source.read(columns=_scalar_columns(source.schema_arrow, passthrough), use_threads=False)

    with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
        running: deque[Future[pa.Table]] = deque()
        for file in files:
            if len(running) >= 2 * _PARALLEL_FILES:
                yield running.popleft().result()
            if running and is_late():
                break
            running.append(pool.submit(read, file))
        while running:
            yield running.popleft().result()


def _scalar_columns(schema: pa.Schema, passthrough: tuple[str, ...]) -> list[str]:
    """Return the columns of single values to read, the known ones first."""
    names = [f.name for f in schema if f.name not in passthrough and (_is_text(f.type) or _is_number(f.type))]
    known = ["shard", "row", "label", "predicted_class_idx", "confidence"]
    # Other texts may be long, and nothing of them is counted. They are read only if a sample has no label to show.
    texts = {f.name for f in schema if _is_text(f.type)} if find_class_column(schema) else set()
    names = [n for n in names if n not in texts or n == "label"]
    return sorted((n for n in names if n != "uri"), key=lambda n: n not in known)[:_MAX_COLUMNS]


def _describe_columns(source: pq.ParquetFile, passthrough: tuple[str, ...]) -> list[PredictionColumn]:
    fields = [f for f in source.schema_arrow if f.name not in (*_ROW_COLUMNS, *passthrough)]
    lists = [f.name for f in fields[:_MAX_COLUMNS] if not _is_text(f.type) and not _is_number(f.type)]
    group = source.metadata.row_group(0) if source.metadata.num_row_groups else None
    size = sum(group.column(i).total_uncompressed_size for i in range(group.num_columns)) if group else 0
    # The shape is that of the first value, if reading its row group is cheap.
    first = None
    if lists and 0 < size <= 64 << 20:
        first = next(source.iter_batches(1, row_groups=[0], columns=lists, use_threads=False), None)
    return [
        PredictionColumn(
            f.name, _type_name(f.type), _shape(first.column(f.name)[0].as_py()) if first and f.name in lists else ""
        )
        for f in fields
    ]


def _type_name(arrow_type: pa.DataType) -> str:
    """Return the name of an Arrow type, without the names of list items."""
    text = str(arrow_type)
    for word in ("item: ", "element: "):
        text = text.replace(word, "")
    return text if len(text) <= 120 else text[:119] + "…"


def _shape(value: Any) -> str:
    """Return the shape of nested lists, such as ``2 x 3``; "" for any other value.

    >>> _shape([[1, 2, 3], [4, 5, 6]])
    '2 x 3'
    """
    lengths = []
    while isinstance(value, list):
        lengths.append(str(len(value)))
        value = value[0] if value else None
    return " x ".join(lengths)


def _is_text(arrow_type: pa.DataType) -> bool:
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return bool(pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type))


def _is_number(arrow_type: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_integer(arrow_type) or types.is_floating(arrow_type) or types.is_boolean(arrow_type))


def _to_floats(column: pa.ChunkedArray) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the values as float64, and a mask of those that are numbers."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    values = pc.cast(column, pa.float64(), safe=False).combine_chunks()
    array = np.asarray(values.fill_null(np.nan).to_numpy(zero_copy_only=False), np.float64)
    return array, ~np.isnan(array)


def _format_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:60]
