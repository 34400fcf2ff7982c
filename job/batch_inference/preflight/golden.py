"""Golden samples: a few images with known predictions, which are compared before a job runs."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pyarrow as pa

from batch_inference.config import JobConfig
from batch_inference.errors import UserError
from batch_inference.inputs.manifest_files import read_expected
from batch_inference.pipeline.checks import Check, first_few
from batch_inference.storage.uris import display_uri

# The manifest may have all rows of an output.
_MAX_SAMPLES = 64
_NAME = "golden samples"


def read_golden_samples(config: JobConfig) -> pa.Table | None:
    """Return the first 64 lines of the golden manifest: ``uri`` and columns of the output; None if none is configured.

    Raises:
        UserError: If it cannot be read, or has no column to compare.
    """
    manifest = config.preflight.golden_manifest
    if not manifest:
        return None
    table = read_expected(manifest, config.storage).slice(0, _MAX_SAMPLES)
    if table.num_columns == 1 or not table.num_rows:
        content = "only the column uri" if table.num_rows else "no lines"
        raise UserError(
            f"{manifest} has {content}, and nothing to compare with",
            "Use rows from the predictions of an output, with uri and the columns to compare.",
        )
    return table


def check_golden(
    expected: pa.Table,
    result: tuple[pa.Table, pa.Table] | None,
    failed: dict[int, str],
    tolerance: float,
    where: str = "",
) -> Check:
    """Compare predictions with the expected ones.

    Args:
        expected: Table of :func:`read_golden_samples`.
        result: Rows of ``RESULT_SCHEMA`` whose ``row`` is the index in ``expected``, and the table of their predictions, which may have
            columns of the same names. None if there are no predictions.
        failed: Stage and type of the samples that could not be read or decoded, by index.
        tolerance: Absolute tolerance for floating-point columns; all other columns must match exactly.
        where: Text that says what the predictions were made on.
    """
    rows, predictions = ([], []) if result is None else (result[0].to_pylist(), result[1].to_pylist())
    predicted = {row["row"]: (row, values) for row, values in zip(rows, predictions, strict=True)}
    output_columns = [] if result is None else result[1].column_names
    columns = [name for name in expected.column_names if name in output_columns]
    missing = [name for name in expected.column_names if name not in (*output_columns, "uri")]
    if not columns and result is not None:
        return Check(
            _NAME,
            "FAIL",
            f"the output has none of the columns {', '.join(missing)}",
            f"Use one of {', '.join(output_columns)}.",
        )
    differing_samples = []
    for index, want in enumerate(expected.to_pylist()):
        row, got = predicted.get(index, (None, {}))
        if row is None or row["error_type"] is not None:
            reason = failed.get(index, "no prediction") if row is None else f"{row['stage']} {row['error_type']}"
            differing_samples.append(f"{display_uri(want['uri'])}: {reason}")
            continue
        differing = [name for name in columns if not matches_expected(want[name], got[name], tolerance)]
        if differing:
            differences = ", ".join(f"{n} is {_format_value(got[n])}, not {_format_value(want[n])}" for n in differing)
            differing_samples.append(f"{display_uri(want['uri'])}: {differences}")
    compared = ", ".join([f"{expected.num_rows} samples", *columns])
    if missing and output_columns:
        compared += f" ({', '.join(missing)} not in the output)"
    if not differing_samples:
        return Check(_NAME, "OK", f"{compared} are as expected{where}")
    remedy = "Check the weights, the transform and inference.precision, or allow more with preflight.golden_tolerance."
    return Check(
        _NAME, "FAIL", f"{len(differing_samples)} of {compared} are off{where}: {first_few(differing_samples)}", remedy
    )


def matches_expected(want: Any, got: Any, tolerance: float) -> bool:
    """Return whether a predicted value is the expected one.

    Lists and structs are compared item by item. None, and an empty field of a CSV file, match anything. The text of a CSV file is
    compared with a predicted number as a number. NaN matches NaN.
    """
    if want is None or want == "":
        return True
    if isinstance(want, dict):
        return isinstance(got, dict) and all(
            matches_expected(value, got.get(key), tolerance) for key, value in want.items()
        )
    if isinstance(want, list):
        return (
            isinstance(got, list)
            and len(want) == len(got)
            and all(map(lambda w, g: matches_expected(w, g, tolerance), want, got))
        )
    if isinstance(want, str) and isinstance(got, float):
        with contextlib.suppress(ValueError):
            want = float(want)
    if isinstance(want, float) or isinstance(got, float):
        if not (isinstance(want, (int, float)) and isinstance(got, (int, float))):
            return False
        return abs(want - got) <= tolerance or (math.isnan(want) and math.isnan(got))
    return bool(want == got) or str(want) == str(got)


def _format_value(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
