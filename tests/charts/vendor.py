"""Write the schemas of custom resources as JSON Schema into schemas/: python -m tests.charts.vendor [CRD VERSION]...

KubeRay's, Karpenter's and the Prometheus operator's come from their modules. Those that are in no Go module are given as files of their
CRDs, each with what its version is:

- ``pkg/apis/crds/karpenter.azure.com_aksnodeclasses.yaml`` of Azure/karpenter-provider-azure
- ``crds/container_v1beta1_containernodepool.yaml`` of GoogleCloudPlatform/k8s-config-connector
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.cluster.process import run
from tests.e2e.cluster.programs import go, module_folder, version

SCHEMAS = Path(__file__).parent / "schemas"
# Nothing here depends on these: module, version, folder of the CRDs, and which of them.
MODULES = {
    "Karpenter for AWS": (
        "github.com/aws/karpenter-provider-aws", "v1.14.0", "pkg/apis/crds",
        ("karpenter.sh_nodepools.yaml", "karpenter.k8s.aws_ec2nodeclasses.yaml"),
    ),
    "Prometheus operator": (
        "github.com/prometheus-operator/prometheus-operator", "v0.85.0", "example/prometheus-operator-crd",
        ("monitoring.coreos.com_podmonitors.yaml", "monitoring.coreos.com_prometheusrules.yaml"),
    ),
}  # fmt: skip


def strict(schema: Any) -> Any:
    """Convert the API server's dialect to JSON Schema that refuses unknown keys, which the API server would drop."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], **({"pattern": schema["pattern"]} if "pattern" in schema else {})}
    kept = {key: strict(value) for key, value in schema.items() if not key.startswith("x-") and key != "format"}
    if "properties" in kept:
        kept["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        kept.setdefault("additionalProperties", False)
    return kept


def plain(schema: Any) -> Any:
    """Remove descriptions, which are most of a CRD."""
    if isinstance(schema, dict):
        return {
            key: plain(value) for key, value in schema.items() if key != "description" or not isinstance(value, str)
        }
    return [plain(item) for item in schema] if isinstance(schema, list) else schema


def write(file: Path, origin: str, *, described: bool = False) -> None:
    """Write the schema of a CRD's stored version."""
    crd = yaml.safe_load(file.read_text())
    stored = next(item for item in crd["spec"]["versions"] if item["storage"])
    schema = strict(stored["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status", None)
    schema["properties"]["metadata"] = {"type": "object"}
    plural, group = crd["spec"]["names"]["plural"], crd["spec"]["group"]
    schema["$comment"] = f"{origin}, {plural}.{group}/{stored['name']}; written by vendor.py"
    text = json.dumps(schema if described else plain(schema), sort_keys=True, separators=(",", ":"))
    (SCHEMAS / f"{plural}.json").write_text(text + "\n")


def crds(origin: str) -> Path:
    """Return the folder with the CRDs that one of :data:`MODULES` ships."""
    module, release, folder, _ = MODULES[origin]
    with tempfile.TemporaryDirectory() as elsewhere:
        downloaded = run(go(), "mod", "download", "-json", f"{module}@{release}", cwd=Path(elsewhere))
    return Path(json.loads(downloaded)["Dir"]) / folder


def main(arguments: list[str]) -> None:
    """Read CRDs that modules ship, and those that are given."""
    bases = module_folder("kuberay-operator") / "config" / "crd" / "bases"
    for kind in ("rayjobs", "rayclusters"):
        write(bases / f"ray.io_{kind}.yaml", f"KubeRay {version('kuberay-operator')}", described=True)
    for origin, (_, release, _, names) in MODULES.items():
        for name in names:
            write(crds(origin) / name, f"{origin} {release}")
    for file, origin in zip(arguments[::2], arguments[1::2], strict=True):
        write(Path(file), origin)


if __name__ == "__main__":
    main(sys.argv[1:])
