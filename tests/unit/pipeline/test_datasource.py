from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_inference.models import batch_size
from batch_inference.models.batch_size import PADDING_ROW
from batch_inference.pipeline.datasource import spread, with_padding_rows
from batch_inference.pipeline.schemas import PREPARED_SCHEMA


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=300))
def test_shards_are_handed_out_once_each(shards: list[int]) -> None:
    assert sorted(spread(shards)) == sorted(shards)
    assert spread(shards) == spread(shards)


@given(st.integers(64, 2000), st.integers(0, 1000), st.sampled_from([4, 16, 32]))
def test_neighbors_in_the_order_lie_all_over_the_list(count: int, start: int, few: int) -> None:
    """Ten prefixes of a listing are asked at the same rate, give or take one task."""
    order = spread(range(count))
    window = order[start % (count - few) :][:few]
    for tenth in range(10):
        share = sum(count * tenth <= 10 * shard < count * (tenth + 1) for shard in window)
        assert abs(share - few / 10) < 3


def block(sizes: list[int | None]) -> pa.Table:
    """Rows whose images have so many bytes, or failed."""
    rows = len(sizes)
    known = {
        "shard": pa.array([7] * rows, pa.int32()),
        "row": pa.array(range(rows), pa.int32()),
        "pixels": pa.array([None if size is None else bytes(size) for size in sizes], pa.large_binary()),
    }
    return pa.Table.from_arrays(
        [known.get(f.name, pa.nulls(rows, f.type)) for f in PREPARED_SCHEMA], schema=PREPARED_SCHEMA
    )


@pytest.mark.parametrize(
    ("sizes", "more"), [([10, 10, None], 0), ([20, None, 25], 3), ([None], 0), ([1000], 9), ([100, 101], 18)]
)
def test_large_images_bring_padding_rows(sizes: list[int | None], more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "MAX_BATCH_BYTES", 100)
    table = block(sizes)
    weighed = with_padding_rows(table, 10)
    assert weighed.schema == table.schema
    assert weighed.slice(0, len(sizes)) == table
    extra = weighed.slice(len(sizes))
    assert extra.num_rows == more
    assert set(extra["shard"].to_pylist()) <= {7}
    assert set(extra["row"].to_pylist()) <= {PADDING_ROW}
    assert extra["pixels"].null_count == more
    # The same block is the same again, by which Ray knows those of a task that is done again.
    assert with_padding_rows(table, 10) == weighed
    assert with_padding_rows(table, None) is table
    assert with_padding_rows(table, 1) is table
