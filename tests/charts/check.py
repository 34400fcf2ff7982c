"""Rendered objects against the schemas of Kubernetes, KubeRay and the Prometheus operator, and against Pod Security."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from kubernetes_validate import utils

from tests.charts.render import Manifest

# The package would read its two megabytes of schemas again for every object.
utils.schema_contents = functools.cache(utils.schema_contents)

KUBERNETES = "1.34"
SCHEMAS = Path(__file__).parent / "schemas"


@functools.cache
def _custom(kind: str) -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(json.loads((SCHEMAS / f"{kind.lower()}s.json").read_text()))


@functools.lru_cache(maxsize=4096)
def _kubernetes(text: str) -> None:
    kubernetes_validate.validate(json.loads(text), KUBERNETES, strict=True)


def pods(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Return the pod templates in an object, by role."""
    spec = manifest["spec"]
    if "submitterPodTemplate" in spec:
        yield "submitter", spec["submitterPodTemplate"]
    cluster = spec.get("rayClusterSpec") if manifest["kind"] == "RayJob" else spec
    if cluster:
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield group["groupName"], group["template"]


def valid(manifests: list[Manifest]) -> None:
    """Raise unless the API server would accept every key of every object and of every pod in it."""
    for manifest in manifests:
        if manifest["apiVersion"] not in ("ray.io/v1", "monitoring.coreos.com/v1"):
            _kubernetes(json.dumps(manifest, sort_keys=True))
            continue
        _custom(manifest["kind"]).validate(manifest)
        if manifest["apiVersion"] != "ray.io/v1":
            continue
        for role, template in pods(manifest):
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            pod["metadata"] = {"name": role, **template["metadata"]}
            _kubernetes(json.dumps(pod, sort_keys=True))
            unique(template["spec"])


def unique(spec: dict[str, Any]) -> None:
    """Raise if a list that Kubernetes treats as a map has duplicate keys."""
    for container in spec["containers"]:
        for key, name in (("env", "name"), ("volumeMounts", "mountPath"), ("ports", "name")):
            names = [item[name] for item in container.get(key, [])]
            assert len(names) == len(set(names)), (key, names)
    names = [volume["name"] for volume in spec["volumes"]]
    assert len(names) == len(set(names)), names
    for container in spec["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(names)


def restricted(spec: dict[str, Any]) -> None:
    """Raise unless a pod passes Pod Security "restricted" and has a read-only root file system."""
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        hardened(container["securityContext"])
    for volume in spec["volumes"]:
        assert "hostPath" not in volume


def hardened(context: dict[str, Any]) -> None:
    """Raise unless a container's security context is as strict as possible."""
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"]}
