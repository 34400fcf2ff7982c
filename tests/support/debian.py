"""Debian's packages, unpacked into a folder; nothing is installed."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.e2e.cluster.process import CommandError, run


def unpack(folder: Path, *packages: str, dependencies: bool = True) -> None:
    """Gets packages, those that they need and the system lacks too where wanted; needs root only for apt's lists.

    Raises:
        CommandError: Where there is no apt-get, or it has no such package.
    """
    if not shutil.which("apt-get"):
        raise CommandError(f"there is no apt-get to have {' '.join(packages)} by: install it, so that it is on PATH")
    archives = folder / "archives"
    (archives / "partial").mkdir(parents=True)
    run("apt-get", "update", "--quiet=2")
    if dependencies:
        wanted = ("install", "--quiet=2", "--yes", "--no-install-recommends", "--download-only")
        options = ("-o", f"Dir::Cache::archives={archives}")
        run("apt-get", *wanted, *options, *packages, env={"DEBIAN_FRONTEND": "noninteractive"})
    else:
        archives.chmod(0o755)
        run("apt-get", "download", "--quiet=2", *packages, cwd=archives)
    for package in sorted(archives.glob("*.deb")):
        run("dpkg-deb", "--extract", package, folder)
    shutil.rmtree(archives)
