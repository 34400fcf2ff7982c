"""Values, schema, reference and the files that set every key have the same keys, and generated files are fresh."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts import check
from tests.charts.oracle import ask
from tests.charts.render import GIVEN, HELM, REPOSITORY, HelmError, Values, merged, render, render_text
from tests.e2e.cluster.programs import tool

CHARTS = ("rayjob", "raycluster")
charts = pytest.mark.parametrize("chart", CHARTS)
# Keys of the all-keys files that exclude others of them.
TOGETHER: dict[str, Values] = {
    "rayjob": {
        "clusterSelector": "",
        "job": {"input": {"manifest": None}},
        "run": {"suspend": False, "shutdownAfterJobFinishes": True, "deletionRules": []},
        "schedule": {"cron": ""},
    },
    "raycluster": {"cluster": {"suspend": False}},
}

_spec = importlib.util.spec_from_file_location("generate", HELM / "generate.py")
assert _spec and _spec.loader
generate = importlib.util.module_from_spec(_spec)


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    import sys

    sys.modules["generate"] = generate
    _spec.loader.exec_module(generate)


def all_keys(chart: str) -> Values:
    values: Values = yaml.safe_load((REPOSITORY / "tests" / "charts" / "values" / f"{chart}.yaml").read_text())
    return values


def schema(chart: str) -> Values:
    loaded: Values = json.loads((HELM / chart / "values.schema.json").read_text())
    return loaded


def schema_keys(part: Values, types: Values, path: str = "") -> Iterator[str]:
    """Return the keys of a schema, as deep as values.yaml has them; keys with a Kubernetes type have no keys below."""
    for name, value in part["properties"].items():
        if name in ("global", "common") or value.get("deprecated"):
            continue
        below = f"{path}.{name}".lstrip(".")
        options = [value, *value.get("anyOf", [])]
        ours = [
            types[ref]
            for option in options
            if (ref := option.get("$ref", "").rpartition("/")[2]) in types and ref[:1].isupper()
        ]
        inner = next((option for option in [*ours, value] if option.get("properties")), None)
        if inner is None:
            yield below
        else:
            yield from schema_keys(inner, types, below)


def present(values: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def test_generated_files_are_fresh() -> None:
    stale = [str(path) for path, text in generate.products().items() if path.read_text() != text]
    assert stale == [], "run python helm/generate.py"


@charts
def test_reference_and_schema_name_the_same_keys(chart: str) -> None:
    loaded = schema(chart)
    referred = {key.path for key in generate.keys(chart)}
    named = set(schema_keys(loaded, loaded["$defs"]))
    parents = {key for key in referred if any(other.startswith(f"{key}.") for other in referred)}
    assert referred - parents == named


@charts
def test_every_key_is_in_the_all_keys_file_and_not_at_its_default(chart: str) -> None:
    values = all_keys(chart)
    for key in generate.keys(chart):
        assert present(values, key.path), key.path
        found = values
        for part in key.path.split("."):
            found = found[part]
        assert found != key.default, key.path


@charts
def test_every_key_of_values_has_a_sentence(chart: str) -> None:
    for key in generate.keys(chart):
        assert key.text, key.path
        assert key.path.startswith("job.") or key.text[0].isupper() or key.text[0] == "`", key.path
        assert re.search(r"[.):]$", key.text), key.path


@charts
def test_no_object_of_the_schema_takes_keys_that_it_does_not_name(chart: str) -> None:
    def walk(part: Any, path: str) -> None:
        if isinstance(part, list):
            for item in part:
                walk(item, path)
        if isinstance(part, dict):
            if part.get("type") == "object" and "required" not in path.rpartition("/")[2]:
                assert "additionalProperties" in part, path
            for name, value in part.items():
                walk(value, f"{path}/{name}")

    walk(schema(chart), "")


@charts
def test_all_keys_file_renders_but_for_keys_that_exclude_each_other(chart: str) -> None:
    values = merged(all_keys(chart), TOGETHER[chart])
    checked, errors = ask(render_text(chart, values))
    assert (len(checked), errors) == (1, [])
    check.valid(render(chart, values))


def test_shared_keys_read_the_same_in_both_charts() -> None:
    rayjob, raycluster = ({key.path: key for key in generate.keys(chart)} for chart in CHARTS)
    common = {
        path for path in rayjob.keys() & raycluster.keys() if not path.startswith(("pods.", "queue.", "nameOverride"))
    }
    assert len(common) > 80
    for path in common:
        assert rayjob[path] == raycluster[path]


@charts
@pytest.mark.parametrize("helm", ["helm", "helm4"])
def test_lint_is_clean(chart: str, helm: str, tmp_path: Any) -> None:
    given = tmp_path / "values.json"
    given.write_text(json.dumps(GIVEN[chart]))
    command = [tool(helm, from_path=False), "lint", "--strict", HELM / chart, "--values", given]
    linted = subprocess.run(command, capture_output=True, text=True, check=False)
    assert linted.returncode == 0, linted.stdout + linted.stderr
    assert "[WARNING]" not in linted.stdout + linted.stderr
    assert "Fail:" not in linted.stdout + linted.stderr


@charts
@pytest.mark.parametrize("keys", ["defaults", "all keys"])
def test_commands_and_the_library_render_the_same(chart: str, keys: str) -> None:
    values = merged(all_keys(chart), TOGETHER[chart]) if keys == "all keys" else {}
    text = render_text(chart, values)
    assert text == render_text(chart, values, helm="helm")
    assert text == render_text(chart, values, helm="helm4")


@pytest.mark.parametrize("values", [{"nonsense": 1}, {"head": {"memoryGiB": 1, "objectStorePercent": 5}}], ids=str)
def test_commands_and_the_library_refuse_the_same(values: Values) -> None:
    refused = []
    for helm in ("library", "helm", "helm4"):
        with pytest.raises(HelmError) as error:
            render("rayjob", values, helm=helm)
        refused.append((error.value.problems, bool(error.value.schema)))
    assert refused[0] == refused[1] == refused[2]
    assert refused[0] != ([], False)


@charts
@pytest.mark.parametrize("helm", ["helm", "helm4"])
def test_packaged_chart_renders_the_same_as_the_checkout(chart: str, helm: str, tmp_path: Path) -> None:
    program = tool(helm, from_path=False)
    subprocess.run([program, "package", HELM / chart, "--destination", tmp_path], capture_output=True, check=True)
    (package,) = tmp_path.glob(f"{chart}-*.tgz")
    given = tmp_path / "values.json"
    given.write_text(json.dumps(GIVEN[chart]))
    command = [program, "template", "demo", package, "--values", given]
    packaged = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert packaged == render_text(chart, helm=helm)
