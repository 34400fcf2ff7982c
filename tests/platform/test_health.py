"""The health checks in Argo CD's own Lua and command, on statuses that the operator wrote."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.charts.argocd import ARGOCD, CASES
from tests.e2e.cluster.process import run
from tests.e2e.cluster.programs import compiled


@pytest.fixture(scope="module")
def configmap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return Argo CD's ConfigMap after the patch."""
    patch = yaml.safe_load((ARGOCD / "argocd-cm-patch.yaml").read_text())
    metadata = {"name": "argocd-cm", "namespace": "argocd", "labels": {"app.kubernetes.io/part-of": "argocd"}}
    file = tmp_path_factory.mktemp("argocd") / "argocd-cm.yaml"
    file.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, **patch}))
    return file


@pytest.mark.parametrize(
    ("kind", "path", "expected"), CASES, ids=[f"{kind}-{Path(path).stem}" for kind, path, _ in CASES]
)
def test_argo_cd_finds_the_same_health(kind: str, path: str, expected: dict[str, str], configmap: Path) -> None:
    command = (compiled("argocd"), "admin", "settings", "resource-overrides", "health", ARGOCD / "ray.io" / kind / path)
    printed = run(*command, "--argocd-cm-path", configmap)
    found = re.search(r"^STATUS: (.*)\nMESSAGE: ?(.*)\Z", printed.rstrip("\n"), re.MULTILINE | re.DOTALL)
    assert found, printed
    assert (found[1], found[2].rstrip()) == (expected["status"], expected["message"].rstrip())
