"""Tries a few of a job's images on one actor: what ``preflight`` does, and a job itself before all of its actors start."""

from __future__ import annotations

import contextlib
import resource
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batch_inference.batching import parts_within
from batch_inference.checks import Check, State, some
from batch_inference.collection import failure_of_all
from batch_inference.config import InputConfig, JobConfig
from batch_inference.errors import NOT_TRIED, STORE_ERROR_TYPES, BatchInferenceError, SystemFault
from batch_inference.forecast import Measured
from batch_inference.golden import compare
from batch_inference.identity import Engine, versions, without_output
from batch_inference.inference import RESULT_SCHEMA, InferenceActor, raise_end_of_job
from batch_inference.manifest import apart, with_places
from batch_inference.output_schema import as_written, distinct_columns, fitted, storable, united
from batch_inference.pipeline import STUCK_S
from batch_inference.prefixes import Prefixes
from batch_inference.preparation import Preparation
from batch_inference.storage import display
from batch_inference.tracebacks import with_place

GIB = 1 << 30
# Of a row in a table, while its columns are taken apart. No column of a predictor has this name.
_PLACE = "\0place"
# Batches are repeated for so long, after one that does not count.
_MEASURE_S = 5.0
# Ray's logs and what it spills go to the temporary folder, blocks on their way to shared memory.
_TMP_GIB, _TMP_LEAST_GIB, _SHM_GIB = 10.0, 1.0, 1.0
# Where a node has less left, Ray ends processes (RAY_memory_usage_threshold).
_MEMORY_SHARE, _MEMORY_GIB = 0.05, 1.0
# Decoded samples lie in one task; photos of 12 megapixels are 36 MB each.
_SAMPLE_BYTES = 512 << 20
# Nodes that say nothing for so long are busy or gone.
_VERSIONS_S = 30.0
# Ray's resource for a kind of GPU, such as accelerator_type:L4; each node with one has 1 of it.
_KIND = "accelerator_type:"
_CGROUP = Path("/sys/fs/cgroup")
_ROWS = "They would end in the errors table."
# What of prepared rows is for the driver: no pixels, which are the actors' matter.
_FACTS = ("row", "stage", "error_type", "message", "fetch_s", "decode_s")


@dataclass(frozen=True)
class _Prepared:
    """Samples that a task has fetched and decoded.

    Attributes:
        facts: Columns ``_FACTS`` of all of them, and their ``uri``.
        rows: Ray's reference to those that were decoded.
    """

    facts: pa.Table
    rows: Any


class Trial:
    """Tries images on one actor of the cluster that Ray is connected to, and keeps a check for each part.

    Nothing of it stays: what the actor decides, on precision or sizes of batches, is not the job's decision.

    Args:
        config: The job.
        engine: Model or predictor.
        passthrough: Columns of the input that go to the output, with their types.
    """

    def __init__(self, config: JobConfig, engine: Engine, passthrough: dict[str, str]) -> None:
        self._config, self._engine, self._passthrough = config, engine, passthrough
        self.checks: list[Check] = []

    def run(self, samples: pa.Table, expected: pa.Table | None = None) -> Measured | None:
        """Fetches, decodes and predicts, on each kind of GPU that the cluster has.

        Args:
            samples: Inputs of the job: ``uri``, and where they lie if they are members of files.
            expected: See :func:`~batch_inference.golden.golden_samples`.

        Returns:
            What it took, on the slowest kind; None where nothing could be predicted, which a check says.

        Raises:
            BatchInferenceError: What a job would end with at once; SystemFault also if no actor or task has answered for 30 min.
            RayError: The actor or its node is gone.
        """
        prepared = self._prepare(samples, Prefixes.of(self._config.input))
        good = prepared.facts.filter(prepared.facts["error_type"].is_null())
        self._bad_samples(prepared.facts)
        if not good.num_rows:
            return None
        # Prefixes are for the job's input.
        golden = (
            None
            if expected is None
            else self._prepare(with_places(expected, InputConfig(), self._config.storage), None)
        )
        kinds = self._kinds()
        tried = [self._on(kind, prepared.rows, expected, golden) for kind in kinds]
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

    def _add(self, name: str, state: State, finding: str, remedy: str = "", *, passing: bool = False) -> None:
        self.checks.append(Check(name, state, finding, remedy, passing))

    def _prepare(self, samples: pa.Table, prefixes: Prefixes | None) -> _Prepared:
        """Samples, fetched and decoded by a task; where one of them ends its process, each in a process of its own."""
        import ray

        preparation = Preparation(
            self._config.storage, self._config.preprocess, self._engine.transform, prefixes=prefixes
        )
        inputs, places = apart(samples)
        uris = inputs["uri"].to_pylist()
        task: Any = ray.remote(num_cpus=self._config.preprocess.cpus_per_task, max_retries=0, num_returns=2)(_rows)
        try:
            facts, rows = task.remote(preparation, uris, places, False)
            return _Prepared(_get(facts), rows)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            facts, rows = task.remote(preparation, uris, places, True)
            return _Prepared(_get(facts), rows)

    def _kinds(self) -> list[str | None]:
        """Kinds of GPU that the job's actors may come to, as Ray names them; None for whatever there is."""
        import ray

        if not self._config.inference.gpus_per_actor:
            return [None]
        there = ray.cluster_resources()  # type: ignore[no-untyped-call]
        kinds = sorted(name for name in there if name.startswith(_KIND))
        return list(kinds) if len(kinds) > 1 else [None]

    def _on(self, kind: str | None, rows: Any, expected: pa.Table | None, golden: _Prepared | None) -> Measured | None:
        """What a batch takes on one kind of GPU; None where it failed."""
        import ray

        section = self._config.inference
        batch = 32 if section.batch_size == "auto" else section.batch_size
        where = "" if kind is None else f" on {kind.removeprefix(_KIND)}"
        begun = time.perf_counter()
        actor: Any = ray.remote(
            num_gpus=section.gpus_per_actor,
            num_cpus=section.cpus_per_actor,
            resources={} if kind is None else {kind: 0.001},
            max_restarts=0,
        )(TrialActor).remote(
            without_output(self._engine, self._config).beside(self._passthrough).factory,
            self._engine.decoder,
            self._config.preprocess.damaged == "accept",
        )
        try:
            first, predicted = _get(actor.predict.remote(rows, batch))
            load_s = time.perf_counter() - begun
            raise_end_of_job(first)
            batch = first.num_rows  # fewer where the images are large
            failed = first.filter(first["error_type"].is_valid())
            if failed.num_rows:
                why = f"{failed['error_type'][0]}: {failed['message'][0]}"
                trace = failed["traceback"][0].as_py()
                none = failed.num_rows == batch
                remedy = "Fix the predictor, or model.* in the configuration." if none else _ROWS
                finding = f"{failed.num_rows} of {batch} images failed{where} with {why}"
                self._add("forward pass", "FAIL" if none else "WARN", with_place(finding, trace), remedy)
            else:
                self._add("forward pass", "OK", f"a batch of {batch} gave {batch} predictions{where}")
            if failed.num_rows == batch:
                return None
            rows_check: Check | None = _get(actor.rows_check.remote())
            if rows_check is not None:
                self.checks.append(replace(rows_check, finding=rows_check.finding + where))
            if expected is not None and golden is not None:
                self.checks.append(self._compared(expected, golden, actor, where))
            measured: Measured = _get(actor.measure.remote(rows, batch, _MEASURE_S))
        finally:
            ray.kill(actor)
        self._rooms(measured, where)
        place = {"uri": "string", "shard": "int32", "row": "int32"}
        columns = {field.name: str(field.type) for field in predicted.schema}
        return replace(measured, load_s=load_s, columns={**place, **columns, **self._passthrough})

    def _compared(self, expected: pa.Table, golden: _Prepared, actor: Any, where: str) -> Check:
        failed = {
            row["row"]: f"{row['stage']} {row['error_type']}"
            for row in golden.facts.to_pylist()
            if row["error_type"] is not None
        }
        result: tuple[pa.Table, pa.Table] | None = None
        if len(failed) < expected.num_rows:
            result = _get(actor.predict.remote(golden.rows, None))
            raise_end_of_job(result[0])
        return compare(expected, result, failed, self._config.preflight.golden_tolerance, where)

    def _bad_samples(self, facts: pa.Table) -> None:
        bad = facts.filter(facts["error_type"].is_valid()).to_pylist()
        tried = f"{facts.num_rows} samples"
        if not bad:
            self._add("samples", "OK", f"all {tried} were fetched and decoded")
            return
        if len(bad) == facts.num_rows and {one["error_type"] for one in bad} <= STORE_ERROR_TYPES:
            known = next((one for one in bad if one["error_type"] != NOT_TRIED), bad[0])
            raise failure_of_all(f"every one of {tried}", known["stage"], known["error_type"], known["message"])
        named = some([f"{display(b['uri'])}: {b['stage']} {b['error_type']}" for b in bad])
        percent = 100 * len(bad) / facts.num_rows
        most = self._config.errors.max_percent
        if len(bad) == facts.num_rows:
            state: State = "FAIL"
            remedy = "Fix the input, or name another: nothing of it could be used."
        else:
            state = "WARN"
            too_many = most is not None and percent > most
            remedy = (
                f"More than errors.max_percent = {most:g} allows: fix the input, or raise it." if too_many else _ROWS
            )
        self._add("samples", state, f"{len(bad)} of {tried} ({percent:.0f} %) failed: {named}", remedy)

    def _rooms(self, measured: Measured, where: str) -> None:
        """Disk and memory of the node that an actor was on."""
        where = where or " where the actor runs"
        why = "Ray writes logs and what it spills there"
        self._room("temporary folder", measured.tmp_free, _TMP_GIB, why, where, least=_TMP_LEAST_GIB)
        self._room("shared memory", measured.shm_free, _SHM_GIB, "images on their way to the actors lie there", where)
        enough = max(_MEMORY_GIB, _MEMORY_SHARE * measured.memory_total / GIB)
        taken = f", {measured.actor_bytes / GIB:,.1f} GiB taken by the actor"
        self._room("memory", measured.memory_free, enough, "Ray ends processes without it", where + taken)
        if not measured.gpu_total:
            return
        share, actors = self._config.inference.gpus_per_actor, self._config.inference.actors
        on_one = min(actors, max(1, int(1 / share))) if 0 < share < 1 else 1
        short = on_one * measured.gpu_bytes > measured.gpu_total
        self._add(
            "GPU memory",
            "WARN" if short else "OK",
            f"{measured.gpu_bytes / GIB:,.1f} GiB taken by an actor, {on_one} of them on a GPU of "
            f"{measured.gpu_total / GIB:,.1f} GiB{where}",
            "Raise inference.gpus_per_actor, or lower inference.batch_size." if short else "",
        )

    def _room(self, name: str, free: int, enough: float, why: str, where: str, *, least: float = 0.0) -> None:
        gib = free / GIB
        state: State = "FAIL" if gib < least else "WARN" if gib < enough else "OK"
        remedy = "" if state == "OK" else f"Make room, at least {enough:g} GiB: {why}."
        self._add(name, state, f"{gib:,.1f} GiB free{where}", remedy, passing=True)


class TrialActor:
    """One actor as the job would have, that measures itself."""

    def __init__(self, factory: Any, decoder: Any, marks_damage: bool = False) -> None:
        self._actor = InferenceActor(factory, [], decoder, marks_damage=marks_damage)

    def predict(self, rows: pa.Table, batch: int | None) -> tuple[pa.Table, pa.Table]:
        """Predicts so many rows at once, some of them several times where there are fewer; None: all as they are.

        Returns:
            Rows of ``RESULT_SCHEMA``, and the columns of their predictions.
        """
        return _apart(self._actor(rows if batch is None else _full(rows, batch)))

    def rows_check(self) -> Check | None:
        """Return whether rows depended on their neighbors; None where that was not tried."""
        return self._actor.rows_check

    def measure(self, rows: pa.Table, batch: int, seconds: float) -> Measured:
        """Predicts the same batch for so many seconds; raises what a job would end with."""
        table = _full(rows, batch)
        begun = time.perf_counter()
        rounds = 0
        while not rounds or time.perf_counter() - begun < seconds:
            raise_end_of_job(_apart(self._actor(table))[0])
            rounds += 1
        infer_s = (time.perf_counter() - begun) / (rounds * table.num_rows)
        shm = Path("/dev/shm")  # noqa: S108 - Ray's own place, asked for its size
        (free, total), (gpu_bytes, gpu_total) = memory(), _gpu_memory()
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
            memory_free=free,
            memory_total=total,
            gpu_bytes=gpu_bytes,
            gpu_total=gpu_total,
        )


def _apart(result: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Rows of ``RESULT_SCHEMA``, and the predictor's columns: these may have the names of ours, and be there in several types.

    Each of them is there once, as in the files of a job; Ray does not serialize tables with several columns of one name.
    """
    ours = len(RESULT_SCHEMA)
    rows, columns = (result.select(list(of)) for of in (range(ours), range(ours, result.num_columns)))
    if len(set(columns.column_names)) == columns.num_columns:
        return rows, columns
    columns = columns.append_column(_PLACE, pa.array(range(columns.num_rows), pa.int64()))
    parts = distinct_columns(columns)
    schema = as_written(united(storable(part.schema) for part in parts))
    columns = pa.concat_tables(fitted(part, schema).table for part in parts).sort_by(_PLACE)
    return rows, columns.drop_columns([_PLACE])


def _full(rows: pa.Table, batch: int) -> pa.Table:
    """A batch of the job's: at most so many rows, and at most ``BATCH_BYTES`` of pixels."""
    places = np.arange(batch) % rows.num_rows
    sizes = pc.binary_length(rows["pixels"]).to_numpy()[places]
    return rows.take(pa.array(places[parts_within(sizes.tolist())[0]]))


def memory() -> tuple[int, int]:
    """Bytes that processes here may still take, and may take in all: of the machine, or of the container where that has less."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(meminfo[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    # Files that were read are in memory.current, but make room when it is needed.
    with contextlib.suppress(OSError, ValueError, KeyError):
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text()) - int(stat["inactive_file"])
        most = int((_CGROUP / "memory.max").read_text())
        free, total = min(free, most - used), min(total, most)
    return max(0, free), total


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


def _rows(
    preparation: Preparation, uris: list[str], places: pa.Table | None, careful: bool
) -> tuple[pa.Table, pa.Table]:
    """Facts of all rows, and the rows that were decoded, as many as a task has room for."""
    facts: list[pa.Table] = []
    kept: list[pa.Table] = []
    taken = 0
    for table in preparation.rows(0, uris, places, careful=careful):
        facts.append(table.select(_FACTS))
        good = table.filter(table["error_type"].is_null())
        # The first in any case.
        if good.num_rows and (not kept or taken + good.nbytes <= _SAMPLE_BYTES):
            kept.append(good)
            taken += good.nbytes
    said = pa.concat_tables(facts)
    named = pa.array([uris[row] for row in said["row"].to_pylist()], pa.string())
    return said.append_column("uri", named), pa.concat_tables(kept) if kept else pa.table({})


def _mean(table: pa.Table, name: str) -> float:
    return float(np.mean(table[name].to_numpy()))
