"""Hypothesis strategies for values that the schema allows: some keys at a time, the others at their defaults."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
from hypothesis import strategies as st

from tests.charts.render import HELM, Values

# Kubernetes' own structures nest deeply, and the operator looks into none of them; one that goes far enough will do.
DEEP = {"affinity": "nodeAffinity", "volumes": "emptyDir"}
# Large numbers only make large clusters; these are where the sums meet.
BOUNDS = {"actors": 64, "top_k": 10}


@functools.cache
def schema(chart: str) -> dict[str, Any]:
    """Return a chart's schema."""
    text = (HELM / chart / "values.schema.json").read_text()
    loaded: dict[str, Any] = json.loads(text, object_hook=_without_deprecated)
    for name, kept in DEEP.items():
        item = loaded["$defs"][name]
        item = item.get("items", item)
        item["properties"] = {key: value for key, value in item["properties"].items() if key in (kept, "name")}
        item.pop("oneOf", None)
        if name == "volumes":
            item["required"] = ["name", kept]
    return loaded


def _without_deprecated(part: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in part.items() if not (isinstance(value, dict) and value.get("deprecated"))}


def leaves(
    part: dict[str, Any], whole: dict[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Return the keys of a schema that have values and no keys below them."""
    for name, value in part["properties"].items():
        if name in ("global", "common"):
            continue
        inner = whole["$defs"][value["$ref"].rpartition("/")[2]] if "$ref" in value else value
        if "properties" in inner and inner.get("required"):
            yield from leaves(inner, whole, (*path, name))
        else:
            yield (*path, name), value


def _strategy(name: str, value: dict[str, Any], whole: dict[str, Any]) -> st.SearchStrategy[Any]:
    if name in BOUNDS:
        return st.integers(1, BOUNDS[name])
    if name in ("gpus_per_actor", "gpusPerActor"):
        return st.sampled_from([0, 0.1, 0.25, 0.3, 0.5, 1, 2, 4])
    return of(value, whole["$defs"])


def of(part: dict[str, Any], types: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for values of a part of a schema; it supports what these schemas use."""
    if "$ref" in part:
        return of(types[part["$ref"].rpartition("/")[2]], types)
    if "const" in part:
        return st.just(part["const"])
    if "enum" in part:
        return st.sampled_from(part["enum"])
    if "anyOf" in part:
        return st.one_of([of(option, types) for option in part["anyOf"]])
    if "oneOf" in part and "properties" in part:
        return st.one_of([_one_of(part, option["required"], types) for option in part["oneOf"]])
    kinds = part.get("type", "string")
    return st.one_of([_typed(part, kind, types) for kind in ([kinds] if isinstance(kinds, str) else kinds)])


def _one_of(part: dict[str, Any], chosen: list[str], types: dict[str, Any]) -> st.SearchStrategy[Any]:
    others = {name for option in part["oneOf"] for name in option["required"]} - set(chosen)
    properties = {name: value for name, value in part["properties"].items() if name not in others}
    required = [*part.get("required", []), *chosen]
    return of(
        {
            **{key: value for key, value in part.items() if key != "oneOf"},
            "properties": properties,
            "required": required,
        },
        types,
    )


def _typed(part: dict[str, Any], kind: str, types: dict[str, Any]) -> st.SearchStrategy[Any]:
    least, most = part.get("minimum"), part.get("maximum")
    if kind == "null":
        return st.none()
    if kind == "boolean":
        return st.booleans()
    if kind == "integer":
        return st.integers(-(2**31) if least is None else least, 2**31 - 1 if most is None else most)
    if kind == "number":
        lowest = part.get("exclusiveMinimum", least)
        return st.floats(lowest, most or 1e6, exclude_min="exclusiveMinimum" in part, allow_subnormal=False).map(
            lambda x: round(x, 4) or 1
        )
    if kind == "array":
        items = part.get("items", {})
        if isinstance(items, list):
            return st.tuples(*[of(item, types) for item in items]).map(list)
        return st.lists(of(items, types), min_size=part.get("minItems", 0), max_size=3, unique_by=repr)
    if kind == "object":
        return _object(part, types)
    if part.get("pattern", "").startswith(
        "^(\\+|-)?"
    ):  # Kubernetes' quantities, which the API server wants to have a digit.
        return st.sampled_from(["1", "500m", "2Gi", "1e3"])
    return _string(part)


def _object(part: dict[str, Any], types: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "not" in part:
        allowed = jsonschema.Draft7Validator({"not": part["not"]}).is_valid
        return _object({key: value for key, value in part.items() if key != "not"}, types).filter(allowed)
    if "properties" not in part:
        extra = part.get("additionalProperties", False)
        names = _string(part.get("propertyNames", {}))
        return st.dictionaries(names, of({} if extra is True else extra, types), max_size=3 if extra else 0)
    required = part.get("required", [])
    options = {name: of(value, types) for name, value in part["properties"].items()}
    return st.fixed_dictionaries(
        {name: options[name] for name in required},
        optional={name: value for name, value in options.items() if name not in required},
    )


def _string(part: dict[str, Any]) -> st.SearchStrategy[Any]:
    longest = part.get("maxLength", 300)
    if "pattern" in part:
        return st.from_regex(
            part["pattern"].replace("$", r"\Z"), alphabet=st.characters(max_codepoint=126, min_codepoint=32)
        ).filter(lambda text: len(text) <= longest)
    return st.text(
        st.characters(codec="utf-8", exclude_categories=("C",)),
        min_size=part.get("minLength", 0),
        max_size=min(20, longest),
    )


@functools.cache
def _choices(chart: str) -> tuple[tuple[tuple[str, ...], st.SearchStrategy[Any]], ...]:
    whole = schema(chart)
    return tuple((path, _strategy(path[-1], value, whole)) for path, value in leaves(whole, whole))


@st.composite
def values(draw: st.DrawFn, chart: str) -> Values:
    """Return a strategy for values with up to ten keys of a chart changed."""
    chosen: Values = {}
    picked = draw(st.lists(st.sampled_from(range(len(_choices(chart)))), min_size=1, max_size=10, unique=True))
    for index in picked:
        path, strategy = _choices(chart)[index]
        target = chosen
        for key in path[:-1]:
            target = target.setdefault(key, {})
        target[path[-1]] = draw(strategy)
    return chosen
