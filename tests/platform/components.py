"""Components beside KubeRay, for the tests: Argo CD, Kueue, and a server of Git and charts, built from source."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.cluster import Cluster, base_image, tools
from tests.e2e.cluster.cache import digest, locked, product
from tests.e2e.cluster.images import engine_run, image_exists
from tests.e2e.cluster.process import run, say
from tests.e2e.cluster.programs import SOURCES, compiled, module_folder, version
from tests.e2e.world import until
from tests.support.limits import HANG_S

CONTAINERFILE = SOURCES / "platform.Containerfile"
PROGRAMS: dict[str, Sequence[str]] = {"argocd": ("argocd", "helm"), "redis": (), "forge": (), "kueue": ("kueue",)}
BUILD_SECONDS = HANG_S
READY_SECONDS = HANG_S


def build() -> None:
    """Build everything that is slow to build."""
    for target in PROGRAMS:
        image(target)
    argocd_manifests()
    kueue_manifests()


def image(target: str) -> str:
    """Return the name of an image; build it unless one of the same inputs exists."""
    programs = [compiled(name) for name in PROGRAMS[target]]
    repository = f"localhost/platform-{target}"
    name = f"{repository}:{digest(target, CONTAINERFILE, *(path.parent.name for path in programs))}"
    with locked(f"platform-{target}"):
        if not image_exists(name):
            base_image()
            say(f"building {name} …")
            with tempfile.TemporaryDirectory() as context:
                for path in programs:
                    shutil.copy2(path, context)
                options = ("--quiet", "--network=host", "--file", CONTAINERFILE, "--target", target, "--tag", name)
                engine_run("build", *options, context, timeout=BUILD_SECONDS)
        for other in engine_run("images", "--format", "{{.Repository}}:{{.Tag}}", repository).split():
            if other.startswith(f"{repository}:") and other != name:
                engine_run("rmi", other, check=False)
    return name


def argocd_manifests() -> Path:
    """Return the file with Argo CD's core install, as its module ships it."""
    return _manifests("argocd", Path("manifests/core-install.yaml"))


def kueue_manifests() -> Path:
    """Return the file with Kueue's manifests, as its module ships them."""
    return _manifests("kueue", Path("config"))


def _manifests(name: str, shipped: Path) -> Path:
    overlay = SOURCES / name
    key = digest(version(name), tools()["kubectl"].parent.name, overlay)

    def make(partial: Path) -> None:
        # Copied, because kustomize takes nothing by its absolute path, and no single file from outside its folder.
        build = partial / "build"
        shutil.copytree(overlay, build / name)
        source = module_folder(name) / shipped
        if source.is_dir():
            shutil.copytree(source, build / source.name)
        else:
            shutil.copy(source, build / name)
        run("chmod", "-R", "u+w", build)  # Go keeps its modules read-only.
        (partial / "manifests.yaml").write_text(run(tools()["kubectl"], "kustomize", build / name))
        shutil.rmtree(build)

    return product(f"{name}-manifests", key, make) / "manifests.yaml"


def apply(cluster: Cluster, manifests: Path, **images: str) -> None:
    """Load the images and apply manifests, with `localhost/NAME:test` replaced by their names."""
    text = manifests.read_text()
    for name, built in images.items():
        cluster.load_image(built)
        assert f"localhost/{name}:test" in text
        text = text.replace(f"localhost/{name}:test", built)
    # Client-side apply keeps a copy of each object in an annotation, and the CRDs are too large for one.
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "--filename=-", stdin=text, timeout=HANG_S)


def rolled_out(cluster: Cluster, namespace: str, *names: str) -> None:
    """Wait for rollouts."""
    for name in names:
        wait = (f"--namespace={namespace}", f"--timeout={READY_SECONDS}s")
        cluster.kubectl("rollout", "status", name, *wait, timeout=READY_SECONDS + 20)


def argocd(cluster: Cluster, patch: Path) -> None:
    """Install Argo CD's core install and patch its configuration as the project's README says."""
    apply(cluster, argocd_manifests(), argocd=image("argocd"), redis=image("redis"))
    crd = ("customresourcedefinition/appprojects.argoproj.io", "--for=condition=Established", f"--timeout={HANG_S}s")
    cluster.kubectl("wait", *crd, timeout=HANG_S)
    cluster.kubectl("apply", "--filename", SOURCES / "argocd" / "project.yaml")
    cluster.kubectl("patch", "configmap", "argocd-cm", "--namespace=argocd", "--patch-file", patch)
    rolled_out(
        cluster,
        "argocd",
        "deployment/argocd-redis",
        "deployment/argocd-repo-server",
        "statefulset/argocd-application-controller",
        "deployment/argocd-applicationset-controller",
    )


def kueue(cluster: Cluster) -> None:
    """Install Kueue and wait until its webhooks answer."""
    apply(cluster, kueue_manifests(), kueue=image("kueue"))
    rolled_out(cluster, "kueue-system", "deployment/kueue-controller-manager")
    probe = json.dumps(
        {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": "ResourceFlavor", "metadata": {"name": "probe"}}
    )

    def answers() -> bool:
        printed = cluster.kubectl("create", "--dry-run=server", "--filename=-", stdin=probe, check=False)
        return "created" in printed

    until("Kueue's webhooks answer", answers, READY_SECONDS, every=2)


if __name__ == "__main__":
    build()
