"""Products that are slow to make, kept outside the checkout under a digest of everything they were made from."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.e2e.cluster.process import say

ROOT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray-batch-inference"


def digest(*inputs: str | Path) -> str:
    """Names a product: the digest of texts, of files, and of folders with everything in them."""
    total = hashlib.sha256()
    for item in inputs:
        files = [] if isinstance(item, str) else sorted(item.rglob("*")) if item.is_dir() else [item]
        parts = [item.encode()] if isinstance(item, str) else []
        for file in filter(Path.is_file, files):
            executable = os.access(file, os.X_OK)
            name = file.relative_to(item) if file != item else file.name
            parts += [f"{name} {executable}".encode(), file.read_bytes()]
        for part in parts:
            # Lengths keep two neighbours from being read as one.
            total.update(f"{len(part)} ".encode() + part)
        total.update(b"|")
    return total.hexdigest()[:16]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Lets one process at a time work on something; the lock goes with its process, however that ends."""
    ROOT.mkdir(parents=True, exist_ok=True)
    with (ROOT / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that works on {name}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def record(name: str, *, hit: bool) -> None:
    """Note whether a slow product was there already, for the table of `make test`, which names the file to write to."""
    if file := os.environ.get("CACHE_RECORD"):
        with Path(file).open("a") as lines:
            lines.write(f"{name} {'hit' if hit else 'miss'}\n")


def product(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """Returns the folder with a product, made now if it is not there.

    A product appears by a rename and so is never seen half made. What an interrupted run left is thrown away by the next.
    """
    final = ROOT / name / key
    record(name, hit=final.is_dir())
    if not final.is_dir():
        with locked(name):
            if not final.is_dir():
                partial = final.with_name(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                say(f"making {name} …")
                start = time.monotonic()
                make(partial)
                partial.rename(final)
                say(f"made {name} in {time.monotonic() - start:.0f} s")
    os.utime(final)  # When it was last wanted, for `prune`.
    return final


def prune(days: float = 14) -> list[Path]:
    """Removes products that nobody wanted for some days: those of older inputs."""
    oldest = time.time() - days * 86400
    removed = []
    for folder in ROOT.glob("*/*"):
        if folder.is_dir() and folder.stat().st_mtime < oldest:
            with locked(folder.parent.name):
                shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed
