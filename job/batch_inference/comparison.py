"""Which predictions changed between two outputs, such as those of two models over the same images."""

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
from batch_inference.data_files import opened
from batch_inference.errors import CountsDoNotClose, UserError
from batch_inference.ledger import DataFile, Ledger
from batch_inference.storage import Store

_PARALLEL_FILES = 8
_EXAMPLES = 10
# What values look like is remembered for so many of them.
_NAMED = 100_000
# Compared unless a column is named: the first that both outputs have.
_COLUMNS = ("label", "predicted_class_idx")
_OURS = ("uri", "shard", "row")


@dataclass(frozen=True)
class Example:
    """An image whose prediction changed."""

    uri: str
    before: str
    after: str


@dataclass(frozen=True)
class Comparison:
    """What became of the inputs of one output in another. Inputs are the same if their URIs are.

    Attributes:
        column: The column that was compared.
        same: Inputs with equal predictions in both.
        changed: Inputs with different predictions.
        only_before: Inputs predicted before that are not among the later output's inputs.
        only_after: Inputs predicted after that were not among the earlier output's inputs.
        newly_failed: Inputs predicted before that failed after.
        newly_predicted: Inputs that failed before and were predicted after.
        changes: How often which value became which, the most frequent first, 20 at most.
        confidence: Mean ``confidence`` of the inputs predicted in both, before and after; None where there is none.
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
        """Changed predictions among the inputs that were predicted in both, in percent."""
        return 100 * self.changed / max(1, self.same + self.changed)

    def to_dict(self) -> dict[str, Any]:
        """For ``diff --json``."""
        shown = {key: value for key, value in vars(self).items() if key not in ("changes", "examples")}
        changes = [{"before": a, "after": b, "rows": n} for a, b, n in self.changes]
        examples = [vars(example) for example in self.examples]
        return {**shown, "changed_percent": self.changed_percent, "changes": changes, "examples": examples}


@dataclass
class _Side:
    """An output, as arrays over its predictions in the order of the URIs' hashes: 16 bytes a row, and 4 for a confidence."""

    output: str
    store: Store
    files: list[DataFile]
    names: list[str] = field(default_factory=list)
    uris: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    confidence: np.ndarray | None = None
    failed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    shown: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, output: str, storage: StorageConfig) -> _Side:
        ledger = Ledger(Store(output, storage, must_exist=True))
        ledger.require_job()
        files = [file for commit in ledger.commits() for file in commit.files]
        side = cls(output, ledger.store, files)
        for file in side.of_kind("predictions")[:1]:
            with side.explained(file):
                side.names = opened(side.store, file).schema_arrow.names
        return side

    def of_kind(self, kind: str) -> list[DataFile]:
        """Files of ``predictions`` or of ``errors``."""
        return [file for file in self.files if file.path.startswith(f"{kind}/")]

    @contextlib.contextmanager
    def explained(self, file: DataFile) -> Iterator[None]:
        """Says of a file that can't be read what that means."""
        try:
            yield
        except (OSError, pa.ArrowInvalid) as exc:
            why = "is missing" if isinstance(exc, FileNotFoundError) else "can't be read"
            raise CountsDoNotClose(
                f"{file.path} of {self.output} is committed and {why}",
                f"batch-inference verify {self.output} names all that is wrong with it.",
            ) from None

    def tables(self, kind: str, columns: list[str]) -> Iterator[pa.Table]:
        """The files of a kind, some read ahead."""
        files = self.of_kind(kind)

        def read(file: DataFile) -> pa.Table:
            with self.explained(file):
                return opened(self.store, file).read(columns=columns, use_threads=False)

        with ThreadPoolExecutor(_PARALLEL_FILES) as pool:
            # Not all at once: what is read and not yet taken is in memory.
            for start in range(0, len(files), _PARALLEL_FILES):
                yield from pool.map(read, files[start : start + _PARALLEL_FILES])

    def load(self, column: str, *, confidence: bool) -> None:
        """Reads what is compared."""
        uris, values, sure = [], [], []
        for table in self.tables("predictions", ["uri", column, *(["confidence"] if confidence else [])]):
            uris.append(_hashes(table["uri"]))
            texts = table[column].cast(pa.string())
            values.append(_hashes(texts))
            if len(self.shown) < _NAMED:
                self.shown.update(zip(values[-1].tolist(), texts.to_pylist(), strict=True))
            if confidence:
                sure.append(table["confidence"].to_numpy().astype(np.float32))
        # A manifest may have a URI twice, with the same prediction: the first counts.
        self.uris, first = np.unique(_joined(uris), return_index=True)
        self.values = _joined(values)[first]
        self.confidence = np.concatenate(sure)[first] if sure else None
        failed = _joined([_hashes(table["uri"]) for table in self.tables("errors", ["uri"])])
        self.failed = np.setdiff1d(failed, self.uris)


def compare(
    before: str, after: str, column: str | None = None, storage: StorageConfig | None = None, to: str | None = None
) -> Comparison:
    """Compares the committed predictions of two outputs.

    Memory: some 50 bytes an input, both outputs together; files are read one after the other.

    Args:
        before: An output folder.
        after: Another one.
        column: The predictions' column to compare, of texts, numbers or truth values; None: ``label``, else ``predicted_class_idx``.
        storage: How to reach both.
        to: Path of a Parquet file for all that changed, with columns ``uri``, ``before``, ``after``.

    Raises:
        UserError: If one is no output, or they have no such column.
        CountsDoNotClose: If a committed file is gone or damaged.
        SystemFault: If the store fails.
    """
    sides = [_Side.of(output, storage or StorageConfig()) for output in (before, after)]
    chosen = column or next((name for name in _COLUMNS if all(name in side.names for side in sides)), None)
    common = [name for name in sides[0].names if name in sides[1].names and name not in _OURS]
    if chosen is None or any(chosen not in side.names for side in sides):
        raise UserError(
            f"the outputs have no column {chosen or ' or '.join(_COLUMNS)} in common",
            f"Choose another with --column: {', '.join(common) or 'there is none that both have'}.",
        )
    for side in sides:
        try:
            side.load(chosen, confidence=all("confidence" in other.names for other in sides))
        except pa.ArrowNotImplementedError:
            raise UserError(
                f"column {chosen} of {side.output} holds lists or structs, which are not compared",
                f"Choose another with --column: {', '.join(name for name in common if name != chosen) or 'none'}.",
            ) from None
    return _joined_up(chosen, sides[0], sides[1], to)


def _joined_up(column: str, a: _Side, b: _Side, to: str | None) -> Comparison:
    both, at, bt = np.intersect1d(a.uris, b.uris, assume_unique=True, return_indices=True)
    differs = a.values[at] != b.values[bt]
    pairs = np.stack([a.values[at][differs], b.values[bt][differs]], axis=1)
    kinds, counts = np.unique(pairs, axis=0, return_counts=True) if len(pairs) else (pairs, np.zeros(0, int))
    order = np.argsort(-counts, kind="stable")[:20]
    changes = [(a.shown.get(int(kinds[i][0]), "…"), b.shown.get(int(kinds[i][1]), "…"), int(counts[i])) for i in order]
    sure = None
    if a.confidence is not None and b.confidence is not None and len(both):
        sure = (float(np.mean(a.confidence[at])), float(np.mean(b.confidence[bt])))
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
        confidence=sure,
        examples=tuple(_details(column, a, b, changed, to)),
    )


def _details(column: str, a: _Side, b: _Side, changed: np.ndarray, to: str | None) -> list[Example]:
    """Looks up URIs and values of what changed: all of it where a file is wanted, else some."""
    wanted = changed if to else changed[:_EXAMPLES]
    found: list[pd.Series] = []
    for side in (a, b):
        parts = [pd.Series([], dtype=object)]
        for table in side.tables("predictions", ["uri", column]) if len(wanted) else ():
            mine = table.filter(pa.array(np.isin(_hashes(table["uri"]), wanted)))
            parts.append(
                pd.Series(mine[column].cast(pa.string()).to_pylist(), index=mine["uri"].to_pylist(), dtype=object)
            )
        series = pd.concat(parts)
        found.append(series[~series.index.duplicated()].sort_index())
    frame = pd.DataFrame({"before": found[0], "after": found[1]}).rename_axis("uri").reset_index()
    if to:
        text = pa.schema([(name, pa.string()) for name in frame.columns])
        try:
            pq.write_table(pa.Table.from_pandas(frame, schema=text, preserve_index=False), to)
        except OSError as exc:
            raise UserError(
                f"{to} can't be written: {exc}", "Name a file in a folder that is there, with --to."
            ) from None
    return [Example(*row) for row in frame.head(_EXAMPLES).itertuples(index=False)]


def _hashes(column: pa.ChunkedArray) -> np.ndarray:
    """64 bits of each text, None among them; of 10^8 different ones two are the same with a probability of 1 in 3,700."""
    values = column.to_numpy(zero_copy_only=False).astype(object)
    return np.asarray(pd.util.hash_array(values, categorize=False))


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)
