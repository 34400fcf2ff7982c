"""Tries a job on a few of its images and one actor before it is started for all of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import pyarrow as pa

from batch_inference.balance import Load, possible_load
from batch_inference.cluster import Demand, connected
from batch_inference.config import InputConfig, JobConfig
from batch_inference.driver import open_output
from batch_inference.errors import BatchInferenceError, UserError
from batch_inference.identity import Engine, check_columns, check_same_job, resolve_engine, versions
from batch_inference.inference import RESULT_SCHEMA, InferenceActor, raise_end_of_job
from batch_inference.ledger import Ledger, fingerprint
from batch_inference.manifest import Inputs, find_inputs
from batch_inference.prefixes import Prefixes
from batch_inference.preparation import Preparation
from batch_inference.storage import Store, display, is_local, local_path

GIB = 1 << 30
# Batches are repeated for so long, after one that does not count.
_MEASURE_S = 5.0
# Ray's logs and what it spills go to the temporary folder, blocks on their way to shared memory.
_TMP_GIB = {"FAIL": 1.0, "WARN": 10.0}
_GOLDEN = 64
# Nodes that say nothing for so long are busy or gone.
_VERSIONS_S = 30.0
_SHM_GIB = {"FAIL": 0.0, "WARN": 1.0}

State = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: What was tried.
        state: OK, WARN or FAIL.
        finding: The fact, with its numbers.
        remedy: What to do about it; "" where there is nothing to do.
    """

    name: str
    state: State
    finding: str
    remedy: str = ""


@dataclass(frozen=True)
class Measured:
    """What one actor and one task took for the samples.

    Attributes:
        images: Images that were decoded.
        fetch_s: Seconds that one image takes to fetch; likewise decode_s.
        decode_s: See fetch_s.
        infer_s: Seconds of an actor for one image, in full batches, after the first.
        load_s: Seconds until the actor had answered for the first time: Ray, weights, warm-up.
        columns: The output's columns with their types.
        tmp_free: Bytes free in the temporary folder of the actor's node; likewise shm_free in shared memory.
        shm_free: See tmp_free.
        gpu_bytes: GPU memory that the actor took at most, 0 without one.
    """

    images: int
    fetch_s: float
    decode_s: float
    infer_s: float
    load_s: float
    columns: dict[str, str]
    tmp_free: int
    shm_free: int
    gpu_bytes: int = 0


@dataclass(frozen=True)
class Forecast:
    """What the whole job will take, from one actor and one task.

    Attributes:
        images_per_s: Of the whole job; the least of what actors, decoding, fetching and CPUs allow.
        limit: Which of these it is: ``inference``, ``decode``, ``fetch`` or ``cpu``.
        seconds: Until the job is done, start included.
        gpu_hours: GPUs of all actors for that time.
        actor_images_per_s: Of one actor that never waits.
        cpus_per_gpu: CPU cores that decode as fast as one GPU predicts, those of its actors left out; None without GPUs.
    """

    images_per_s: float
    limit: str
    seconds: float
    gpu_hours: float
    actor_images_per_s: float
    cpus_per_gpu: float | None


@dataclass(frozen=True)
class Preflight:
    """All checks, and the forecast where one could be made."""

    checks: tuple[Check, ...]
    measured: Measured | None = None
    forecast: Forecast | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing failed; warnings do not count."""
        return all(check.state != "FAIL" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For ``preflight --json``."""
        return {"ok": self.ok, **asdict(self)}


def forecast(measured: Measured, load: Load, rows: int, config: JobConfig) -> Forecast:
    """Predicts a job from what one actor and one task took; each part is taken to work without waiting for the others.

    Args:
        measured: Of one actor and one task.
        load: What can go on at the same time.
        rows: Inputs that are left to do.
        config: The job.
    """
    section = config.inference
    cpu_s = measured.decode_s + (0.0 if load.on_gpu else measured.infer_s * load.cpus_per_actor)
    rates = {
        "inference": load.actors / max(1e-9, measured.infer_s),
        "decode": load.decode_cpus / max(1e-9, measured.decode_s),
        "fetch": load.fetch_threads / max(1e-9, measured.fetch_s),
        "cpu": load.cpus / max(1e-9, cpu_s),
    }
    limit = min(rates, key=lambda name: rates[name])
    seconds = measured.load_s + rows / rates[limit]
    gpus = section.gpus_per_actor if load.on_gpu else 0.0
    return Forecast(
        images_per_s=rates[limit],
        limit=limit,
        seconds=seconds,
        gpu_hours=seconds * gpus * load.actors / 3600,
        actor_images_per_s=1 / max(1e-9, measured.infer_s),
        cpus_per_gpu=measured.decode_s / max(1e-9, measured.infer_s) / gpus if gpus else None,
    )


def preflight(
    config: JobConfig,
    *,
    address: str | None = None,
    samples: int = 64,
    golden: str | None = None,
    golden_tolerance: float = 0.02,
) -> Preflight:
    """Tries everything that a job needs, in the order in which it would need it; writes nothing that stays.

    Args:
        config: The job.
        address: Ray cluster to try it on, as for ``run``; None starts one on this machine.
        samples: Images to decode and predict, spread evenly over the inputs.
        golden: A manifest with the predictions that are expected, such as the rows of an earlier output: ``uri``, and columns of
            the output. Its first 64 lines are predicted and compared.
        golden_tolerance: How far numbers with fractions may be off; everything else has to be equal.

    Returns:
        A check for each part; parts that need one that failed are left out.

    Raises:
        UserError: If no input or output is given.
        SystemFault: If Ray does not start.
    """
    return _Preflight(config, address, samples, golden, golden_tolerance).run()


class _Preflight:
    def __init__(
        self,
        config: JobConfig,
        address: str | None,
        samples: int,
        golden: str | None = None,
        golden_tolerance: float = 0.0,
    ) -> None:
        self._config = config
        self._golden, self._tolerance = golden, golden_tolerance
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._samples = samples
        self._checks: list[Check] = []
        self._begun = 0.0

    def run(self) -> Preflight:
        store = self._try("output", lambda: open_output(self._config), lambda s: self._output(s))
        found = self._try("input", lambda: find_inputs(self._config), self._inputs)
        engine = self._try("model", lambda: resolve_engine(self._config), self._engine)
        if store and engine:
            self._try("job", lambda: Ledger(store).job() and self._resume(store, engine), lambda text: text or "")
        if store and is_local(store.uri):
            with contextlib.suppress(OSError):  # an empty folder that this has made; a job's is not empty
                Path(local_path(store.uri)).rmdir()
        expected = None
        if self._golden:
            expected = self._try("golden samples", self._expected, lambda _: "")
        if not engine or not found:
            return Preflight(tuple(c for c in self._checks if c.finding))
        # One actor is enough to try, and fits where the whole job may not.
        config = self._config.model_copy(update={"inference": self._config.inference.model_copy(update={"actors": 1})})
        has_gpus, wants_gpus = _gpus(self._address), config.inference.gpus_per_actor > 0
        if wants_gpus and not has_gpus:
            cpu = {"gpus_per_actor": 0.0}
            config = config.model_copy(update={"inference": config.inference.model_copy(update=cpu)})
            engine = resolve_engine(config)
        self._begun = time.perf_counter()
        with connected(config, self._address, None):
            measured = self._measure(config, engine, found, expected)
            self._same_versions()
            load = possible_load(self._config, -(-found.table.num_rows // self._config.shard_size), self._cpus())
            self._fits(has_gpus or not wants_gpus)
        predicted = None
        if measured and (has_gpus or not wants_gpus):
            predicted = forecast(measured, load, found.table.num_rows, self._config)
        return Preflight(tuple(c for c in self._checks if c.finding), measured, predicted)

    # --- the checks ---

    def _try(self, name: str, call: Callable[[], Any], finding: Callable[[Any], str]) -> Any:
        """The call's value after a check that says what was found; None after one that failed."""
        try:
            value = call()
            self._checks.append(Check(name, "OK", finding(value)))
        except BatchInferenceError as exc:
            self._checks.append(Check(name, "FAIL", exc.message, exc.remedy))
            return None
        return value

    def _output(self, store: Store) -> str:
        begun = time.perf_counter()
        path = f"_probe/{uuid4().hex}"
        store.put(path, b"x")
        try:
            listed = any(info.path == path for info in store.objects("_probe"))
            read = store.get(path) == b"x"
        finally:
            store.delete([path])
        if not (listed and read):
            raise BatchInferenceError(
                f"an object written to {display(store.uri)} can't be {'read' if listed else 'listed'} at once",
                "Use a store that is consistent after a write (S3, GCS, Azure, a local disk).",
            )
        store.probe()
        return f"{display(store.uri)}: write, list, read, delete and put-if-absent work ({time.perf_counter() - begun:.2f} s)"

    def _inputs(self, found: Inputs) -> str:
        check_columns(self._config, found.table.column_names)
        rows = found.table.num_rows
        left_out = sum(found.skipped.values())
        return (
            f"{rows:,} images, {-(-rows // self._config.shard_size):,} shards"
            + (f"; {left_out:,} files with other endings left out" if left_out else "")
            + (f"; {found.duplicates:,} listed twice" if found.duplicates else "")
        )

    def _engine(self, engine: Engine) -> str:
        shown = {key.rpartition(".")[2]: value for key, value in engine.identity.items()}
        what = [
            f"{key} {shown[key][:16] if key == 'sha256' else shown[key]}"
            for key in ("path", "name", "weights", "sha256")
            if shown.get(key)
        ]
        return f"{', '.join(what)}; identity {fingerprint(engine.identity)[:12]}"

    def _resume(self, store: Store, engine: Engine) -> str:
        ledger = Ledger(store)
        job = ledger.require_job()
        check_same_job(self._config, engine, job, store)
        return f"the output holds this job already: {len(ledger.committed()):,} of {job.shards:,} shards are committed"

    def _fits(self, tried_as_asked: bool) -> None:
        import ray

        there = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = there.get("GPU", 0.0)
        demand = Demand.of(self._config)
        # A Ray of our own shares its CPUs among more processes than there are.
        cpus = float("inf") if self._own else there.get("CPU", 0.0)
        problems = demand.problems(cpus, gpus)
        where = "this machine" if self._own else "the cluster"
        if not problems:
            self._checks.append(
                Check("room", "OK", f"{demand.cpus:g} CPUs and {demand.actor_gpus:g} GPUs fit into {where}")
            )
        else:
            remedy = (
                "Run it where there are more, or change these." + ("" if tried_as_asked else " The rates below are a CPU's.")
            )  # fmt: skip
            self._checks.append(
                Check("room", "WARN", f"the job does not fit into {where}: {'; '.join(problems)}", remedy)
            )

    def _expected(self) -> pa.Table:
        source = InputConfig(manifest=self._golden)
        table = find_inputs(self._config.model_copy(update={"input": source})).table.slice(0, _GOLDEN)
        if table.num_columns == 1:
            raise UserError(
                f"{self._golden} has the column uri alone, and nothing to compare with",
                "Take rows of an output's predictions, with uri and the columns that are to stay as they are.",
            )
        return table

    def _as_expected(self, expected: pa.Table, result: pa.Table) -> None:
        """Compares predictions with those that are expected; rows in the order of ``row``."""
        result = result.sort_by("row")
        columns = [
            name for name in expected.column_names if name in result.column_names and name not in ("shard", "row")
        ]
        missing = [name for name in expected.column_names if name not in (*result.column_names, "uri", "row", "shard")]
        if not columns:
            remedy = f"The output has {', '.join(n for n in result.column_names if n not in RESULT_SCHEMA.names)}."
            self._checks.append(
                Check("golden samples", "FAIL", f"no column is the output's: {', '.join(missing)}", remedy)
            )
            return
        off = []
        for want, got in zip(expected.to_pylist(), result.to_pylist(), strict=True):
            if got["error_type"] is not None:
                off.append(f"{display(want['uri'])}: {got['stage']} {got['error_type']}")
                continue
            differing = [name for name in columns if not _alike(want[name], got[name], self._tolerance)]
            if differing:
                said = ", ".join(f"{n} is {_short(got[n])}, not {_short(want[n])}" for n in differing)
                off.append(f"{display(want['uri'])}: {said}")
        compared = f"{expected.num_rows} samples, {', '.join(columns)}"
        if missing:
            compared += f" ({', '.join(missing)} not in the output)"
        if off:
            self._checks.append(
                Check(
                    "golden samples",
                    "FAIL",
                    f"{len(off)} of {compared} are off: {_some(off)}",
                    "Look at weights, transform and inference.precision; or allow more with --golden-tolerance.",
                )
            )
        else:
            self._checks.append(Check("golden samples", "OK", f"{compared} are as expected"))

    def _same_versions(self) -> None:
        """What unpickles on a worker has to be of the driver's version, and gives other pixels where Pillow is another."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self._own:
            return
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
            self._checks.append(
                Check("versions", "FAIL", f"nodes differ from here: {_some(differing)}", "Give all one image.")
            )
        elif waiting:
            remedy = "Look at them in Ray's dashboard; a busy cluster may need longer."
            finding = f"{len(waiting)} of {len(nodes)} nodes did not answer in {_VERSIONS_S:g} s"
            self._checks.append(Check("versions", "WARN", finding, remedy))
        else:
            self._checks.append(Check("versions", "OK", f"the same on {len(nodes)} nodes and here"))

    def _measure(
        self, config: JobConfig, engine: Engine, found: Inputs, expected: pa.Table | None = None
    ) -> Measured | None:
        import ray

        section = config.inference
        places = np.unique(np.linspace(0, found.table.num_rows - 1, self._samples).astype(np.int64))
        uris = found.table["uri"].take(pa.array(places)).to_pylist()
        preparation = Preparation(
            config.storage, config.preprocess, engine.transform, prefixes=Prefixes.of(config.input)
        )
        trial: Any = ray.remote(num_gpus=section.gpus_per_actor, num_cpus=section.cpus_per_actor, max_restarts=0)(
            Trial
        ).remote(engine.factory, engine.decoder)
        task: Any = ray.remote(num_cpus=config.preprocess.cpus_per_task, max_retries=0)(_prepared)
        try:
            table: pa.Table = ray.get(task.remote(preparation, uris))
            good = table.filter(table["error_type"].is_null())
            self._bad_samples(table)
            if not good.num_rows:
                return None
            batch = 32 if section.batch_size == "auto" else section.batch_size
            full = good.take(pa.array(np.arange(batch) % good.num_rows))
            first: pa.Table = ray.get(trial.predict.remote(full))
            load_s = time.perf_counter() - self._begun
            raise_end_of_job(first)
            self._forward(first, batch)
            if first["error_type"].null_count == 0:
                return None
            if expected is not None:
                # The manifest's own preparation: prefixes are for the job's input.
                plain = Preparation(config.storage, config.preprocess, engine.transform)
                rows = ray.get(task.remote(plain, expected["uri"].to_pylist()))
                self._as_expected(expected, ray.get(trial.predict.remote(rows)))
            measured: Measured = ray.get(trial.measure.remote(full, _MEASURE_S))
        except BatchInferenceError as exc:
            self._checks.append(Check("forward pass", "FAIL", exc.message, exc.remedy))
            return None
        except ray.exceptions.RayError as exc:
            text = " ".join(str(exc).split())[-300:]
            self._checks.append(
                Check("forward pass", "FAIL", f"the actor did not survive: {text}", "Look at memory and Ray's logs.")
            )
            return None
        finally:
            ray.kill(trial)
        columns = {field.name: str(field.type) for field in first.schema if field.name not in RESULT_SCHEMA.names}
        passthrough = {f.name: str(f.type) for f in found.table.schema if f.name != "uri"}
        place = {"uri": "string", "shard": "int32", "row": "int32"}
        measured = replace(
            measured,
            images=good.num_rows,
            fetch_s=_mean(good, "fetch_s"),
            decode_s=_mean(good, "decode_s"),
            load_s=load_s,
            columns={**place, **columns, **passthrough},
        )
        schema = ", ".join(f"{name} {kind}" for name, kind in measured.columns.items())
        self._checks.append(Check("output schema", "OK", schema))
        self._room("temporary folder", measured.tmp_free, _TMP_GIB, "Ray writes logs and what it spills there")
        self._room("shared memory", measured.shm_free, _SHM_GIB, "images on their way to the actors lie there")
        return measured

    def _bad_samples(self, table: pa.Table) -> None:
        bad = table.filter(table["error_type"].is_valid()).to_pylist()
        tried = f"{table.num_rows} samples"
        if not bad:
            self._checks.append(Check("samples", "OK", f"all {tried} were fetched and decoded"))
            return
        named = _some([f"{display(b['uri'])}: {b['stage']} {b['error_type']}" for b in bad])
        percent = 100 * len(bad) / table.num_rows
        most = self._config.errors.max_percent
        too_many = len(bad) == table.num_rows or (most is not None and percent > most)
        self._checks.append(
            Check(
                "samples",
                "FAIL" if len(bad) == table.num_rows else "WARN",
                f"{len(bad)} of {tried} ({percent:.0f} %) failed: {named}",
                f"More than errors.max_percent = {most:g} allows: mend the input, or raise it."
                if too_many and most is not None
                else "They would end in the errors table.",
            )
        )

    def _forward(self, result: pa.Table, batch: int) -> None:
        failed = result.filter(result["error_type"].is_valid())
        if failed.num_rows:
            self._checks.append(
                Check(
                    "forward pass",
                    "FAIL",
                    f"{failed.num_rows} of {batch} images failed with {failed['error_type'][0]}: {failed['message'][0]}",
                    "Mend the predictor, or model.* in the configuration.",
                )
            )
        else:
            self._checks.append(Check("forward pass", "OK", f"a batch of {batch} gave {batch} predictions"))

    def _room(self, name: str, free: int, limits: dict[str, float], why: str) -> None:
        gib = free / GIB
        state: State = "FAIL" if gib < limits["FAIL"] else "WARN" if gib < limits["WARN"] else "OK"
        remedy = "" if state == "OK" else f"Make room, at least {limits['WARN']:g} GiB: {why}."
        self._checks.append(Check(name, state, f"{gib:,.1f} GiB free where the actor runs", remedy))

    @property
    def _own(self) -> bool:
        return self._address in (None, "local")

    def _cpus(self) -> float:
        return float(os.cpu_count() or 1) if self._own else float("inf")


class Trial:
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
        return Measured(
            images=table.num_rows,
            fetch_s=0.0,
            decode_s=0.0,
            infer_s=infer_s,
            load_s=0.0,
            columns={},
            tmp_free=shutil.disk_usage(tempfile.gettempdir()).free,
            shm_free=shutil.disk_usage(shm).free if shm.exists() else 0,
            gpu_bytes=_gpu_bytes(),
        )


def _gpu_bytes() -> int:
    import sys

    torch = sys.modules.get("torch")
    return int(torch.cuda.max_memory_reserved()) if torch is not None and torch.cuda.is_available() else 0


def _prepared(preparation: Preparation, uris: list[str]) -> pa.Table:
    return pa.concat_tables(list(preparation.rows(0, uris)))


def _alike(want: Any, got: Any, tolerance: float) -> bool:
    """Whether a value is what is expected; lists and structs piece by piece, None as nothing that is compared."""
    if want is None:
        return True
    if isinstance(want, dict):
        return isinstance(got, dict) and all(_alike(value, got.get(key), tolerance) for key, value in want.items())
    if isinstance(want, list):
        return (
            isinstance(got, list)
            and len(want) == len(got)
            and all(map(lambda w, g: _alike(w, g, tolerance), want, got))
        )
    if isinstance(want, float) or isinstance(got, float):
        return isinstance(got, (int, float)) and abs(want - got) <= tolerance
    return bool(want == got) or str(want) == str(got)


def _some(texts: list[str]) -> str:
    """The first five, and how many more there are."""
    return "; ".join(texts[:5]) + (f"; and {len(texts) - 5} more" if len(texts) > 5 else "")


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _mean(table: pa.Table, name: str) -> float:
    return float(np.mean(table[name].to_numpy()))


def _gpus(address: str | None) -> bool:
    """Whether there are GPUs where the job would run."""
    from batch_inference.cluster import local_gpus

    if address in (None, "local"):
        return local_gpus() > 0
    return True  # a cluster without them is found when the actor is placed
