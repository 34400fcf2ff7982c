"""Checks of disk and memory on the node of a trial's actor."""

from __future__ import annotations

from batch_inference.config import InferenceConfig
from batch_inference.pipeline.checks import Check, State
from batch_inference.preflight.forecast import TrialMeasurements

GIB = 1 << 30
# Ray writes its logs and spilled objects to the temporary folder, and blocks that wait for actors to shared memory.
_TMP_WARN_GIB, _TMP_MIN_GIB, _SHM_WARN_GIB = 10.0, 1.0, 1.0
# With less memory left on a node, Ray kills processes (RAY_memory_usage_threshold).
_MIN_MEMORY_SHARE, _MIN_MEMORY_GIB = 0.05, 1.0


def check_node(measured: TrialMeasurements, inference: InferenceConfig, where: str) -> list[Check]:
    """Check disk, memory and GPU memory of the node that an actor was on.

    Args:
        measured: Measurements of the actor.
        inference: Resources of the job's actors.
        where: Text that says which node it was; "" for any.
    """
    where = where or " where the actor runs"
    spilling = "Ray writes its logs and spilled objects there"
    actor_use = f", {measured.actor_bytes / GIB:,.1f} GiB used by the actor"
    enough_memory = max(_MIN_MEMORY_GIB, _MIN_MEMORY_SHARE * measured.memory_total / GIB)
    checks = [
        _check_free("temporary folder", measured.tmp_free, _TMP_WARN_GIB, spilling, where, minimum=_TMP_MIN_GIB),
        _check_free("shared memory", measured.shm_free, _SHM_WARN_GIB, "images wait for the actors there", where),
        _check_free("memory", measured.memory_free, enough_memory, "Ray kills processes without it", where + actor_use),
    ]
    if measured.gpu_total:
        checks.append(_check_gpu_memory(measured, inference, where))
    return checks


def _check_free(name: str, free: int, enough: float, use: str, where: str, *, minimum: float = 0.0) -> Check:
    """Check free bytes: less than ``minimum`` GiB is a failure, less than ``enough`` GiB a warning."""
    gib = free / GIB
    state: State = "FAIL" if gib < minimum else "WARN" if gib < enough else "OK"
    remedy = "" if state == "OK" else f"Make room, at least {enough:g} GiB: {use}."
    return Check(name, state, f"{gib:,.1f} GiB free{where}", remedy, passing=True)


def _check_gpu_memory(measured: TrialMeasurements, inference: InferenceConfig, where: str) -> Check:
    share = inference.gpus_per_actor
    actors_per_gpu = min(inference.actors, max(1, int(1 / share))) if 0 < share < 1 else 1
    too_small = actors_per_gpu * measured.gpu_bytes > measured.gpu_total
    return Check(
        "GPU memory",
        "WARN" if too_small else "OK",
        f"{measured.gpu_bytes / GIB:,.1f} GiB used by an actor, {actors_per_gpu} of them on a GPU of "
        f"{measured.gpu_total / GIB:,.1f} GiB{where}",
        "Raise inference.gpus_per_actor, or lower inference.batch_size." if too_small else "",
    )
