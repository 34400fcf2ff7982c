"""Manifests that provision GPU nodes: against the schemas of their controllers, and against their presets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.charts import check
from tests.charts.presets import PRESETS, values

FOLDER = Path(__file__).parents[2] / "k8s" / "node-pools"
FILES = sorted(FOLDER.glob("*.yaml"))
SCHEMAS = {
    "ContainerNodePool": "containernodepools",
    "EC2NodeClass": "ec2nodeclasses",
    "AKSNodeClass": "aksnodeclasses",
    "NodePool": "nodepools",
}
# GKE's reference has no schema to take along: the keys of it that we write.
TEXT, FLAG = {"type": "string"}, {"type": "boolean"}


def _closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


COMPUTE_CLASS = _closed(
    nodePoolAutoCreation=_closed(enabled=FLAG),
    nodePoolConfig=_closed(imageStreaming=_closed(enabled=FLAG)),
    priorities={
        "type": "array",
        "items": _closed(
            machineType=TEXT, spot=FLAG, gpu=_closed(type=TEXT, count={"type": "integer"}, driverVersion=TEXT)
        ),
    },
    whenUnsatisfiable={"enum": ["DoNotScaleUp", "ScaleUpAnyway"]},
    activeMigration=_closed(optimizeRulePriority=FLAG),
)
# Which nodes each preset is for. What the platform itself labels and taints them with is in the second and third column.
GPU_TAINT = ("nvidia.com/gpu", "present")
MADE_FOR: dict[str, tuple[str, dict[str, set[str]], set[tuple[str, str]]]] = {
    "gke": ("gke-node-pool", {"cloud.google.com/gke-accelerator": {"nvidia-l4"}}, {GPU_TAINT}),
    "gke-spot": ("gke-node-pool", {"cloud.google.com/gke-accelerator": {"nvidia-l4"}}, {GPU_TAINT}),
    "gke-compute-class": (
        "gke-compute-class",
        {"cloud.google.com/compute-class": {"batch-inference-gpu"}},
        {GPU_TAINT, ("cloud.google.com/compute-class", "batch-inference-gpu")},
    ),
    "eks": ("eks-karpenter", {}, set()),
    "eks-spot": ("eks-karpenter", {}, set()),
    "aks-karpenter": ("aks-karpenter", {}, set()),
}


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text()))


@pytest.mark.parametrize("file", [file for file in FILES if "values" not in file.stem], ids=lambda file: file.stem)
def test_manifests_are_what_their_readers_take(file: Path) -> None:
    for document in documents(file):
        kind = document["kind"]
        if kind == "ComputeClass":
            jsonschema.validate(document["spec"], COMPUTE_CLASS)
        elif kind in SCHEMAS:
            schema = json.loads((check.SCHEMAS / f"{SCHEMAS[kind]}.json").read_text())
            jsonschema.Draft7Validator(schema).validate(document)
        else:
            check.valid([document])


def offered(documents: list[dict[str, Any]]) -> tuple[dict[str, set[str]], set[tuple[str, str]]]:
    """Return labels with their values, and taints, that a manifest gives its nodes."""
    labels: dict[str, set[str]] = {}
    taints: set[tuple[str, str]] = set()
    for document in documents:
        spec = document["spec"]
        if document["kind"] == "NodePool":
            for item in spec["template"]["spec"]["requirements"]:
                labels.setdefault(item["key"], set()).update(item["values"])
            taints |= {(taint["key"], taint.get("value", "")) for taint in spec["template"]["spec"]["taints"]}
        elif document["kind"] == "ContainerNodePool":
            taints |= {(taint["key"], taint["value"]) for taint in spec["nodeConfig"].get("taint", [])}
    return labels, taints


@pytest.mark.parametrize("name", MADE_FOR)
def test_workers_find_the_nodes_that_are_made_for_them(name: str) -> None:
    file, platform_labels, platform_taints = MADE_FOR[name]
    labels, taints = offered(documents(FOLDER / f"{file}.yaml"))
    labels |= platform_labels
    taints |= platform_taints
    workers = values(next(preset for preset in PRESETS if preset.stem == name))["workers"]
    for key, value in workers["nodeSelector"].items():
        assert value in labels.get(key, set()), key
    tolerated = {(item["key"], item.get("value")) for item in workers["tolerations"]}
    # The preset for nodes on demand stays off the spot pool, and that is what its taint is for.
    if "spot" not in name:
        taints -= {("cloud.google.com/gke-spot", "true")}
    assert [taint for taint in taints if taint not in tolerated and (taint[0], None) not in tolerated] == []


def test_claim_is_of_as_many_gpus_as_a_worker_has() -> None:
    (template,) = documents(FOLDER / "dra.yaml")
    workers = values(next(preset for preset in PRESETS if preset.stem == "dra"))["workers"]
    (request,) = template["spec"]["spec"]["devices"]["requests"]
    assert workers["gpuClaimTemplate"] == template["metadata"]["name"]
    assert workers["gpusPerWorker"] == request["exactly"]["count"]


def test_pre_pull_passes_pod_security() -> None:
    (document,) = documents(FOLDER / "prepull.yaml")
    spec = document["spec"]["template"]["spec"]
    check.restricted({"volumes": [], **spec})


def test_gpu_operator_time_slicing_is_what_the_preset_asks_for() -> None:
    (operator,) = documents(FOLDER / "gpu-operator-values.yaml")
    sharing = yaml.safe_load(operator["devicePlugin"]["config"]["data"]["four-a-gpu"])["sharing"]["timeSlicing"]
    workers = values(next(preset for preset in PRESETS if preset.stem == "time-slicing"))["workers"]
    (resource,) = sharing["resources"]
    assert sharing["renameByDefault"]
    assert workers["gpuResource"] == resource["name"] + ".shared"
    assert operator["mig"]["strategy"] == "mixed"
