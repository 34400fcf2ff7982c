"""PySpark for the recipe that reads an output with it: too large to be a dependency of the tests, so it is kept in the cache."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import sys
from pathlib import Path

from tests.e2e.cluster.cache import digest, product
from tests.e2e.cluster.process import run
from tests.support import debian
from tests.support.servers import BIN

VERSION = "4.1.1"
JAVA = "openjdk-17-jre-headless"


@functools.cache
def variables() -> dict[str, str]:
    """Variables with which a Python program imports PySpark and finds a Java for it."""
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    root = product("pyspark", digest(VERSION, python), _install)
    found = {"PYTHONPATH": str(root)}
    if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        java = product("java", digest(JAVA, platform.machine()), _unpack_java)
        (home,) = (java / "usr/lib/jvm").glob("java-17-openjdk-*")
        found["JAVA_HOME"] = str(home)
    return found


def _install(folder: Path) -> None:
    uv = BIN.parent / ".tools" / "bin" / "uv"
    run(uv, "pip", "install", "--python", sys.executable, "--target", folder, f"pyspark=={VERSION}")


def _unpack_java(folder: Path) -> None:
    debian.unpack(folder, JAVA)
    # Its configuration is linked to where it would be installed.
    linked = {path: path.readlink() for path in folder.rglob("*") if path.is_symlink()}
    for path, target in linked.items():
        if target.parts[:2] == ("/", "etc"):
            path.unlink()
            path.symlink_to(os.path.relpath(folder / target.relative_to("/"), path.parent))
