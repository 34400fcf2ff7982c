"""Failed rows grouped by stage and type, with examples of each group."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.output import manifest
from batch_inference.output.records import Commit
from batch_inference.storage.store import Store

#: Number of groups that get examples, most frequent first.
MAX_GROUPS = 50
#: Number of examples that a report lists per group; more of them are shown as images.
EXAMPLES_PER_GROUP = 3
# Messages are cut off at this length.
_MAX_MESSAGE_CHARACTERS = 2000


@dataclass(frozen=True)
class FailedRow:
    """A failed row of the errors table."""

    shard: int
    row: int
    uri: str
    stage: str
    error_type: str
    message: str
    traceback: str | None = None


@dataclass
class FailureGroup:
    """The failures of one stage and type.

    Attributes:
        stage: Stage that failed.
        error_type: Type of the failures.
        count: Number of failed rows.
        examples: Some of the failed rows.
    """

    stage: str
    error_type: str
    count: int
    examples: list[FailedRow] = field(default_factory=list)


def group_failures(
    store: Store, commits: Iterable[Commit], counts: dict[str, dict[str, int]], max_examples: int
) -> list[FailureGroup]:
    """Return the groups of failures, most frequent first, with examples; read only the files that have them.

    Args:
        store: The output folder.
        commits: The valid commits.
        counts: Number of failed rows, ``{stage: {error_type: count}}``. The :data:`MAX_GROUPS` most frequent groups get
            examples.
        max_examples: Number of examples per group, at least :data:`EXAMPLES_PER_GROUP`.

    Raises:
        FileNotFoundError: If a committed file is missing.
        ArrowException: If a committed file cannot be read.
    """
    groups = [
        FailureGroup(stage, error_type, count) for stage, types in counts.items() for error_type, count in types.items()
    ]
    groups.sort(key=lambda group: (-group.count, group.stage, group.error_type))
    wanted = {(group.stage, group.error_type): group for group in groups[:MAX_GROUPS]}
    max_examples = max(EXAMPLES_PER_GROUP, max_examples)
    for commit in commits:
        incomplete = [
            wanted[key]
            for stage, types in commit.errors_by.items()
            for error_type in types
            if (key := (stage, error_type)) in wanted and len(wanted[key].examples) < max_examples
        ]
        path = next((file.path for file in commit.files if file.path.startswith("errors/")), None)
        if not incomplete or path is None:
            continue
        table = _read_errors(store.get(path))
        for group in incomplete:
            matches = pc.and_(pc.equal(table["stage"], group.stage), pc.equal(table["error_type"], group.error_type))
            for row in table.filter(matches).slice(0, max_examples - len(group.examples)).to_pylist():
                message = str(row["message"])[:_MAX_MESSAGE_CHARACTERS]
                group.examples.append(FailedRow(**{**row, "message": message, "uri": row["uri"] or ""}))
    return groups


def interleave(groups: Iterable[FailureGroup], maximum: int) -> list[FailedRow]:
    """Return up to ``maximum`` examples, taken in turn from each group."""
    queues = [list(group.examples) for group in groups]
    rows: list[FailedRow] = []
    while len(rows) < maximum and any(queues):
        rows += [queue.pop(0) for queue in queues if queue]
    return rows[:maximum]


def _read_errors(data: bytes) -> pa.Table:
    columns = ["uri", "shard", "row", "stage", "error_type", "message"]
    try:
        return manifest.read_parquet(data, [*columns, "traceback"])
    except KeyError:  # an earlier version wrote no tracebacks
        return manifest.read_parquet(data, columns)
