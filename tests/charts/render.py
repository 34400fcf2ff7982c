"""Render charts as `helm template` does, by default with Helm's library, and cache the results."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.charts import renderer
from tests.e2e.cluster.programs import tool

REPOSITORY = Path(__file__).resolve().parents[2]
HELM = REPOSITORY / "helm"
Values = dict[str, Any]
Manifest = dict[str, Any]

# What the charts can't know; everything else has a default.
GIVEN: dict[str, Values] = {
    "rayjob": {"job": {"input": {"uris": ["s3://images/"]}, "output": {"uri": "s3://predictions/"}}},
    "raycluster": {},
}


class HelmError(Exception):
    """Helm refused the values; `problems` are the chart's, one sentence each, and `schema` those of the schema."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.problems = re.findall(r"^  - (.+)$", text, re.MULTILINE)
        self.schema = re.findall(r"^- (at .+)$", text, re.MULTILINE)


def merged(base: Values, top: Values) -> Values:
    """Merge values over others, as Helm does."""
    result = dict(base)
    for key, value in top.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def render_text(chart: str, values: Values | None = None, *, name: str = "demo", helm: str = "library") -> str:
    """Return the manifests of a chart as text; a default input and output are filled in.

    Args:
        chart: The chart.
        values: Values on top of its own.
        name: The release.
        helm: `library` for Helm 3's own code in a process that stays, `helm` and `helm4` for the commands.
    """
    return _render(
        chart, json.dumps(merged(GIVEN[chart], values or {}), sort_keys=True, ensure_ascii=False), name, helm
    )


def render(chart: str, values: Values | None = None, *, name: str = "demo", helm: str = "library") -> list[Manifest]:
    """Return the manifests of a chart."""
    return [item for item in yaml.load_all(render_text(chart, values, name=name, helm=helm), _Loader) if item]


def find(manifests: list[Manifest], kind: str) -> Manifest:
    """Return the only manifest of a kind."""
    (found,) = [item for item in manifests if item["kind"] == kind]
    return found


def rayjob(values: Values | None = None, *, name: str = "demo") -> Manifest:
    """Return the RayJob of the rayjob chart."""
    return find(render("rayjob", values, name=name), "RayJob")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Read a lone = as text, as every other library does."""


_Loader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: node.value)


@functools.lru_cache(maxsize=512)
def _render(chart: str, values: str, name: str, helm: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(values)
        file.flush()
        if helm == "library":
            answer = renderer.service().ask({"chart": str(HELM / chart), "name": name, "values": file.name})
            text, error = answer["text"], answer["error"]
        else:
            command = [tool(helm, from_path=False), "template", name, HELM / chart, "--values", file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            text, error = done.stdout, done.stderr if done.returncode else ""
    if error:
        raise HelmError(error)
    return text
