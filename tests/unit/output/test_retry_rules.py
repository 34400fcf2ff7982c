"""Which rows a retry selects, in words and in fact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from batch_inference.output.records import Retry
from batch_inference.output.retries import describe_retry


def retry(**changes: Any) -> Retry:
    return replace(Retry(1, (), (), False, 0, "a", "now"), **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "all failed rows"),
        ({"stages": ("decode", "fetch")}, "stage decode, fetch"),
        ({"error_types": ("TIMEOUT",)}, "type TIMEOUT"),
        ({"retryable": True}, "marked retryable"),
        (
            {"stages": ("fetch",), "error_types": ("A", "B"), "retryable": True},
            "stage fetch; type A, B; marked retryable",
        ),
    ],
)
def test_words_of_a_retry(changes: dict[str, Any], words: str) -> None:
    assert describe_retry(retry(**changes)) == words
