"""Fixtures that several tiers share."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.images import broken, jpeg
from tests.support.limits import TEST_S

HERE = Path(__file__).parent

# How long an example takes, and how long it takes to make one, is the machine's affair.
hypothesis.settings.register_profile("project", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("project")

# The checkout under test rather than the installed package, here and in all processes that tests start.
JOB = str(Path(__file__).parents[1] / "job")
sys.path.insert(0, JOB)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [JOB, os.environ.get("PYTHONPATH")]))

# Whatever the tests start must not ask anything of the network by itself.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test the limit of its folder, at which pytest-timeout takes it for hanging."""
    for item in items:
        item.add_marker(pytest.mark.timeout(TEST_S[item.path.relative_to(HERE).parts[0]]), append=False)


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A temporary folder that every user may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of small JPEGs, a given share of them broken; returns it."""

    def make(count: int, *, bad_percent: float = 0.0, seed: int = 0, name: str = "photos") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        bad = set(random.Random(seed).sample(range(count), round(count * bad_percent / 100)))
        # A handful of contents is enough; what is tested is what becomes of each file.
        good = [jpeg(s) for s in range(16)]
        for index in range(count):
            data = broken(index) if index in bad else good[index % 16]
            folder.joinpath(f"image-{index:06d}.jpg").write_bytes(data)
        return folder

    return make
