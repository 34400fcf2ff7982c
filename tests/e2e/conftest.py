"""One cluster for all end-to-end tests, and evidence of whatever fails in it."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.e2e import evidence
from tests.e2e.cluster import Cluster
from tests.e2e.cluster.programs import REPOSITORY
from tests.e2e.runs import Kubernetes, Releases
from tests.e2e.world import World, for_tests

NAME = "e2e"
FOLDER = REPOSITORY / "build" / "e2e"
# The first test also waits for the cluster, and for the image to be copied into it.
TIMEOUT_S = 1500


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives tests of the cluster more time than others."""
    for item in items:
        if "world" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


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
    return Releases(world, kubernetes, FOLDER / "values")


@pytest.fixture
def releases(all_releases: Releases) -> Iterator[Releases]:
    """Helm on the cluster; what a test has not removed is removed after it."""
    yield all_releases
    for name in sorted(all_releases.names):
        all_releases.uninstall(name)


@pytest.fixture(scope="session")
def slow_predictor(world: World) -> Path:
    """The file of a predictor that takes its time, in a ConfigMap."""
    file = Path(__file__).with_name("slow.py")
    named = ("configmap", "slow-predictor", "--namespace=batch-inference")
    world.cluster.kubectl("delete", *named, "--ignore-not-found")
    world.cluster.kubectl("create", *named, f"--from-file={file}")
    return file
