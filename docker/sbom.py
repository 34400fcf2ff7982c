"""Print the image's software bill of materials as CycloneDX: Python packages of an environment, and Debian packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator


def output(*command: str) -> str:
    """Return what a command prints."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603 - our own commands


def python_packages(environment: str) -> dict[str, Any]:
    """Return the SBOM of a virtual environment."""
    tool = Path(sys.executable).with_name("cyclonedx-py")
    options = ("--spec-version", "1.6", "--output-reproducible", "--no-validate")
    sbom: dict[str, Any] = json.loads(output(str(tool), "environment", *options, environment))
    return sbom


def debian_packages() -> list[dict[str, str]]:
    """Return the installed Debian packages as components."""
    text = output("/usr/bin/dpkg-query", "--show", "--showformat", "${Package} ${Version} ${Architecture}\n")
    components = []
    for line in sorted(text.splitlines()):
        name, version, architecture = line.split()
        purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={architecture}&distro=debian-12"
        components.append({"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl})
    return components


def main() -> None:
    """Write the SBOM of the environment named on the command line to standard output, if it is valid."""
    sbom = python_packages(sys.argv[1])
    sbom["metadata"]["component"] = {"type": "container", "bom-ref": "image", "name": "ray-batch-inference"}
    sbom["components"] += debian_packages()
    text = json.dumps(sbom, indent=1)
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        sys.exit(f"the SBOM is not valid CycloneDX: {error}")
    print(text)


if __name__ == "__main__":
    main()
