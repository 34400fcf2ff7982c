"""The preflight hook: the job is tried in a pod of its own, before Helm installs anything."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.charts import check
from tests.charts.flows import DNS, HEAD, IN_CLUSTER_STORE, INTERNET, OPERATOR, OUTSIDER, Pod, allowed
from tests.charts.render import Values, find, merged, render

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


def test_hook_is_off_by_default() -> None:
    assert hooks({"preflightHook": {"enabled": False}}) == []


def test_objects_that_the_pod_needs_exist_before_it() -> None:
    """Nothing of the release exists when Helm runs its hooks."""
    made = hooks({"serviceAccount": {"annotations": {"example.com/role": "reader"}}})
    order = {item["kind"]: int(item["metadata"]["annotations"].get("helm.sh/hook-weight", 0)) for item in made}
    assert order == {"ConfigMap": -10, "ServiceAccount": -10, "NetworkPolicy": -10, "Job": 0}
    assert all(item["metadata"]["name"] == "demo-preflight" for item in made)
    account = find(made, "ServiceAccount")
    assert account["metadata"]["annotations"]["example.com/role"] == "reader"
    spec = pod({})
    assert spec["serviceAccountName"] == "demo-preflight"
    mounted = {volume["name"]: volume.get("configMap", {}).get("name") for volume in spec["volumes"]}
    assert mounted["job"] == "demo-preflight"
    assert yaml.safe_load(find(made, "ConfigMap")["data"]["job.yaml"])["inference"]["actors"] == 4
    (container,) = spec["containers"]
    assert container["command"] == [
        "batch-inference",
        "preflight",
        "--one-actor",
        "--config",
        "/etc/batch-inference/job.yaml",
    ]


def test_account_that_is_there_already_is_used() -> None:
    values = {"serviceAccount": {"create": False, "name": "mine"}}
    assert {item["kind"] for item in hooks(values)} == {"ConfigMap", "NetworkPolicy", "Job"}
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
def test_pod_takes_the_gpus_of_one_actor(values: Values, gpus: str | None) -> None:
    (container,) = pod(values)["containers"]
    assert container["resources"]["limits"].get("nvidia.com/gpu") == gpus
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]


def test_pod_has_placement_and_rights_of_a_worker() -> None:
    tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    own = {"tolerations": tolerations, "nodeSelector": {"pool": "gpu"}, "annotations": {"gke-gcsfuse/volumes": "true"}}
    values = {
        "workers": own,
        "queue": {"name": "gpus", "priorityClass": "high"},
        "pods": {"labels": {"azure.workload.identity/use": "true"}},
    }
    spec = pod(values)
    assert spec["tolerations"] == tolerations
    assert spec["nodeSelector"] == {"pool": "gpu"}
    check.valid(hooks(values))
    (job,) = (item for item in hooks(values) if item["kind"] == "Job")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    metadata = job["spec"]["template"]["metadata"]
    assert metadata["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert metadata["labels"]["azure.workload.identity/use"] == "true"
    assert metadata["labels"]["app.kubernetes.io/component"] == "preflight"


def test_claimed_gpus() -> None:
    spec = pod({"workers": {"gpuClaimTemplate": "gpu"}})
    assert spec["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": "gpu"}]
    (container,) = spec["containers"]
    assert container["resources"]["claims"] == [{"name": "gpus"}]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]


def test_worker_of_many_actors_is_asked_for_one_actor_s_share() -> None:
    values = {"job": {"inference": {"actors": 16}}, "workers": {"gpusPerWorker": 8, "cpus": 40, "memoryGiB": 120}}
    (container,) = pod(values)["containers"]
    requests = container["resources"]["requests"]
    assert (requests["cpu"], requests["memory"], requests["nvidia.com/gpu"]) == ("5000m", "15360Mi", "1")


def test_pod_reaches_the_store_and_is_unreachable_before_the_release_has_policies() -> None:
    values = {"job": {"storage": {"endpoint_url": "http://store.data.svc:8333"}}}
    policies = [item for item in hooks(values) if item["kind"] == "NetworkPolicy"]
    (job,) = (item for item in hooks(values) if item["kind"] == "Job")
    mine = Pod("a preflight", "10.0.0.8", "default", job["spec"]["template"]["metadata"]["labels"])
    assert allowed(policies, mine, IN_CLUSTER_STORE, 8333)
    assert allowed(policies, mine, DNS, 53)
    assert allowed(policies, mine, INTERNET, 443)
    assert not allowed(policies, mine, INTERNET, 22)
    for outsider in (OUTSIDER, HEAD, OPERATOR):
        assert not allowed(policies, outsider, mine, 6379)
    assert hooks({"networkPolicy": {"enabled": False}})
    assert not [item for item in hooks({"networkPolicy": {"enabled": False}}) if item["kind"] == "NetworkPolicy"]
