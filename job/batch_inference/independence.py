"""Check that a predictor class gives an image the same row whatever else is in its batch.

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

from batch_inference.checks import Check
from batch_inference.columns import WrongCount
from batch_inference.errors import RowFailure
from batch_inference.storage import display

NAME = "rows"
#: The images that are tried, at most, and their bytes.
MOST_IMAGES, MOST_BYTES = 8, 256 << 20
#: Seconds that the check may take, as far as the time of a batch foretells them; slow classes get fewer images, or none.
MOST_S = 60.0
# Each image is predicted alone, in two batches, and in two more where something was found.
_TIMES = 5
# Share of a column's largest number by which rows of one image may differ: more than rounding to bfloat16 adds up to.
_ROUNDING = 0.05
# A row is another image's if it is so many times closer to that than to its own, and its own is so far off.
_CLOSER, _APART = 0.01, 1e-3
_MOST_NUMBERS, _MOST_TEXTS = 1 << 16, 256
_REMEDY = (
    "Compute each row from its own image: a list of boxes for each image instead of one for the batch, model.eval() for a network "
    "with batch normalization, one size for all images instead of that of the largest in the batch. If rows depend on the batch on "
    "purpose, set predictor.depends_on_batch=true."
)

Call = Callable[[Any, list[str]], pa.Table]
# What is compared of one row, by where it is nested: arrays of numbers, tuples of anything else.
_Row = dict[str, Any]
# The largest number of each of these, by column.
_Scales = dict[str, dict[str, float]]


@dataclass
class _Seen:
    """Rows of one image, by column: in the job's batch, alone, and in the batches of both orders."""

    batch: dict[str, tuple[_Row, str]] = field(default_factory=dict)
    alone: dict[str, tuple[_Row, str]] = field(default_factory=dict)
    first: dict[str, tuple[_Row, str]] = field(default_factory=dict)
    second: dict[str, tuple[_Row, str]] = field(default_factory=dict)


def chosen(images: Sequence[Any], places: Sequence[int], seconds: float) -> list[int]:
    """Return places of different images to try, the first there are; fewer than two where the check can't be made.

    Args:
        images: Arrays of uint8.
        places: Those of them that may be tried.
        seconds: What one image took in a batch.
    """
    most = MOST_IMAGES
    while most >= 2 and most * _TIMES * seconds > MOST_S:
        most //= 2
    out: dict[bytes, int] = {}
    taken = 0
    # Neighbors, since these are what a class mixes up.
    for place in places[: 4 * MOST_IMAGES]:
        image = images[place]
        if len(out) == most or taken + image.nbytes > MOST_BYTES:
            break
        digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).digest()
        if digest not in out:
            out[digest], taken = place, taken + image.nbytes
    return list(out.values())


def check(call: Call, images: Sequence[Any], uris: Sequence[str], rows: pa.Table, batch: int) -> Check:
    """Predict images alone, in batches and in another order, and compare their rows.

    Args:
        call: Predicts a batch; RowFailure where the class fails.
        images: Two to eight different ones that the class has predicted in one batch.
        uris: Theirs.
        rows: Theirs, as predicted in that batch.
        batch: How many images that batch had.

    Returns:
        OK; WARN where the answers are random, or depend on the size of the batch alone; FAIL with both outputs side by side.

    Raises:
        BatchInferenceError: What the class raises to end the job.
    """
    try:
        return _Check(call, images, uris).run(_rows(rows))
    except _ByChance as exc:
        return Check(
            NAME, "FAIL", f"that the predictor returned {batch:,} values for {batch:,} images is chance: {exc}", _REMEDY
        )
    except RowFailure as exc:
        # A class may refuse batches of another size, which says nothing about its rows.
        return Check(NAME, "WARN", f"rows alone and in a batch were not compared: {exc.error.message}")


class _ByChance(Exception):  # noqa: N818
    """The number of values is not that of the images, of some that were in a batch whose number was right."""


class _Check:
    def __init__(self, call: Call, images: Sequence[Any], uris: Sequence[str]) -> None:
        self._call, self._images, self._uris = call, images, uris
        self._count = len(images) if len(images) < 4 else len(images) // 2 * 2
        self._alone_failure = ""

    def run(self, rows: list[dict[str, tuple[_Row, str]]]) -> Check:
        seen = [_Seen(row) for row in rows[: self._count]]
        for place in range(len(self._images)):
            self._alone(place, seen[place] if place < self._count else _Seen())
        layout = self._batches(seen)
        scales = self._scales(seen)
        suspects = [name for name in scales if self._evidence(name, seen, scales, layout)]
        sized = [name for name in scales if self._depends_on_size(name, seen, scales)]
        if not suspects:
            return self._harmless(seen, scales, [], sized)
        # Once more: what is random, or counts its calls, is not the neighbors' doing.
        again = [_Seen(one.batch, one.alone) for one in seen]
        self._batches(again)
        random = [
            name
            for name in suspects
            if any(self._differ(name, a.first, b.first, scales) for a, b in zip(seen, again, strict=True))
        ]
        certain = [n for n in suspects if n not in random and self._evidence(n, again, scales, layout)]
        if certain:
            return Check(NAME, "FAIL", self._side_by_side(certain[0], seen, scales), _REMEDY)
        return self._harmless(seen, scales, random, [name for name in sized if name not in random])

    def _harmless(self, seen: list[_Seen], scales: _Scales, random: list[str], sized: list[str]) -> Check:
        notes = []
        if random:
            notes.append(
                f"column {random[0]!r} differs when the same images are predicted again, so it was not compared"
            )
        if sized:
            name = sized[0]
            one = next(one for one in seen if self._differ(name, one.alone, one.first, scales))
            notes.append(
                f"column {name!r} depends on the size of the batch or on the place in it: {one.alone[name][1]} for an image alone, "
                f"{one.first[name][1]} for it in a batch"
            )
        if self._alone_failure:
            notes.append(f"one image alone fails, which the last batch of a shard may be: {self._alone_failure}")
        if notes:
            return Check(NAME, "WARN", "; ".join(notes), "Look at it before you start a long job.")
        return Check(NAME, "OK", f"the same for {len(self._images)} images alone, in a batch and in another order")

    def _predicted(self, places: list[int]) -> pa.Table:
        # Copies, since a class may write into its images.
        parts = [np.array(self._images[place]) for place in places]
        alike = len({part.shape for part in parts}) == 1
        try:
            return self._call(np.stack(parts) if alike else parts, [self._uris[place] for place in places])
        except WrongCount as exc:
            of = f"{_short(self._uris[places[0]])} alone" if len(places) == 1 else f"{len(places)} of them"
            raise _ByChance(f"its column {exc.name!r} has {exc.values:,} for {of}") from None

    def _alone(self, place: int, one: _Seen) -> None:
        try:
            one.alone = _rows(self._predicted([place]))[0]
        except RowFailure as exc:
            self._alone_failure = exc.error.message

    def _batches(self, seen: list[_Seen]) -> list[tuple[list[int], list[int]]]:
        """Predict batches; return their places, of the first and of the second order side by side."""
        first, second = _layout(self._count)
        for batches, which in ((first, "first"), (second, "second")):
            for places in batches:
                for place, row in zip(places, _rows(self._predicted(places)), strict=True):
                    setattr(seen[place], which, row)
        return list(zip(first, second, strict=True))

    def _scales(self, seen: list[_Seen]) -> _Scales:
        """The largest number of each part of each column that all batches have."""
        names = [name for name in seen[0].first if all(name in o.first and name in o.second for o in seen)]
        out: _Scales = {}
        for name in names:
            rows = [row[name][0] for one in seen for row in vars(one).values() if name in row]
            out[name] = {
                path: max(_largest(row.get(path, ())) for row in rows) for path in {p for r in rows for p in r}
            }
        return out

    def _differ(self, name: str, a: dict[str, Any], b: dict[str, Any], scales: _Scales) -> bool:
        return name in a and name in b and _distance(a[name][0], b[name][0], scales[name]) > _ROUNDING

    def _depends_on_size(self, name: str, seen: list[_Seen], scales: _Scales) -> bool:
        return 2 * sum(self._differ(name, one.alone, one.first, scales) for one in seen) >= self._count

    def _evidence(
        self, name: str, seen: list[_Seen], scales: _Scales, layout: list[tuple[list[int], list[int]]]
    ) -> bool:
        changed = sum(self._differ(name, one.first, one.second, scales) for one in seen)
        # Row numbers and constants are no image's; whatever they are for, they are not in the wrong place.
        by_place = all(
            not self._differ(name, seen[a].first, seen[b].second, scales)
            for batch, other in layout
            for a, b in zip(batch, other, strict=True)
        )
        if changed >= max(2, self._count / 2) and not by_place:
            return True
        texts = all(isinstance(part, tuple) for part in seen[0].first[name][0].values())
        moved = max(
            sum(self._whose(name, place, seen, scales, w) is not None for place in range(self._count))
            for w in ("batch", "first", "second")
        )
        return moved >= max(2, self._count / (2 if texts else 4))

    def _whose(self, name: str, place: int, seen: list[_Seen], scales: _Scales, which: str) -> int | None:
        """The image whose row alone this one's row in a batch is; None where it is its own, or no other's."""
        if name not in seen[place].alone or name not in getattr(seen[place], which):
            return None
        row = getattr(seen[place], which)[name][0]
        own = _distance(row, seen[place].alone[name][0], scales[name])
        if own <= (_ROUNDING if _coarse(row) else _APART):
            return None
        for other, one in enumerate(seen):
            if other != place and name in one.alone:
                away = _distance(row, one.alone[name][0], scales[name])
                if away <= (_CLOSER * own if math.isfinite(own) else _APART):
                    return other
        return None

    def _side_by_side(self, name: str, seen: list[_Seen], scales: _Scales) -> str:
        lines: list[str] = []
        for place, one in enumerate(seen):
            if len(lines) == 3:
                break
            which = next(
                (w for w in ("batch", "first") if self._whose(name, place, seen, scales, w) is not None), "first"
            )
            whose = self._whose(name, place, seen, scales, which)
            if whose is None and not self._differ(name, one.first, one.second, scales):
                continue
            alone = one.alone[name][1] if name in one.alone else "failed"
            of = "" if whose is None else f", which is what {_short(self._uris[whose])} gives alone"
            lines.append(
                f"  - {_short(self._uris[place])}: {alone} alone | {getattr(one, which)[name][1]} in a batch{of} | "
                f"{one.second[name][1]} in a batch in another order"
            )
        return "\n".join(
            [
                f"the predictor's rows depend on the other images of their batch; column {name!r} of the same images:",
                *lines,
            ]
        )


def _layout(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Places of images in batches, twice: in order; and with other neighbors, in another order, in batches of the same size.

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
    return display(uri).rpartition("/")[2] or display(uri)


def _rows(table: pa.Table) -> list[dict[str, tuple[_Row, str]]]:
    """What to compare of each row and how to show it, by column.

    Parts of a batch may have come back with other types, so that there are several columns of a name; a row has a value in one.
    """
    out: list[dict[str, tuple[_Row, str]]] = [{} for _ in range(table.num_rows)]
    for name, chunks in zip(table.column_names, table.columns, strict=True):
        column = chunks.combine_chunks()
        for place, row in enumerate(out):
            value = column.slice(place, 1)
            if name not in row or value[0].is_valid:
                row[name] = (_parts(value), _shown(value))
    return out


def _parts(value: pa.Array, path: str = "") -> _Row:
    """An array's numbers as float64 arrays, all else and the lengths of lists as tuples, by where they are nested.

    An empty list, or one of nulls, has the type of nothing where it is alone; it is the same whatever its type is.
    """
    kind = value.type
    if value.null_count == len(value):
        return {path: (None,) * len(value)} if len(value) else {}
    if pa.types.is_struct(kind):
        fields = zip(kind, value.flatten(), strict=True)
        return {name: part for f, one in fields for name, part in _parts(one, f"{path}.{f.name}").items()}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.list_value_length(value).slice(0, _MOST_NUMBERS)
        return {f"{path}#": tuple(lengths.to_pylist()), **_parts(value.flatten().slice(0, _MOST_NUMBERS), f"{path}[]")}
    if pa.types.is_floating(kind) or pa.types.is_integer(kind):
        return {path: np.asarray(value.to_numpy(zero_copy_only=False), np.float64)}
    return {path: tuple(value.slice(0, _MOST_TEXTS).to_pylist())}


def _shown(value: pa.Array) -> str:
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
        return [_rounded(one) for one in value[:4]]
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _largest(part: Any) -> float:
    if isinstance(part, tuple):
        return 0.0
    finite = np.abs(part[np.isfinite(part)])
    return float(finite.max()) if finite.size else 0.0


def _distance(a: _Row, b: _Row, scales: dict[str, float]) -> float:
    """The largest difference of two rows' numbers, as a share of the largest number there is; infinite where all else differs."""
    if a.keys() != b.keys():
        return math.inf
    most = 0.0
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
            most = max(most, float(np.abs(mine[finite] - other[finite]).max()) / scales[path])
    return most


def _coarse(row: _Row) -> bool:
    """Whether all numbers have so few digits that two images have the same one by chance: bfloat16, float16, small integers."""
    for part in row.values():
        if isinstance(part, tuple):
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            single = part.astype(np.float32)
            half = single.astype(np.float16).astype(np.float64)
            brain = (single.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).astype(np.float64)
        if not (np.array_equal(half, part, equal_nan=True) or np.array_equal(brain, part, equal_nan=True)):
            return False
    return True
