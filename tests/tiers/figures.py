"""The tiers and the caches with their figures: the only place that says how long `make test` takes and how much it caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.e2e.cluster.cache import ROOT as CACHE

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Tier:
    """A tier of tests.

    Attributes:
        name: As in the table.
        target: The target of make that runs it.
        warm: Minutes with full caches, on two cores that do nothing else.
        cold: Minutes with empty caches, also on two cores.
        folders: The folders of its tests; none if pytest does not run it.
    """

    name: str
    target: str
    warm: float
    cold: float
    folders: tuple[str, ...] = ()


TIERS = (
    Tier("setup", "setup", warm=0.5, cold=5),
    Tier("lint", "lint", warm=0.3, cold=0.5),
    Tier("unit", "test-unit", warm=2.5, cold=3, folders=("tests/unit", "tests/docs")),
    Tier("charts", "test-charts", warm=1, cold=5, folders=("tests/charts",)),
    Tier("report", "test-report", warm=0.5, cold=1.5, folders=("tests/report",)),
    Tier("job", "test-job", warm=13, cold=15, folders=("tests/job",)),
    Tier("e2e", "test-e2e", warm=7, cold=24, folders=("tests/e2e",)),
)


@dataclass(frozen=True)
class Folder:
    """A folder that outlives a run.

    Attributes:
        path: Where it is.
        gb: Gigabytes in it after a run of all tiers.
        tiers: The tiers that fill it.
    """

    path: Path
    gb: float
    tiers: frozenset[str]


_ALL = frozenset(tier.name for tier in TIERS)
FOLDERS = (
    Folder(REPOSITORY / ".venv", 8, _ALL),
    # Wheels: uv links them into .venv, so that they need room once.
    Folder(CACHE.parent / "uv", 2, _ALL),
    Folder(CACHE, 5, _ALL - {"setup", "lint"}),
    Folder(CACHE.parent / "go-build", 7, frozenset({"unit", "charts", "e2e"})),
    Folder(Path("/var/lib/containers"), 15, frozenset({"e2e"})),
)

# The caches of the table, and the products (of `tests.e2e.cluster.cache`) that they consist of.
CACHES = {
    ".venv": ("venv",),
    "compiled programs": (
        "actionlint", "go", "helm", "helm4", "kind", "kubectl", "oracle", "renderer", "coredns", "etcd", "kube-apiserver",
        "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubeadm", "kubelet", "kuberay-operator", "pause",
    ),
    "cluster images": ("debian", "kuberay-manifests", "node-image", "system-images"),
    "job image": ("job-image",),
    "emulators": ("azurite", "fake-gcs-server", "node", "prometheus"),
    "Chromium": ("chromium",),
    "Spark": ("java", "pyspark"),
}  # fmt: skip
