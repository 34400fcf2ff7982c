"""The size of the Ray cluster that an actor pool needs, and what does not fit: the chart's arithmetic, word for word.

`helm/common/templates/_capacity.tpl` and `_rules-capacity.tpl` say the same; tests/charts/test_capacity.py compares the two,
and the defaults and bounds here with the chart's. All arithmetic is on whole numbers of small units: 1/10000 GPU or CPU, as in
Ray, thousandths of a CPU, as in Kubernetes, and MiB.
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
LEAST_MEMORY_MIB = 1_024
LEAST_OBJECT_STORE_MIB = 80  # Ray refuses to start with less than 75 MiB.

# The chart's values by the names here (gpusPerWorker is gpus_per_worker), with its types; it has keys that no size follows from.
VALUES = ConfigDict(alias_generator=lambda name: to_camel(name).replace("Gib", "GiB"), extra="ignore")
Count = Annotated[int, Field(ge=1, le=1_000, strict=True)]
Gib = Annotated[float, Field(ge=1, le=100_000, strict=True)]
PartGib = Annotated[float, Field(ge=0.1, le=10_000, strict=True)]
Percent = Annotated[int, Field(ge=1, le=80, strict=True)]


@dataclass(frozen=True)
class Keys:
    """How messages call the settings of the actor pool."""

    gpus: str = "job.inference.gpus_per_actor"
    cpus: str = "job.inference.cpus_per_actor"
    task_cpus: str = "job.preprocess.cpus_per_task"


SHARED_CLUSTER = Keys("actorPool.gpusPerActor", "actorPool.cpusPerActor", "actorPool.cpusPerTask")


@dataclass(frozen=True)
class Pool:
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
    actors_per_worker: Count = 1  # Where actors have no GPU.
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
    """Whether workers come and go, between so many and as many as the actors need."""

    __pydantic_config__: ClassVar[ConfigDict] = VALUES

    enabled: Annotated[bool, Field(strict=True)] = False
    min_workers: Annotated[int, Field(ge=0, le=10_000, strict=True)] = 0


@dataclass(frozen=True)
class Size:
    """What one pod of a group has, and how many pods there are.

    Attributes:
        replicas: Number of pods, the most there can be where they come and go.
        memory_mib: Memory, the object store included.
        object_store_mib: Memory of Ray's object store.
        cpu_millis: Thousandths of a CPU that the pod asks Kubernetes for.
        actors: Actors that it has room for.
        gpus: GPUs.
        cpus: CPUs that Ray counts with.
        spare_cpu_units: Of these, 1/10000 CPUs beside the actors.
        tasks: Fetch-and-decode tasks that run in those at the same time.
        heap_mib: Memory that actors and tasks take.
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
    """The cluster, and what is wrong with it: a sentence each, with both numbers and the remedy."""

    workers: Size
    cpu_workers: Size
    head: Size
    min_workers: int
    problems: tuple[str, ...] = ()

    def total(self, amount: str) -> int:
        """The sum of an attribute of :class:`Size` over all pods."""
        sizes = (self.head, self.workers, self.cpu_workers)
        return sum(size.replicas * int(getattr(size, amount)) for size in sizes)


@dataclass(frozen=True)
class Cluster:
    """All values that the size of a cluster follows from."""

    __pydantic_config__: ClassVar[ConfigDict] = VALUES

    pool: Pool = field(default_factory=Pool)
    workers: Workers = field(default_factory=Workers)
    cpu_workers: CpuWorkers = field(default_factory=CpuWorkers)
    head: Head = field(default_factory=Head)
    autoscaling: Autoscaling = field(default_factory=Autoscaling)
    cpu_overcommit: Annotated[float, Field(ge=1, le=100, strict=True)] = 1

    @classmethod
    def of(cls, config: JobConfig, values: Mapping[str, Any]) -> Cluster:
        """The cluster of a job with values of the ``rayjob`` chart; what these do not say is at the chart's default.

        Raises:
            UserError: If a value is not of its type or out of its bounds, all of them at once.
        """
        inference = config.inference
        pool = Pool(
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
                "Mend them; helm/README.md has every value with its default.",
            ) from None


_CLUSTER = TypeAdapter(Cluster)


def capacity(cluster: Cluster, keys: Keys = Keys()) -> Capacity:
    """Sizes a cluster and checks it.

    >>> found = capacity(Cluster(Pool(actors=6, gpus_per_actor=0.5), Workers(gpus_per_worker=2)))
    >>> found.workers.replicas, found.workers.actors, found.problems
    (2, 4, ())
    """
    pool, workers, cpu_workers = cluster.pool, cluster.workers, cluster.cpu_workers
    actor_gpus = _units(pool.gpus_per_actor, RAY_UNITS)
    fit = _actors_per_worker(actor_gpus, workers)
    replicas = -(-pool.actors // max(1, fit))
    sizes = Capacity(
        workers=_pod(
            workers, cluster, replicas, fit, workers.gpus_per_worker if actor_gpus else 0, workers.actor_memory_gib
        ),
        cpu_workers=_pod(cpu_workers, cluster, cpu_workers.replicas, 0, 0, 0),
        head=_head(cluster),
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


def _shown(amount: float, units: int) -> str:
    return f"{amount / units:.10f}".rstrip("0").rstrip(".")


def _actors_per_worker(actor_gpus: int, workers: Workers) -> int:
    if actor_gpus == 0:
        return workers.actors_per_worker
    if actor_gpus < RAY_UNITS:  # A fraction is of one GPU, so 0.6 does not fit three times into two.
        return workers.gpus_per_worker * (RAY_UNITS // actor_gpus)
    return workers.gpus_per_worker * RAY_UNITS // actor_gpus


def _requested(cpus: float, cluster: Cluster) -> int:
    return math.ceil(_units(cpus, MILLIS) / Decimal(repr(cluster.cpu_overcommit)))


def _pod(
    group: Workers | CpuWorkers, cluster: Cluster, replicas: int, actors: int, gpus: int, actor_memory_gib: float
) -> Size:
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
    memory = max(LEAST_MEMORY_MIB, memory)
    store = memory * percent // 100
    return Size(replicas, memory, store, _requested(cpus, cluster), actors, gpus, cpus, spare, tasks, heap)


def _head(cluster: Cluster) -> Size:
    memory = _units(cluster.head.memory_gib, MIB_OF_GIB)
    store = memory * cluster.head.object_store_percent // 100
    return Size(1, memory, store, _requested(cluster.head.cpus, cluster))


def _step_problems(key: str, given: float) -> list[str]:
    units = _units(given, RAY_UNITS)
    if Decimal(repr(given)) * RAY_UNITS == units:
        return []
    return [f"{key} is {_shown(given, 1)}, Ray counts in steps of 0.0001: use {_shown(max(1, units), RAY_UNITS)}"]


def _gpu_problems(actor_gpus: int, gpus: int, keys: Keys) -> list[str]:
    shown = _shown(actor_gpus, RAY_UNITS)
    whole, rest = divmod(actor_gpus, RAY_UNITS)
    if actor_gpus > RAY_UNITS and rest:
        return [
            f"{keys.gpus} is {shown}, which is neither a fraction of one GPU nor a whole number of GPUs; "
            f"Ray schedules only those: use {whole} or {whole + 1}"
        ]
    if actor_gpus > gpus * RAY_UNITS:
        return [
            f"{keys.gpus} is {shown}, workers.gpusPerWorker is {gpus}: no worker can hold an actor; "
            f"raise workers.gpusPerWorker to {shown} or lower {keys.gpus} to {gpus}"
        ]
    if actor_gpus >= RAY_UNITS and gpus % whole:
        return [
            f"{keys.gpus} is {shown}, workers.gpusPerWorker is {gpus}: {gpus % whole} GPUs of each worker would be paid for "
            f"and idle; make workers.gpusPerWorker a multiple of {shown}"
        ]
    return []


def _cpu_problems(sizes: Capacity, task_cpus: int, keys: Keys) -> list[str]:
    found = []
    workers = sizes.workers
    if workers.spare_cpu_units < 0:
        need = _shown(workers.cpus * RAY_UNITS - workers.spare_cpu_units, RAY_UNITS)
        found.append(
            f"workers.cpus is {workers.cpus}, its {workers.actors} actors need {need}: raise workers.cpus or lower {keys.cpus}"
        )
    cpu_workers = sizes.cpu_workers
    if cpu_workers.replicas and task_cpus > cpu_workers.spare_cpu_units:
        found.append(
            f"{keys.task_cpus} is {_shown(task_cpus, RAY_UNITS)}, cpuWorkers.cpus is {cpu_workers.cpus}: CPU workers would never "
            f"run a task; raise cpuWorkers.cpus or lower {keys.task_cpus}"
        )
    most = max(0, workers.spare_cpu_units, sizes.cpu_workers.spare_cpu_units if sizes.cpu_workers.replicas else 0)
    if task_cpus > most:
        found.append(
            f"{keys.task_cpus} is {_shown(task_cpus, RAY_UNITS)}, no worker has more than {_shown(most, RAY_UNITS)} CPUs beside "
            "its actors: no image would ever be prepared; raise workers.tasksPerWorker, workers.cpus or cpuWorkers.replicas"
        )
    return found


def _memory_problems(name: str, size: Size) -> list[str]:
    if size.replicas == 0:
        return []
    found = []
    need = size.heap_mib + size.object_store_mib
    if need > size.memory_mib:
        found.append(
            f"{name}.memoryGiB is {_shown(size.memory_mib, MIB_OF_GIB)}, {size.actors} actors, {size.tasks} tasks and the object "
            f"store need {_shown(need, MIB_OF_GIB)}: raise {name}.memoryGiB or lower {name}.objectStorePercent"
        )
    return found + _store_problems(name, size)


def _store_problems(name: str, size: Size) -> list[str]:
    if size.object_store_mib >= LEAST_OBJECT_STORE_MIB:
        return []
    return [
        f"{name} has {size.object_store_mib} MiB of object store, Ray starts with no less than {LEAST_OBJECT_STORE_MIB}: "
        f"raise {name}.memoryGiB or {name}.objectStorePercent"
    ]


def _autoscaling_problems(autoscaling: Autoscaling, replicas: int) -> list[str]:
    if not autoscaling.enabled or autoscaling.min_workers <= replicas:
        return []
    return [
        f"autoscaling.minWorkers is {autoscaling.min_workers}, the actor pool needs {replicas} workers: "
        f"lower autoscaling.minWorkers to {replicas} or less"
    ]
