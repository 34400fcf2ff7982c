"""Check of a predictor class: an image gets the same row whatever else is in its batch.

A class that flattens the boxes of a batch, sorts its answers or normalizes over the batch can return the right number of
values and still put them beside the wrong images. A few images are predicted alone, in batches, and in batches of the same
size with other neighbors in another order; then the rows of each image are compared.

Numbers differ with the size of a batch, labels flip where two are close, and some classes are random on purpose: none of that
is a finding. Evidence is either rows that are another image's, or rows that change by far more than rounding explains between
batches of the same size, in many rows at once and again when it is repeated.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.errors import RowError, UserError
from batch_inference.models.columns import WrongCountError
from batch_inference.pipeline.checks import Check
from batch_inference.storage.uris import display_uri

NAME = "rows"
#: Largest number of images that are tried, and of their bytes.
MAX_IMAGES, MAX_BYTES = 8, 256 << 20
#: Seconds that the check may take, estimated from the time of a batch; slow classes get fewer images, or none.
MAX_S = 60.0
# The images of a batch may all be equal, so several of the first batches are tried.
_BATCHES_TO_TRY = 8
# Each image is predicted alone, in two batches, and in two more where something was suspected.
_CALLS_PER_IMAGE = 5
# Share of a column's largest number by which rows of one image may differ: more than rounding to bfloat16 adds up to.
_ROUNDING = 0.05
# A row is another image's if its distance from that is at most this share of the distance from its own, and its own is at least this
# far off.
_CLOSER, _APART = 0.01, 1e-3
# Largest number of numbers, and of other values, that are compared of one row.
_MAX_NUMBERS, _MAX_TEXTS = 1 << 16, 256
_REMEDY = (
    "Compute each row from its own image: a list of boxes for each image instead of one for the batch, model.eval() for a network "
    "with batch normalization, one size for all images instead of that of the largest in the batch. If rows depend on the batch on "
    "purpose, set predictor.depends_on_batch=true."
)

Call = Callable[[Any, list[str]], pa.Table]
# The values of one row and column to compare, by where they are nested: arrays of numbers, tuples of anything else.
_Values = dict[str, Any]
# One row, by column: its values, and how to show them.
_Row = dict[str, tuple[_Values, str]]
# The largest number, by column and by where it is nested.
_Scales = dict[str, dict[str, float]]
# Pairs of batches of the first and of the second order: the indices of their images.
_Layout = list[tuple[list[int], list[int]]]


class FirstBatches:
    """Checks a predictor class once in a process, in one of its first batches.

    Args:
        checks_rows: Whether the class is to be checked at all.

    Attributes:
        result: The check; None where it was not made yet, or not at all.
    """

    def __init__(self, *, checks_rows: bool) -> None:
        self._left = _BATCHES_TO_TRY if checks_rows else 0
        self.result: Check | None = None

    @property
    def pending(self) -> bool:
        """Whether a further batch is to be tried."""
        return self._left > 0

    def check(
        self, call: Call, images: Any, uris: list[str], good: list[int], predictions: pa.Table, seconds: float
    ) -> str:
        """Compare the rows of a few images of a batch alone and in batches.

        Args:
            call: Predicts a batch.
            images: Of the batch: uint8 arrays.
            uris: Of each image.
            good: Indices of the images that have a prediction.
            predictions: One row for each of these.
            seconds: Time of one image in the batch.

        Returns:
            A note for the driver; "" where there is nothing to say.

        Raises:
            UserError: If rows depend on their neighbors.
        """
        if len(good) < 2:
            return ""
        indices = choose_images(images, good, seconds)
        self._left -= 1
        if len(indices) < 2:
            return ""
        self._left = 0
        rows = predictions.take(pa.array([good.index(i) for i in indices]))
        self.result = check(call, [images[i] for i in indices], [uris[i] for i in indices], rows, len(uris))
        if self.result.state == "FAIL":
            raise UserError(self.result.finding, self.result.remedy)
        return f"rows of the predictor: {self.result.finding}" if self.result.state == "WARN" else ""


def choose_images(images: Sequence[Any], candidates: Sequence[int], seconds: float) -> list[int]:
    """Return the indices of the first different images to try; fewer than two if the check cannot be made.

    Args:
        images: uint8 arrays.
        candidates: Indices of those that may be tried.
        seconds: Time of one image in a batch.
    """
    maximum = MAX_IMAGES
    while maximum >= 2 and maximum * _CALLS_PER_IMAGE * seconds > MAX_S:
        maximum //= 2
    index_of: dict[bytes, int] = {}
    total_bytes = 0
    # Neighbors, since these are what a class mixes up.
    for index in candidates[: 4 * MAX_IMAGES]:
        image = images[index]
        if len(index_of) == maximum or total_bytes + image.nbytes > MAX_BYTES:
            break
        digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
        if digest not in index_of:
            index_of[digest] = index
            total_bytes += image.nbytes
    return list(index_of.values())


def check(call: Call, images: Sequence[Any], uris: Sequence[str], rows: pa.Table, batch_rows: int) -> Check:
    """Predict images alone, in batches and in another order, and compare their rows.

    Args:
        call: Predicts a batch; raises RowError where the class fails.
        images: Two to eight different ones that the class has predicted in one batch, uint8.
        uris: Of each image.
        rows: Of each image, as predicted in that batch.
        batch_rows: Number of images in that batch.

    Returns:
        OK; WARN where the answers are random, or depend on the size of the batch alone; FAIL with both outputs side by side.

    Raises:
        BatchInferenceError: What the class raises to end the job.
    """
    try:
        return _Comparison(call, images, uris).run(_rows(rows))
    except _RandomPredictorError as exc:
        finding = f"that the predictor returned {batch_rows:,} values for {batch_rows:,} images is chance: {exc}"
        return Check(NAME, "FAIL", finding, _REMEDY)
    except RowError as exc:
        # A class may refuse batches of another size, which says nothing about its rows.
        return Check(NAME, "WARN", f"rows alone and in a batch were not compared: {exc.error.message}")


@dataclass
class _Observed:
    """Rows of one image: in the job's batch, alone, and in the batches of both orders; empty where there is none."""

    batch: _Row = field(default_factory=dict)
    alone: _Row = field(default_factory=dict)
    first: _Row = field(default_factory=dict)
    second: _Row = field(default_factory=dict)


class _RandomPredictorError(Exception):
    """The number of values is not that of the images, although it was for a batch that held them."""


class _Comparison:
    """Predicts images in several ways and compares their rows.

    An odd number of images beyond three leaves the last one out of the batches.
    """

    def __init__(self, call: Call, images: Sequence[Any], uris: Sequence[str]) -> None:
        self._call, self._images, self._uris = call, images, uris
        self._count = len(images) if len(images) < 4 else len(images) // 2 * 2
        self._alone_failure = ""

    def run(self, rows: list[_Row]) -> Check:
        """Return the check, given the images' rows in the job's batch."""
        observed = [_Observed(row) for row in rows[: self._count]]
        for index in range(len(self._images)):
            self._predict_alone(index, observed[index] if index < self._count else _Observed())
        layout = self._predict_batches(observed)
        scales = self._scales(observed)
        suspects = [name for name in scales if self._is_suspect(name, observed, scales, layout)]
        size_dependent = [name for name in scales if self._depends_on_size(name, observed, scales)]
        if not suspects:
            return self._passed(observed, scales, [], size_dependent)
        # Once more: a difference that is random, or counts the calls, is not caused by the neighbors.
        repeated = [_Observed(image.batch, image.alone) for image in observed]
        self._predict_batches(repeated)
        random = [
            name
            for name in suspects
            if any(self._differ(name, a.first, b.first, scales) for a, b in zip(observed, repeated, strict=True))
        ]
        certain = [n for n in suspects if n not in random and self._is_suspect(n, repeated, scales, layout)]
        if certain:
            return Check(NAME, "FAIL", self._side_by_side(certain[0], observed, scales), _REMEDY)
        return self._passed(observed, scales, random, [name for name in size_dependent if name not in random])

    def _passed(
        self, observed: list[_Observed], scales: _Scales, random: list[str], size_dependent: list[str]
    ) -> Check:
        """Return the check of a class without evidence against it: OK, or WARN with what was noticed."""
        notes = []
        if random:
            notes.append(
                f"column {random[0]!r} differs when the same images are predicted again, so it was not compared"
            )
        if size_dependent:
            name = size_dependent[0]
            example = next(image for image in observed if self._differ(name, image.alone, image.first, scales))
            notes.append(
                f"column {name!r} depends on the size of the batch or on the place in it: {example.alone[name][1]} for an image alone, "
                f"{example.first[name][1]} for it in a batch"
            )
        if self._alone_failure:
            notes.append(f"one image alone fails, which the last batch of a shard may be: {self._alone_failure}")
        if notes:
            return Check(NAME, "WARN", "; ".join(notes), "Look at it before you start a long job.")
        return Check(NAME, "OK", f"the same for {len(self._images)} images alone, in a batch and in another order")

    def _predict(self, indices: list[int]) -> pa.Table:
        # Copies, since a class may write into its images.
        images = [np.array(self._images[index]) for index in indices]
        alike = len({image.shape for image in images}) == 1
        try:
            return self._call(np.stack(images) if alike else images, [self._uris[index] for index in indices])
        except WrongCountError as exc:
            of = f"{_short(self._uris[indices[0]])} alone" if len(indices) == 1 else f"{len(indices)} of them"
            raise _RandomPredictorError(f"its column {exc.name!r} has {exc.values:,} for {of}") from None

    def _predict_alone(self, index: int, image: _Observed) -> None:
        try:
            image.alone = _rows(self._predict([index]))[0]
        except RowError as exc:
            self._alone_failure = exc.error.message

    def _predict_batches(self, observed: list[_Observed]) -> _Layout:
        """Predict batches in two orders; return their layout."""
        first, second = _layout(self._count)
        for batches, order in ((first, "first"), (second, "second")):
            for indices in batches:
                for index, row in zip(indices, _rows(self._predict(indices)), strict=True):
                    setattr(observed[index], order, row)
        return list(zip(first, second, strict=True))

    def _scales(self, observed: list[_Observed]) -> _Scales:
        """Return the largest number of each part of each column that all batches have."""
        names = [name for name in observed[0].first if all(name in o.first and name in o.second for o in observed)]
        scales: _Scales = {}
        for name in names:
            rows = [row[name][0] for image in observed for row in vars(image).values() if name in row]
            paths = {path for row in rows for path in row}
            scales[name] = {path: max(_largest(row.get(path, ())) for row in rows) for path in paths}
        return scales

    def _differ(self, name: str, a: _Row, b: _Row, scales: _Scales) -> bool:
        return name in a and name in b and _distance(a[name][0], b[name][0], scales[name]) > _ROUNDING

    def _depends_on_size(self, name: str, observed: list[_Observed], scales: _Scales) -> bool:
        return 2 * sum(self._differ(name, image.alone, image.first, scales) for image in observed) >= self._count

    def _is_suspect(self, name: str, observed: list[_Observed], scales: _Scales, layout: _Layout) -> bool:
        """Return whether rows of a column change with their neighbors, or are other images' rows."""
        changed = sum(self._differ(name, image.first, image.second, scales) for image in observed)
        # Row numbers and constants belong to no image, so they are not beside the wrong one.
        by_position = all(
            not self._differ(name, observed[a].first, observed[b].second, scales)
            for batch, other in layout
            for a, b in zip(batch, other, strict=True)
        )
        if changed >= max(2, self._count / 2) and not by_position:
            return True
        texts = all(isinstance(part, tuple) for part in observed[0].first[name][0].values())
        moved = max(
            sum(self._owner(name, index, observed, scales, where) is not None for index in range(self._count))
            for where in ("batch", "first", "second")
        )
        return moved >= max(2, self._count / (2 if texts else 4))

    def _owner(self, name: str, index: int, observed: list[_Observed], scales: _Scales, where: str) -> int | None:
        """Return the other image whose row alone equals this image's row in a batch; None if it is its own, or nobody's.

        Args:
            name: Column.
            index: Of the image.
            observed: Rows of all images.
            scales: As :meth:`_scales` returns them.
            where: Which row in a batch: ``batch``, ``first`` or ``second``.
        """
        if name not in observed[index].alone or name not in getattr(observed[index], where):
            return None
        values = getattr(observed[index], where)[name][0]
        own = _distance(values, observed[index].alone[name][0], scales[name])
        if own <= (_ROUNDING if _coarse(values) else _APART):
            return None
        for other, image in enumerate(observed):
            if other != index and name in image.alone:
                distance = _distance(values, image.alone[name][0], scales[name])
                if distance <= (_CLOSER * own if math.isfinite(own) else _APART):
                    return other
        return None

    def _side_by_side(self, name: str, observed: list[_Observed], scales: _Scales) -> str:
        """Return the finding: a column of up to three images, alone and in both batches."""
        lines: list[str] = []
        for index, image in enumerate(observed):
            if len(lines) == 3:
                break
            where = next(
                (w for w in ("batch", "first") if self._owner(name, index, observed, scales, w) is not None), "first"
            )
            owner = self._owner(name, index, observed, scales, where)
            if owner is None and not self._differ(name, image.first, image.second, scales):
                continue
            alone = image.alone[name][1] if name in image.alone else "failed"
            of = "" if owner is None else f", which is what {_short(self._uris[owner])} gives alone"
            lines.append(
                f"  - {_short(self._uris[index])}: {alone} alone | {getattr(image, where)[name][1]} in a batch{of} | "
                f"{image.second[name][1]} in a batch in another order"
            )
        return "\n".join(
            [
                f"the predictor's rows depend on the other images of their batch; column {name!r} of the same images:",
                *lines,
            ]
        )


def _layout(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return the indices of images in batches of one size, twice: in order; and in another order, with other neighbors.

    >>> _layout(4)
    ([[0, 1], [2, 3]], [[3, 0], [2, 1]])
    >>> _layout(3)
    ([[0, 1, 2]], [[2, 1, 0]])
    """
    if count < 4:
        return [list(range(count))], [list(range(count))[::-1]]
    half, quarter = count // 2, count // 4
    left, right = list(range(half)), list(range(half, 2 * half))
    return [left, right], [
        right[half - quarter :][::-1] + left[: half - quarter][::-1],
        right[: half - quarter][::-1] + left[half - quarter :][::-1],
    ]


def _short(uri: str) -> str:
    return display_uri(uri).rpartition("/")[2] or display_uri(uri)


def _rows(table: pa.Table) -> list[_Row]:
    """Return each row of a table, by column.

    Parts of a batch may come back with different types, so there may be several columns of a name; a row has a value in one.
    """
    rows: list[_Row] = [{} for _ in range(table.num_rows)]
    for name, chunks in zip(table.column_names, table.columns, strict=True):
        column = chunks.combine_chunks()
        for index, row in enumerate(rows):
            value = column.slice(index, 1)
            if name not in row or value[0].is_valid:
                row[name] = (_values(value), _shown(value))
    return rows


def _values(value: pa.Array, path: str = "") -> _Values:
    """Return an array's numbers as float64 arrays, anything else and the lengths of lists as tuples, by where they are nested.

    An empty list, or one of nulls, has the null type when it is alone; it counts as equal whatever its type is.
    """
    arrow_type = value.type
    if value.null_count == len(value):
        return {path: (None,) * len(value)} if len(value) else {}
    if pa.types.is_struct(arrow_type):
        fields = zip(arrow_type, value.flatten(), strict=True)
        return {name: part for f, column in fields for name, part in _values(column, f"{path}.{f.name}").items()}
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type) or pa.types.is_fixed_size_list(arrow_type):
        lengths = pc.list_value_length(value).slice(0, _MAX_NUMBERS)
        return {f"{path}#": tuple(lengths.to_pylist()), **_values(value.flatten().slice(0, _MAX_NUMBERS), f"{path}[]")}
    if pa.types.is_floating(arrow_type) or pa.types.is_integer(arrow_type):
        return {path: np.asarray(value.to_numpy(zero_copy_only=False), np.float64)}
    return {path: tuple(value.slice(0, _MAX_TEXTS).to_pylist())}


def _shown(value: pa.Array) -> str:
    """Return an array of one value as a text of at most 80 characters."""
    while pa.types.is_list(value.type) and len(value) == 1 and pc.list_value_length(value)[0].as_py() == 1:
        value = value.flatten()
    inner = value.flatten() if pa.types.is_list(value.type) else value
    if len(inner) > 4:
        text = str([_rounded(v) for v in inner.slice(0, 3).to_pylist()])[:-1] + f", … {len(inner)} values]"
    else:
        text = str(_rounded(value[0].as_py()))
    return text if len(text) <= 80 else text[:77] + "…"


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value[:4]]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _largest(part: Any) -> float:
    if isinstance(part, tuple):
        return 0.0
    finite = np.abs(part[np.isfinite(part)])
    return float(finite.max()) if finite.size else 0.0


def _distance(a: _Values, b: _Values, scales: dict[str, float]) -> float:
    """Return the largest difference of two rows' numbers, as a share of the largest number; infinite if anything else differs."""
    if a.keys() != b.keys():
        return math.inf
    distance = 0.0
    for path, mine in a.items():
        other = b[path]
        if isinstance(mine, tuple) or isinstance(other, tuple):
            if not isinstance(other, type(mine)) or mine != other:
                return math.inf
            continue
        finite = np.isfinite(mine)
        if mine.shape != other.shape or not np.array_equal(mine[~finite], other[~np.isfinite(other)], equal_nan=True):
            return math.inf
        if (finite != np.isfinite(other)).any():
            return math.inf
        if finite.any() and scales[path]:
            distance = max(distance, float(np.abs(mine[finite] - other[finite]).max()) / scales[path])
    return distance


def _coarse(values: _Values) -> bool:
    """Return whether all numbers have so few digits that two images may agree by chance: bfloat16, float16, small integers."""
    for part in values.values():
        if isinstance(part, tuple):
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            single = part.astype(np.float32)
            half = single.astype(np.float16).astype(np.float64)
            brain = (single.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
        if not (np.array_equal(half, part, equal_nan=True) or np.array_equal(brain, part, equal_nan=True)):
            return False
    return True
