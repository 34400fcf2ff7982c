"""Golden samples: a few images whose predictions are known, which a job is held against before it runs."""

from __future__ import annotations

import contextlib
from typing import Any

import pyarrow as pa

from batch_inference.checks import Check, some
from batch_inference.config import JobConfig
from batch_inference.errors import UserError
from batch_inference.inference import RESULT_SCHEMA
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


def compare(expected: pa.Table, result: pa.Table, tolerance: float) -> Check:
    """Holds predictions against those that are expected.

    Args:
        expected: See :func:`golden_samples`.
        result: Of ``RESULT_SCHEMA`` and the predictor's columns; ``row`` is the place in ``expected``.
        tolerance: How far numbers with fractions may be off; everything else has to be equal.
    """
    result = result.sort_by("row")
    columns = [name for name in expected.column_names if name in result.column_names]
    missing = [name for name in expected.column_names if name not in (*result.column_names, "uri")]
    if not columns:
        remedy = f"The output has {', '.join(n for n in result.column_names if n not in RESULT_SCHEMA.names)}."
        return Check(_NAME, "FAIL", f"no column is the output's: {', '.join(missing)}", remedy)
    off = []
    for want, got in zip(expected.to_pylist(), result.to_pylist(), strict=True):
        if got["error_type"] is not None:
            off.append(f"{display(want['uri'])}: {got['stage']} {got['error_type']}")
            continue
        differing = [name for name in columns if not alike(want[name], got[name], tolerance)]
        if differing:
            said = ", ".join(f"{n} is {_short(got[n])}, not {_short(want[n])}" for n in differing)
            off.append(f"{display(want['uri'])}: {said}")
    compared = f"{expected.num_rows} samples, {', '.join(columns)}"
    if missing:
        compared += f" ({', '.join(missing)} not in the output)"
    if not off:
        return Check(_NAME, "OK", f"{compared} are as expected")
    remedy = "Look at weights, transform and inference.precision; or allow more with preflight.golden_tolerance."
    return Check(_NAME, "FAIL", f"{len(off)} of {compared} are off: {some(off)}", remedy)


def alike(want: Any, got: Any, tolerance: float) -> bool:
    """Whether a value is what is expected; lists and structs piece by piece, None as nothing that is compared."""
    if want is None:
        return True
    if isinstance(want, dict):
        return isinstance(got, dict) and all(alike(value, got.get(key), tolerance) for key, value in want.items())
    if isinstance(want, list):
        return (
            isinstance(got, list) and len(want) == len(got) and all(map(lambda w, g: alike(w, g, tolerance), want, got))
        )
    if isinstance(want, str) and isinstance(got, (int, float)):
        with contextlib.suppress(ValueError):
            want = float(want)  # a CSV has text alone
    if isinstance(want, float) or isinstance(got, float):
        both = isinstance(want, (int, float)) and isinstance(got, (int, float))
        return both and abs(want - got) <= tolerance
    return bool(want == got) or str(want) == str(got)


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
