"""Values for the GPU nodes of well-known platforms."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts import check
from tests.charts.oracle import ask
from tests.charts.presets import PRESETS, values
from tests.charts.render import Manifest, find, rayjob, render

README = Path(__file__).parents[2] / "k8s" / "README.md"
# All that a preset may change: where workers go, what a GPU is called there, and how long a node waits for them.
MAY_DIFFER = {"affinity", "nodeSelector", "resourceClaims", "terminationGracePeriodSeconds", "tolerations"}
presets = pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)


def run(given: dict[str, Any] | None = None) -> Manifest:
    """Return the RayJob without its name, which contains a digest of the values."""
    manifest = rayjob(given)
    named: Manifest = yaml.safe_load(yaml.safe_dump(manifest).replace(manifest["metadata"]["name"], "the-run"))
    return named


def worker(manifest: Manifest) -> Manifest:
    (group,) = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    spec: Manifest = group["template"]["spec"]
    return spec


@presets
def test_presets_render_and_are_admitted(file: Path) -> None:
    manifests = render("rayjob", values(file))
    check.valid(manifests)
    job = find(manifests, "RayJob")
    for _, template in check.pods(job):
        check.restricted(template["spec"])
    assert ask(yaml.safe_dump(job)) == ([f"RayJob/{job['metadata']['name']}"], [])


@presets
def test_presets_differ_in_where_workers_go_and_nothing_else(file: Path) -> None:
    given = values(file)
    assert set(given) == {"workers"}
    mine, plain = worker(run(given)), worker(run())
    differing = {key for key in mine.keys() | plain.keys() if mine.get(key) != plain.get(key)}
    assert differing - {"containers"} <= MAY_DIFFER
    (container,), (other,) = mine["containers"], plain["containers"]
    resource = given["workers"].get("gpuResource", "nvidia.com/gpu")
    if claim := given["workers"].get("gpuClaimTemplate"):
        assert mine["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": claim}]
        assert container["resources"].pop("claims") == [{"name": "gpus"}]
        for kind in ("requests", "limits"):
            del other["resources"][kind]["nvidia.com/gpu"]
    for kind in ("requests", "limits") if not claim else ():
        assert container["resources"][kind].pop(resource) == other["resources"][kind].pop("nvidia.com/gpu") == "1"
    # Ray's own time to drain follows the pod's.
    drain = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    for one in (container, other):
        one["env"] = [variable for variable in one["env"] if variable["name"] != drain]
    assert container == other


@presets
def test_head_stays_on_nodes_without_gpus_that_nobody_takes_away(file: Path) -> None:
    def head(manifest: Manifest) -> Any:
        return manifest["spec"]["rayClusterSpec"]["headGroupSpec"]

    assert head(run(values(file))) == head(run())


def test_table_says_what_each_preset_expects() -> None:
    """Every preset has a row with each of its labels, taints and resources."""
    rows = dict(re.findall(r"^\| `([a-z0-9-]+)` (\|.+)$", README.read_text(), re.MULTILINE))
    assert set(rows) >= {file.stem for file in PRESETS}
    for file in PRESETS:
        workers = values(file)["workers"]
        words = [f"`{key}={value}`" for key, value in workers.get("nodeSelector", {}).items()]
        words += [f"`{t['key']}" for t in workers["tolerations"]]
        words += [f"`{workers[key]}`" for key in ("gpuResource", "gpuClaimTemplate") if key in workers]
        assert [word for word in words if word not in rows[file.stem]] == [], file.stem
