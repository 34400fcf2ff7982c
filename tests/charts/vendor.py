"""Writes KubeRay's and Prometheus' schemas as JSON Schema into schemas/: python -m tests.charts.vendor, after a version changed."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.cluster.process import run
from tests.e2e.cluster.programs import go, module_folder, version

SCHEMAS = Path(__file__).parent / "schemas"
PROMETHEUS_OPERATOR = "github.com/prometheus-operator/prometheus-operator@v0.85.0"


def strict(schema: Any) -> Any:
    """Turns the API server's dialect into JSON Schema that refuses unknown keys, which the API server would drop."""
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


def write(folder: Path, group: str, kind: str, release: str) -> None:
    """Writes the schema of one kind."""
    crd = yaml.safe_load((folder / f"{group}_{kind}.yaml").read_text())
    served = next(item for item in crd["spec"]["versions"] if item["name"] == "v1")["schema"]["openAPIV3Schema"]
    schema = strict(served)
    schema["properties"].pop("status", None)
    schema["properties"]["metadata"] = {"type": "object"}
    schema["$comment"] = f"{release}, {kind}.{group}/v1; written by vendor.py"
    (SCHEMAS / f"{kind}.json").write_text(json.dumps(schema, sort_keys=True, separators=(",", ":")) + "\n")


def prometheus_crds() -> Path:
    """The folder with the Prometheus operator's CRDs, as its module ships them."""
    with tempfile.TemporaryDirectory() as elsewhere:
        # Outside any module, since nothing here depends on this one.
        downloaded = run(go(), "mod", "download", "-json", PROMETHEUS_OPERATOR, cwd=Path(elsewhere), timeout=600)
    return Path(json.loads(downloaded)["Dir"]) / "example" / "prometheus-operator-crd"


def main() -> None:
    """Reads the CRDs that the operators' modules ship."""
    bases = module_folder("kuberay-operator") / "config" / "crd" / "bases"
    for kind in ("rayjobs", "rayclusters"):
        write(bases, "ray.io", kind, f"KubeRay {version('kuberay-operator')}")
    for kind in ("podmonitors", "prometheusrules"):
        write(
            prometheus_crds(),
            "monitoring.coreos.com",
            kind,
            f"Prometheus operator {PROMETHEUS_OPERATOR.rpartition('@')[2]}",
        )


if __name__ == "__main__":
    main()
