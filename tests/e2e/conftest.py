"""One cluster for all end-to-end tests and all processes that run them, and evidence of whatever fails in it."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e import evidence
from tests.e2e.cluster import Cluster
from tests.e2e.cluster.programs import REPOSITORY
from tests.e2e.runs import SMALL, Kubernetes, Releases
from tests.e2e.world import NAMESPACE, World, for_tests, remove_unused

NAME = "e2e"
FOLDER = REPOSITORY / "build" / "e2e"
# A test of the cluster waits for pods more than it computes, so that three of them fill two CPUs. At the same time there are at most
# a job of two workers and two of one.
PROCESSES, MEMORY_OF_ONE_GIB = 3, 7
HERE = Path(__file__).parent
STARTED = time.time()


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker that orders the tests."""
    config.addinivalue_line("markers", "seconds(number): about how long a test takes, if that is longer than one")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cluster if the processes that used it were ended before they could, as after Ctrl-C."""
    controls_others = not hasattr(config, "workerinput") and config.getoption("numprocesses", None)
    lock = FOLDER / "users.lock"
    used = lock.is_file() and lock.stat().st_mtime >= STARTED
    if controls_others and used and (FOLDER / "kubeconfig").is_file():
        remove_unused(NAME, FOLDER)


def pytest_xdist_auto_num_workers() -> int:
    """Return the number of processes for `--numprocesses auto`: as many as the memory has room for."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(PROCESSES, int(memory / MEMORY_OF_ONE_GIB)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the tests so that several processes stay busy."""
    own = [item for item in items if HERE in item.path.parents]
    if hasattr(config, "workerinput") and len(own) == len(items):
        items[:] = in_order(own)


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """Put long tests first, so that processes end together.

    Each process first gets two tests in a row. The first process makes the cluster with the longest test, and the others run those
    that need none in the meantime. Later, each gets its next test when it starts the one before it, so that a short one follows each
    long one.
    """
    longest_first = sorted(items, key=_seconds, reverse=True)
    last = [item for item in items if item.name == "test_admission_has_had_no_warnings"]
    in_cluster = [item for item in longest_first if _in_cluster(item) and item not in last]
    first = [*in_cluster[:1], *in_cluster[1:][-1:]]
    outside = [item for item in longest_first if not _in_cluster(item)]
    long, short = [item for item in outside if _seconds(item)], [item for item in outside if not _seconds(item)]
    return [*first, *long, *_alternating([item for item in in_cluster if item not in first]), *short, *last]


def _alternating(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the first, the last, the second, the last but one, and so on."""
    both_ends = zip(items, reversed(items), strict=True)
    return [item for pair in both_ends for item in pair][: len(items)]


def _in_cluster(item: pytest.Item) -> bool:
    return "world" in getattr(item, "fixturenames", ())


def _seconds(item: pytest.Item) -> float:
    marker = item.get_closest_marker("seconds")
    return float(marker.args[0]) if marker else 0.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Writes evidence of what failed."""
    report = yield
    evidence.keep(item, report, Cluster(NAME, FOLDER / "kubeconfig"), FOLDER / "evidence")
    return report


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """The cluster with image, namespace and store."""
    with for_tests(NAME, FOLDER) as made:
        yield made


@pytest.fixture(scope="session")
def kubernetes(world: World) -> Kubernetes:
    """The official client of the cluster."""
    return Kubernetes(world.cluster.kubeconfig)


@pytest.fixture(scope="session")
def all_releases(world: World, kubernetes: Kubernetes) -> Releases:
    """Helm on the cluster."""
    return Releases(world, kubernetes, FOLDER / "values", SMALL)


@pytest.fixture
def releases(all_releases: Releases) -> Iterator[Releases]:
    """Yield Helm on the cluster; remove what a test has left, and check that admission has warned of nothing."""
    yield all_releases
    for name in sorted(all_releases.names):
        all_releases.uninstall(name)
    assert not all_releases.warnings()


@pytest.fixture(scope="session")
def slow_predictor(world: World) -> Path:
    """The file of a predictor that takes its time, in a ConfigMap."""
    file = HERE / "slow.py"
    metadata = {"name": "slow-predictor", "namespace": NAMESPACE}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {file.name: file.read_text()}}
    # Applied, because another process may have made it, and its pods may be mounting it.
    world.cluster.kubectl("apply", "--server-side", "--filename", "-", stdin=yaml.safe_dump(config_map))
    return file
