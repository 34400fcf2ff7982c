"""What datasets refuse before there is a cluster; tests/job/test_datasets.py has them in one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from ray.data.block import BlockAccessor

from batch_inference import from_images, from_paths
from batch_inference.errors import UserError
from batch_inference.models.columns import is_sequence
from batch_inference.pipeline.datasets import _Predict


@pytest.mark.parametrize("bad", [np.zeros((2, 2, 3)), np.zeros((2, 2, 4), np.uint8), np.zeros(3, np.uint8), "a.jpg"])
def test_from_images_refuses_other_arrays(bad: Any) -> None:
    with pytest.raises(UserError, match="image 1 "):
        from_images([np.zeros((2, 2, 3), np.uint8), bad])


def test_from_paths_refuses_an_empty_list() -> None:
    with pytest.raises(UserError, match="no paths"):
        from_paths([])


@pytest.mark.parametrize("values", ["ab", b"ab", {0: 1, 1: 2}, {1, 2}, bytearray(b"ab")])
def test_value_with_a_length_may_not_be_a_column(values: Any) -> None:
    class Odd:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            return {"x": values}

    table = pa.table(BlockAccessor.batch_to_arrow_block({"image": np.zeros((2, 4, 4, 3), np.uint8)}))
    with pytest.raises(ValueError, match=f"Odd returned one {type(values).__name__} as x, not one value an image"):
        _Predict(Odd, (), {})(table)


@pytest.mark.parametrize("values", [[1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2]), pd.Series([1, 2])])
def test_columns_are_lists_arrays_tensors_and_series(values: Any) -> None:
    assert is_sequence(values)
