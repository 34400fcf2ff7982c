"""Package the charts of a release: python helm/package.py VERSION REPOSITORY@sha256:DIGEST [--push oci://REGISTRY/charts].

Chart, application and image have one version, and the image is named by its digest, so that a chart always installs the same image. With
``--push`` the charts go to a registry, and their references by digest are printed, one a line, to be signed.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HELM = Path(__file__).resolve().parent
CHARTS = ("rayjob", "raycluster")
VERSION = re.compile(r"\d+\.\d+\.\d+(-[0-9A-Za-z.-]+)?")
IMAGE = re.compile(r"(?P<repository>[^@\s]+)@(?P<digest>sha256:[0-9a-f]{64})")


def package(chart: str, version: str, image: str, destination: Path, helm: str = "helm") -> Path:
    """Write ``CHART-VERSION.tgz`` and return its path.

    Args:
        chart: ``rayjob`` or ``raycluster``.
        version: Version of chart and application.
        image: Default image, by digest.
        destination: Folder for the package.
        helm: The command.

    Raises:
        ValueError: If version or image is malformed.
    """
    if not VERSION.fullmatch(version):
        raise ValueError(f"{version} is not a version such as 1.2.3 or 1.2.3-rc.1")
    parts = IMAGE.fullmatch(image)
    if not parts:
        raise ValueError(f"{image} is not an image by digest such as registry.example/batch-inference@sha256:…")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / chart
        # The package has a copy of the library, which is a link here.
        shutil.copytree(HELM / chart, copy)
        values = (copy / "values.yaml").read_text()
        for key in ("repository", "digest"):
            values, count = re.subn(rf"(?m)^(image:\n(?:[ #].*\n)*?  {key}: ).*$", rf"\g<1>{parts[key]}", values)
            if count != 1:
                raise ValueError(f"values.yaml of {chart} has no image.{key}")
        (copy / "values.yaml").write_text(values)
        command = [
            helm,
            "package",
            "--version",
            version,
            "--app-version",
            version,
            "--destination",
            str(destination),
            str(copy),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    return destination / f"{chart}-{version}.tgz"


def push(file: Path, registry: str, helm: str = "helm", *options: str) -> str:
    """Push a package and return its reference by digest, without the scheme."""
    command = [helm, "push", str(file), registry, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    digest = re.search(r"Digest: (sha256:[0-9a-f]{64})", done.stdout + done.stderr)
    if not digest:
        raise ValueError(f"helm push printed no digest: {done.stdout + done.stderr}")
    name = re.sub(r"-\d+\.\d+\.\d+.*$", "", file.stem)
    return f"{registry.removeprefix('oci://')}/{name}@{digest[1]}"


def main() -> int:
    """Package the charts, push them if asked, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", metavar="VERSION")
    parser.add_argument("image", metavar="REPOSITORY@sha256:DIGEST")
    parser.add_argument("--destination", type=Path, default=HELM.parent / "build")
    parser.add_argument("--push", metavar="oci://REGISTRY/charts")
    args = parser.parse_args()
    args.destination.mkdir(parents=True, exist_ok=True)
    try:
        for chart in CHARTS:
            file = package(chart, args.version, args.image, args.destination)
            print(push(file, args.push) if args.push else file)
    except FileNotFoundError:
        print("error: there is no helm on PATH: install Helm 3 or 4", file=sys.stderr)
        return 1
    except (ValueError, subprocess.CalledProcessError) as exc:
        print(f"error: {exc} {getattr(exc, 'stderr', None) or ''}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
