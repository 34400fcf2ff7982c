"""Checks: one line of a table for each part of a job that was tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: What was tried.
        state: OK, WARN or FAIL.
        finding: The fact, with its numbers.
        remedy: What to do about it; "" where there is nothing to do.
        passing: Whether another try may end differently, such as on another node.
    """

    name: str
    state: State
    finding: str
    remedy: str = ""
    passing: bool = False


def first_few(texts: list[str]) -> str:
    """Return the first five texts, and how many more there are."""
    return "; ".join(texts[:5]) + (f"; and {len(texts) - 5} more" if len(texts) > 5 else "")
