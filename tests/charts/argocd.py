"""The health checks for Argo CD and their test data."""

from __future__ import annotations

from pathlib import Path

import yaml

ARGOCD = Path(__file__).parents[2] / "k8s" / "argocd"
# The health of each object, in the format of Argo CD's own repository.
CASES = [
    (kind.name, test["inputPath"], test["healthStatus"])
    for kind in sorted((ARGOCD / "ray.io").iterdir())
    for test in yaml.safe_load((kind / "health_test.yaml").read_text())["tests"]
]
