from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from batch_inference.shards import spread


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=300))
def test_every_shard_is_handed_out_once(shards: list[int]) -> None:
    assert sorted(spread(shards)) == sorted(shards)
    assert spread(shards) == spread(shards)


@given(st.integers(64, 2000), st.integers(0, 1000), st.sampled_from([4, 16, 32]))
def test_any_few_that_are_under_way_together_lie_all_over_the_list(count: int, start: int, few: int) -> None:
    """Ten prefixes of a listing are asked at the same rate, give or take one task."""
    order = spread(range(count))
    window = order[start % (count - few) :][:few]
    for tenth in range(10):
        share = sum(count * tenth <= 10 * shard < count * (tenth + 1) for shard in window)
        assert abs(share - few / 10) < 3
