"""The chart and `batch-inference plan` do the same arithmetic: same sizes, same verdicts, same words, same defaults."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from batch_inference.config import parse_config
from batch_inference.driver.planner import pods
from batch_inference.errors import UserError
from batch_inference.kubernetes.capacity import (
    SHARED_CLUSTER_NAMES,
    ActorPool,
    Autoscaling,
    Capacity,
    ClusterValues,
    CpuWorkers,
    Head,
    Workers,
    size_cluster,
)
from tests.charts.render import HELM, HelmError, Manifest, Values, find, merged, render

EXAMPLES = 200

gpus = st.sampled_from([0, 0.00001, 0.1, 0.125, 0.25, 0.3, 0.33333, 0.5, 0.6, 1, 1.5, 2, 3, 4, 8]) | st.floats(
    0, 4
).map(lambda x: round(x, 3))
cpus = st.sampled_from([0.5, 1, 1.25, 2, 3.7, 4]) | st.floats(0.001, 16).map(lambda x: round(x, 3))
gib = st.integers(1, 64) | st.floats(1, 64).map(lambda x: round(x, 2))
percent = st.integers(10, 60)
clusters = st.builds(
    ClusterValues,
    st.builds(ActorPool, st.integers(1, 40), gpus, cpus, cpus),
    st.builds(
        Workers,
        st.integers(1, 8),
        st.integers(1, 8),
        st.integers(0, 16),
        st.none() | st.integers(1, 32),
        st.none() | st.none() | gib,
        gib,
        gib,
        percent,
    ),
    st.builds(
        CpuWorkers,
        st.integers(0, 4),
        st.integers(1, 16),
        st.none() | st.integers(1, 32),
        st.none() | st.none() | gib,
        gib,
        percent,
    ),
    st.builds(Head, st.integers(1, 64), percent, st.sampled_from([0.1, 0.5, 1, 2.5, 4])),
    st.builds(Autoscaling, st.booleans(), st.integers(0, 12)),
    st.sampled_from([1, 1.1, 1.5, 3, 7, 10]),
)


def values_of(cluster: ClusterValues, chart: str) -> Values:
    """Return the values that describe a cluster."""
    pool, workers, cpu_workers = cluster.pool, cluster.workers, cluster.cpu_workers
    shared: Values = {
        "workers": {
            "gpusPerWorker": workers.gpus_per_worker,
            "actorsPerWorker": workers.actors_per_worker,
            "tasksPerWorker": workers.tasks_per_worker,
            "cpus": workers.cpus,
            "memoryGiB": workers.memory_gib,
            "actorMemoryGiB": workers.actor_memory_gib,
            "taskMemoryGiB": workers.task_memory_gib,
            "objectStorePercent": workers.object_store_percent,
        },
        "cpuWorkers": {
            "replicas": cpu_workers.replicas,
            "tasksPerWorker": cpu_workers.tasks_per_worker,
            "cpus": cpu_workers.cpus,
            "memoryGiB": cpu_workers.memory_gib,
            "taskMemoryGiB": cpu_workers.task_memory_gib,
            "objectStorePercent": cpu_workers.object_store_percent,
        },
        "head": {
            "memoryGiB": cluster.head.memory_gib,
            "objectStorePercent": cluster.head.object_store_percent,
            "cpus": cluster.head.cpus,
        },
        "autoscaling": {"enabled": cluster.autoscaling.enabled, "minWorkers": cluster.autoscaling.min_workers},
        "cpuOvercommit": cluster.cpu_overcommit,
    }
    numbers = {"gpus": pool.gpus_per_actor, "cpus": pool.cpus_per_actor, "task": pool.cpus_per_task}
    if chart == "raycluster":
        names = {"gpusPerActor": numbers["gpus"], "cpusPerActor": numbers["cpus"], "cpusPerTask": numbers["task"]}
        return {"actorPool": {"actors": pool.actors, **names}, **shared}
    inference = {"actors": pool.actors, "gpus_per_actor": numbers["gpus"], "cpus_per_actor": numbers["cpus"]}
    return {"job": {"inference": inference, "preprocess": {"cpus_per_task": numbers["task"]}}, **shared}


def rendered(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the sizes of the pods in a manifest."""
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    return [_size(group) for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def _size(group: Manifest) -> dict[str, Any]:
    container = group["template"]["spec"]["containers"][0]
    start = group["rayStartParams"]
    return {
        "replicas": group.get("maxReplicas", 1),
        "cpu_millis": int(container["resources"]["requests"]["cpu"].removesuffix("m")),
        "memory_mib": int(container["resources"]["limits"]["memory"].removesuffix("Mi")),
        "object_store_mib": int(start["object-store-memory"]) // 2**20,
        "gpus": int(start["num-gpus"]),
        "cpus": int(start["num-cpus"]),
    }


def computed(found: Capacity) -> list[dict[str, Any]]:
    """Return the sizes that the module computes, in the manifest's order."""
    sizes = [found.head, found.workers] + ([found.cpu_workers] if found.cpu_workers.replicas else [])
    names = ("replicas", "cpu_millis", "memory_mib", "object_store_mib", "gpus", "cpus")
    return [{name: getattr(size, name) for name in names} for size in sizes]


def planned(cluster: ClusterValues, chart: str) -> Capacity:
    """Return the program's sizes and problems; for a job with the function behind `plan --values`, from the values that the chart gets."""
    if chart == "raycluster":
        return size_cluster(cluster, SHARED_CLUSTER_NAMES)
    values = values_of(cluster, chart)
    whole = size_cluster(cluster)
    try:
        config = parse_config(values["job"])
    except UserError as error:  # The configuration itself refuses this one, before anything is planned.
        refused = "neither a fraction of one GPU nor a whole number of GPUs; Ray schedules only those"
        assert refused in error.message and any(refused in problem for problem in whole.problems)
        return whole
    found = pods(config, values)
    assert found == whole
    return found


@pytest.mark.parametrize("chart", ["rayjob", "raycluster"])
def test_chart_and_program_agree(chart: str) -> None:
    verdicts = {"fits": 0, "refused": 0}

    @settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
    @example(ClusterValues())
    @example(ClusterValues(ActorPool(actors=6, gpus_per_actor=0.5), Workers(gpus_per_worker=2)))
    @example(ClusterValues(ActorPool(gpus_per_actor=0)))
    @given(clusters)
    def agree(cluster: ClusterValues) -> None:
        found = planned(cluster, chart)
        try:
            manifests = render(chart, values_of(cluster, chart))
        except HelmError as error:
            assert tuple(error.problems) == found.problems, error
            verdicts["refused"] += 1
            return
        verdicts["fits"] += 1
        assert found.problems == ()
        manifest = find(manifests, "RayJob" if chart == "rayjob" else "RayCluster")
        assert rendered(manifest) == computed(found)
        group = manifest["spec"].get("rayClusterSpec", manifest["spec"])["workerGroupSpecs"][0]
        assert group["replicas"] == group["minReplicas"] == found.min_workers

    agree()
    print(f"\n{chart}: {verdicts}")
    assert min(verdicts.values()) >= EXAMPLES // 20


@pytest.mark.parametrize(
    ("actors", "gpus_per_actor", "gpus_per_worker", "workers"),
    [
        (4, 1, 1, 4),
        (4, 1, 4, 1),
        (5, 1, 4, 2),
        (4, 2, 8, 1),
        (4, 0.5, 1, 2),
        (10, 0.3, 1, 4),
        (10, 0.1, 1, 1),
        (4, 0.6, 2, 2),
        (3, 0, 1, 3),
    ],
)
def test_workers_follow_from_the_actor_pool(
    actors: int, gpus_per_actor: float, gpus_per_worker: int, workers: int
) -> None:
    values = {
        "job": {"inference": {"actors": actors, "gpus_per_actor": gpus_per_actor}},
        "workers": {"gpusPerWorker": gpus_per_worker},
    }
    group = find(render("rayjob", values), "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == workers
    assert (
        group["rayStartParams"]["num-gpus"]
        == limits.get("nvidia.com/gpu", "0")
        == str(gpus_per_worker if gpus_per_actor else 0)
    )


def names(shape: Any, path: str = "") -> dict[str, dict[str, Any]]:
    """Return the keys of a JSON Schema as pydantic writes it, with their type, bounds and default."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in shape["properties"].items():
        if "$ref" in value:
            found |= names(TYPES[value["$ref"].rpartition("/")[2]], f"{path}{key}.")
            continue
        options = value.get("anyOf", [value])
        bounds = {bound: option[bound] for option in options for bound in ("minimum", "maximum") if bound in option}
        kinds = [option["type"] for option in options]
        found[f"{path}{key}"] = {"type": kinds if len(kinds) > 1 else kinds[0], **bounds, "default": value["default"]}
    return found


SHAPE = TypeAdapter(ClusterValues).json_schema()
TYPES = SHAPE["$defs"]


@pytest.mark.parametrize("chart", ["rayjob", "raycluster"])
def test_program_has_the_chart_s_defaults_and_bounds(chart: str) -> None:
    shape = {**SHAPE, "properties": {key: value for key, value in SHAPE["properties"].items() if key != "pool"}}
    found = names(shape)
    assert len(found) == 20
    schema = json.loads((HELM / chart / "values.schema.json").read_text())
    values = yaml.safe_load((HELM / chart / "values.yaml").read_text())
    for path, expected in found.items():
        part, default = schema, values
        for key in path.split("."):
            part, default = part["properties"][key], default[key]
        bounds = {bound: part[bound] for bound in ("minimum", "maximum") if bound in part}
        assert expected == {"type": part["type"], **bounds, "default": default}, path


def test_program_has_the_chart_s_defaults_of_the_actor_pool() -> None:
    job = yaml.safe_load((HELM / "rayjob" / "values.yaml").read_text())["job"]
    pool = yaml.safe_load((HELM / "raycluster" / "values.yaml").read_text())["actorPool"]
    assert parse_config(job) == parse_config({})
    assert ClusterValues.of(parse_config({}), {}) == ClusterValues()
    given = ClusterValues().pool
    assert pool == {
        "actors": given.actors,
        "gpusPerActor": given.gpus_per_actor,
        "cpusPerActor": given.cpus_per_actor,
        "cpusPerTask": given.cpus_per_task,
    }


@pytest.mark.parametrize(
    "values",
    [
        {"workers": {"gpusPerWorker": "2"}},
        {"workers": {"gpusPerWorker": 0}},
        {"head": {"objectStorePercent": 81}},
        {"autoscaling": {"enabled": "yes"}},
        {"cpuWorkers": {"replicas": 1.5}},
        {"cpuOvercommit": 0.5},
        {"head": None},
    ],
    ids=str,
)
def test_value_that_the_chart_refuses_by_its_schema_is_refused_by_the_program(values: Values) -> None:
    with pytest.raises(HelmError):
        render("rayjob", values)
    with pytest.raises(UserError, match=rf"{next(iter(values))}"):
        pods(parse_config({}), values)


def test_all_keys_file_is_planned() -> None:
    values = yaml.safe_load((HELM.parent / "tests" / "charts" / "values" / "rayjob.yaml").read_text())
    assert pods(parse_config({}), values) is None  # It joins a cluster.
    # A predictor excludes embeddings and decoding on GPUs, as a manifest excludes URIs.
    together = {"input": {"manifest": None}, "task": "classify", "preprocess": {"decoder": "exact"}}
    job = merged(values["job"], together)
    run = {"suspend": False, "shutdownAfterJobFinishes": True, "deletionRules": []}
    own = merged(values, {"clusterSelector": "", "job": together, "run": run, "schedule": {"cron": ""}})
    found = pods(parse_config(job), own)
    assert found
    assert rendered(find(render("rayjob", own), "RayJob")) == computed(found)
