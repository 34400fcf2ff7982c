"""One cluster for the platform's tests, with the real Argo CD and Kueue."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from tests.e2e import evidence
from tests.e2e.cluster import Cluster
from tests.e2e.cluster.programs import REPOSITORY
from tests.e2e.conftest import kubernetes, pytest_collection_modifyitems, slow_predictor
from tests.e2e.runs import Kubernetes, Releases
from tests.e2e.world import World, for_tests
from tests.platform import components, forge
from tests.platform.argocd import Argo
from tests.platform.kueue import Queue

__all__ = ["kubernetes", "pytest_collection_modifyitems", "slow_predictor"]

NAME = "platform"
FOLDER = REPOSITORY / "build" / "platform"
KINDS = ("applications", "applicationsets", "workloads", "clusterqueues", "localqueues", "resourceflavors")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write evidence of failures."""
    report = yield
    evidence.keep(item, report, Cluster(NAME, FOLDER / "kubeconfig"), FOLDER / "evidence", *KINDS)
    return report


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Yield the cluster with image, namespace and store."""
    with for_tests(NAME, FOLDER) as made:
        yield made


@pytest.fixture(scope="session")
def installed_argo(world: World, kubernetes: Kubernetes) -> Argo:
    """Return Argo CD with the project's health checks and a server of Git and charts."""
    components.argocd(world.cluster, REPOSITORY / "k8s/argocd/argocd-cm-patch.yaml")
    forge.install(world.cluster)
    return Argo(world, kubernetes)


@pytest.fixture
def argo(installed_argo: Argo) -> Iterator[Argo]:
    """Yield Argo CD without applications; those of a test are removed after it."""
    yield installed_argo
    installed_argo.clear()


@pytest.fixture(scope="session")
def queue(world: World, kubernetes: Kubernetes) -> Queue:
    """Return Kueue with the project's example of queues."""
    components.kueue(world.cluster)
    return Queue(world, kubernetes)


@pytest.fixture
def releases(world: World, kubernetes: Kubernetes) -> Iterator[Releases]:
    """Yield Helm on the cluster; releases that a test leaves are removed after it."""
    made = Releases(world, kubernetes, FOLDER / "values")
    yield made
    for name in sorted(made.names):
        made.uninstall(name)
