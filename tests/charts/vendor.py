"""Writes KubeRay's schemas as JSON Schema into schemas/: python -m tests.charts.vendor, after the operator's version changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.cluster.programs import module_folder, version

SCHEMAS = Path(__file__).parent / "schemas"


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


def main() -> None:
    """Reads the CRDs that the operator's module ships."""
    bases = module_folder("kuberay-operator") / "config" / "crd" / "bases"
    for kind in ("rayjobs", "rayclusters"):
        crd = yaml.safe_load((bases / f"ray.io_{kind}.yaml").read_text())
        served = next(item for item in crd["spec"]["versions"] if item["name"] == "v1")["schema"]["openAPIV3Schema"]
        schema = strict(served)
        del schema["properties"]["status"]
        schema["properties"]["metadata"] = {"type": "object"}
        schema["$comment"] = f"KubeRay {version('kuberay-operator')}, {kind}.ray.io/v1; written by vendor.py"
        (SCHEMAS / f"{kind}.json").write_text(json.dumps(schema, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
