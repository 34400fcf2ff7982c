"""When a commit is told, and failures of shards that are no retry's."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from batch_inference.driver.collector import OpenShard
from batch_inference.driver.committer import Committer, PredictionWriters
from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.errors import AccountingError
from batch_inference.output.records import Commit
from tests.support.outputs import ERRORS, planned, write

URIS = [f"s3://b/{index}.jpg" for index in range(3)]


def open_shard() -> OpenShard:
    return OpenShard(np.ones(0, bool), [ERRORS.empty_table()])


def test_shard_of_which_rows_are_missing_ends_the_job(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, 1)
    writers = PredictionWriters(ShardWriter(ledger.store, "one", "zstd"), [])
    with (
        pytest.raises(AccountingError, match="shard-00001 has 1 inputs to do, but 0 rows came back"),
        Committer(ledger, writers, lambda *_: None) as mine,
    ):
        mine.add(1, open_shard())
        mine.wait()
    assert ledger.generations() == {}


def test_commit_is_told_with_the_next_shard(tmp_path: Path) -> None:
    """The progress would stand still otherwise, until many shards wait."""
    ledger, _ = planned(str(tmp_path), URIS, 1)
    told: list[int] = []

    class Writers(PredictionWriters):
        def write(self, shard: int, errors: object, retry_shard: object) -> Commit:
            writer, failed = write(ledger.store, shard, "one")
            return writer.write(shard, failed)

    with Committer(ledger, Writers(None, []), lambda commit, *_: told.append(commit.shard)) as mine:
        assert mine.blocked_s == 0.0
        mine.add(0, open_shard())
        while mine._running and not mine._running[0].done():
            time.sleep(0.01)
        mine.add(1, open_shard())
        assert told[:1] == [0]
        assert mine.blocked_s > 0.0
    assert told == [0, 1]
