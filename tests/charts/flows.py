"""Connections that NetworkPolicies allow, computed as Kubernetes defines it: https://kubernetes.io/docs/concepts/services-networking/network-policies/.

For networks at hand enforce none. Of a connection both ends are asked: what the source's policies let out, and the destination's in.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.charts import check
from tests.charts.render import rayjob

Policy = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod, with what policies select by; one without a namespace is an address outside the cluster."""

    name: str
    address: str
    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)


def allowed(policies: Iterable[Policy], source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
    """Return whether a connection is allowed."""
    every = list(policies)
    return _lets(every, source, target, "Egress", port, protocol) and _lets(
        every, target, source, "Ingress", port, protocol
    )


def _lets(policies: list[Policy], subject: Pod, peer: Pod, direction: str, port: int, protocol: str) -> bool:
    mine = [
        policy["spec"]
        for policy in policies
        if subject.namespace == policy["metadata"]["namespace"]
        and direction in policy["spec"]["policyTypes"]
        and _selects(policy["spec"]["podSelector"], subject.labels)
    ]
    if not mine:
        return True  # no policy isolates it
    key, ends = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    for spec in mine:
        for rule in spec.get(key, []):
            there = ends not in rule or any(_is(peer, end, subject.namespace) for end in rule[ends])
            ports = rule.get("ports")
            if there and (
                ports is None or any(p["port"] == port and p.get("protocol", "TCP") == protocol for p in ports)
            ):
                return True
    return False


def _is(pod: Pod, end: dict[str, Any], namespace: str) -> bool:
    if "ipBlock" in end:
        assert set(end) == {"ipBlock"}
        address, block = ipaddress.ip_address(pod.address), end["ipBlock"]
        inside = [address in ipaddress.ip_network(net) for net in (block["cidr"], *block.get("except", []))]
        # Networks differ on whether a pod's address counts: nothing here may depend on it.
        return not pod.namespace and inside[0] and not any(inside[1:])
    if not pod.namespace:
        return False
    if "namespaceSelector" in end:
        here = _selects(end["namespaceSelector"], {"kubernetes.io/metadata.name": pod.namespace})
    else:
        here = pod.namespace == namespace
    return here and _selects(end.get("podSelector", {}), pod.labels)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, selector
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def pod(role: str, release: str = "demo", values: dict[str, Any] | None = None, namespace: str = "default") -> Pod:
    """Return a pod of a release of the rayjob chart, with its labels."""
    templates = dict(check.pods(rayjob(values, name=release)))
    return Pod(f"{release}'s {role}", "10.0.0.9", namespace, templates[role]["metadata"]["labels"])


HEAD, WORKER, SUBMITTER = pod("head"), pod("gpu"), pod("submitter")
OUTSIDER = Pod("an outsider", "10.0.0.7", "default", {"app": "web"})
OPERATOR = Pod("the operator", "10.0.0.2", "kuberay", {"app.kubernetes.io/component": "kuberay-operator"})
DNS = Pod("DNS", "10.0.0.3", "kube-system", {"k8s-app": "kube-dns"})
INTERNET = Pod("an object store", "52.216.1.1")
IN_CLUSTER_STORE = Pod("a store in the cluster", "10.0.0.4", "data", {"app": "store"})
