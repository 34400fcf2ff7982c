"""Examples of failed rows, of every stage and type."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from batch_inference import manifest
from batch_inference.ledger import Commit
from batch_inference.storage import Store

MOST_KINDS = 50
EXAMPLES = 3


@dataclass(frozen=True)
class Failure:
    """A failed row."""

    shard: int
    row: int
    uri: str
    stage: str
    error_type: str
    message: str
    traceback: str | None = None


@dataclass
class Kind:
    """Failures of one stage and type.

    Attributes:
        stage: Where they failed.
        error_type: Of what.
        count: How many there are.
        found: Some of them.
    """

    stage: str
    error_type: str
    count: int
    found: list[Failure] = field(default_factory=list)


def examples(store: Store, commits: Iterable[Commit], by: dict[str, dict[str, int]], most: int) -> list[Kind]:
    """Kinds of failures, most frequent first, with examples; reads no more files than these take.

    Args:
        store: The output folder.
        commits: Those that count.
        by: All counts, ``{stage: {error_type: count}}``; the :data:`MOST_KINDS` most frequent get examples.
        most: How many examples to find of each kind, at least :data:`EXAMPLES`.

    Raises:
        FileNotFoundError: If a committed file is gone.
        ArrowException: If one can't be read.
    """
    kinds = [Kind(stage, kind, count) for stage, types in by.items() for kind, count in types.items()]
    kinds.sort(key=lambda one: (-one.count, one.stage, one.error_type))
    wanted = {(one.stage, one.error_type): one for one in kinds[:MOST_KINDS]}
    most = max(EXAMPLES, most)
    for commit in commits:
        here = [
            wanted[key]
            for stage, types in commit.errors_by.items()
            for kind in types
            if (key := (stage, kind)) in wanted and len(wanted[key].found) < most
        ]
        path = next((file.path for file in commit.files if file.path.startswith("errors/")), None)
        if not here or path is None:
            continue
        table = _read(store.get(path))
        for one in here:
            mine = table.filter(
                pc.and_(pc.equal(table["stage"], one.stage), pc.equal(table["error_type"], one.error_type))
            )
            for row in mine.slice(0, most - len(one.found)).to_pylist():
                one.found.append(Failure(**{**row, "message": str(row["message"])[:2000], "uri": row["uri"] or ""}))
    return kinds


def _read(data: bytes) -> pa.Table:
    columns = ["uri", "shard", "row", "stage", "error_type", "message"]
    try:
        return manifest.read_parquet(data, [*columns, "traceback"])
    except KeyError:  # written by an earlier version
        return manifest.read_parquet(data, columns)


def wall(kinds: Iterable[Kind], most: int) -> list[Failure]:
    """Failures of as many kinds as possible, in turn."""
    queues = [list(one.found) for one in kinds]
    out: list[Failure] = []
    while len(out) < most and any(queues):
        out += [queue.pop(0) for queue in queues if queue]
    return out[:most]
