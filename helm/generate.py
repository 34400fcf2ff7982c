"""Writes values.schema.json of the charts, the reference in README.md, and the table of metrics: python helm/generate.py [--check]."""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from batch_inference import metrics

HELM = Path(__file__).resolve().parent
CHARTS = ("rayjob", "raycluster")
KUBERAY = HELM.parent / "tests" / "charts" / "schemas" / "rayjobs.json"
# What Pod Security "restricted" admits.
VOLUMES = ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
MARK = "<!-- values of {}: written by generate.py -->"
MONITORING = HELM.parent / "k8s" / "monitoring.md"
METRICS_MARK = "<!-- metrics{}: written by helm/generate.py -->"


@dataclass(frozen=True)
class Key:
    """A key of values.yaml with its sentence."""

    path: str
    text: str
    default: Any


@functools.cache
def program_schema() -> dict[str, Any]:
    """The schema of the job, printed by the program."""
    command = [sys.executable, "-m", "batch_inference", "schema"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    schema: dict[str, Any] = json.loads(printed.stdout)
    return schema


def sentences(chart: str) -> dict[str, str]:
    """The `# --` sentence above each key of a chart's values.yaml."""
    found: dict[str, str] = {}
    parents: list[str] = []
    text = ""
    for line in (HELM / chart / "values.yaml").read_text().splitlines():
        if comment := re.match(r"\s*# -- (.+)", line):
            text = comment[1]
        elif key := re.match(r"( *)([A-Za-z_]+):", line):
            parents[len(key[1]) // 2 :] = [key[2]]
            if text:
                found[".".join(parents)] = text
            text = ""
    return found


def defaults(chart: str) -> dict[str, Any]:
    """The values of a chart."""
    values: dict[str, Any] = yaml.safe_load((HELM / chart / "values.yaml").read_text())
    return values


def kubernetes() -> dict[str, Any]:
    """Types that are handed through to pods, as the operator's CRD has them, with what only the API server would check."""
    schema = json.loads(KUBERAY.read_text())
    spec = schema["properties"]["spec"]["properties"]["submitterPodTemplate"]["properties"]["spec"]["properties"]
    container = spec["containers"]["items"]["properties"]
    types = {name: spec[name] for name in ("tolerations", "affinity", "topologySpreadConstraints", "volumes")}
    types |= {name: container[name] for name in ("env", "envFrom", "volumeMounts")}
    toleration = types["tolerations"]["items"]["properties"]
    toleration["effect"]["enum"] = ["NoSchedule", "PreferNoSchedule", "NoExecute"]
    toleration["operator"]["enum"] = ["Exists", "Equal"]
    exists = {"properties": {"operator": {"const": "Exists"}}, "required": ["operator"]}
    types["tolerations"]["items"]["not"] = {"allOf": [exists, {"required": ["value"]}]}
    spread = types["topologySpreadConstraints"]["items"]["properties"]
    spread["whenUnsatisfiable"]["enum"] = ["DoNotSchedule", "ScheduleAnyway"]
    spread["maxSkew"]["minimum"] = 1
    spread["topologyKey"]["minLength"] = 1
    types["env"]["items"]["properties"]["name"]["pattern"] = "^[-._a-zA-Z][-._a-zA-Z0-9]*$"
    types["env"]["items"]["not"] = {"required": ["value", "valueFrom"]}
    types["envFrom"]["items"]["oneOf"] = [{"required": ["configMapRef"]}, {"required": ["secretRef"]}]
    for source in ("configMapRef", "secretRef"):
        types["envFrom"]["items"]["properties"][source]["required"] = ["name"]
    volume = types["volumes"]["items"]
    volume["properties"] = {name: volume["properties"][name] for name in ("name", *VOLUMES)}
    volume["properties"]["name"] |= {"pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
    volume["properties"]["configMap"]["required"] = ["name"]
    volume["properties"]["secret"]["required"] = ["secretName"]
    volume["oneOf"] = [{"required": [name]} for name in VOLUMES]
    mount = types["volumeMounts"]["items"]["properties"]
    mount["mountPath"]["pattern"] = "^/[^:]*[^:/]$"
    return types


def draft7(schema: Any) -> Any:
    """Rewrites what older Helm versions do not know: tuples, as JSON Schema had them before 2020."""
    if isinstance(schema, list):
        return [draft7(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    rewritten = {key: draft7(value) for key, value in schema.items() if key != "title" or not isinstance(value, str)}
    if "prefixItems" in rewritten:
        rewritten["items"] = rewritten.pop("prefixItems")
        rewritten["additionalItems"] = False
    return rewritten


def job_schema(program: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The program's schema, with the keys that the chart computes with made mandatory."""
    schema: dict[str, Any] = draft7({key: value for key, value in program.items() if not key.startswith("$")})
    schema["required"] = list(given)
    return schema


def typed(shape: dict[str, Any], path: str, texts: dict[str, str], given: Any) -> dict[str, Any]:
    """Turns a part of schema.yaml into JSON Schema."""
    about = {"description": texts[path]} if path in texts else {}
    if "kubernetes" in shape:
        return {"$ref": f"#/$defs/{shape['kubernetes']}"}
    if not shape:
        return {"type": "object", "additionalProperties": False}
    if ("type" in shape and not isinstance(shape["type"], dict)) or "enum" in shape:
        return {**about, **shape}
    return {
        **about,
        "type": "object",
        "additionalProperties": False,
        # Helm drops a key that is set to null: what templates need must not be lost that way.
        "required": [key for key in shape if given[key] is not None],
        "properties": {
            key: typed(value, f"{path}.{key}".lstrip("."), texts, given[key])
            for key, value in shape.items()
            if key != "job"
        },
    }


def schema(chart: str) -> str:
    """The text of a chart's values.schema.json."""
    shape = yaml.safe_load((HELM / "schema.yaml").read_text())[chart]
    given = defaults(chart)
    whole = typed(shape, "", sentences(chart), given)
    # Helm adds these for what parent and library charts share.
    whole["properties"]["global"] = {"type": "object", "additionalProperties": False}
    whole["properties"]["common"] = typed({"global": {}}, "", {}, {"global": None})
    types = kubernetes()
    if "job" in shape:
        program = program_schema()
        whole["properties"]["job"] = job_schema(program, given["job"])
        types |= draft7(program["$defs"])
        for section, name in (("inference", "InferenceConfig"), ("preprocess", "PreprocessConfig")):
            types[name]["required"] = list(given["job"][section])
    whole = {"$schema": "http://json-schema.org/draft-07/schema#", **whole, "$defs": types}
    return json.dumps(whole, indent=1, sort_keys=True) + "\n"


def program_keys(schema: dict[str, Any], types: dict[str, Any], path: str) -> Iterator[Key]:
    """The keys of the job, as the program describes them."""
    for name, value in schema["properties"].items():
        options = [value, *value.get("anyOf", [])]
        inner = next((types[item["$ref"].rpartition("/")[2]] for item in options if "$ref" in item), None)
        below = f"{path}.{name}"
        if inner is None or value.get("default", ...) is None:
            yield Key(below, value.get("description", ""), value.get("default"))
        if inner is not None:
            yield from program_keys(inner, types, below)


def keys(chart: str) -> list[Key]:
    """All keys of a chart's values, in order."""
    texts, given = sentences(chart), defaults(chart)
    found = [key for key in _value_keys(given, "", texts)]
    if "job" in given:
        program = program_schema()
        own = {key.path: key for key in found if key.path.startswith("job.")}
        job = [own.get(key.path, key) for key in program_keys(program, program["$defs"], "job")]
        at = next(index for index, key in enumerate(found) if key.path in own)
        found = [key for key in found if key.path not in own]
        found[at:at] = job
    return found


def _value_keys(values: dict[str, Any], path: str, texts: dict[str, str]) -> Iterator[Key]:
    for name, value in values.items():
        below = f"{path}.{name}".lstrip(".")
        if below in texts or not isinstance(value, dict):
            yield Key(below, texts.get(below, ""), value)
        else:
            yield from _value_keys(value, below, texts)


def reference(chart: str) -> str:
    """The table of a chart's values."""
    lines = [MARK.format(chart), "", "| key | default | |", "| --- | --- | --- |"]
    for key in keys(chart):
        text = key.text.replace("|", "\\|")
        lines.append(f"| `{key.path}` | `{json.dumps(key.default)}` | {text} |")
    return "\n".join([*lines, "", MARK.format(f"{chart}, end")])


def readme() -> str:
    """README.md with its tables written anew."""
    text = (HELM / "README.md").read_text()
    for chart in CHARTS:
        start, end = re.escape(MARK.format(chart)), re.escape(MARK.format(f"{chart}, end"))
        table = reference(chart)
        text = re.sub(f"{start}.*?{end}", table.replace("\\", r"\\"), text, flags=re.DOTALL)
    return text


def monitoring() -> str:
    """monitoring.md with its table of metrics written anew."""
    start, end = METRICS_MARK.format(""), METRICS_MARK.format(", end")
    before, _, rest = MONITORING.read_text().partition(start)
    return f"{before}{start}\n\n{metrics.table()}\n\n{end}{rest.partition(end)[2]}"


def products() -> dict[Path, str]:
    """What this program writes."""
    return {
        **{HELM / chart / "values.schema.json": schema(chart) for chart in CHARTS},
        HELM / "README.md": readme(),
        MONITORING: monitoring(),
    }


def main() -> None:
    """Writes, or with --check says what is not fresh."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")
    check = parser.parse_args().check
    stale = [path for path, text in products().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(HELM.parent)} is {'stale: run python helm/generate.py' if check else 'written'}")
        if not check:
            path.write_text(products()[path])
    sys.exit(bool(stale and check))


if __name__ == "__main__":
    main()
