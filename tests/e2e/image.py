"""The job image, built from docker/Dockerfile when its sources have changed."""

from __future__ import annotations

import functools
import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from tests.e2e.cluster import base_image
from tests.e2e.cluster.cache import digest, locked, record
from tests.e2e.cluster.images import engine_run, image_exists
from tests.e2e.cluster.process import CommandError, say
from tests.support.limits import HANG_S

ROOT = Path(__file__).parents[2]
REPOSITORY = "localhost/batch-inference"
# What the image is made from; the allow-list of the build context is among it.
SOURCES = (
    ROOT / "docker/Dockerfile",
    ROOT / "docker/Dockerfile.dockerignore",
    ROOT / "docker/sbom.py",
    ROOT / "docker/tools.lock",
    ROOT / "LICENSE",
    ROOT / "README.md",
    ROOT / "pyproject.toml",
    ROOT / "requirements.lock",
)
# The first time, three gigabytes are downloaded, and seven written twice.
BUILD_SECONDS = 2 * HANG_S


def image_name() -> str:
    """The name of the image that the sources make, as they are now."""
    program = [path for path in sorted((ROOT / "job/batch_inference").rglob("*")) if "__pycache__" not in path.parts]
    return f"{REPOSITORY}:{digest(*SOURCES, *program)}"


@functools.cache
def job_image() -> str:
    """Returns the name of the job image, built now if the engine does not have it."""
    with locked("job-image"):
        name = image_name()
        there = image_exists(name)
        record("job-image", hit=there)
        if not there:
            base_image()
            say(f"building {name} …")
            build_image(name)
        _remove_others(name)
    return name


def build_image(name: str, arguments: Mapping[str, str] | None = None, target: str | None = None) -> str:
    """Builds docker/Dockerfile, or one stage of it, with some build arguments, and returns what was printed."""
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    values = {"VERSION": version[1] if version else "", **_index(), **(arguments or {})}
    options = [word for key, value in values.items() for word in ("--build-arg", f"{key}={value}")]
    # Of the host, for proxies that sign what they pass on.
    bundle = ssl.get_default_verify_paths().cafile
    if bundle:
        options += ["--secret", f"id=ca,src={bundle}"]
    if (netrc := Path.home() / ".netrc").is_file():
        options += ["--secret", f"id=netrc,src={netrc}"]
    if target:
        options += ["--target", target]
    command = ("build", "--network", "host", "--file", ROOT / "docker/Dockerfile", "--tag", name)
    printed = engine_run(*command, *options, ROOT, timeout=BUILD_SECONDS)
    if not image_exists(name):
        # Podman reports success when a SIGTERM ends it.
        raise CommandError(f"the build of {name} was interrupted:\n{printed[-1000:]}")
    return printed


def _index() -> dict[str, str]:
    """The package index that this machine is set up for, if it is not PyPI itself."""
    url = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("PIP_INDEX_URL")
    if url and urlsplit(url).password:
        raise CommandError(
            "the package index's URL has a password, which would stay in the image: put it into ~/.netrc"
        )
    return {"INDEX_URL": url} if url else {}


def _remove_others(name: str) -> None:
    """Removes images of earlier sources, and after an hour what builds left: each has gigabytes."""
    for other in engine_run("images", "--format", "{{.Repository}}:{{.Tag}}", REPOSITORY).split():
        # Podman lists an image's other names, too.
        if other.startswith(f"{REPOSITORY}:") and other != name:
            engine_run("rmi", other, check=False)  # It stays where a container runs it.
    label = "label=org.opencontainers.image.title=ray-batch-inference"
    engine_run("image", "prune", "--force", "--filter", label, "--filter", "until=1h", check=False)


if __name__ == "__main__":
    print(job_image())
