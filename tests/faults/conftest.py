"""Fixtures of the fault tests: servers and cluster of the other tests, and one table of outcomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import (
    all_releases,
    kubernetes,
    pytest_collection_modifyitems,
    pytest_runtest_makereport,
    releases,
    slow_predictor,
    world,
)
from tests.faults import report
from tests.job.conftest import cluster, google_key, program, proxy, s3

__all__ = [
    "all_releases", "cluster", "google_key", "kubernetes", "program", "proxy", "pytest_collection_modifyitems",
    "pytest_runtest_makereport", "releases", "s3", "slow_predictor", "world",
]  # fmt: skip

FOLDER = Path(__file__).parents[2] / "build/faults"


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[Callable[[report.Outcome], None]]:
    """Record an outcome in the table, which is rewritten each time, and printed at the end."""
    outcomes: list[report.Outcome] = []
    file = FOLDER / f"{Path(request.node.name).stem.removeprefix('test_')}.md"

    def add(outcome: report.Outcome) -> None:
        outcomes.append(outcome)
        report.write(outcomes, file)

    yield add
    print(f"\n{report.table(outcomes)}\n{file}")
