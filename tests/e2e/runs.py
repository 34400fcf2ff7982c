"""Helm releases of the charts, and what became of their runs, as a user would look for it."""

from __future__ import annotations

import base64
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, config

from tests.charts.render import merged
from tests.e2e.cluster.process import run
from tests.e2e.cluster.programs import REPOSITORY, tool
from tests.e2e.world import HANG_SECONDS, NAMESPACE, World, kind_values, until

RUN_SECONDS = HANG_SECONDS
ENDED = ("Complete", "Failed", "ValidationFailed")
# Values of a job that runs on the CPU, with the device that a GPU job has.
WITHOUT_GPUS = {"job": {"inference": {"actors": 1, "gpus_per_actor": 0, "device": "auto"}}}
# Pods so small that jobs of three tests fit on a node of two CPUs and 23 GiB; what Ray schedules on stays as it is.
SMALL: dict[str, Any] = {
    "cpuOvercommit": 16,
    "head": {"memoryGiB": 3},
    "workers": {"actorMemoryGiB": 1, "taskMemoryGiB": 0.5},
}
Values = dict[str, Any]


class Kubernetes:
    """The objects in the jobs' namespace, by the official client."""

    def __init__(self, kubeconfig: Path) -> None:
        api = config.new_client_from_config(str(kubeconfig))
        self.core = client.CoreV1Api(api)
        self.batch = client.BatchV1Api(api)
        self.custom = client.CustomObjectsApi(api)

    def ray(self, plural: str, *releases: str) -> list[dict[str, Any]]:
        """RayJobs or RayClusters of some releases, by default of all."""
        selector = f"app.kubernetes.io/instance in ({','.join(releases)})" if releases else ""
        found = self.custom.list_namespaced_custom_object("ray.io", "v1", NAMESPACE, plural, label_selector=selector)
        return list(found["items"])

    def names(self, plural: str, *releases: str) -> set[str]:
        """Return the names of RayJobs or RayClusters of some releases, by default of all."""
        return {item["metadata"]["name"] for item in self.ray(plural, *releases)}

    def pods(self, selector: str = "") -> list[Any]:
        """Pods by their labels."""
        return list(self.core.list_namespaced_pod(NAMESPACE, label_selector=selector).items)

    def dashboard(self, service: str, path: str) -> Any:
        """Return the answer of Ray's dashboard through the API server, once the head is ready."""

        def answer() -> Any:
            self.core.api_client.set_default_header("X-Ray-Authorization", f"Bearer {self.token(service)}")
            try:
                reply: Any = self.core.connect_get_namespaced_service_proxy_with_path(
                    f"{service}:8265", NAMESPACE, path, _preload_content=False
                )
            except client.ApiException as error:
                if error.status in (502, 503, 504):
                    return None
                raise
            return json.loads(reply.data)

        return until(f"{service} answers {path}", answer)

    def token(self, service: str) -> str:
        """The token that the operator has made for a head's cluster, as the head has it."""
        cluster = self.core.read_namespaced_service(service, NAMESPACE).spec.selector["ray.io/cluster"]
        secret = self.core.read_namespaced_secret(cluster, NAMESPACE)
        return base64.b64decode(secret.data["auth_token"]).decode()


@dataclass(frozen=True)
class Run:
    """One RayJob."""

    name: str
    kubernetes: Kubernetes

    @property
    def object(self) -> dict[str, Any]:
        """The RayJob as it is now."""
        found: dict[str, Any] = self.kubernetes.custom.get_namespaced_custom_object(
            "ray.io", "v1", NAMESPACE, "rayjobs", self.name
        )
        return found

    @property
    def status(self) -> dict[str, Any]:
        """Its status; empty before the operator has seen it."""
        status: dict[str, Any] = self.object.get("status") or {}
        return status

    @property
    def pods(self) -> list[Any]:
        """The pods of its cluster."""
        name = self.status.get("rayClusterName")
        return self.kubernetes.pods(f"ray.io/cluster={name}") if name else []

    @property
    def submitters(self) -> list[Any]:
        """The submitter's pods, oldest first."""
        found = self.kubernetes.pods(f"job-name={self.name}")
        return sorted(found, key=lambda pod: pod.metadata.creation_timestamp)

    def log(self, pod: Any | None = None) -> str:
        """The log of a submitter's pod, by default the newest one's."""
        pod = pod or self.submitters[-1]
        return str(self.kubernetes.core.read_namespaced_pod_log(pod.metadata.name, NAMESPACE))

    def until_running(self) -> None:
        """Waits until Ray runs the job."""

        def running() -> bool:
            status = self.status
            assert status.get("jobDeploymentStatus") not in ENDED, status
            return status.get("jobStatus") == "RUNNING"

        until(f"{self.name} runs", running)

    def until_ended(self) -> dict[str, Any]:
        """Waits for the end and returns the status."""

        def ended() -> dict[str, Any] | None:
            status = self.status
            return status if status.get("jobDeploymentStatus") in ENDED else None

        return until(f"{self.name} ends", ended)

    def succeeded(self) -> dict[str, Any]:
        """Waits for the end, which must be a good one."""
        status = self.until_ended()
        assert status["jobStatus"] == "SUCCEEDED", status
        return status

    def until_cluster_is_gone(self) -> float:
        """Waits until nothing of its Ray cluster is left; returns the seconds that it took."""
        name = self.status["rayClusterName"]
        start = time.monotonic()

        def gone() -> bool:
            clusters = self.kubernetes.names("rayclusters")
            return name not in clusters and not self.kubernetes.pods(f"ray.io/cluster={name}")

        until(f"{name} goes", gone)
        return time.monotonic() - start


class Releases:
    """Installs, upgrades and removes the charts with helm."""

    def __init__(self, world: World, kubernetes: Kubernetes, folder: Path, values: Values | None = None) -> None:
        """Args: the world; its client; where values are written; what all releases get on top of those for kind."""
        self._world = world
        self._values = values or {}
        self._kubernetes = kubernetes
        self._folder = folder
        self.names: set[str] = set()
        self.printed: list[str] = []

    def rayjob(self, name: str, values: Values | None = None, output: str | None = None, *, helm: str = "helm") -> Run:
        """Installs or upgrades a job, and returns the run that its notes name.

        Args:
            name: The release.
            values: On top of those for kind.
            output: Where the rows go, by default a folder of the release's name.
            helm: `helm` for Helm 3, `helm4`.
        """
        base = {"job": {"output": {"uri": output or f"s3://images/out/{name}/"}}, "run": {"backoffLimit": 0}}
        all_values = merged(self._base(base), values or {})
        notes = self._upgrade("rayjob", name, all_values, helm)
        after = notes.split("### The run\n", 1)[1].strip()
        return Run(after.split(":", 1)[0], self._kubernetes)

    def schedule(self, name: str, values: Values) -> None:
        """Installs a job that runs by the clock."""
        self._upgrade("rayjob", name, merged(self._base({"run": {"backoffLimit": 0}}), values))

    def raycluster(self, name: str, values: Values) -> None:
        """Installs a cluster that jobs share, with the same small pods."""
        shared = {key: value for key, value in self._base({}).items() if key not in ("job", "submitter")}
        self._upgrade("raycluster", name, merged(shared, values))

    def uninstall(self, name: str) -> None:
        """Removes a release."""
        self.names.discard(name)
        self._world.cluster.helm("uninstall", name, "--namespace", NAMESPACE)

    def test(self, name: str) -> str:
        """Runs the tests that a release brings and returns what they printed."""
        return self._world.cluster.helm(
            "test", name, "--namespace", NAMESPACE, "--logs", "--timeout", f"{HANG_SECONDS}s", timeout=HANG_SECONDS + 60
        )

    def left(self, name: str) -> list[str]:
        """Return the objects of a release in the namespace."""
        selector = f"app.kubernetes.io/instance={name}"
        kinds = "pods,jobs,services,configmaps,serviceaccounts,rayjobs,rayclusters"
        arguments = ("get", kinds, "--namespace", NAMESPACE, "--selector", selector, "--output=name")
        return self._world.cluster.kubectl(*arguments).split()

    def admitted(self) -> dict[str, int]:
        """Return how often Pod Security has looked at a pod under "restricted", by the labels of its count: by what it would have done."""
        metrics = self._world.cluster.kubectl("get", "--raw", "/metrics")
        counts = re.findall(r"^pod_security_evaluations_total\{(.*)\} (\d+)", metrics, re.MULTILINE)
        return {labels: int(count) for labels, count in counts if 'policy_level="restricted"' in labels}

    def warnings(self) -> list[str]:
        """Return what admission has had against anything in the cluster, or Helm against a release of this process."""
        denied = [labels for labels in self.admitted() if 'decision="deny"' in labels]
        return denied + [text for text in self.printed if "arning:" in text.split("NOTES:")[0]]

    def _base(self, values: Values) -> Values:
        return merged(merged(kind_values(), self._values), values)

    def _upgrade(self, chart: str, name: str, values: Values, helm: str = "helm") -> str:
        repository, _, tag = self._world.image.rpartition(":")
        values = merged(values, {"image": {"repository": repository, "tag": tag}})
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(values))
        self.names.add(name)
        arguments = ("upgrade", "--install", name, REPOSITORY / "helm" / chart, "--namespace", NAMESPACE)
        program = tool(helm, from_path=False)
        printed = run(program, *arguments, "--values", file, env=self._world.cluster.env, timeout=HANG_SECONDS)
        self.printed.append(printed)
        return printed


PHOTOS, BROKEN = 20, 5
# A job with a class of the user's own, mounted from a ConfigMap; how long it takes does not depend on the machine.
SLOW: dict[str, Any] = {
    "job": {
        "input": {"uris": [], "manifest": "s3://images/many.csv"},
        "predictor": "slow:Slow",
        "inference": {"actors": 1, "batch_size": 4},
        "errors": {"max_percent": None},
    },
    "pods": {
        "env": [{"name": "PYTHONPATH", "value": "/opt/predictors"}],
        "volumes": [{"name": "predictors", "configMap": {"name": "slow-predictor"}}],
        "volumeMounts": [{"name": "predictors", "mountPath": "/opt/predictors"}],
    },
}


def verified(world: World, output: str, rows: int, errors: int) -> None:
    done = world.program("verify", output, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["ok"], found["finished"], found["rows"], found["errors"]) == (True, True, rows, errors)
