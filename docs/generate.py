"""Writes reference.md from the program: python docs/generate.py [--check]."""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from batch_inference import errors
from batch_inference.error_types import ERROR_TYPES
from batch_inference.factories import CLASSIFIER_SCHEMA
from batch_inference.writer import ERRORS_SCHEMA

FILE = Path(__file__).resolve().with_name("reference.md")
_INTRODUCTION = """# Exit codes, error types, columns

Written from the program by `python docs/generate.py`; a test compares. Elsewhere: the keys of the configuration and of the charts in
[helm/README.md](../helm/README.md#values-of-rayjob), the commands in [job/README.md](../job/README.md#commands), the files of the output
[there, too](../job/README.md#output), and messages in [troubleshooting](troubleshooting.md).
"""
_WHO_ENDS = """
They end `run` and `retry`; `verify` ends with 4 where something is missing or double, `plan` and `preflight` with 2 where something does
not fit.
"""
_WHAT_IS_RETRIED = """
`batch-inference retry OUTPUT` does the retryable ones again; `--stage`, `--error-type` and `--all` choose others. A new job is one with
another output.
"""
_NAMES = {
    "UserError": "yours to mend",
    "ThresholdExceeded": "too many rows failed",
    "CountsDoNotClose": "the counts do not close",
    "SystemFault": "a fault of the system",
    "Interrupted": "interrupted",
}
_PLACE = [("uri", pa.string()), ("shard", pa.int32()), ("row", pa.int32())]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [list(head), ["---"] * len(list(head)), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def exit_codes() -> str:
    """The exit codes: what each exception that ends a job says of itself."""
    rows = [["0", "done", "Every input is accounted for, and at least one has a prediction."]]
    for kind in errors.BatchInferenceError.__subclasses__():
        text = re.sub(r" \(exit \d+\)", "", inspect.getdoc(kind) or "").replace("``", "`")
        sentence = re.sub(r"^The user's", "The reader's", text)
        rows.append([str(kind.exit_code), _NAMES[kind.__name__], sentence])
    return table(("code", "", "meaning"), rows)


def error_types() -> str:
    """The kinds of failed rows, by stage."""
    rows = [
        [f"`{one.stage}`", f"`{one.name}`" if one.name.isupper() else one.name, one.meaning, "yes" if one.retryable else "", one.remedy]
        for one in ERROR_TYPES
    ]  # fmt: skip
    return table(("stage", "error_type", "what has happened", "retryable", "what to do"), rows)


def columns(fields: Iterable[tuple[str, pa.DataType]]) -> str:
    """Columns with their types."""
    return table(("column", "type"), [[f"`{name}`", f"`{kind}`"] for name, kind in fields])


def reference() -> str:
    """The whole document."""
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
        "`predictions`, of a classifier; in place of the last four, the columns of a class of your own, or `embedding`:\n",
        columns(classifier),
        "\n`errors`:\n",
        columns((field.name, field.type) for field in ERRORS_SCHEMA),
        "\nBehind them in both, the other columns of the manifest, or `input.passthrough_columns`.",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Writes, or with --check says whether it is fresh."""
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
