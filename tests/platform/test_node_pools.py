"""Placement of a job's pods by the presets, on nodes labelled and tainted as pools with and without GPUs.

Pods are placed and do not start, for no node has the image: this is about the scheduler, whom nobody has to believe anything.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from kubernetes import client, config

from tests.charts.presets import PRESETS, values
from tests.charts.render import merged
from tests.e2e.cluster import Cluster
from tests.e2e.cluster.programs import REPOSITORY
from tests.e2e.world import NAMESPACE, kind_values, until
from tests.support.limits import HANG_S

FOLDER = REPOSITORY / "build" / "platform-pools"
SCHEDULED_S = HANG_S
GPUS = 4
# What the platform calls a GPU, and what marks its nodes beyond what the preset selects by.
DEVICES = {
    "apiVersion": "resource.k8s.io/v1",
    "kind": "DeviceClass",
    "metadata": {"name": "gpu.nvidia.com"},
    "spec": {"selectors": [{"cel": {"expression": 'device.driver == "gpu.nvidia.com"'}}]},
}


class Pools:
    """A cluster with a pool of CPU nodes and two of GPU nodes, one node each; the second GPU node is cordoned at first."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.cpu, self.gpu, self.more = cluster.nodes
        self._core = client.CoreV1Api(config.new_client_from_config(str(cluster.kubeconfig)))

    def closed(self) -> None:
        """Keeps everything off the second GPU node."""
        taint = {"key": "closed", "value": "true", "effect": "NoSchedule"}
        self._core.patch_node(self.more, {"spec": {"taints": [taint]}})

    def marked(
        self, workers: dict[str, Any], node: str = "", gpus: int = GPUS, spot: dict[str, str] | None = None
    ) -> None:
        """Makes a node, the first GPU node if no other is named, one of the platform that a preset is for.

        Args:
            workers: What the preset says of workers.
            node: Its name.
            gpus: How many it has.
            spot: The label of spot nodes, for one of these.
        """
        node = node or self.gpu
        there = self._core.read_node(node).metadata.labels
        labels = {key: None for key in there if "kubernetes.io/" not in key}
        labels |= {**workers.get("nodeSelector", {}), **(spot or {})}
        taints = [
            {"key": taint["key"], "value": taint.get("value", "present"), "effect": "NoSchedule"}
            for taint in workers["tolerations"]
        ]
        self._core.patch_node(node, {"metadata": {"labels": labels}, "spec": {"taints": taints}})
        self.cluster.advertise_gpus(gpus, workers.get("gpuResource", "nvidia.com/gpu"), node)

    def install(self, name: str, given: dict[str, Any]) -> None:
        """Installs a job whose image is nowhere."""
        nowhere = {"image": {"repository": "localhost/nowhere", "tag": "none", "pullPolicy": "Never"}}
        file = FOLDER / f"{name}.yaml"
        file.write_text(yaml.safe_dump(merged(merged(kind_values(), nowhere), given)))
        chart = REPOSITORY / "helm" / "rayjob"
        self.cluster.helm("install", name, chart, "--namespace", NAMESPACE, "--values", file)

    def uninstall(self, name: str) -> None:
        """Removes it, and waits until its pods are gone."""
        self.cluster.helm("uninstall", name, "--namespace", NAMESPACE)
        until(f"no pods of {name}", lambda: not self.pods(name), SCHEDULED_S)

    def pods(self, name: str) -> list[Any]:
        """Pods of a release."""
        selector = f"app.kubernetes.io/instance={name}"
        return list(self._core.list_namespaced_pod(NAMESPACE, label_selector=selector).items)

    def placed(self, name: str, count: int) -> dict[str, set[str | None]]:
        """The nodes of a release's pods by role, once there are so many and all have one."""

        def all_placed() -> dict[str, set[str | None]] | None:
            found: dict[str, set[str | None]] = {}
            pods = self.pods(name)
            for pod in pods:
                found.setdefault(pod.metadata.labels["app.kubernetes.io/component"], set()).add(pod.spec.node_name)
            return found if len(pods) >= count and None not in set().union(*found.values()) else None

        placed: dict[str, set[str | None]] = until(f"{count} pods of {name} placed", all_placed, SCHEDULED_S)
        return placed


@contextlib.contextmanager
def installed(pools: Pools, name: str, given: dict[str, Any]) -> Iterator[None]:
    """Yield a release, collect evidence if the test fails, and remove the release."""
    try:
        pools.install(name, given)
        yield
    except BaseException:
        pools.cluster.evidence(FOLDER / "evidence" / name)
        raise
    finally:
        pools.uninstall(name)


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    cluster = Cluster("pools", FOLDER / "kubeconfig", workers=2)
    try:
        cluster.up(0, FOLDER / "evidence" / "start")
        cluster.kubectl("apply", "--filename", REPOSITORY / "k8s" / "namespace.yaml")
        secret = ("create", "secret", "generic", "s3-credentials", f"--namespace={NAMESPACE}", "--from-literal=A=b")
        cluster.kubectl(*secret)
        made = Pools(cluster)
        made.closed()
        yield made
    finally:
        cluster.down()


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_workers_go_to_the_gpu_pool_and_the_head_to_the_other(pools: Pools, file: Any) -> None:
    preset = values(file)
    pools.marked(preset["workers"])
    if "gpuClaimTemplate" in preset["workers"]:
        offer_devices(pools)
    with installed(pools, file.stem, preset):
        placed = pools.placed(file.stem, 3)
        print(f"{file.stem}: {placed}")
        assert placed == {"head": {pools.cpu}, "workers": {pools.gpu}}


@pytest.mark.parametrize(
    "file", [file for file in PRESETS if "affinity" in values(file)["workers"]], ids=lambda file: file.stem
)
def test_workers_go_to_spot_nodes_and_where_these_are_full_to_others(pools: Pools, file: Any) -> None:
    preset = values(file)
    (preferred,) = preset["workers"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    (label,) = preferred["preference"]["matchExpressions"]
    spot = {label["key"]: label["values"][0]}
    pools.marked(preset["workers"])
    try:
        # The fewer GPUs are preferred all the same.
        for gpus, nodes in ((1, {pools.gpu, pools.more}), (GPUS, {pools.more})):
            pools.marked(preset["workers"], pools.more, gpus, spot)
            with installed(pools, file.stem, preset):
                placed = pools.placed(file.stem, 3)
                print(f"{file.stem}, {gpus} GPUs on spot: {placed}")
                assert placed == {"head": {pools.cpu}, "workers": nodes}
    finally:
        pools.closed()


def test_no_worker_gets_onto_a_pool_without_its_preset(pools: Pools) -> None:
    preset = values(next(file for file in PRESETS if file.stem == "gke"))
    pools.marked(preset["workers"])
    with installed(pools, "plain", {}):
        until("three pods", lambda: len(pools.pods("plain")) >= 3, SCHEDULED_S)
        time.sleep(10)
        waiting = [pod for pod in pools.pods("plain") if pod.spec.node_name is None]
        assert {pod.metadata.labels["app.kubernetes.io/component"] for pod in waiting} == {"workers"}
        (condition,) = [item for item in waiting[0].status.conditions if item.type == "PodScheduled"]
        print(condition.message)
        assert "untolerated taint" in condition.message


def offer_devices(pools: Pools) -> None:
    """Create the devices that a driver would report for the GPU node, and the project's claim for them."""
    devices = [{"name": f"gpu-{i}", "capacity": {"memory": {"value": "24Gi"}}} for i in range(GPUS)]
    offered = {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceSlice",
        "metadata": {"name": "gpus"},
        "spec": {
            "driver": "gpu.nvidia.com",
            "nodeName": pools.gpu,
            "pool": {"name": pools.gpu, "generation": 1, "resourceSliceCount": 1},
            "devices": devices,
        },
    }
    objects = {"apiVersion": "v1", "kind": "List", "items": [DEVICES, offered]}
    pools.cluster.kubectl("apply", "--filename", "-", stdin=json.dumps(objects))
    pools.cluster.kubectl("apply", "--filename", REPOSITORY / "k8s" / "node-pools" / "dra.yaml")
