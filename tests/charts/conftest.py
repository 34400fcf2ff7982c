"""Compiles what the tests ask before the first of them starts, so that no test's time limit has to cover a compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.cluster.programs import tool

from . import oracle, renderer

HERE = Path(__file__).parent


def pytest_collection_finish(session: pytest.Session) -> None:
    """Makes the programs, or finds them in the cache, unless nothing here is going to run."""
    if not session.config.option.collectonly and any(HERE in item.path.parents for item in session.items):
        oracle.program()
        renderer.program()
        for name in ("helm", "helm4"):
            tool(name, from_path=False)
