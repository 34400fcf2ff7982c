"""The chart's arithmetic and that of batch_inference.capacity are one: same sizes, same verdicts, same words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batch_inference.capacity import SHARED_CLUSTER, Capacity, Cluster, CpuWorkers, Head, Keys, Pool, Workers, capacity

from .render import HelmError, Manifest, Values, find, render

EXAMPLES = 200

gpus = st.sampled_from([0, 0.00001, 0.1, 0.125, 0.25, 0.3, 0.33333, 0.5, 0.6, 1, 1.5, 2, 3, 4, 8]) | st.floats(
    0, 4
).map(lambda x: round(x, 3))
cpus = st.sampled_from([0.5, 1, 1.25, 2, 3.7, 4]) | st.floats(0.001, 16).map(lambda x: round(x, 3))
gib = st.integers(1, 64) | st.floats(1, 64).map(lambda x: round(x, 2))
percent = st.integers(10, 60)
clusters = st.builds(
    Cluster,
    st.builds(Pool, st.integers(1, 40), gpus, cpus, cpus),
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
    st.builds(Head, st.integers(1, 64), percent),
    st.booleans(),
    st.integers(0, 12),
)


def values_of(cluster: Cluster, chart: str) -> Values:
    """The values that describe a cluster."""
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
        "head": {"memoryGiB": cluster.head.memory_gib, "objectStorePercent": cluster.head.object_store_percent},
        "autoscaling": {"enabled": cluster.autoscaling, "minWorkers": cluster.min_workers},
    }
    numbers = {"gpus": pool.gpus_per_actor, "cpus": pool.cpus_per_actor, "task": pool.cpus_per_task}
    if chart == "raycluster":
        names = {"gpusPerActor": numbers["gpus"], "cpusPerActor": numbers["cpus"], "cpusPerTask": numbers["task"]}
        return {"actorPool": {"actors": pool.actors, **names}, **shared}
    inference = {"actors": pool.actors, "gpus_per_actor": numbers["gpus"], "cpus_per_actor": numbers["cpus"]}
    return {"job": {"inference": inference, "preprocess": {"cpus_per_task": numbers["task"]}}, **shared}


def rendered(manifest: Manifest) -> list[dict[str, Any]]:
    """The sizes of the pods in a manifest."""
    cluster = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    return [_size(group) for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def _size(group: Manifest) -> dict[str, Any]:
    container = group["template"]["spec"]["containers"][0]
    start = group["rayStartParams"]
    return {
        "replicas": group.get("maxReplicas", 1),
        "memory_mib": int(container["resources"]["limits"]["memory"].removesuffix("Mi")),
        "object_store_mib": int(start["object-store-memory"]) // 2**20,
        "gpus": int(start["num-gpus"]),
        "cpus": int(start["num-cpus"]),
    }


def computed(found: Capacity) -> list[dict[str, Any]]:
    """The sizes that the module computes, in the manifest's order."""
    sizes = [found.head, found.workers] + ([found.cpu_workers] if found.cpu_workers.replicas else [])
    names = ("replicas", "memory_mib", "object_store_mib", "gpus", "cpus")
    return [{name: getattr(size, name) for name in names} for size in sizes]


@pytest.mark.parametrize(("chart", "keys"), [("rayjob", Keys()), ("raycluster", SHARED_CLUSTER)])
def test_chart_and_program_agree(chart: str, keys: Keys) -> None:
    verdicts = {"fits": 0, "refused": 0}

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @example(Cluster())
    @example(Cluster(Pool(actors=6, gpus_per_actor=0.5), Workers(gpus_per_worker=2)))
    @example(Cluster(Pool(gpus_per_actor=0)))
    @given(clusters)
    def agree(cluster: Cluster) -> None:
        found = capacity(cluster, keys)
        try:
            manifests = render(chart, values_of(cluster, chart))
        except HelmError as error:
            assert tuple(error.problems) == found.problems, error
            verdicts["refused"] += 1
            return
        verdicts["fits"] += 1
        assert found.problems == ()
        assert rendered(find(manifests, "RayJob" if chart == "rayjob" else "RayCluster")) == computed(found)

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
