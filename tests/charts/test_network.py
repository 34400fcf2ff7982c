"""Connections between pods: the charts' NetworkPolicies for every kind of connection; and what a drain may evict."""

from __future__ import annotations

from typing import Any

import pytest

from tests.charts import check
from tests.charts.flows import (
    DNS,
    HEAD,
    IN_CLUSTER_STORE,
    INTERNET,
    OPERATOR,
    OUTSIDER,
    SUBMITTER,
    WORKER,
    Pod,
    allowed,
    pod,
)
from tests.charts.render import Manifest, find, render

STORE = {"job": {"storage": {"endpoint_url": "http://store.data.svc:8333"}}}
SHARED = {"clusterSelector": "shared"}
DASHBOARD, GCS, CLIENT, METRICS = 8265, 6379, 10001, 8080


def policies(chart: str = "rayjob", values: dict[str, Any] | None = None, name: str = "demo") -> list[Manifest]:
    return [item for item in render(chart, values, name=name) if item["kind"] == "NetworkPolicy"]


NEIGHBOUR = pod("gpu", "other")
ELSEWHERE = pod("head", namespace="elsewhere")  # the same labels in another namespace
NODE_DNS, METADATA = Pod("DNS of the node", "169.254.20.10"), Pod("metadata service", "169.254.169.254")
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
    ({"networkPolicy": {"enabled": False}}, OUTSIDER, HEAD, GCS),
]  # fmt: skip
NO = [
    *[({}, who, HEAD, port) for who in (OUTSIDER, ELSEWHERE, NEIGHBOUR, INTERNET) for port in (DASHBOARD, GCS, CLIENT, METRICS)],
    ({}, OUTSIDER, WORKER, 40123), ({}, NEIGHBOUR, WORKER, 40123), ({}, OUTSIDER, SUBMITTER, 80),
    ({}, OPERATOR, HEAD, GCS), ({}, PROMETHEUS, HEAD, METRICS),
    ({"networkPolicy": {"operatorNamespace": "ray-system"}}, OPERATOR, HEAD, DASHBOARD),
    (MONITORED, PROMETHEUS, HEAD, DASHBOARD), (MONITORED, OUTSIDER, HEAD, METRICS), (NOT_THERE, PROMETHEUS, HEAD, METRICS),
    ({}, WORKER, METADATA, 80), ({}, WORKER, OUTSIDER, 80), ({}, WORKER, INTERNET, 22), ({}, WORKER, NEIGHBOUR, GCS),
    ({}, WORKER, IN_CLUSTER_STORE, 8333), (STORE, WORKER, IN_CLUSTER_STORE, 5432),
]  # fmt: skip


def _label(case: Any) -> str:
    return case.name if isinstance(case, Pod) else ""


@pytest.mark.parametrize(("values", "source", "target", "port"), YES, ids=_label)
def test_connections_that_a_job_needs_are_allowed(values: dict[str, Any], source: Pod, target: Pod, port: int) -> None:
    there = [*policies(values=values), *policies(name="other")]
    assert allowed(there, source, target, port, "UDP" if port == 53 else "TCP")


@pytest.mark.parametrize(("values", "source", "target", "port"), NO, ids=_label)
def test_other_connections_are_refused(values: dict[str, Any], source: Pod, target: Pod, port: int) -> None:
    assert not allowed([*policies(values=values), *policies(name="other")], source, target, port)


def test_job_on_a_shared_cluster_reaches_its_dashboard_and_that_is_all() -> None:
    """The cluster's policy accepts submitters, and the job's own lets them connect."""
    templates = dict(check.pods(find(render("raycluster", name="shared"), "RayCluster")))
    labels = {**templates["head"]["metadata"]["labels"], "ray.io/cluster": "shared", "ray.io/node-type": "head"}
    head, submitter = Pod("shared head", "10.0.0.8", "default", labels), pod("submitter", values=SHARED)
    there = [*policies("raycluster", name="shared"), *policies(values=SHARED)]
    assert len(there) == 2
    assert allowed(there, submitter, head, DASHBOARD)
    assert not allowed(there, submitter, head, GCS)
    assert not allowed(there, OUTSIDER, head, DASHBOARD)
    assert allowed(there, OPERATOR, head, DASHBOARD)


@pytest.mark.parametrize("scaling", [False, True])
def test_autoscaler_reaches_the_api_server(scaling: bool) -> None:
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
def test_port_of_the_endpoint_is_open(endpoint: str, port: int) -> None:
    there = policies(values={"job": {"storage": {"endpoint_url": endpoint}}, "networkPolicy": {"storePorts": []}})
    assert allowed(there, WORKER, INTERNET, port)


@pytest.mark.parametrize("chart", ["rayjob", "raycluster"])
def test_drain_leaves_the_head_alone(chart: str) -> None:
    budget = find(render(chart), "PodDisruptionBudget")["spec"]
    # No number of runs at once leaves a head over.
    assert budget["minAvailable"] == 1000
    for role, template in check.pods(find(render(chart), "RayJob" if chart == "rayjob" else "RayCluster")):
        selected = budget["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert selected is (role == "head")
    kinds = [item["kind"] for item in render(chart, {"podDisruptionBudget": {"enabled": False}})]
    assert "PodDisruptionBudget" not in kinds


def test_job_on_a_shared_cluster_has_no_head_to_keep() -> None:
    assert "PodDisruptionBudget" not in [item["kind"] for item in render("rayjob", SHARED)]
