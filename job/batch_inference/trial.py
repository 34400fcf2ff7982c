"""Tries a few of a job's images on one actor: what ``preflight`` does, and a job itself before all of its actors start."""

from __future__ import annotations

import contextlib
import resource
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from batch_inference.checks import Check, State, some
from batch_inference.config import JobConfig
from batch_inference.errors import BatchInferenceError, SystemFault
from batch_inference.forecast import Measured
from batch_inference.golden import compare
from batch_inference.identity import Engine, versions
from batch_inference.inference import RESULT_SCHEMA, InferenceActor, raise_end_of_job
from batch_inference.pipeline import STUCK_S
from batch_inference.prefixes import Prefixes
from batch_inference.preparation import Preparation
from batch_inference.storage import display

GIB = 1 << 30
# Batches are repeated for so long, after one that does not count.
_MEASURE_S = 5.0
# Ray's logs and what it spills go to the temporary folder, blocks on their way to shared memory.
_TMP_GIB = {"FAIL": 1.0, "WARN": 10.0}
_SHM_GIB = {"FAIL": 0.0, "WARN": 1.0}
# Ray ends processes where a node has less than 5 % left.
_MEMORY_GIB = {"FAIL": 0.0, "WARN": 1.0}
# Nodes that say nothing for so long are busy or gone.
_VERSIONS_S = 30.0
# Ray's resource for a kind of GPU, such as accelerator_type:L4; each node with one has 1 of it.
_KIND = "accelerator_type:"
_CGROUP = Path("/sys/fs/cgroup")


class Trial:
    """Tries images on one actor of the cluster that Ray is connected to, and keeps a check for each part.

    Args:
        config: The job.
        engine: Model or predictor.
        passthrough: Columns of the input that go to the output, with their types.
    """

    def __init__(self, config: JobConfig, engine: Engine, passthrough: dict[str, str]) -> None:
        self._config, self._engine, self._passthrough = config, engine, passthrough
        self.checks: list[Check] = []

    def run(self, uris: list[str], expected: pa.Table | None = None) -> Measured | None:
        """Fetches, decodes and predicts, on each kind of GPU that the cluster has.

        Args:
            uris: The samples, of the job's input.
            expected: See :func:`~batch_inference.golden.golden_samples`.

        Returns:
            What it took, on the slowest kind; None where nothing could be predicted, which a check says.

        Raises:
            BatchInferenceError: What a job would end with at once; SystemFault also if no actor or task has answered for 30 min.
            RayError: The actor or its node is gone.
        """
        prepared = self._prepare(uris, Prefixes.of(self._config.input))
        good = prepared.filter(prepared["error_type"].is_null())
        self._bad_samples(prepared)
        if not good.num_rows:
            return None
        section = self._config.inference
        batch = 32 if section.batch_size == "auto" else section.batch_size
        full = good.take(pa.array(np.arange(batch) % good.num_rows))
        # Prefixes are for the job's input.
        golden = None if expected is None else self._prepare(expected["uri"].to_pylist(), None)
        kinds = self._kinds()
        tried = [self._on(kind, full, expected, golden) for kind in kinds]
        found = [one for one in tried if one is not None]
        if len(found) < len(kinds):
            return None
        slowest = replace(
            max(found, key=lambda one: one.infer_s),
            images=good.num_rows,
            fetch_s=_mean(good, "fetch_s"),
            decode_s=_mean(good, "decode_s"),
        )
        self._add("output schema", "OK", ", ".join(f"{name} {kind}" for name, kind in slowest.columns.items()))
        self._room("temporary folder", slowest.tmp_free, _TMP_GIB, "Ray writes logs and what it spills there")
        self._room("shared memory", slowest.shm_free, _SHM_GIB, "images on their way to the actors lie there")
        taken = f"{slowest.actor_bytes / GIB:,.1f} GiB taken by the actor"
        self._room("memory", slowest.memory_free, _MEMORY_GIB, "processes are killed without it", taken)
        self._gpu_room(slowest)
        return slowest

    def same_versions(self) -> None:
        """What unpickles on a worker has to be of the driver's version, and gives other pixels where Pillow is another."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        mine = versions()
        ask: Any = ray.remote(num_cpus=0, max_retries=0)(versions)
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        asked = [
            ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
            for node in nodes
        ]
        done, waiting = ray.wait(asked, num_returns=len(asked), timeout=_VERSIONS_S)
        differing = []
        for node, answer in zip(nodes, asked, strict=True):
            theirs = ray.get(answer) if answer in done else {}
            other = [f"{k} {theirs.get(k, 'none')}, not {v}" for k, v in mine.items() if theirs.get(k) != v]
            if theirs and other:
                differing.append(f"{node['NodeManagerAddress']}: {', '.join(other)}")
        if differing:
            self._add("versions", "FAIL", f"nodes differ from here: {some(differing)}", "Give all one image.")
        elif waiting:
            remedy = "Look at them in Ray's dashboard; a busy cluster may need longer."
            self._add(
                "versions", "WARN", f"{len(waiting)} of {len(nodes)} nodes did not answer in {_VERSIONS_S:g} s", remedy
            )
        else:
            self._add("versions", "OK", f"the same on {len(nodes)} nodes and here")

    def _add(self, name: str, state: State, finding: str, remedy: str = "") -> None:
        self.checks.append(Check(name, state, finding, remedy))

    def _prepare(self, uris: list[str], prefixes: Prefixes | None) -> pa.Table:
        """Rows of samples, fetched and decoded by a task; where one of them ends its process, each in a process of its own."""
        import ray

        preparation = Preparation(
            self._config.storage, self._config.preprocess, self._engine.transform, prefixes=prefixes
        )
        task: Any = ray.remote(num_cpus=self._config.preprocess.cpus_per_task, max_retries=0)(_rows)
        try:
            return _get(task.remote(preparation, uris, False))
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            return _get(task.remote(preparation, uris, True))

    def _kinds(self) -> list[str | None]:
        """Kinds of GPU that the job's actors may come to, as Ray names them; None for whatever there is."""
        import ray

        if not self._config.inference.gpus_per_actor:
            return [None]
        there = ray.cluster_resources()  # type: ignore[no-untyped-call]
        kinds = sorted(name for name in there if name.startswith(_KIND))
        return list(kinds) if len(kinds) > 1 else [None]

    def _on(
        self, kind: str | None, full: pa.Table, expected: pa.Table | None, golden: pa.Table | None
    ) -> Measured | None:
        """What a batch takes on one kind of GPU; None where it failed."""
        import ray

        section = self._config.inference
        begun = time.perf_counter()
        actor: Any = ray.remote(
            num_gpus=section.gpus_per_actor,
            num_cpus=section.cpus_per_actor,
            resources={} if kind is None else {kind: 0.001},
            max_restarts=0,
        )(TrialActor).remote(self._engine.factory, self._engine.decoder)
        try:
            first: pa.Table = _get(actor.predict.remote(full))
            load_s = time.perf_counter() - begun
            raise_end_of_job(first)
            where = "" if kind is None else f" on {kind.removeprefix(_KIND)}"
            failed = first.filter(first["error_type"].is_valid())
            if failed.num_rows:
                why = f"{failed['error_type'][0]}: {failed['message'][0]}"
                none = failed.num_rows == full.num_rows
                remedy = (
                    "Mend the predictor, or model.* in the configuration."
                    if none
                    else "They would end in the errors table."
                )
                finding = f"{failed.num_rows} of {full.num_rows} images failed{where} with {why}"
                self._add("forward pass", "FAIL" if none else "WARN", finding, remedy)
            else:
                self._add("forward pass", "OK", f"a batch of {full.num_rows} gave {full.num_rows} predictions{where}")
            if failed.num_rows == full.num_rows:
                return None
            if expected is not None and golden is not None:
                tolerance = self._config.preflight.golden_tolerance
                self.checks.append(compare(expected, _get(actor.predict.remote(golden)), tolerance))
            measured: Measured = _get(actor.measure.remote(full, _MEASURE_S))
        finally:
            ray.kill(actor)
        place = {"uri": "string", "shard": "int32", "row": "int32"}
        columns = {field.name: str(field.type) for field in first.schema if field.name not in RESULT_SCHEMA.names}
        return replace(measured, load_s=load_s, columns={**place, **columns, **self._passthrough})

    def _bad_samples(self, table: pa.Table) -> None:
        bad = table.filter(table["error_type"].is_valid()).to_pylist()
        tried = f"{table.num_rows} samples"
        if not bad:
            self._add("samples", "OK", f"all {tried} were fetched and decoded")
            return
        named = some([f"{display(b['uri'])}: {b['stage']} {b['error_type']}" for b in bad])
        percent = 100 * len(bad) / table.num_rows
        most = self._config.errors.max_percent
        too_many = len(bad) == table.num_rows or (most is not None and percent > most)
        self._add(
            "samples",
            "FAIL" if len(bad) == table.num_rows else "WARN",
            f"{len(bad)} of {tried} ({percent:.0f} %) failed: {named}",
            f"More than errors.max_percent = {most:g} allows: mend the input, or raise it."
            if too_many and most is not None
            else "They would end in the errors table.",
        )

    def _room(self, name: str, free: int, limits: dict[str, float], why: str, taken: str = "") -> None:
        gib = free / GIB
        state: State = "FAIL" if gib < limits["FAIL"] else "WARN" if gib < limits["WARN"] else "OK"
        remedy = "" if state == "OK" else f"Make room, at least {limits['WARN']:g} GiB: {why}."
        finding = f"{gib:,.1f} GiB free where the actor runs"
        self._add(name, state, f"{finding}, {taken}" if taken else finding, remedy)

    def _gpu_room(self, measured: Measured) -> None:
        if not measured.gpu_total:
            return
        share = self._config.inference.gpus_per_actor
        on_one = max(1, int(1 / share)) if 0 < share < 1 else 1
        free = measured.gpu_total - on_one * measured.gpu_bytes
        self._add(
            "GPU memory",
            "WARN" if free < 0 else "OK",
            f"{measured.gpu_bytes / GIB:,.1f} GiB taken by an actor, {on_one} of them on a GPU of {measured.gpu_total / GIB:,.1f} GiB",
            "Raise inference.gpus_per_actor, or lower inference.batch_size." if free < 0 else "",
        )


class TrialActor:
    """One actor as the job would have, that measures itself."""

    def __init__(self, factory: Any, decoder: Any) -> None:
        self._actor = InferenceActor(factory, [], decoder)

    def predict(self, table: pa.Table) -> pa.Table:
        """Predicts prepared rows once."""
        return self._actor(table)

    def measure(self, table: pa.Table, seconds: float) -> Measured:
        """Predicts the same rows for so many seconds."""
        begun = time.perf_counter()
        rounds = 0
        while not rounds or time.perf_counter() - begun < seconds:
            self._actor(table)
            rounds += 1
        infer_s = (time.perf_counter() - begun) / (rounds * table.num_rows)
        shm = Path("/dev/shm")  # noqa: S108 - Ray's own place, asked for its size
        gpu_bytes, gpu_total = _gpu_memory()
        return Measured(
            images=table.num_rows,
            fetch_s=0.0,
            decode_s=0.0,
            infer_s=infer_s,
            load_s=0.0,
            columns={},
            tmp_free=shutil.disk_usage(tempfile.gettempdir()).free,
            shm_free=shutil.disk_usage(shm).free if shm.exists() else 0,
            actor_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            memory_free=_memory_free(),
            gpu_bytes=gpu_bytes,
            gpu_total=gpu_total,
        )


def _memory_free() -> int:
    """Bytes that processes here may still take: of the machine, and of the container where that has less."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(meminfo["MemAvailable"].split()[0]) * 1024
    # Files that were read are in memory.current, but make room when it is needed.
    with contextlib.suppress(OSError, ValueError, KeyError):
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
        free = min(free, int((_CGROUP / "memory.max").read_text()) - used)
    return max(0, free)


def _gpu_memory() -> tuple[int, int]:
    import sys

    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0, 0
    return int(torch.cuda.max_memory_reserved()), int(torch.cuda.mem_get_info()[1])


def _get(answer: Any) -> Any:
    """What a task or an actor answers, waited for as long as a job waits for its actors."""
    import ray

    try:
        return ray.get(answer, timeout=STUCK_S)
    except ray.exceptions.GetTimeoutError:
        raise SystemFault(
            f"the one actor that was tried has not answered for {STUCK_S} s: it does not start, or the predictor does not return",
            "Look at its log and at pending pods; then start the same command again.",
        ) from None
    except ray.exceptions.RayTaskError as exc:
        if isinstance(exc.cause, BatchInferenceError):
            raise exc.cause from None
        raise


def _rows(preparation: Preparation, uris: list[str], careful: bool) -> pa.Table:
    return pa.concat_tables(list(preparation.rows(0, uris, careful=careful)))


def _mean(table: pa.Table, name: str) -> float:
    return float(np.mean(table[name].to_numpy()))
