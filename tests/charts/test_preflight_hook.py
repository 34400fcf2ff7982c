"""The job tried in a pod of its own, before Helm installs anything."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from . import check
from .render import Values, find, merged, render

ON: Values = {"preflightHook": {"enabled": True}}


def hooks(values: Values) -> list[dict[str, Any]]:
    return [
        item
        for item in render("rayjob", merged(ON, values))
        if "pre-install" in item["metadata"].get("annotations", {}).get("helm.sh/hook", "")
    ]


def pod(values: Values) -> dict[str, Any]:
    (job,) = (item for item in hooks(values) if item["kind"] == "Job")
    return dict(job["spec"]["template"]["spec"])


def test_without_it_there_is_no_hook() -> None:
    assert hooks({"preflightHook": {"enabled": False}}) == []


def test_what_the_pod_needs_is_there_before_it() -> None:
    """Nothing of the release is, when Helm runs its hooks."""
    made = hooks({"serviceAccount": {"annotations": {"example.com/role": "reader"}}})
    order = {item["kind"]: int(item["metadata"]["annotations"].get("helm.sh/hook-weight", 0)) for item in made}
    assert order == {"ConfigMap": -10, "ServiceAccount": -10, "Job": 0}
    assert all(item["metadata"]["name"] == "demo-preflight" for item in made)
    account = find(made, "ServiceAccount")
    assert account["metadata"]["annotations"]["example.com/role"] == "reader"
    spec = pod({})
    assert spec["serviceAccountName"] == "demo-preflight"
    mounted = {volume["name"]: volume.get("configMap", {}).get("name") for volume in spec["volumes"]}
    assert mounted["job"] == "demo-preflight"
    assert yaml.safe_load(find(made, "ConfigMap")["data"]["job.yaml"])["inference"]["actors"] == 4
    (container,) = spec["containers"]
    assert container["command"] == ["batch-inference", "preflight", "--config", "/etc/batch-inference/job.yaml"]


def test_an_account_that_is_there_already_is_used() -> None:
    values = {"serviceAccount": {"create": False, "name": "mine"}}
    assert [item["kind"] for item in hooks(values)] == ["ConfigMap", "Job"]
    assert pod(values)["serviceAccountName"] == "mine"


@pytest.mark.parametrize(
    ("values", "gpus"),
    [
        ({}, "1"),
        ({"job": {"inference": {"gpus_per_actor": 0.25}}}, "1"),
        ({"job": {"inference": {"gpus_per_actor": 2}}, "workers": {"gpusPerWorker": 4}}, "2"),
        ({"job": {"inference": {"gpus_per_actor": 0}}}, None),
    ],
    ids=str,
)
def test_it_takes_the_gpus_of_one_actor(values: Values, gpus: str | None) -> None:
    (container,) = pod(values)["containers"]
    assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


def test_it_goes_where_workers_go_and_may_do_no_more() -> None:
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    values = {"workers": {"tolerations": tolerations, "nodeSelector": {"pool": "gpu"}}, "queue": {"name": "gpus"}}
    spec = pod(values)
    assert spec["tolerations"] == tolerations
    assert spec["nodeSelector"] == {"pool": "gpu"}
    check.valid(hooks(values))
    (job,) = (item for item in hooks(values) if item["kind"] == "Job")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"


def test_claimed_gpus() -> None:
    spec = pod({"workers": {"gpuClaimTemplate": "gpu"}})
    assert spec["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": "gpu"}]
    (container,) = spec["containers"]
    assert container["resources"]["claims"] == [{"name": "gpus"}]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
