"""Compile the programs that tests use before the first test starts, so that no test's time has a compiler in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.charts import oracle, renderer
from tests.e2e.cluster.programs import tool

HERE = Path(__file__).parent


def pytest_collection_finish(session: pytest.Session) -> None:
    """Compile the programs or find them in the cache, unless no test here is going to run."""
    if not session.config.option.collectonly and any(HERE in item.path.parents for item in session.items):
        oracle.program()
        renderer.program()
        for name in ("helm", "helm4", "actionlint"):
            tool(name, from_path=False)
