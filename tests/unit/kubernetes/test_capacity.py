"""Exact sizes and verdicts at the bounds; that the charts compute the same is tested with the charts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from batch_inference.config import parse_config
from batch_inference.errors import UserError
from batch_inference.kubernetes.capacity import (
    SHARED_CLUSTER_NAMES,
    ActorPool,
    Autoscaling,
    Capacity,
    ClusterValues,
    CpuWorkers,
    Head,
    PodGroup,
    Workers,
    size_cluster,
)


def size(pool: ActorPool = ActorPool(), **values: Any) -> Capacity:
    return size_cluster(ClusterValues(pool, **values))


def test_default_cluster() -> None:
    assert size() == Capacity(
        # An actor of 6 GiB and 4 tasks of 1 GiB are 70 % of 15 GiB, rounded up.
        workers=PodGroup(
            replicas=4,
            memory_mib=15 * 1024,
            object_store_mib=4608,
            cpu_millis=5000,
            actors=1,
            gpus=1,
            cpus=5,
            spare_cpu_units=40_000,
            tasks=4,
            heap_mib=10 * 1024,
        ),
        cpu_workers=PodGroup(
            replicas=0,
            memory_mib=12 * 1024,
            object_store_mib=3686,
            cpu_millis=8000,
            actors=0,
            gpus=0,
            cpus=8,
            spare_cpu_units=80_000,
            tasks=8,
            heap_mib=8 * 1024,
        ),
        head=PodGroup(
            replicas=1,
            memory_mib=8 * 1024,
            object_store_mib=2457,
            cpu_millis=2000,
            actors=0,
            gpus=0,
            cpus=0,
            spare_cpu_units=0,
            tasks=0,
            heap_mib=0,
        ),
        min_workers=4,
        problems=(),
    )


def test_pods_have_nothing_that_is_not_named() -> None:
    assert PodGroup(1, 1024, 80) == PodGroup(1, 1024, 80, 0, 0, 0, 0, 0, 0, 0)


def test_totals_count_every_pod() -> None:
    found = size(cpu_workers=CpuWorkers(replicas=3))
    assert found.total("memory_mib") == 1024 * (8 + 4 * 15 + 3 * 12)
    assert found.total("cpu_millis") == 2000 + 4 * 5000 + 3 * 8000
    assert found.total("gpus") == 4


@pytest.mark.parametrize(
    ("gpus_per_actor", "gpus_per_worker", "actors_per_worker"),
    [
        (1, 1, 1),
        (1, 4, 4),
        (2, 8, 4),
        (0.5, 1, 2),
        (0.3, 1, 3),
        (0.6, 2, 2),  # not three, as 1.8 GPUs would be: a fraction is of one GPU
        (0.3333, 1, 3),
        (0.0001, 1, 10_000),
        (0, 1, 7),
    ],
)
def test_actors_that_fit_into_a_worker(gpus_per_actor: float, gpus_per_worker: int, actors_per_worker: int) -> None:
    workers = Workers(gpus_per_worker=gpus_per_worker, actors_per_worker=7)
    for actors, replicas in ((1, 1), (actors_per_worker, 1), (actors_per_worker + 1, 2), (2 * actors_per_worker, 2)):
        found = size(ActorPool(actors=actors, gpus_per_actor=gpus_per_actor), workers=workers)
        assert (found.workers.actors, found.workers.replicas) == (actors_per_worker, replicas)
        assert found.workers.gpus == (gpus_per_worker if gpus_per_actor else 0)
        assert found.min_workers == replicas
        assert found.problems == ()


def test_actor_without_gpu_has_a_worker_of_its_own_by_default() -> None:
    workers = size(ActorPool(actors=3, gpus_per_actor=0)).workers
    assert (workers.replicas, workers.actors, workers.gpus) == (3, 1, 0)


def test_cpus_are_rounded_up_and_all_that_are_spare_run_tasks() -> None:
    pool = ActorPool(cpus_per_actor=0.7, cpus_per_task=0.6)
    workers = size(pool, workers=Workers(tasks_per_worker=1)).workers
    assert (workers.cpus, workers.spare_cpu_units, workers.tasks) == (2, 13_000, 2)
    workers = size(pool, workers=Workers(tasks_per_worker=1, cpus=3)).workers
    assert (workers.cpus, workers.spare_cpu_units, workers.tasks) == (3, 23_000, 3)
    assert workers.heap_mib == (6 + 3) * 1024
    cpu_workers = size(replace(pool, cpus_per_task=0.5), cpu_workers=CpuWorkers(tasks_per_worker=4)).cpu_workers
    assert (cpu_workers.cpus, cpu_workers.spare_cpu_units, cpu_workers.tasks) == (2, 20_000, 4)


def test_actors_that_leave_no_cpu_leave_no_task() -> None:
    found = size(ActorPool(cpus_per_actor=3), workers=Workers(cpus=3), cpu_workers=CpuWorkers(replicas=1))
    assert (found.workers.spare_cpu_units, found.workers.tasks, found.problems) == (0, 0, ())
    least = ActorPool(cpus_per_actor=3, cpus_per_task=0.0001)
    assert size(least, workers=Workers(cpus=3), cpu_workers=CpuWorkers(replicas=1)).workers.tasks == 0
    assert size(least, workers=Workers(cpus=4)).workers.tasks == 10_000
    found = size(ActorPool(cpus_per_actor=3.5), workers=Workers(cpus=3), cpu_workers=CpuWorkers(replicas=1))
    assert (found.workers.spare_cpu_units, found.workers.tasks) == (-5_000, 0)
    assert found.problems == (
        "workers.cpus is 3, its 1 actors need 3.5: raise workers.cpus or lower job.inference.cpus_per_actor",
    )


@pytest.mark.parametrize(
    ("cpus", "overcommit", "millis"),
    [(2, 1, 2000), (2, 3, 667), (2, 1.6, 1250), (0.1, 100, 1), (0.1001, 1, 100), (2.0005, 1, 2001)],
)
def test_requested_cpus_are_thousandths_rounded_up(cpus: float, overcommit: float, millis: int) -> None:
    assert size(head=Head(cpus=cpus), cpu_overcommit=overcommit).head.cpu_millis == millis


@pytest.mark.parametrize(
    ("task_memory_gib", "percent", "memory_mib", "store_mib"),
    [
        (0.7, 30, 2048, 614),  # 717 MiB are 70 % of 1,024.3: rounded up to whole GiB
        (0.699, 30, 1024, 307),
        (0.75, 25, 1024, 256),  # fits exactly
        (0.751, 25, 2048, 512),
        (7.5, 25, 10_240, 2560),
        (0.1, 30, 1024, 307),  # no less
        (0.8, 80, 4096, 3276),  # 819 MiB are 20 % of 4,095
        (0.801, 80, 5120, 4096),  # 820 MiB
    ],
)
def test_memory_is_what_tasks_and_object_store_need_in_whole_gib(
    task_memory_gib: float, percent: int, memory_mib: int, store_mib: int
) -> None:
    workers = CpuWorkers(1, 1, task_memory_gib=task_memory_gib, object_store_percent=percent)
    found = size(cpu_workers=workers)
    assert (found.cpu_workers.memory_mib, found.cpu_workers.object_store_mib) == (memory_mib, store_mib)
    assert found.problems == ()
    assert found.cpu_workers.heap_mib + store_mib <= memory_mib


def test_given_memory_is_taken_and_refused_if_one_mib_is_missing() -> None:
    # 6 GiB and 4 tasks of 1 GiB beside 20 % of 12.5 GiB.
    fits = Workers(memory_gib=12.5, object_store_percent=20)
    found = size(workers=fits)
    assert (found.workers.memory_mib, found.workers.object_store_mib, found.problems) == (12_800, 2560, ())
    found = size(workers=replace(fits, memory_gib=12.498))
    assert found.workers.memory_mib == 12_798
    assert found.problems == (
        "workers.memoryGiB is 12.498046875, 1 actors, 4 tasks and the object store need 12.4990234375: "
        "raise workers.memoryGiB or lower workers.objectStorePercent",
    )
    # Groups without pods need no memory.
    assert size(cpu_workers=CpuWorkers(0, memory_gib=1)).problems == ()
    (problem,) = size(cpu_workers=CpuWorkers(1, memory_gib=1)).problems
    assert problem.startswith("cpuWorkers.memoryGiB is 1, 0 actors, 8 tasks and the object store need 8.2998046875: ")


@pytest.mark.parametrize(("memory_gib", "percent", "store_mib"), [(1, 8, 81), (1.5625, 5, 80), (1.5624, 5, 80)])
def test_object_store_of_80_mib_is_enough(memory_gib: float, percent: int, store_mib: int) -> None:
    found = size(head=Head(memory_gib=memory_gib, object_store_percent=percent))
    assert (found.head.object_store_mib, found.problems) == (store_mib, ())


def test_smaller_object_store_is_refused() -> None:
    found = size(
        head=Head(memory_gib=1.5615, object_store_percent=5),
        workers=Workers(task_memory_gib=0.1, actor_memory_gib=0.1, object_store_percent=7),
        cpu_workers=CpuWorkers(1, 1, task_memory_gib=0.1, object_store_percent=1),
    )
    assert found.problems == tuple(
        f"{name} has {mib} MiB of object store, Ray starts with no less than 80: "
        f"raise {name}.memoryGiB or {name}.objectStorePercent"
        for name, mib in (("workers", 71), ("cpuWorkers", 10), ("head", 79))
    )


@pytest.mark.parametrize(
    ("given", "use"), [(0.33333, "0.3333"), (0.00001, "0.0001"), (0.00015, "0.0002"), (1.99999, "2")]
)
def test_numbers_finer_than_rays_steps_are_refused(given: float, use: str) -> None:
    shown = f"{given:.5f}"
    pool = ActorPool(cpus_per_actor=given, cpus_per_task=given)
    assert size_cluster(ClusterValues(pool), SHARED_CLUSTER_NAMES).problems == tuple(
        f"actorPool.{name} is {shown}, Ray counts in steps of 0.0001: use {use}"
        for name in ("cpusPerActor", "cpusPerTask")
    )
    pool = ActorPool(gpus_per_actor=given)
    (problem, *_) = size_cluster(ClusterValues(pool, Workers(gpus_per_worker=2))).problems
    assert problem == f"job.inference.gpus_per_actor is {shown}, Ray counts in steps of 0.0001: use {use}"


@pytest.mark.parametrize(
    ("gpus_per_actor", "gpus_per_worker", "problem"),
    [
        (1.5, 2, "is 1.5, which is neither a fraction of one GPU nor a whole number of GPUs; Ray schedules only those: use 1 or 2"),
        (1.0001, 8, "is 1.0001, which is neither a fraction of one GPU nor a whole number of GPUs; Ray schedules only those: use 1 or 2"),
        (
            2,
            1,
            "is 2, workers.gpusPerWorker is 1: no worker can hold an actor; "
            "raise workers.gpusPerWorker to 2 or lower job.inference.gpus_per_actor to 1",
        ),
        (
            3,
            7,
            "is 3, workers.gpusPerWorker is 7: 1 GPUs of each worker would be paid for and idle; "
            "make workers.gpusPerWorker a multiple of 3",
        ),
        (2, 2, None),
        (2, 4, None),
        (0.9999, 3, None),
        (1, 3, None),
    ],
)  # fmt: skip
def test_gpus_of_an_actor(gpus_per_actor: float, gpus_per_worker: int, problem: str | None) -> None:
    found = size(ActorPool(gpus_per_actor=gpus_per_actor), workers=Workers(gpus_per_worker=gpus_per_worker))
    assert found.problems == ((f"job.inference.gpus_per_actor {problem}",) if problem else ())


def test_task_needs_a_worker_with_as_many_spare_cpus() -> None:
    pool = ActorPool(cpus_per_task=4)
    assert size(pool, workers=Workers(cpus=5)).problems == ()
    assert size(pool, workers=Workers(cpus=4)).problems == (
        "job.preprocess.cpus_per_task is 4, no worker has more than 3 CPUs beside its actors: no image would ever be prepared; "
        "raise workers.tasksPerWorker, workers.cpus or cpuWorkers.replicas",
    )
    # CPU workers count if there are any.
    assert len(size(pool, workers=Workers(cpus=4), cpu_workers=CpuWorkers(0, cpus=4)).problems) == 1
    assert size(pool, workers=Workers(cpus=4), cpu_workers=CpuWorkers(1, cpus=4)).problems == ()
    assert size(pool, workers=Workers(cpus=5), cpu_workers=CpuWorkers(0, cpus=3)).problems == ()
    assert size(pool, workers=Workers(cpus=5), cpu_workers=CpuWorkers(1, cpus=3)).problems == (
        "job.preprocess.cpus_per_task is 4, cpuWorkers.cpus is 3: CPU workers would never run a task; "
        "raise cpuWorkers.cpus or lower job.preprocess.cpus_per_task",
    )
    # Where actors need more than there is, none is spare.
    (_, problem) = size(ActorPool(cpus_per_actor=2), workers=Workers(cpus=1)).problems
    assert "no worker has more than 0 CPUs beside its actors" in problem


def test_autoscaling_has_no_more_workers_than_the_actors_need() -> None:
    assert size(autoscaling=Autoscaling(True)).min_workers == 0
    found = size(autoscaling=Autoscaling(True, 4))
    assert (found.min_workers, found.problems) == (4, ())
    found = size(autoscaling=Autoscaling(False, 5))
    assert (found.min_workers, found.problems) == (4, ())
    assert size(autoscaling=Autoscaling(True, 5)).problems == (
        "autoscaling.minWorkers is 5, the actor pool needs 4 workers: lower autoscaling.minWorkers to 4 or less",
    )


BOUNDS = {
    "workers.gpusPerWorker": (1, 1000, 1),
    "workers.actorsPerWorker": (1, 1000, 1),
    "workers.tasksPerWorker": (0, 1000, 1),
    "workers.cpus": (1, 1000, 1),
    "workers.memoryGiB": (1, 100_000, 0.5),
    "workers.actorMemoryGiB": (0.1, 10_000, 0.05),
    "workers.taskMemoryGiB": (0.1, 10_000, 0.05),
    "workers.objectStorePercent": (1, 80, 1),
    "cpuWorkers.replicas": (0, 10_000, 1),
    "cpuWorkers.tasksPerWorker": (1, 1000, 1),
    "cpuWorkers.cpus": (1, 1000, 1),
    "head.memoryGiB": (1, 100_000, 0.5),
    "head.cpus": (0.1, 1000, 0.05),
    "autoscaling.minWorkers": (0, 10_000, 1),
    "cpuOvercommit": (1, 100, 0.5),
}


@pytest.mark.parametrize("path", BOUNDS)
def test_values_at_their_bounds_are_taken_and_beyond_them_refused(path: str) -> None:
    def given(value: object) -> ClusterValues:
        group, _, key = path.rpartition(".")
        return ClusterValues.of(parse_config({}), {group: {key: value}} if group else {key: value})

    low, high, step = BOUNDS[path]
    assert given(low) != given(high)
    wrong = (low - step, high + step, str(low), *([low + 0.5] if step == 1 else []))
    for value in wrong:
        with pytest.raises(UserError) as caught:
            given(value)
        assert caught.value.message.startswith(f"1 of the chart's values can't be used: {path}: ")
        assert caught.value.message.endswith(f", not {value!r}")


def test_pool_of_a_job_is_that_of_its_configuration() -> None:
    config = parse_config(
        {
            "inference": {"actors": 9, "gpus_per_actor": 0.25, "cpus_per_actor": 3},
            "preprocess": {"cpus_per_task": 2},
        }
    )
    values = ClusterValues.of(config, {"workers": {"gpusPerWorker": 2}, "image": "x"})
    assert values == ClusterValues(ActorPool(9, 0.25, 3, 2), Workers(gpus_per_worker=2))
