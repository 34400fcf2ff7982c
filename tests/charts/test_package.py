"""Packages of a release: one version for chart, application and image, and the image by digest."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml

from batch_inference import __version__
from tests.charts.render import GIVEN, HELM, REPOSITORY
from tests.e2e.cluster.programs import tool

_spec = importlib.util.spec_from_file_location("package", HELM / "package.py")
assert _spec and _spec.loader
package = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(package)

DIGEST = "sha256:" + "0123456789abcdef" * 4
IMAGE = f"registry.example:5000/team/batch-inference@{DIGEST}"


@pytest.mark.parametrize("chart", package.CHARTS)
@pytest.mark.parametrize("helm", ["helm", "helm4"])
def test_package_installs_the_image_that_it_was_made_for(chart: str, helm: str, tmp_path: Path) -> None:
    program = str(tool(helm, from_path=False))
    file = package.package(chart, "1.2.3", IMAGE, tmp_path, program)
    with tarfile.open(file) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        assert f"{chart}/charts/common/Chart.yaml" in archive.getnames()
    shown = yaml.safe_load(subprocess.run([program, "show", "chart", file], check=True, capture_output=True).stdout)
    assert (shown["version"], shown["appVersion"]) == ("1.2.3", "1.2.3")
    values = tmp_path / "values.json"
    values.write_text(json.dumps(GIVEN[chart]))
    command = [program, "template", "demo", file, "--values", values]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    images = re.findall(r'image: "?([^"\s]+)', text)
    assert len(images) > 1
    assert set(images) == {IMAGE}


@pytest.mark.parametrize(
    ("version", "image", "says"),
    [("v1.2", IMAGE, "v1.2 is not a version"), ("1.2.3", "batch-inference:1.2.3", "not an image by digest")],
)
def test_uncertain_versions_and_images_are_not_packaged(version: str, image: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        package.package("rayjob", version, image, tmp_path)


def test_all_parts_have_one_version() -> None:
    charts = [yaml.safe_load((HELM / name / "Chart.yaml").read_text()) for name in ("rayjob", "raycluster", "common")]
    assert {chart["version"] for chart in charts} | {chart["appVersion"] for chart in charts} == {__version__}
    assert f'version = "{__version__}"' in (REPOSITORY / "pyproject.toml").read_text()
    assert f"## [{__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text()
