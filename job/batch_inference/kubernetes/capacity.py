"""The size of the Ray cluster that an actor pool needs, and what does not fit: the chart's arithmetic in Python.

`helm/common/templates/_capacity.tpl` and `_rules-capacity.tpl` compute the same numbers and messages. tests/charts/test_capacity.py
compares the two, and the defaults and bounds here with the chart's. All arithmetic is on whole numbers of small units: 1/10000 GPU
or CPU, as in Ray, thousandths of a CPU, as in Kubernetes, and MiB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import ROUND_HALF_UP, Decimal
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from batch_inference.config import JobConfig
from batch_inference.errors import UserError

RAY_UNITS = 10_000
MILLIS = 1_000
MIB_OF_GIB = 1_024
MIN_MEMORY_MIB = 1_024
MIN_OBJECT_STORE_MIB = 80  # Ray refuses to start with less than 75 MiB.

# The chart's values have its types and, in camel case, the names here (gpusPerWorker is gpus_per_worker). Keys that have no
# influence on sizes are ignored.
VALUES = ConfigDict(alias_generator=lambda name: to_camel(name).replace("Gib", "GiB"), extra="ignore")
Count = Annotated[int, Field(ge=1, le=1_000, strict=True)]
Gib = Annotated[float, Field(ge=1, le=100_000, strict=True)]
PartGib = Annotated[float, Field(ge=0.1, le=10_000, strict=True)]
Percent = Annotated[int, Field(ge=1, le=80, strict=True)]


@dataclass(frozen=True)
class SettingNames:
    """Names of the actor pool's settings in messages."""

    gpus: str = "job.inference.gpus_per_actor"
    cpus: str = "job.inference.cpus_per_actor"
    task_cpus: str = "job.preprocess.cpus_per_task"


SHARED_CLUSTER_NAMES = SettingNames("actorPool.gpusPerActor", "actorPool.cpusPerActor", "actorPool.cpusPerTask")


@dataclass(frozen=True)
class ActorPool:
    """The actor pool, and the tasks that feed it."""

    actors: int = 4
    gpus_per_actor: float = 1
    cpus_per_actor: float = 1
    cpus_per_task: float = 1


@dataclass(frozen=True)
class Workers:
    """The workers that hold the actors; `cpus` and `memory_gib` follow from the actors unless given."""

    __pydantic_config__: ClassVar[ConfigDict] = VALUES

    gpus_per_worker: Count = 1
    actors_per_worker: Count = 1  # if actors have no GPU
    tasks_per_worker: Annotated[int, Field(ge=0, le=1_000, strict=True)] = 4
    cpus: Count | None = None
    memory_gib: Gib | None = None
    actor_memory_gib: PartGib = 6
    task_memory_gib: PartGib = 1
    object_store_percent: Percent = 30


@dataclass(frozen=True)
class CpuWorkers:
    """Workers without GPUs and actors."""

    __pydantic_config__: ClassVar[ConfigDict] = VALUES

    replicas: Annotated[int, Field(ge=0, le=10_000, strict=True)] = 0
    tasks_per_worker: Count = 8
    cpus: Count | None = None
    memory_gib: Gib | None = None
    task_memory_gib: PartGib = 1
    object_store_percent: Percent = 30


@dataclass(frozen=True)
class Head:
    """The head, which runs neither actors nor tasks."""

    __pydantic_config__: ClassVar[ConfigDict] = VALUES

    memory_gib: Gib = 8
    object_store_percent: Percent = 30
    cpus: Annotated[float, Field(ge=0.1, le=1_000, strict=True)] = 2


@dataclass(frozen=True)
class Autoscaling:
    """Whether the number of workers varies, between ``min_workers`` and the number that the actors need."""

    __pydantic_config__: ClassVar[ConfigDict] = VALUES

    enabled: Annotated[bool, Field(strict=True)] = False
    min_workers: Annotated[int, Field(ge=0, le=10_000, strict=True)] = 0


@dataclass(frozen=True)
class PodGroup:
    """A group of equal pods: their number, and what each of them has.

    Attributes:
        replicas: Number of pods; the maximum with autoscaling.
        memory_mib: Memory, the object store included.
        object_store_mib: Memory of Ray's object store.
        cpu_millis: Thousandths of a CPU that the pod requests from Kubernetes.
        actors: Actors that fit.
        gpus: GPUs.
        cpus: CPUs that Ray schedules on.
        spare_cpu_units: Those that the actors leave, in 1/10000 CPU.
        tasks: Fetch-and-decode tasks that run on the spare CPUs at the same time.
        heap_mib: Memory of actors and tasks.
    """

    replicas: int
    memory_mib: int
    object_store_mib: int
    cpu_millis: int = 0
    actors: int = 0
    gpus: int = 0
    cpus: int = 0
    spare_cpu_units: int = 0
    tasks: int = 0
    heap_mib: int = 0


@dataclass(frozen=True)
class Capacity:
    """A sized cluster, and its problems: one sentence each, with both numbers and the remedy."""

    workers: PodGroup
    cpu_workers: PodGroup
    head: PodGroup
    min_workers: int
    problems: tuple[str, ...] = ()

    def total(self, amount: str) -> int:
        """Return the sum of an attribute of :class:`PodGroup` over all pods."""
        sizes = (self.head, self.workers, self.cpu_workers)
        return sum(size.replicas * int(getattr(size, amount)) for size in sizes)


@dataclass(frozen=True)
class ClusterValues:
    """All values that determine the size of a cluster."""

    __pydantic_config__: ClassVar[ConfigDict] = VALUES

    pool: ActorPool = field(default_factory=ActorPool)
    workers: Workers = field(default_factory=Workers)
    cpu_workers: CpuWorkers = field(default_factory=CpuWorkers)
    head: Head = field(default_factory=Head)
    autoscaling: Autoscaling = field(default_factory=Autoscaling)
    cpu_overcommit: Annotated[float, Field(ge=1, le=100, strict=True)] = 1

    @classmethod
    def of(cls, config: JobConfig, values: Mapping[str, Any]) -> ClusterValues:
        """Return the values of a job with values of the ``rayjob`` chart; those that are not given have the chart's defaults.

        Raises:
            UserError: If values have a wrong type or are out of bounds; it names all of them.
        """
        inference = config.inference
        pool = ActorPool(
            inference.actors, inference.gpus_per_actor, inference.cpus_per_actor, config.preprocess.cpus_per_task
        )
        try:
            return _CLUSTER.validate_python({**values, "pool": pool})
        except ValidationError as exc:
            lines = [
                f"{'.'.join(map(str, error['loc']))}: {error['msg']}, not {error['input']!r}" for error in exc.errors()
            ]
            raise UserError(
                f"{len(lines)} of the chart's values can't be used: " + "; ".join(lines),
                "Fix them; helm/README.md has every value with its default.",
            ) from None


_CLUSTER = TypeAdapter(ClusterValues)


def size_cluster(cluster: ClusterValues, keys: SettingNames = SettingNames()) -> Capacity:
    """Return the size of a cluster and its problems.

    >>> capacity = size_cluster(ClusterValues(ActorPool(actors=6, gpus_per_actor=0.5), Workers(gpus_per_worker=2)))
    >>> capacity.workers.replicas, capacity.workers.actors, capacity.problems
    (2, 4, ())
    """
    pool, workers, cpu_workers = cluster.pool, cluster.workers, cluster.cpu_workers
    actor_gpus = _units(pool.gpus_per_actor, RAY_UNITS)
    actors_per_worker = _actors_per_worker(actor_gpus, workers)
    replicas = -(-pool.actors // max(1, actors_per_worker))
    sizes = Capacity(
        workers=_worker_group(
            workers,
            cluster,
            replicas,
            actors_per_worker,
            workers.gpus_per_worker if actor_gpus else 0,
            workers.actor_memory_gib,
        ),
        cpu_workers=_worker_group(cpu_workers, cluster, cpu_workers.replicas, 0, 0, 0),
        head=_head_group(cluster),
        min_workers=cluster.autoscaling.min_workers if cluster.autoscaling.enabled else replicas,
    )
    problems = (
        _step_problems(keys.gpus, pool.gpus_per_actor)
        + _step_problems(keys.cpus, pool.cpus_per_actor)
        + _step_problems(keys.task_cpus, pool.cpus_per_task)
        + _gpu_problems(actor_gpus, workers.gpus_per_worker, keys)
        + _cpu_problems(sizes, _units(pool.cpus_per_task, RAY_UNITS), keys)
        + _memory_problems("workers", sizes.workers)
        + _memory_problems("cpuWorkers", sizes.cpu_workers)
        + _store_problems("head", sizes.head)
        + _autoscaling_problems(cluster.autoscaling, replicas)
    )
    return replace(sizes, problems=tuple(problems))


def _units(number: float, units: int) -> int:
    return int((Decimal(repr(number)) * units).quantize(Decimal(1), ROUND_HALF_UP))


def _format(amount: float, units: int) -> str:
    return f"{amount / units:.10f}".rstrip("0").rstrip(".")


def _actors_per_worker(actor_gpus: int, workers: Workers) -> int:
    if actor_gpus == 0:
        return workers.actors_per_worker
    if actor_gpus < RAY_UNITS:  # A fraction is of one GPU, so 0.6 does not fit three times into two.
        return workers.gpus_per_worker * (RAY_UNITS // actor_gpus)
    return workers.gpus_per_worker * RAY_UNITS // actor_gpus


def _requested(cpus: float, cluster: ClusterValues) -> int:
    return math.ceil(_units(cpus, MILLIS) / Decimal(repr(cluster.cpu_overcommit)))


def _worker_group(
    group: Workers | CpuWorkers, cluster: ClusterValues, replicas: int, actors: int, gpus: int, actor_memory_gib: float
) -> PodGroup:
    pool = cluster.pool
    task_cpus = _units(pool.cpus_per_task, RAY_UNITS)
    actor_cpus = actors * _units(pool.cpus_per_actor, RAY_UNITS)
    cpus = group.cpus or -(-(actor_cpus + group.tasks_per_worker * task_cpus) // RAY_UNITS)
    spare = cpus * RAY_UNITS - actor_cpus
    tasks = max(0, spare) // max(1, task_cpus)
    heap = actors * _units(actor_memory_gib, MIB_OF_GIB) + tasks * _units(group.task_memory_gib, MIB_OF_GIB)
    percent = group.object_store_percent
    memory = MIB_OF_GIB * -(-heap * 100 // (MIB_OF_GIB * (100 - percent)))
    if group.memory_gib:
        memory = _units(group.memory_gib, MIB_OF_GIB)
    memory = max(MIN_MEMORY_MIB, memory)
    store = memory * percent // 100
    return PodGroup(replicas, memory, store, _requested(cpus, cluster), actors, gpus, cpus, spare, tasks, heap)


def _head_group(cluster: ClusterValues) -> PodGroup:
    memory = _units(cluster.head.memory_gib, MIB_OF_GIB)
    store = memory * cluster.head.object_store_percent // 100
    return PodGroup(1, memory, store, _requested(cluster.head.cpus, cluster))


def _step_problems(key: str, given: float) -> list[str]:
    units = _units(given, RAY_UNITS)
    if Decimal(repr(given)) * RAY_UNITS == units:
        return []
    return [f"{key} is {_format(given, 1)}, Ray counts in steps of 0.0001: use {_format(max(1, units), RAY_UNITS)}"]


def _gpu_problems(actor_gpus: int, gpus: int, keys: SettingNames) -> list[str]:
    shown = _format(actor_gpus, RAY_UNITS)
    gpus_each, rest = divmod(actor_gpus, RAY_UNITS)
    if actor_gpus > RAY_UNITS and rest:
        return [
            f"{keys.gpus} is {shown}, which is neither a fraction of one GPU nor a whole number of GPUs; "
            f"Ray schedules only those: use {gpus_each} or {gpus_each + 1}"
        ]
    if actor_gpus > gpus * RAY_UNITS:
        return [
            f"{keys.gpus} is {shown}, workers.gpusPerWorker is {gpus}: no worker can hold an actor; "
            f"raise workers.gpusPerWorker to {shown} or lower {keys.gpus} to {gpus}"
        ]
    if actor_gpus >= RAY_UNITS and gpus % gpus_each:
        return [
            f"{keys.gpus} is {shown}, workers.gpusPerWorker is {gpus}: {gpus % gpus_each} GPUs of each worker would be paid for "
            f"and idle; make workers.gpusPerWorker a multiple of {shown}"
        ]
    return []


def _cpu_problems(sizes: Capacity, task_cpus: int, keys: SettingNames) -> list[str]:
    problems = []
    workers = sizes.workers
    if workers.spare_cpu_units < 0:
        need = _format(workers.cpus * RAY_UNITS - workers.spare_cpu_units, RAY_UNITS)
        problems.append(
            f"workers.cpus is {workers.cpus}, its {workers.actors} actors need {need}: raise workers.cpus or lower {keys.cpus}"
        )
    cpu_workers = sizes.cpu_workers
    if cpu_workers.replicas and task_cpus > cpu_workers.spare_cpu_units:
        problems.append(
            f"{keys.task_cpus} is {_format(task_cpus, RAY_UNITS)}, cpuWorkers.cpus is {cpu_workers.cpus}: CPU workers would never "
            f"run a task; raise cpuWorkers.cpus or lower {keys.task_cpus}"
        )
    max_spare = max(0, workers.spare_cpu_units, sizes.cpu_workers.spare_cpu_units if sizes.cpu_workers.replicas else 0)
    if task_cpus > max_spare:
        problems.append(
            f"{keys.task_cpus} is {_format(task_cpus, RAY_UNITS)}, no worker has more than {_format(max_spare, RAY_UNITS)} CPUs beside "
            "its actors: no image would ever be prepared; raise workers.tasksPerWorker, workers.cpus or cpuWorkers.replicas"
        )
    return problems


def _memory_problems(name: str, size: PodGroup) -> list[str]:
    if size.replicas == 0:
        return []
    problems = []
    need = size.heap_mib + size.object_store_mib
    if need > size.memory_mib:
        problems.append(
            f"{name}.memoryGiB is {_format(size.memory_mib, MIB_OF_GIB)}, {size.actors} actors, {size.tasks} tasks and the object "
            f"store need {_format(need, MIB_OF_GIB)}: raise {name}.memoryGiB or lower {name}.objectStorePercent"
        )
    return problems + _store_problems(name, size)


def _store_problems(name: str, size: PodGroup) -> list[str]:
    if size.object_store_mib >= MIN_OBJECT_STORE_MIB:
        return []
    return [
        f"{name} has {size.object_store_mib} MiB of object store, Ray starts with no less than {MIN_OBJECT_STORE_MIB}: "
        f"raise {name}.memoryGiB or {name}.objectStorePercent"
    ]


def _autoscaling_problems(autoscaling: Autoscaling, replicas: int) -> list[str]:
    if not autoscaling.enabled or autoscaling.min_workers <= replicas:
        return []
    return [
        f"autoscaling.minWorkers is {autoscaling.min_workers}, the actor pool needs {replicas} workers: "
        f"lower autoscaling.minWorkers to {replicas} or less"
    ]
