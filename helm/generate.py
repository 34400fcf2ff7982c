"""Write values.schema.json of the charts, the reference in README.md, and the table of metrics: python helm/generate.py [--check]."""

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

from batch_inference.config import RENAMED_KEYS
from batch_inference.telemetry import metrics

HELM = Path(__file__).resolve().parent
CHARTS = ("rayjob", "raycluster")
KUBERAY = HELM.parent / "tests" / "charts" / "schemas" / "rayjobs.json"
# Volumes that Pod Security "restricted" admits.
VOLUMES = ("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
MARK = "<!-- values of {}: written by generate.py -->"
MONITORING = HELM.parent / "k8s" / "monitoring.md"
METRICS_MARK = "<!-- metrics{}: written by helm/generate.py -->"


@dataclass(frozen=True)
class Key:
    """A key of values.yaml with its description."""

    path: str
    text: str
    default: Any


@functools.cache
def program_schema() -> dict[str, Any]:
    """Return the schema of the job, as the program prints it."""
    command = [sys.executable, "-m", "batch_inference", "schema"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    schema: dict[str, Any] = json.loads(printed.stdout)
    return schema


def descriptions(chart: str) -> dict[str, str]:
    """Return the `# --` description above each key of a chart's values.yaml."""
    texts: dict[str, str] = {}
    parents: list[str] = []
    text = ""
    for line in (HELM / chart / "values.yaml").read_text().splitlines():
        if comment := re.match(r"\s*# -- (.+)", line):
            text = comment[1]
        elif key := re.match(r"( *)([A-Za-z_]+):", line):
            parents[len(key[1]) // 2 :] = [key[2]]
            if text:
                texts[".".join(parents)] = text
            text = ""
    return texts


def defaults(chart: str) -> dict[str, Any]:
    """Return the default values of a chart."""
    values: dict[str, Any] = yaml.safe_load((HELM / chart / "values.yaml").read_text())
    return values


def kubernetes() -> dict[str, Any]:
    """Return the types of values that pods get unchanged: those of the operator's CRD, with checks that only the API server would make."""
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
    """Rewrite tuples to JSON Schema draft 7, since older Helm versions do not know later ones."""
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
    """Return the program's schema, in which the keys that the chart computes with are mandatory."""
    schema: dict[str, Any] = draft7({key: value for key, value in program.items() if not key.startswith("$")})
    schema["required"] = list(given)
    return schema


def typed(shape: dict[str, Any], path: str, texts: dict[str, str], given: Any) -> dict[str, Any]:
    """Return a part of schema.yaml as JSON Schema."""
    description = {"description": texts[path]} if path in texts else {}
    if "kubernetes" in shape:
        return {"$ref": f"#/$defs/{shape['kubernetes']}"}
    if not shape:
        return {"type": "object", "additionalProperties": False}
    if ("type" in shape and not isinstance(shape["type"], dict)) or "enum" in shape:
        return {**description, **shape}
    return {
        **description,
        "type": "object",
        "additionalProperties": False,
        # Helm drops a key that is set to null; keys that templates need must not be lost that way.
        "required": [key for key in shape if given[key] is not None],
        "properties": {
            key: typed(value, f"{path}.{key}".lstrip("."), texts, given[key])
            for key, value in shape.items()
            if key != "job"
        },
    }


def schema(chart: str) -> str:
    """Return the text of a chart's values.schema.json."""
    shape = yaml.safe_load((HELM / "schema.yaml").read_text())[chart]
    given = defaults(chart)
    root = typed(shape, "", descriptions(chart), given)
    # Helm adds these for values that parent and library charts share.
    root["properties"]["global"] = {"type": "object", "additionalProperties": False}
    root["properties"]["common"] = typed({"global": {}}, "", {}, {"global": None})
    types = kubernetes()
    if "job" in shape:
        program = program_schema()
        root["properties"]["job"] = job_schema(program, given["job"])
        types |= draft7(program["$defs"])
        for section, name in (("inference", "InferenceConfig"), ("preprocess", "PreprocessConfig")):
            types[name]["required"] = list(given["job"][section])
        _let_renamed_keys_pass(root["properties"]["job"], types)
    root = {"$schema": "http://json-schema.org/draft-07/schema#", **root, "$defs": types}
    return json.dumps(root, indent=1, sort_keys=True) + "\n"


def _let_renamed_keys_pass(job: dict[str, Any], types: dict[str, Any]) -> None:
    """Allow keys of earlier versions: Helm looks at the schema first, which cannot say the new name; a rule of the chart does."""
    for old, new in RENAMED_KEYS.items():
        section, _, key = old.partition(".")
        properties = types[job["properties"][section]["$ref"].rpartition("/")[2]]["properties"]
        properties[key] = {"deprecated": True, "description": f"Refused: its name is `job.{new}` now."}


def program_keys(schema: dict[str, Any], types: dict[str, Any], path: str) -> Iterator[Key]:
    """Yield the keys of the job, as the program describes them."""
    for name, value in schema["properties"].items():
        options = [value, *value.get("anyOf", [])]
        inner = next((types[item["$ref"].rpartition("/")[2]] for item in options if "$ref" in item), None)
        below = f"{path}.{name}"
        if inner is None or value.get("default", ...) is None:
            yield Key(below, value.get("description", ""), value.get("default"))
        if inner is not None:
            yield from program_keys(inner, types, below)


def keys(chart: str) -> list[Key]:
    """Return all keys of a chart's values, in order."""
    texts, given = descriptions(chart), defaults(chart)
    result = list(_value_keys(given, "", texts))
    if "job" in given:
        program = program_schema()
        own = {key.path: key for key in result if key.path.startswith("job.")}
        job = [own.get(key.path, key) for key in program_keys(program, program["$defs"], "job")]
        first = next(index for index, key in enumerate(result) if key.path in own)
        result = [key for key in result if key.path not in own]
        result[first:first] = job
    return result


def _value_keys(values: dict[str, Any], path: str, texts: dict[str, str]) -> Iterator[Key]:
    for name, value in values.items():
        below = f"{path}.{name}".lstrip(".")
        if below in texts or not isinstance(value, dict):
            yield Key(below, texts.get(below, ""), value)
        else:
            yield from _value_keys(value, below, texts)


def reference(chart: str) -> str:
    """Return the table of a chart's values."""
    lines = [MARK.format(chart), "", "| key | default | |", "| --- | --- | --- |"]
    for key in keys(chart):
        text = key.text.replace("|", "\\|")
        lines.append(f"| `{key.path}` | `{json.dumps(key.default)}` | {text} |")
    return "\n".join([*lines, "", MARK.format(f"{chart}, end")])


def readme() -> str:
    """Return README.md with fresh tables."""
    text = (HELM / "README.md").read_text()
    for chart in CHARTS:
        start, end = re.escape(MARK.format(chart)), re.escape(MARK.format(f"{chart}, end"))
        table = reference(chart)
        text = re.sub(f"{start}.*?{end}", table.replace("\\", r"\\"), text, flags=re.DOTALL)
    return text


def monitoring() -> str:
    """Return monitoring.md with a fresh table of metrics."""
    start, end = METRICS_MARK.format(""), METRICS_MARK.format(", end")
    before, _, rest = MONITORING.read_text().partition(start)
    return f"{before}{start}\n\n{metrics.markdown_table()}\n\n{end}{rest.partition(end)[2]}"


def products() -> dict[Path, str]:
    """Return the files that this program writes, with their texts."""
    return {
        **{HELM / chart / "values.schema.json": schema(chart) for chart in CHARTS},
        HELM / "README.md": readme(),
        MONITORING: monitoring(),
    }


def main() -> None:
    """Write the files, or with --check name the stale ones."""
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
