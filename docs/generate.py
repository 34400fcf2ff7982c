"""Write reference.md from the program: python docs/generate.py [--check]."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from batch_inference import errors
from batch_inference.driver.shard_writer import ERRORS_SCHEMA
from batch_inference.error_types import ERROR_TYPES
from batch_inference.pipeline.factories import CLASSIFIER_SCHEMA

FILE = Path(__file__).resolve().with_name("reference.md")
_INTRODUCTION = """# Exit codes, error types, columns

`python docs/generate.py` writes this page from the program; a test checks that it is current. See also
the [keys of the configuration and of the charts](../helm/README.md#values-of-rayjob), the
[commands](../job/README.md#commands), the [files of the output](../job/README.md#output), and
[troubleshooting by message](troubleshooting.md).
"""
_WHO_ENDS = """
`run` and `retry` end with these codes. `verify` ends with 4 if rows or files are missing or duplicated,
`plan` and `preflight` end with 2 if the job could not run as configured. 5 is also the exit code of an
internal error, which is printed with its traceback.
"""
_WHAT_IS_RETRIED = """
`batch-inference retry OUTPUT` tries the retryable rows again; `--stage`, `--error-type` and `--all`
choose others. A new job needs another `--output`.
"""
_PLACE = [("uri", pa.string()), ("shard", pa.int32()), ("row", pa.int32())]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    lines = [list(head), ["---"] * len(list(head)), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def exit_codes() -> str:
    """Return the table of exit codes, from the docstrings of the exceptions that end a job."""
    rows = [["0", "done", "Every input is accounted for, and at least one has a prediction."]]
    for error in errors.BatchInferenceError.__subclasses__():
        sentence = re.sub(r" \(exit \d+\)", "", inspect.getdoc(error) or "").replace("``", "`")
        name, _, meaning = sentence.partition(": ")
        rows.append([str(error.exit_code), name.lower(), meaning[:1].upper() + meaning[1:]])
    return table(("code", "", "meaning"), rows)


def error_types() -> str:
    """Return the table of error types, by stage."""
    rows = [
        [f"`{e.stage}`", f"`{e.name}`" if e.name.isupper() else e.name, e.meaning, "yes" if e.retryable else "", e.remedy]
        for e in ERROR_TYPES
    ]  # fmt: skip
    return table(("stage", "error_type", "meaning", "retryable", "remedy"), rows)


def columns(fields: Iterable[tuple[str, pa.DataType]]) -> str:
    """Return a table of columns with their types."""
    return table(("column", "type"), [[f"`{name}`", f"`{arrow_type}`"] for name, arrow_type in fields])


def reference() -> str:
    """Return the text of the document."""
    classifier = [*_PLACE, *((field.name, field.type) for field in CLASSIFIER_SCHEMA)]
    parts = [
        _INTRODUCTION,
        "## Exit codes\n",
        exit_codes(),
        _WHO_ENDS,
        "## Error types\n",
        error_types(),
        _WHAT_IS_RETRIED,
        "## Columns\n",
        "`predictions` of a classifier (a predictor class has its own columns instead of the last four, `task: embed` has `embedding`):\n",
        columns(classifier),
        "\n`errors`:\n",
        columns((field.name, field.type) for field in ERRORS_SCHEMA),
        "\nBoth end with the other columns of the manifest, or `input.passthrough_columns`.",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the document, or with --check fail if it is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it would change")
    check = parser.parse_args().check
    stale = not FILE.exists() or FILE.read_text(encoding="utf-8") != reference()
    if stale:
        print(f"docs/reference.md is {'stale: run python docs/generate.py' if check else 'written'}")
        if not check:
            FILE.write_text(reference(), encoding="utf-8")
    sys.exit(stale and check)


if __name__ == "__main__":
    main()
