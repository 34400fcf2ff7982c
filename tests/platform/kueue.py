"""Kueue's queues and the history of the jobs in them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import yaml

from tests.e2e.cluster.programs import REPOSITORY
from tests.e2e.runs import Kubernetes, Run
from tests.e2e.world import NAMESPACE, World, until

FOLDER = REPOSITORY / "k8s" / "kueue"
POOL = "karpenter.sh/capacity-type"
API = ("kueue.x-k8s.io", "v1beta2")


class Queue:
    """The project's example of queues in the cluster."""

    def __init__(self, world: World, kubernetes: Kubernetes) -> None:
        self._cluster = world.cluster
        self._kubernetes = kubernetes

    def set_up(self, pool: str, gpus: dict[str, int]) -> None:
        """Applies the examples, with the quotas of a small node.

        Args:
            pool: What the only node is labelled as.
            gpus: The quota of each flavor.
        """
        self._cluster.kubectl("label", "node", self._cluster.node, f"{POOL}={pool}", "--overwrite")
        objects = list(yaml.safe_load_all((FOLDER / "queues.yaml").read_text()))
        (queue,) = [item for item in objects if item["kind"] == "ClusterQueue"]
        (group,) = [item for item in queue["spec"]["resourceGroups"] if "nvidia.com/gpu" in item["coveredResources"]]
        assert [flavor["name"] for flavor in group["flavors"]] == list(gpus)
        for flavor in group["flavors"]:
            flavor["resources"][0]["nominalQuota"] = gpus[flavor["name"]]
        queue["spec"]["stopPolicy"] = "None"  # An earlier test may have held it.
        self._apply(yaml.safe_dump_all(objects))
        self._apply((FOLDER / "priorities.yaml").read_text())
        until("the queue is active", lambda: self._active(), 60)

    def hold(self, policy: str) -> None:
        """Stops admitting, with `Hold`; goes on with `None`."""
        patch = f'{{"spec": {{"stopPolicy": "{policy}"}}}}'
        self._cluster.kubectl("patch", "clusterqueue", "batch-inference", "--type=merge", "--patch", patch)

    def workload(self, run: Run) -> dict[str, Any]:
        """What Kueue has made of a run."""

        def found() -> dict[str, Any] | None:
            for item in self._kubernetes.custom.list_namespaced_custom_object(*API, NAMESPACE, "workloads")["items"]:
                owners = item["metadata"].get("ownerReferences", [])
                if run.name in [owner["name"] for owner in owners]:
                    return dict(item)
            return None

        return until(f"a workload of {run.name}", found, 60)

    def condition(self, run: Run, kind: str) -> dict[str, str]:
        """A condition of a run's workload; empty if it has none."""
        conditions = self.workload(run).get("status", {}).get("conditions", [])
        return next((item for item in conditions if item["type"] == kind), {})

    def until_admitted(self, run: Run, seconds: float = 120) -> None:
        """Waits until a run may start."""
        until(f"{run.name} is admitted", lambda: self.condition(run, "Admitted").get("status") == "True", seconds)

    def until_waiting(self, run: Run) -> str:
        """Waits until a run is told to wait; returns why."""

        def why() -> str | None:
            reserved = self.condition(run, "QuotaReserved")
            return reserved.get("message") if reserved.get("status") == "False" else None

        return until(f"{run.name} waits", why, 60)

    def flavors(self, run: Run) -> dict[str, dict[str, str]]:
        """The flavor of each resource, by set of pods."""
        admission = self.workload(run)["status"]["admission"]
        return {item["name"]: item["flavors"] for item in admission["podSetAssignments"]}

    def history(self, *runs: Run, reasons: tuple[str, ...]) -> list[tuple[datetime, str, str]]:
        """Kueue's events on runs and their workloads, oldest first: when, which release, why."""
        releases = {}
        for run in runs:
            there = run.object["metadata"]
            for uid in (there["uid"], self.workload(run)["metadata"]["uid"]):
                releases[uid] = there["labels"]["app.kubernetes.io/instance"]
        found = []
        for event in self._kubernetes.core.list_namespaced_event(NAMESPACE).items:
            # By uid, for a run of an earlier use of a cluster that was kept has the same name.
            release = releases.get(event.involved_object.uid)
            if release and event.reason in reasons:
                moment = event.event_time or event.first_timestamp or event.metadata.creation_timestamp
                found.append((moment, release, event.reason))
        return sorted(found)

    def _active(self) -> bool:
        """Whether Kueue has taken up the ClusterQueue, as it is now."""
        item = self._kubernetes.custom.get_cluster_custom_object(*API, "clusterqueues", "batch-inference")
        return any(
            condition["type"] == "Active"
            and condition["status"] == "True"
            and condition.get("observedGeneration", 0) == item["metadata"]["generation"]
            for condition in item.get("status", {}).get("conditions", [])
        )

    def _apply(self, text: str) -> None:
        self._cluster.kubectl("apply", "--server-side", "--force-conflicts", "--filename=-", stdin=text)


def print_history(history: list[tuple[datetime, str, str]]) -> None:
    """Print the events, with seconds since the first."""
    for moment, name, reason in history:
        print(f"  {(moment - history[0][0]).total_seconds():6.1f} s  {name}: {reason}")
