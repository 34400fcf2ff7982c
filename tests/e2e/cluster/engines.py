"""Sources and engines of images: upstream images if a registry answers, else images built here."""

from __future__ import annotations

import functools
import os
import shutil
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.cluster.cache import ROOT, locked
from tests.e2e.cluster.process import CommandError, run, say

# The registries that a cluster with KubeRay pulls from.
REGISTRIES = ("https://registry-1.docker.io/v2/", "https://quay.io/v2/")
DEBIAN_PACKAGES = (
    "podman",
    "aardvark-dns",
    "ca-certificates",
    "conntrack",
    "debootstrap",
    "iproute2",
    "iptables",
    "netavark",
    "runc",
    "uidmap",
)
DEBIAN_COMMANDS = ("podman", "debootstrap", "runc", "iptables", "conntrack")


@dataclass(frozen=True)
class Engine:
    """A container engine, the variables that it runs with, and whether upstream images can be had."""

    command: str
    upstream: bool
    env: dict[str, str] = field(default_factory=dict)


@functools.cache
def engine() -> Engine:
    """Picks by what is found here; CLUSTER_IMAGES=upstream or =source decides it by hand."""
    command, why = upstream()
    if command:
        say(f"using upstream images with {command}")
        return Engine(command, True, {"KIND_EXPERIMENTAL_PROVIDER": command})
    say(f"building images from source: {why}")
    return _podman()


def upstream() -> tuple[str | None, str]:
    """Returns the engine that upstream images can be had with, or none and why; installs nothing."""
    choice = os.environ.get("CLUSTER_IMAGES", "auto")
    if choice not in ("auto", "upstream", "source"):
        raise CommandError(f"CLUSTER_IMAGES is {choice!r}; it can be auto, upstream or source")
    if choice == "source":
        return None, "CLUSTER_IMAGES=source"
    command = next(filter(_works, ("docker", "podman")), None)
    missing = [url for url in REGISTRIES if not _answers(url)] if command else []
    if command and not missing:
        return command, ""
    why = f"no answer from {', '.join(missing)}" if command else "neither docker nor podman runs here"
    if choice == "upstream":
        raise CommandError(f"upstream images cannot be used: {why}")
    return None, why


def _works(command: str) -> bool:
    if not shutil.which(command):
        return False
    try:
        # A client without its daemon fails here, too.
        run(command, "info", timeout=30)
    except CommandError:
        return False
    return True


def _answers(url: str) -> bool:
    """Says whether a registry answers; 401 is the answer of one that wants a token, which pulling gets by itself."""
    try:
        with urllib.request.urlopen(url, timeout=5, context=ssl.create_default_context()) as reply:  # noqa: S310
            return bool(reply.status == 200)
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False


def _podman() -> Engine:
    """Installs podman where it is missing, and sets it up for hosts that cannot raise their resource limits."""
    _install_packages()
    # kind mounts this folder; a host whose drivers are all built in has none.
    Path("/lib/modules").mkdir(exist_ok=True)
    text = """\
[containers]
# The host's limits: podman's own are higher, and raising limits can be forbidden.
default_ulimits = []
# A node's processes are those of all its pods.
pids_limit = 0

[engine]
# Unlike crun, it starts containers on hosts that mount both versions of cgroups.
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
    config = ROOT / "containers.conf"
    with locked("containers.conf"):
        if not config.is_file() or config.read_text() != text:
            config.write_text(text)
    # A variable, so that nothing changes for other users of podman.
    env = {"CONTAINERS_CONF": str(config), "KIND_EXPERIMENTAL_PROVIDER": "podman"}
    return Engine("podman", False, env)


def missing_commands() -> list[str]:
    """Returns which commands are missing that images are built from source with."""
    return [command for command in DEBIAN_COMMANDS if not shutil.which(command)]


def _install_packages() -> None:
    if not missing_commands():
        return
    packages = " ".join(DEBIAN_PACKAGES)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise CommandError(f"these Debian packages are needed (only root can use them for a kind node): {packages}")
    with locked("packages"):
        say(f"installing Debian packages: {packages}")
        env = {"DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "update", "--quiet=2", timeout=300)
        run("apt-get", "install", "--quiet=2", "--no-install-recommends", *DEBIAN_PACKAGES, timeout=900, env=env)
