"""Golden samples: a few images whose predictions are known, which a job is held against before it runs."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pyarrow as pa

from batch_inference.checks import Check, some
from batch_inference.config import JobConfig
from batch_inference.errors import UserError
from batch_inference.manifest import read_expected
from batch_inference.storage import display

# A manifest may be a whole output's.
_MOST = 64
_NAME = "golden samples"


def golden_samples(config: JobConfig) -> pa.Table | None:
    """The manifest ``preflight.golden``: ``uri`` and columns of the output, its first 64 lines; None where there is none.

    Raises:
        UserError: If it cannot be read, or has nothing to compare with.
    """
    manifest = config.preflight.golden
    if not manifest:
        return None
    table = read_expected(manifest, config.storage).slice(0, _MOST)
    if table.num_columns == 1 or not table.num_rows:
        what = "the column uri alone" if table.num_rows else "no lines"
        raise UserError(
            f"{manifest} has {what}, and nothing to compare with",
            "Take rows of an output's predictions, with uri and the columns that are to stay as they are.",
        )
    return table


def compare(
    expected: pa.Table,
    result: tuple[pa.Table, pa.Table] | None,
    failed: dict[int, str],
    tolerance: float,
    where: str = "",
) -> Check:
    """Holds predictions against those that are expected.

    Args:
        expected: See :func:`golden_samples`.
        result: Rows of ``RESULT_SCHEMA``, ``row`` being the place in ``expected``, and the columns of their predictions, whose names may
            be the same. None: there are none.
        failed: Places of those that could not be read or decoded, with stage and type.
        tolerance: How far numbers with fractions may be off; everything else has to be equal.
        where: What the predictions were made on, for the text.
    """
    rows, found = ([], []) if result is None else (result[0].to_pylist(), result[1].to_pylist())
    predicted = {row["row"]: (row, columns) for row, columns in zip(rows, found, strict=True)}
    known = [] if result is None else result[1].column_names
    columns = [name for name in expected.column_names if name in known]
    missing = [name for name in expected.column_names if name not in (*known, "uri")]
    if not columns and result is not None:
        return Check(
            _NAME, "FAIL", f"no column is the output's: {', '.join(missing)}", f"The output has {', '.join(known)}."
        )
    off = []
    for place, want in enumerate(expected.to_pylist()):
        row, got = predicted.get(place, (None, {}))
        if row is None or row["error_type"] is not None:
            why = failed.get(place, "no prediction") if row is None else f"{row['stage']} {row['error_type']}"
            off.append(f"{display(want['uri'])}: {why}")
            continue
        differing = [name for name in columns if not alike(want[name], got[name], tolerance)]
        if differing:
            said = ", ".join(f"{n} is {_short(got[n])}, not {_short(want[n])}" for n in differing)
            off.append(f"{display(want['uri'])}: {said}")
    compared = ", ".join([f"{expected.num_rows} samples", *columns])
    if missing and known:
        compared += f" ({', '.join(missing)} not in the output)"
    if not off:
        return Check(_NAME, "OK", f"{compared} are as expected{where}")
    remedy = "Look at weights, transform and inference.precision; or allow more with preflight.golden_tolerance."
    return Check(_NAME, "FAIL", f"{len(off)} of {compared} are off{where}: {some(off)}", remedy)


def alike(want: Any, got: Any, tolerance: float) -> bool:
    """Whether a value is what is expected.

    Lists and structs piece by piece; None, and the empty field of a CSV, as nothing that is compared; text of a CSV as the number
    that is predicted; no number as no number.
    """
    if want is None or want == "":
        return True
    if isinstance(want, dict):
        return isinstance(got, dict) and all(alike(value, got.get(key), tolerance) for key, value in want.items())
    if isinstance(want, list):
        return (
            isinstance(got, list) and len(want) == len(got) and all(map(lambda w, g: alike(w, g, tolerance), want, got))
        )
    if isinstance(want, str) and isinstance(got, float):
        with contextlib.suppress(ValueError):
            want = float(want)
    if isinstance(want, float) or isinstance(got, float):
        if not (isinstance(want, (int, float)) and isinstance(got, (int, float))):
            return False
        return abs(want - got) <= tolerance or (math.isnan(want) and math.isnan(got))
    return bool(want == got) or str(want) == str(got)


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
