"""Health of RayJob and RayCluster for Argo CD, on statuses as the operator writes them; and the examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from lupa.lua51 import LuaRuntime

from tests.charts.argocd import ARGOCD, CASES

STATES = (
    "", "Initializing", "Running", "Complete", "Failed", "ValidationFailed", "Suspending", "Suspended", "Retrying", "Waiting",
)  # fmt: skip


# By default Argo CD has three of Lua's libraries, and a few functions of os.
CLOSED = ("string", "math", "io", "debug", "os", "coroutine")


def health(kind: str, obj: dict[str, Any], *, closed: bool = False) -> dict[str, str]:
    """Return the script's result for an object, in Argo CD's version of Lua, with all libraries or without."""
    lua: Any = LuaRuntime(unpack_returned_tuples=True)
    for library in CLOSED if closed else ():
        lua.globals()[library] = None
    lua.globals().obj = lua.table_from(obj, recursive=True)
    return dict(lua.execute((ARGOCD / "ray.io" / kind / "health.lua").read_text()).items())


@pytest.mark.parametrize(
    ("kind", "path", "expected"), CASES, ids=[f"{kind}-{Path(path).stem}" for kind, path, _ in CASES]
)
def test_health_of_what_the_operator_writes(kind: str, path: str, expected: dict[str, str]) -> None:
    obj = yaml.safe_load((ARGOCD / "ray.io" / kind / path).read_text())
    assert obj["kind"] == kind
    assert health(kind, obj) == expected
    without = health(kind, obj, closed=True)
    assert without["status"] == expected["status"]
    assert without["message"].rstrip().endswith(expected["message"].splitlines()[-1])


def test_every_state_of_a_job_has_its_case_and_no_state_is_unknown() -> None:
    objects = [
        yaml.safe_load((ARGOCD / "ray.io/RayJob" / path).read_text()) for kind, path, _ in CASES if kind == "RayJob"
    ]
    assert {obj.get("status", {}).get("jobDeploymentStatus", "") for obj in objects} == set(STATES)
    for state in STATES:
        assert health("RayJob", {"kind": "RayJob", "metadata": {}, "status": {"jobDeploymentStatus": state}})["status"]


def test_every_case_is_used() -> None:
    listed = {(kind, Path(path).name) for kind, path, _ in CASES}
    assert listed == {(file.parents[1].name, file.name) for file in ARGOCD.glob("ray.io/*/testdata/*.yaml")}


def test_patch_of_argocd_s_configmap_has_these_scripts() -> None:
    patch = yaml.safe_load((ARGOCD / "argocd-cm-patch.yaml").read_text())
    assert patch == {
        "data": {
            f"resource.customizations.health.ray.io_{kind.name}": (kind / "health.lua").read_text()
            for kind in sorted((ARGOCD / "ray.io").iterdir())
        }
        | {"resource.customizations.useOpenLibs.ray.io_RayJob": "true"}
    }


@pytest.mark.parametrize("file", ["application.yaml", "applicationset.yaml"])
def test_examples_differ_in_nothing_but_their_jobs(file: str) -> None:
    found = yaml.safe_load((ARGOCD / file).read_text())
    spec = found["spec"]["template"]["spec"] if found["kind"] == "ApplicationSet" else found["spec"]
    chart = yaml.safe_load((ARGOCD.parents[1] / "helm/rayjob/Chart.yaml").read_text())
    assert (spec["sources"][0]["chart"], spec["sources"][0]["targetRevision"]) == (chart["name"], chart["version"])
    assert spec["syncPolicy"] == {
        "automated": {"prune": True, "selfHeal": True},
        "syncOptions": ["RespectIgnoreDifferences=true"],
    }
    assert spec["ignoreDifferences"] == [
        {
            "group": "ray.io",
            "kind": "RayJob",
            "jsonPointers": ["/spec/suspend", "/spec/rayClusterSpec", "/spec/submitterPodTemplate"],
        }
    ]
