"""The version of this program, and of the packages that its results depend on."""

from __future__ import annotations

__version__ = "0.1.0"


def version_info() -> dict[str, str]:
    """Return the versions of everything that may change a result, by name."""
    import sys
    from importlib.metadata import PackageNotFoundError, version

    versions = {"batch-inference": __version__, "python": sys.version.split()[0]}
    for package in ("ray", "torch", "torchvision", "pillow", "pyarrow", "timm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if cuda := _cuda():
        versions["cuda"] = cuda
    return versions


def _cuda() -> str | None:
    """Return the CUDA version that torch was built for. Reading it from a file saves the seconds of importing torch."""
    import importlib.util
    import re
    from pathlib import Path

    spec = importlib.util.find_spec("torch")
    text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    match = re.search(r"^cuda\b.*= '([\d.]+)'", text, re.MULTILINE)
    return match[1] if match else None
