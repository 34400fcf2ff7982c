"""Who reaches whom: the charts' NetworkPolicies, asked about every kind of connection; and what a drain may evict."""

from __future__ import annotations

from typing import Any

import pytest

from . import check
from .flows import Pod, allowed
from .render import Manifest, find, rayjob, render

STORE = {"job": {"storage": {"endpoint_url": "http://store.data.svc:8333"}}}
SHARED = {"clusterSelector": "shared"}
DASHBOARD, GCS, CLIENT, METRICS = 8265, 6379, 10001, 8080


def pod(role: str, release: str = "demo", values: dict[str, Any] | None = None, namespace: str = "default") -> Pod:
    """A pod of a release of the rayjob chart, with the labels that it gets."""
    templates = dict(check.pods(rayjob(values, name=release)))
    return Pod(f"{release}'s {role}", "10.0.0.9", namespace, templates[role]["metadata"]["labels"])


def policies(chart: str = "rayjob", values: dict[str, Any] | None = None, name: str = "demo") -> list[Manifest]:
    return [item for item in render(chart, values, name=name) if item["kind"] == "NetworkPolicy"]


HEAD, WORKER, SUBMITTER = pod("head"), pod("gpu"), pod("submitter")
NEIGHBOUR = pod("gpu", "other")
STRANGER = Pod("a stranger", "10.0.0.7", "default", {"app": "web"})
ELSEWHERE = pod("head", namespace="elsewhere")  # the same labels in another namespace
OPERATOR = Pod("the operator", "10.0.0.2", "kuberay", {"app.kubernetes.io/component": "kuberay-operator"})
DNS = Pod("DNS", "10.0.0.3", "kube-system", {"k8s-app": "kube-dns"})
NODE_DNS, METADATA = Pod("DNS of the node", "169.254.20.10"), Pod("metadata service", "169.254.169.254")
INTERNET = Pod("an object store", "52.216.1.1")
IN_CLUSTER_STORE = Pod("a store in the cluster", "10.0.0.4", "data", {"app": "store"})
PROMETHEUS = Pod("Prometheus", "10.0.0.5", "monitoring", {"app.kubernetes.io/name": "prometheus"})
MONITORED: dict[str, Any] = {"monitoring": {"podMonitor": {"enabled": True}}}
THERE: dict[str, Any] = {"monitoring": {"podMonitor": {"enabled": True}, "prometheus": {"namespace": "monitoring"}}}
NOT_THERE: dict[str, Any] = {"monitoring": {"podMonitor": {"enabled": True}, "prometheus": {"namespace": "elsewhere"}}}
RULE = {
    "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    "ports": [{"port": METRICS, "protocol": "TCP"}],
}

YES = [
    ({}, WORKER, HEAD, GCS), ({}, HEAD, WORKER, 40123), ({}, WORKER, WORKER, 40123), ({}, SUBMITTER, HEAD, DASHBOARD),
    ({}, OPERATOR, HEAD, DASHBOARD), ({}, HEAD, DNS, 53), ({}, WORKER, NODE_DNS, 53),
    ({}, WORKER, INTERNET, 443), ({}, HEAD, INTERNET, 443),
    (STORE, WORKER, IN_CLUSTER_STORE, 8333),
    ({"networkPolicy": {"ingress": [RULE]}}, PROMETHEUS, HEAD, METRICS),
    (MONITORED, PROMETHEUS, HEAD, METRICS), (MONITORED, PROMETHEUS, WORKER, METRICS), (THERE, PROMETHEUS, WORKER, METRICS),
    ({"networkPolicy": {"metadataService": True}}, WORKER, METADATA, 80),
    ({"networkPolicy": {"operatorNamespace": "kuberay"}}, OPERATOR, HEAD, DASHBOARD),
    ({"networkPolicy": {"enabled": False}}, STRANGER, HEAD, GCS),
]  # fmt: skip
NO = [
    *[({}, who, HEAD, port) for who in (STRANGER, ELSEWHERE, NEIGHBOUR, INTERNET) for port in (DASHBOARD, GCS, CLIENT, METRICS)],
    ({}, STRANGER, WORKER, 40123), ({}, NEIGHBOUR, WORKER, 40123), ({}, STRANGER, SUBMITTER, 80),
    ({}, OPERATOR, HEAD, GCS), ({}, PROMETHEUS, HEAD, METRICS),
    ({"networkPolicy": {"operatorNamespace": "ray-system"}}, OPERATOR, HEAD, DASHBOARD),
    (MONITORED, PROMETHEUS, HEAD, DASHBOARD), (MONITORED, STRANGER, HEAD, METRICS), (NOT_THERE, PROMETHEUS, HEAD, METRICS),
    ({}, WORKER, METADATA, 80), ({}, WORKER, STRANGER, 80), ({}, WORKER, INTERNET, 22), ({}, WORKER, NEIGHBOUR, GCS),
    ({}, WORKER, IN_CLUSTER_STORE, 8333), (STORE, WORKER, IN_CLUSTER_STORE, 5432),
]  # fmt: skip


def _label(case: Any) -> str:
    return case.name if isinstance(case, Pod) else ""


@pytest.mark.parametrize(("values", "source", "target", "port"), YES, ids=_label)
def test_what_a_job_needs_goes_through(values: dict[str, Any], source: Pod, target: Pod, port: int) -> None:
    there = [*policies(values=values), *policies(name="other")]
    assert allowed(there, source, target, port, "UDP" if port == 53 else "TCP")


@pytest.mark.parametrize(("values", "source", "target", "port"), NO, ids=_label)
def test_nothing_else_does(values: dict[str, Any], source: Pod, target: Pod, port: int) -> None:
    assert not allowed([*policies(values=values), *policies(name="other")], source, target, port)


def test_a_job_on_a_shared_cluster_reaches_its_dashboard_and_that_is_all() -> None:
    """The cluster's policy lets submitters in, the job's own lets them out."""
    templates = dict(check.pods(find(render("raycluster", name="shared"), "RayCluster")))
    labels = {**templates["head"]["metadata"]["labels"], "ray.io/cluster": "shared", "ray.io/node-type": "head"}
    head, submitter = Pod("shared head", "10.0.0.8", "default", labels), pod("submitter", values=SHARED)
    there = [*policies("raycluster", name="shared"), *policies(values=SHARED)]
    assert len(there) == 2
    assert allowed(there, submitter, head, DASHBOARD)
    assert not allowed(there, submitter, head, GCS)
    assert not allowed(there, STRANGER, head, DASHBOARD)
    assert allowed(there, OPERATOR, head, DASHBOARD)


@pytest.mark.parametrize("scaling", [False, True])
def test_the_autoscaler_reaches_the_api_server(scaling: bool) -> None:
    there = policies(values={"autoscaling": {"enabled": scaling}})
    assert allowed(there, HEAD, Pod("API server", "172.18.0.2"), 6443) is scaling


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        ("https://minio.example:9000", 9000),
        ("https://minio.example", 443),
        ("http://minio.example", 80),
        ("http://[fd00::1]:9000", 9000),
        ("http://minio.example/a:1", 80),
        ("https://minio.example:65535/a:1/", 65535),
    ],
)
def test_the_port_of_the_endpoint_is_open(endpoint: str, port: int) -> None:
    there = policies(values={"job": {"storage": {"endpoint_url": endpoint}}, "networkPolicy": {"storePorts": []}})
    assert allowed(there, WORKER, INTERNET, port)


@pytest.mark.parametrize("chart", ["rayjob", "raycluster"])
def test_a_drain_leaves_the_head_alone(chart: str) -> None:
    budget = find(render(chart), "PodDisruptionBudget")["spec"]
    # No number of runs at once leaves a head over.
    assert budget["minAvailable"] == 1000
    for role, template in check.pods(find(render(chart), "RayJob" if chart == "rayjob" else "RayCluster")):
        selected = budget["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert selected is (role == "head")
    kinds = [item["kind"] for item in render(chart, {"podDisruptionBudget": {"enabled": False}})]
    assert "PodDisruptionBudget" not in kinds


def test_a_job_on_a_shared_cluster_has_no_head_to_keep() -> None:
    assert "PodDisruptionBudget" not in [item["kind"] for item in render("rayjob", SHARED)]
