"""A kind cluster with the KubeRay operator in it: made, looked into and removed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.e2e.cluster import layers
from tests.e2e.cluster.cache import digest, locked, prune, record
from tests.e2e.cluster.engines import engine
from tests.e2e.cluster.images import (
    OPERATOR_NAMESPACE,
    base_image,
    engine_run,
    image_exists,
    node_image,
    operator_manifests,
)
from tests.e2e.cluster.process import CommandError, kill, run, say
from tests.e2e.cluster.programs import REPOSITORY, SOURCES, tool, version
from tests.support.limits import HANG_S

CONFIG = REPOSITORY / "k8s" / "kind.yaml"
CHART = "https://ray-project.github.io/kuberay-helm/"
# Limits are for what hangs: ten times what a busy machine needs.
READY_SECONDS = HANG_S
LOAD_SECONDS = 2 * HANG_S
COMMAND_SECONDS = HANG_S
LABEL = "batch-inference-test-inputs"


def _yaml(file: Path) -> Any:
    # Imported here, since `make test` asks this package about the machine before anything is installed.
    import yaml

    return yaml.safe_load(file.read_text())


def tools() -> dict[str, Path]:
    """Returns the clients that tests use, by name."""
    return {name: tool(name, from_path=engine().upstream) for name in ("kind", "kubectl", "helm")}


def _folders() -> list[str]:
    """Returns what PATH needs for the clients to be found by their names."""
    return list(dict.fromkeys(str(path.parent) for path in tools().values()))


def build() -> None:
    """Makes everything that is slow, so that `up` is not."""
    tools()
    base_image()
    if engine().upstream:
        for node in _yaml(CONFIG)["nodes"]:
            there = image_exists(node["image"])
            record("node-image", hit=there)
            if not there:
                say(f"pulling {node['image']} …")
                engine_run("pull", node["image"], timeout=LOAD_SECONDS)
    else:
        node_image()
        operator_manifests()
    for folder in prune():
        say(f"removed {folder}: not wanted for two weeks")


def _merged(base: Any, extra: Any) -> Any:
    """Adds one configuration to another: mappings by key, lists at the end."""
    if isinstance(base, dict) and isinstance(extra, dict):
        return {key: _merged(base.get(key), extra.get(key)) for key in {**base, **extra}}
    if isinstance(base, list) and isinstance(extra, list):
        return base + extra
    return base if extra is None else extra


@dataclass(frozen=True)
class Cluster:
    """A cluster by name, and the file that clients reach it with."""

    name: str
    kubeconfig: Path
    workers: int = 0

    @property
    def node(self) -> str:
        """The first node, and the container that it is; it takes pods, whether there are others or not."""
        return f"{self.name}-control-plane"

    @property
    def nodes(self) -> list[str]:
        """All nodes. Networks do not cross them where the node image is ours, so that only scheduling can be tried there."""
        return [
            self.node,
            *[f"{self.name}-worker{'' if place == 1 else place}" for place in range(1, self.workers + 1)],
        ]

    @property
    def env(self) -> dict[str, str]:
        """The variables with which kubectl and helm, and programs that call them, reach this cluster."""
        path = os.pathsep.join([*_folders(), os.environ.get("PATH", "")])
        # What kubectl remembers of an API server it files by port, and a later cluster may have the same one.
        cache = str(self.kubeconfig.with_name("kubectl-cache"))
        return {"PATH": path, "KUBECONFIG": str(self.kubeconfig), "KUBECACHEDIR": cache}

    def kubectl(
        self, *arguments: str | Path, timeout: float = COMMAND_SECONDS, stdin: str | None = None, check: bool = True
    ) -> str:
        """Runs kubectl on this cluster."""
        return run(tools()["kubectl"], *arguments, env=self.env, timeout=timeout, stdin=stdin, check=check)

    def helm(self, *arguments: str | Path, timeout: float = READY_SECONDS, check: bool = True) -> str:
        """Runs helm on this cluster."""
        return run(tools()["helm"], *arguments, env=self.env, timeout=timeout, check=check)

    def in_node(self, *command: str, timeout: float = COMMAND_SECONDS) -> str:
        """Runs a command in the node."""
        return engine_run("exec", self.node, *command, timeout=timeout)

    def up(self, gpus: int = 2, evidence: Path | None = None) -> None:
        """Makes the cluster, or keeps the one of this name if it was made of the same inputs and still answers.

        Args:
            gpus: how many GPUs the node claims to have.
            evidence: where to write what is known about a cluster that did not start.
        """
        if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
            raise CommandError(f"{self.name!r} cannot name a cluster: 1 to 40 of a-z, 0-9 and -, none at the ends")
        build()
        with locked(f"cluster-{self.name}"):
            inputs = self._inputs()
            if self._made_of() == inputs:
                say(f"{self.name} is up already")
            else:
                self._delete()
                try:
                    self._create()
                    self._install_operator()
                    self.kubectl("annotate", "node", self.node, f"{LABEL}={inputs}", "--overwrite")
                except BaseException:
                    # A cluster that is half there is of no use to anybody, but what it says is.
                    if evidence:
                        self.evidence(evidence)
                    self._delete()
                    raise
            self.advertise_gpus(gpus)
        say(f"{self.name} is up: export KUBECONFIG={self.kubeconfig}")

    def down(self) -> None:
        """Removes the cluster and its kubeconfig, if they are there."""
        with locked(f"cluster-{self.name}"):
            self._delete()

    def advertise_gpus(self, count: int, resource: str = "nvidia.com/gpu", node: str = "") -> None:
        """Gives a node, by default the first, GPUs that exist only for the scheduler: pods that ask for them are placed, and find none.

        It lasts until the kubelet restarts.
        """
        # The kubelet copies capacity to what can be allocated, but seconds later.
        paths = [f"/status/{total}/{resource.replace('/', '~1')}" for total in ("capacity", "allocatable")]
        patch = json.dumps([{"op": "add", "path": path, "value": str(count)} for path in paths])
        self.kubectl("patch", "node", node or self.node, "--subresource=status", "--type=json", "--patch", patch)

    def load_image(self, image: str) -> None:
        """Copies an image from the engine into the node, unless it is there; pods then name it by the same name."""
        registry = image.split("/")[0]
        if "/" not in image or not (registry == "localhost" or "." in registry or ":" in registry):
            raise CommandError(
                f"{image!r} has no registry; pods and engines complete such names differently: localhost/{image}"
            )
        identity = engine_run("image", "inspect", "--format", "{{.Id}}", image).strip().removeprefix("sha256:")
        label = f"{LABEL}={identity}"
        ctr = ("ctr", "--namespace", "k8s.io", "images")
        if label in self.in_node(*ctr, "list", f"name=={image}"):
            say(f"{self.name} has {image} already")
            return
        say(f"loading {image} into {self.name} …")
        shareable = layers.find(image)
        if shareable:
            # A container that never runs, so that the engine keeps the layers that the node uses.
            keeper = f"{self.name}-keeps-{identity[:12]}"
            engine_run("rm", "--force", keeper, check=False)
            engine_run("create", "--name", keeper, "--label", f"{LABEL}={self.name}", "--network=none", image)
            layers.share(shareable, self.node)
        else:
            with _output_of(engine().command, "save", image) as archive:
                command = (engine().command, "exec", "--interactive", self.node, *ctr, "import", "-")
                run(*command, env=engine().env, stdin=archive, timeout=LOAD_SECONDS)
        self.in_node(*ctr, "label", image, label)

    def evidence(self, folder: Path) -> None:
        """Writes what is known about the cluster to a folder; what cannot be had is left out, with the reason in its file."""
        say(f"writing evidence on {self.name} to {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        kubectl = (tools()["kubectl"], "--request-timeout=20s")
        kinds = "all,configmaps,jobs,rayjobs,rayclusters,events"
        inside = (engine().command, "exec", self.node)
        # Pods' logs are read from the node's disk, where those of pods that are gone may still be.
        ray = "find /var/lib/kubelet/pods -path '*/session_*/logs/*' -type f -size -20M -print0"
        commands: dict[str, tuple[str | Path, ...]] = {
            "engine.txt": (engine().command, "ps", "--all"),
            "node.log": (engine().command, "logs", self.node),
            "journal.log": (*inside, "journalctl", "--no-pager", "--lines=20000"),
            "resources.txt": (*kubectl, "get", "nodes,pods", "--all-namespaces", "--output=wide"),
            "events.txt": (*kubectl, "get", "events", "--all-namespaces", "--sort-by=.lastTimestamp"),
            "describe.txt": (*kubectl, "describe", "nodes,pods,rayjobs,rayclusters", "--all-namespaces"),
            "objects.yaml": (*kubectl, "get", kinds, "--all-namespaces", "--output=yaml"),
            "operator.log": (*kubectl, "logs", "--namespace", OPERATOR_NAMESPACE, "deployment/kuberay-operator"),
            "pods.tar": (*inside, "tar", "--create", "--directory=/var/log", "--dereference", "pods"),
            "ray.tar": (*inside, "bash", "-c", f"{ray} | tar --create --null --files-from=-"),
        }
        for name, command in commands.items():
            with (folder / name).open("wb") as file:
                try:
                    file.write(
                        run(*command, env={**engine().env, **self.env}, stdout=file, timeout=30, check=False).encode()
                    )
                except (CommandError, OSError) as error:
                    file.write(str(error).encode())

    def _kind(self, *arguments: str | Path, timeout: float, stdin: str | None = None) -> str:
        command = (tools()["kind"], *arguments, "--name", self.name)
        return run(*command, env=engine().env, timeout=timeout, stdin=stdin)

    def _inputs(self) -> str:
        if engine().upstream:
            return digest("upstream", version("kuberay-operator"), CONFIG)
        return digest(node_image(), operator_manifests(), CONFIG, SOURCES / "kind.yaml", json.dumps(layers.mounts()))

    def _made_of(self) -> str:
        """Returns the digest of what the cluster was made of, once all of it was there; nothing if it does not answer."""
        if not self.kubeconfig.is_file():
            return ""
        path = "{.metadata.annotations." + LABEL.replace(".", r"\.") + "}"
        query = ("get", "node", self.node, "--output", f"jsonpath={path}", "--request-timeout=120s")
        try:
            return self.kubectl(*query).strip()
        except CommandError:
            return ""

    def _create(self) -> None:
        config = _yaml(CONFIG)
        config["nodes"] += [{**config["nodes"][0], "role": "worker"} for _ in range(self.workers)]
        arguments: tuple[str | Path, ...] = ("--kubeconfig", self.kubeconfig, "--wait", f"{READY_SECONDS}s", "--retain")
        if not engine().upstream:
            config = _merged(config, _yaml(SOURCES / "kind.yaml"))
            config["nodes"] = [_merged(node, {"extraMounts": layers.mounts()}) for node in config["nodes"]]
            arguments += ("--image", node_image())
        self.kubeconfig.parent.mkdir(parents=True, exist_ok=True)
        say(f"creating {self.name} …")
        self._kind(
            "create", "cluster", "--config", "-", *arguments, timeout=2 * READY_SECONDS, stdin=json.dumps(config)
        )
        if self.workers:
            self.kubectl("taint", "node", self.node, "node-role.kubernetes.io/control-plane-")

    def _install_operator(self) -> None:
        # An operator that starts before service addresses work ends at once, and is kept waiting for its second start.
        self._rolled_out("kube-system", "daemonset/kube-proxy")
        say(f"installing KubeRay {version('kuberay-operator')} …")
        if engine().upstream:
            chart = ("kuberay-operator", "--repo", CHART, "--version", version("kuberay-operator").removeprefix("v"))
            namespace = ("--namespace", OPERATOR_NAMESPACE, "--create-namespace")
            self.helm("install", "kuberay-operator", *chart, *namespace, timeout=READY_SECONDS)
        else:
            # Client-side apply keeps a copy of each object in an annotation, and the CRDs are too large for one.
            self.kubectl("apply", "--server-side", "--filename", operator_manifests())
            # One DNS server is enough here; two would ask for a tenth of the CPUs of a small machine.
            container = {"name": "coredns", "resources": {"requests": {"cpu": "25m"}}}
            spec = {"replicas": 1, "template": {"spec": {"containers": [container]}}}
            patch = json.dumps({"spec": spec})
            self.kubectl("patch", "deployment", "coredns", "--namespace", "kube-system", "--patch", patch)
        self._rolled_out("kube-system", "deployment/coredns")
        self._rolled_out(OPERATOR_NAMESPACE, "deployment/kuberay-operator")

    def _rolled_out(self, namespace: str, name: str) -> None:
        self.kubectl(
            "rollout",
            "status",
            name,
            "--namespace",
            namespace,
            f"--timeout={READY_SECONDS}s",
            timeout=READY_SECONDS + 60,
        )

    def _delete(self) -> None:
        # Nothing in the node is worth an orderly end, which takes ten seconds.
        engine_run("kill", *self.nodes, check=False)
        # Also after an interrupted start: kind finds a cluster by the labels of its containers.
        self._kind("delete", "cluster", "--kubeconfig", self.kubeconfig, timeout=READY_SECONDS)
        kept = engine_run("ps", "--all", "--quiet", "--filter", f"label={LABEL}={self.name}").split()
        if kept:
            engine_run("rm", "--force", *kept)
        self.kubeconfig.unlink(missing_ok=True)
        shutil.rmtree(self.env["KUBECACHEDIR"], ignore_errors=True)


@contextlib.contextmanager
def _output_of(*command: str) -> Iterator[IO[bytes]]:
    """Runs a command beside the caller, who reads its output; its failure is raised at the end."""
    process = subprocess.Popen(
        command, env={**os.environ, **engine().env}, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout
    try:
        yield process.stdout
        process.stdout.close()
        if process.wait(timeout=60) != 0:
            raise CommandError(f"exit {process.returncode}: {' '.join(command)}")
    finally:
        kill(process)
