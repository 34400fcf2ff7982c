"""Images built from source: Debian's base image, what runs in the cluster, and the kind node."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.cluster.cache import digest, locked, product
from tests.e2e.cluster.engines import engine
from tests.e2e.cluster.process import CommandError, run
from tests.e2e.cluster.programs import NODE_PROGRAMS, SOURCES, SYSTEM_PROGRAMS, compiled, module_folder, version
from tests.support.limits import HANG_S

BASE = "debian:bookworm-slim"
NODE_IMAGE = "localhost/kind-node"
OPERATOR_NAMESPACE = "kuberay-system"
BUILD_SECONDS = 2 * HANG_S
SAVE_SECONDS = HANG_S
COMMAND_SECONDS = HANG_S


def engine_run(
    *arguments: str | Path, timeout: float = COMMAND_SECONDS, check: bool = True, stdin: str | None = None
) -> str:
    """Runs the container engine."""
    return run(engine().command, *arguments, timeout=timeout, env=engine().env, check=check, stdin=stdin)


def image_exists(image: str) -> bool:
    """Says whether the engine has an image."""
    try:
        engine_run("image", "inspect", "--format", "{{.Id}}", image)
    except CommandError:
        return False
    return True


def _debian() -> Path:
    script = SOURCES / "debian-rootfs"

    def make(partial: Path) -> None:
        run(script, partial / "rootfs.tar", timeout=BUILD_SECONDS)

    return product("debian", digest(script), make)


def base_image() -> str:
    """Makes sure that `FROM debian:bookworm-slim` works, and returns that name."""
    if not engine().upstream and not image_exists(BASE):
        archive = _debian() / "rootfs.tar"
        engine_run("import", "--change", 'CMD ["bash"]', archive, f"docker.io/library/{BASE}", timeout=SAVE_SECONDS)
    return BASE


def _system_images(kubeadm: Path) -> dict[str, str]:
    """Maps the names that kubeadm gives to its images, and KubeRay to its own, to the programs in them."""
    listed = run(kubeadm, "config", "images", "list", "--kubernetes-version", version("kubeadm"), timeout=60)
    names = [line for line in listed.splitlines() if line.startswith("registry.k8s.io/")]
    images = {name: name.rsplit("/", 1)[1].split(":")[0] for name in names}
    images[f"quay.io/kuberay/operator:{version('kuberay-operator')}"] = "kuberay-operator"
    if sorted(images.values()) != sorted(SYSTEM_PROGRAMS):
        raise CommandError(f"kubeadm wants other images than are built here: {listed}")
    return images


def _link(programs: Sequence[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for program in programs:
        (folder / program.name).hardlink_to(program)


def _build(tag: str, containerfile: str, context: Path, *arguments: str) -> None:
    command = ("build", "--quiet", "--network", "host", "--tag", tag, "--file", SOURCES / containerfile)
    engine_run(*command, *arguments, context, timeout=BUILD_SECONDS)


def _save(images: Sequence[str], archive: Path) -> None:
    engine_run("save", "--quiet", "--multi-image-archive", "--output", archive, *images, timeout=SAVE_SECONDS)


def _system(images: dict[str, str], programs: Sequence[Path]) -> Path:
    """Returns the folder with the archive of the images that run in the cluster."""
    key = digest("system", repr(images), *(path.parent.name for path in programs), SOURCES / "system.Containerfile")

    def make(partial: Path) -> None:
        base_image()
        context = partial / "context"
        _link(programs, context)
        for name, program in images.items():
            _build(name, "system.Containerfile", context, "--target", program)
        _save(list(images), partial / "system.tar")
        # Only the archive is needed: the node imports it when it starts.
        engine_run("rmi", "--force", *images)
        shutil.rmtree(context)

    return product("system-images", key, make)


@functools.cache
def node_image() -> str:
    """Returns the name of the kind node image, built or loaded into podman if it is not there."""
    system_programs = [compiled(name) for name in SYSTEM_PROGRAMS]
    node_programs = [compiled(name) for name in NODE_PROGRAMS]
    images = _system_images(node_programs[NODE_PROGRAMS.index("kubeadm")])
    system = _system(images, system_programs)
    sources = (SOURCES / "node.Containerfile", SOURCES / "node")
    key = digest("node", system.name, *(path.parent.name for path in node_programs), *sources)
    name = f"{NODE_IMAGE}:{version('kubelet')}-{key}"

    def make(partial: Path) -> None:
        base_image()
        context = partial / "context"
        shutil.copytree(SOURCES / "node", context / "node")
        _link(node_programs, context / "bin")
        _link([system / "system.tar"], context / "images")
        pause = next(image for image, program in images.items() if program == "pause")
        arguments = [f"KUBERNETES_VERSION={version('kubelet')}", f"PAUSE_IMAGE={pause}"]
        _build(name, "node.Containerfile", context, *(word for value in arguments for word in ("--build-arg", value)))
        _save([name], partial / "node.tar")
        shutil.rmtree(context)

    archive = product("node-image", key, make) / "node.tar"
    with locked("node-image-load"):
        if not image_exists(name):
            engine_run("load", "--quiet", "--input", archive, timeout=SAVE_SECONDS)
        for other in engine_run("images", "--format", "{{.Repository}}:{{.Tag}}", NODE_IMAGE).split():
            if other != name:
                engine_run("rmi", other, check=False)  # It stays where a cluster runs on it.
    return name


@functools.cache
def operator_manifests() -> Path:
    """Returns the file with KubeRay's CRDs, roles and operator, as its module ships them."""
    kubectl = compiled("kubectl")
    patches = SOURCES / "kuberay"
    key = digest(version("kuberay-operator"), kubectl.parent.name, OPERATOR_NAMESPACE, patches)

    def make(partial: Path) -> None:
        # Copied, because kustomize takes no folder by its absolute path.
        build = partial / "build"
        shutil.copytree(module_folder("kuberay-operator") / "config", build / "config")
        shutil.copytree(patches, build / "kuberay")
        (partial / "operator.yaml").write_text(run(kubectl, "kustomize", build / "kuberay", timeout=60))
        run("chmod", "-R", "u+w", build, timeout=60)  # Go keeps its modules read-only.
        shutil.rmtree(build)

    return product("kuberay-manifests", key, make) / "operator.yaml"
