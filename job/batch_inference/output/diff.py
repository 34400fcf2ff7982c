"""Compare the predictions of two outputs, for example of two models over the same images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from batch_inference.config import StorageConfig
from batch_inference.errors import AccountingError, UserError
from batch_inference.output.data_files import open_data_file
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import DataFile
from batch_inference.storage.store import Store

_PARALLEL_FILES = 8
_MAX_EXAMPLES = 10
_MAX_CHANGES = 20
# Values whose text is kept; of others only the hash is known.
_MAX_TEXTS = 100_000
# Columns to compare unless one is named: the first that both outputs have.
_DEFAULT_COLUMNS = ("label", "predicted_class_idx")
_KEY_COLUMNS = ("uri", "shard", "row")


@dataclass(frozen=True)
class Example:
    """An image whose prediction changed."""

    uri: str
    before: str
    after: str


@dataclass(frozen=True)
class Comparison:
    """Differences between two outputs. Inputs are the same if their URIs are.

    Attributes:
        column: Name of the compared column.
        same: Inputs with equal predictions in both.
        changed: Inputs with different predictions.
        only_before: Inputs predicted before that are not among the later output's inputs.
        only_after: Inputs predicted after that were not among the earlier output's inputs.
        newly_failed: Inputs predicted before that failed after.
        newly_predicted: Inputs that failed before and were predicted after.
        changes: Value before, value after and number of inputs; the 20 most frequent.
        confidence: Mean ``confidence`` of the inputs predicted in both, before and after; None if the outputs have no
            such column.
        examples: Some inputs that changed.
    """

    column: str
    same: int
    changed: int
    only_before: int
    only_after: int
    newly_failed: int
    newly_predicted: int
    changes: tuple[tuple[str, str, int], ...] = ()
    confidence: tuple[float, float] | None = None
    examples: tuple[Example, ...] = ()

    @property
    def changed_percent(self) -> float:
        """Percentage of changed predictions among the inputs predicted in both."""
        return 100 * self.changed / max(1, self.same + self.changed)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``diff --json``."""
        shown = {key: value for key, value in vars(self).items() if key not in ("changes", "examples")}
        changes = [{"before": a, "after": b, "rows": n} for a, b, n in self.changes]
        examples = [vars(example) for example in self.examples]
        return {**shown, "changed_percent": self.changed_percent, "changes": changes, "examples": examples}


def diff_outputs(
    before: str, after: str, column: str | None = None, storage: StorageConfig | None = None, to: str | None = None
) -> Comparison:
    """Compare the committed predictions of two outputs.

    Takes some 50 bytes of memory per input, for both outputs together. Files are read one after the other.

    Args:
        before: The earlier output folder.
        after: The later output folder.
        column: Column of the predictions to compare, with texts, numbers or booleans; None for ``label``, else
            ``predicted_class_idx``.
        storage: Settings of the store of both.
        to: Path of a Parquet file for all changed inputs, with columns ``uri``, ``before``, ``after``.

    Raises:
        UserError: If a folder is not an output, or the outputs do not both have the column.
        AccountingError: If a committed file is missing or damaged.
        InfrastructureError: If the store fails.
    """
    sides = [_Side.of(output, storage or StorageConfig()) for output in (before, after)]
    compared = column or next((name for name in _DEFAULT_COLUMNS if all(name in side.names for side in sides)), None)
    common = [name for name in sides[0].names if name in sides[1].names and name not in _KEY_COLUMNS]
    if compared is None or any(compared not in side.names for side in sides):
        raise UserError(
            f"the outputs have no column {compared or ' or '.join(_DEFAULT_COLUMNS)} in common",
            f"Choose another with --column: {', '.join(common) or 'there is none that both have'}.",
        )
    for side in sides:
        try:
            side.load(compared, confidence=all("confidence" in other.names for other in sides))
        except pa.ArrowNotImplementedError:
            raise UserError(
                f"column {compared} of {side.output} holds lists or structs, which are not compared",
                f"Choose another with --column: {', '.join(name for name in common if name != compared) or 'none'}.",
            ) from None
    return _compare(compared, sides[0], sides[1], to)


@dataclass
class _Side:
    """One output, as arrays in the order of its URIs' hashes: 16 bytes a row, and 4 for a confidence."""

    output: str
    store: Store
    files: list[DataFile]
    names: list[str] = field(default_factory=list)
    uris: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    confidence: np.ndarray | None = None
    failed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    texts: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, output: str, storage: StorageConfig) -> _Side:
        ledger = Ledger(Store(output, storage, must_exist=True))
        ledger.require_job()
        files = [file for commit in ledger.commits() for file in commit.files]
        side = cls(output, ledger.store, files)
        for file in side.files_in("predictions")[:1]:
            with side.explain_errors(file):
                side.names = open_data_file(side.store, file).schema_arrow.names
        return side

    def files_in(self, folder: str) -> list[DataFile]:
        """Return the committed files of a folder, ``predictions`` or ``errors``."""
        return [file for file in self.files if file.path.startswith(f"{folder}/")]

    @contextlib.contextmanager
    def explain_errors(self, file: DataFile) -> Iterator[None]:
        """Turn errors of reading a file into an AccountingError with the remedy."""
        try:
            yield
        except (OSError, pa.ArrowInvalid) as exc:
            problem = "is missing" if isinstance(exc, FileNotFoundError) else "can't be read"
            raise AccountingError(
                f"{file.path} of {self.output} is committed and {problem}",
                f"batch-inference verify {self.output} names all that is wrong with it.",
            ) from None

    def tables(self, folder: str, columns: list[str]) -> Iterator[pa.Table]:
        """Yield the tables of a folder's files; some are read ahead."""
        files = self.files_in(folder)

        def read(file: DataFile) -> pa.Table:
            with self.explain_errors(file):
                return open_data_file(self.store, file).read(columns=columns, use_threads=False)

        with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
            # Not all at once: tables that are read ahead stay in memory.
            for start in range(0, len(files), _PARALLEL_FILES):
                yield from pool.map(read, files[start : start + _PARALLEL_FILES])

    def load(self, column: str, *, confidence: bool) -> None:
        """Read the column to compare, and the confidence."""
        uris, values, confidences = [], [], []
        for table in self.tables("predictions", ["uri", column, *(["confidence"] if confidence else [])]):
            uris.append(_hashes(table["uri"]))
            texts = table[column].cast(pa.string())
            values.append(_hashes(texts))
            if len(self.texts) < _MAX_TEXTS:
                self.texts.update(zip(values[-1].tolist(), texts.to_pylist(), strict=True))
            if confidence:
                confidences.append(table["confidence"].to_numpy().astype(np.float32))
        # A manifest may name a URI twice, with the same prediction; the first counts.
        self.uris, first = np.unique(_concatenate(uris), return_index=True)
        self.values = _concatenate(values)[first]
        self.confidence = np.concatenate(confidences)[first] if confidences else None
        failed = _concatenate([_hashes(table["uri"]) for table in self.tables("errors", ["uri"])])
        self.failed = np.setdiff1d(failed, self.uris)


def _compare(column: str, a: _Side, b: _Side, to: str | None) -> Comparison:
    both, in_a, in_b = np.intersect1d(a.uris, b.uris, assume_unique=True, return_indices=True)
    differs = a.values[in_a] != b.values[in_b]
    pairs = np.stack([a.values[in_a][differs], b.values[in_b][differs]], axis=1)
    distinct, counts = np.unique(pairs, axis=0, return_counts=True) if len(pairs) else (pairs, np.zeros(0, int))
    order = np.argsort(-counts, kind="stable")[:_MAX_CHANGES]
    changes = [
        (a.texts.get(int(distinct[i][0]), "…"), b.texts.get(int(distinct[i][1]), "…"), int(counts[i])) for i in order
    ]
    confidence = None
    if a.confidence is not None and b.confidence is not None and len(both):
        confidence = (float(np.mean(a.confidence[in_a])), float(np.mean(b.confidence[in_b])))
    newly_failed = len(np.intersect1d(a.uris, b.failed, assume_unique=True))
    newly_predicted = len(np.intersect1d(a.failed, b.uris, assume_unique=True))
    changed = both[differs]
    return Comparison(
        column=column,
        same=len(both) - len(changed),
        changed=len(changed),
        only_before=len(a.uris) - len(both) - newly_failed,
        only_after=len(b.uris) - len(both) - newly_predicted,
        newly_failed=newly_failed,
        newly_predicted=newly_predicted,
        changes=tuple(changes),
        confidence=confidence,
        examples=tuple(_changed_rows(column, a, b, changed, to)),
    )


def _changed_rows(column: str, a: _Side, b: _Side, changed: np.ndarray, to: str | None) -> list[Example]:
    """Read URIs and values of changed inputs, all of them if a file is wanted; return the examples."""
    wanted = changed if to else changed[:_MAX_EXAMPLES]
    sides: list[pd.Series] = []
    for side in (a, b):
        parts = [pd.Series([], dtype=object)]
        for table in side.tables("predictions", ["uri", column]) if len(wanted) else ():
            matching = table.filter(pa.array(np.isin(_hashes(table["uri"]), wanted)))
            parts.append(
                pd.Series(
                    matching[column].cast(pa.string()).to_pylist(), index=matching["uri"].to_pylist(), dtype=object
                )
            )
        series = pd.concat(parts)
        sides.append(series[~series.index.duplicated()].sort_index())
    frame = pd.DataFrame({"before": sides[0], "after": sides[1]}).rename_axis("uri").reset_index()
    if to:
        schema = pa.schema([(name, pa.string()) for name in frame.columns])
        try:
            pq.write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False), to)
        except OSError as exc:
            raise UserError(f"{to} can't be written: {exc}", "Name a file in an existing folder with --to.") from None
    return [Example(*row) for row in frame.head(_MAX_EXAMPLES).itertuples(index=False)]


def _hashes(column: pa.ChunkedArray) -> np.ndarray:
    """Return 64-bit hashes of texts and None; of 10^8 different texts two collide with a probability of 1 in 3,700."""
    values = column.to_numpy(zero_copy_only=False).astype(object)
    return np.asarray(pd.util.hash_array(values, categorize=False))


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)
