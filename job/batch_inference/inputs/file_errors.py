"""Failures of files and members that listing finds: how the manifest's column ``_error`` holds them, and what is said about them."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.errors import RowError, RowFailure, UserError
from batch_inference.inputs.member_uris import MAX_NAMED, split_member
from batch_inference.output.manifest import LOCATION_SCHEMA
from batch_inference.storage.uris import display_uri


def encode_error(exc: RowError) -> str:
    """Return a failure as a value of the column ``_error``."""
    return "\n".join((exc.error.stage, exc.error.error_type, exc.fact, exc.remedy))


def parse_error(text: str | None) -> RowFailure | None:
    """Return the failure that a value of the column ``_error`` stands for."""
    if text is None:
        return None
    stage, error_type, fact, remedy = text.split("\n")
    return RowFailure(stage, error_type, f"{fact}. {remedy}" if remedy else fact)  # type: ignore[arg-type]


def failed_row(uri: str, exc: RowError) -> pa.Table:
    """Return the row of a file or member that cannot be read."""
    values = (uri, None, None, None, None, encode_error(exc))
    schema = pa.schema([("uri", pa.string()), *LOCATION_SCHEMA])
    return pa.table([pa.array([value], f.type) for value, f in zip(values, schema, strict=True)], schema=schema)


def check_failed_files(table: pa.Table) -> str:
    """Return a sentence that names the files which listing cannot read, or not as a whole; "" if there are none.

    Raises:
        UserError: If no input is left beside them.
    """
    if "_error" not in table.column_names or table["_error"].null_count == table.num_rows:
        return ""
    failed = table.filter(pc.is_valid(table["_error"]))
    facts: dict[str, str] = {}
    remedies: dict[str, None] = {}
    files: set[str] = set()
    for uri, text in zip(failed["uri"].to_pylist(), failed["_error"].to_pylist(), strict=True):
        _, error_type, fact, remedy = text.split("\n")
        # Members that a manifest names share their file's failure; a sparse member has its own.
        file = uri if error_type == "SPARSE_MEMBER" else (split_member(uri) or (uri,))[0]
        files.add(file)
        if len(facts) < MAX_NAMED:
            facts.setdefault(file, fact)
            remedies.setdefault(remedy + "." if remedy else "")
    named = "; ".join(f"{display_uri(file)}: {fact}" for file, fact in facts.items())
    if len(files) > len(facts):
        named += f"; and {len(files) - len(facts):,} more"
    if failed.num_rows == table.num_rows:
        raise UserError(
            named if len(files) == 1 else f"none of the {len(files):,} files that were found can be used: {named}",
            " ".join(list(remedies)[:4]).strip(),
        )
    return (
        f"{failed.num_rows:,} of {table.num_rows:,} inputs will be rows of errors, because their files cannot be read, or not as a "
        f"whole: {named}"
    )
