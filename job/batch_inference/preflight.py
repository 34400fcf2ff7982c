"""Tries a job on a few of its images and one actor before it is started for all of them."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import structlog

from batch_inference.balance import possible_load
from batch_inference.checks import Check
from batch_inference.cluster import Demand, connected
from batch_inference.config import JobConfig
from batch_inference.cpus import available_cpus
from batch_inference.destination import check_output
from batch_inference.errors import BatchInferenceError, SystemFault, UserError
from batch_inference.forecast import Forecast, Measured, forecast
from batch_inference.golden import golden_samples
from batch_inference.history import at_work
from batch_inference.identity import Engine, check_columns, check_same_job, differences, resolve_engine
from batch_inference.ledger import Job, Ledger, fingerprint
from batch_inference.manifest import Inputs, apart, find_inputs, read_stored
from batch_inference.progress import duration
from batch_inference.storage import Store, display, is_local, local_path, open_output
from batch_inference.trial import Trial

log = structlog.get_logger()

# Shards that a job's own samples come from: reading one costs a request.
_SHARDS = 8


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


def preflight(config: JobConfig, *, address: str | None = None, one_actor: bool = False) -> Preflight:
    """Tries everything that a job needs, in the order in which it would need it; writes nothing that stays.

    Args:
        config: The job; ``preflight`` in it says how many images are tried, and what is expected of them.
        address: Ray cluster to try it on, as for ``run``; None starts one on this machine.
        one_actor: Whether this is no place for the whole job: whether it has room here, and how long it would take, is not asked.

    Returns:
        A check for each part; parts that need one that failed are left out.

    Raises:
        UserError: If no input or output is given.
        SystemFault: If Ray does not start.
    """
    return _Preflight(config, address, one_actor).run()


def first_step(config: JobConfig, engine: Engine, store: Store, job: Job, cpus: float = math.inf) -> None:
    """A job's own preflight: one actor of the cluster that Ray is connected to, before there are others.

    Args:
        config: The job.
        engine: Model or predictor.
        store: The output, with the job's manifest in it.
        job: The plan.
        cpus: See :func:`~batch_inference.balance.possible_load`.

    Raises:
        UserError: If a check fails; names all that do, each with its remedy.
        SystemFault: If the store fails, the actor does not start, or its node has no room.
        RayError: The actor or its node is gone, which says nothing about the job.
    """
    expected = golden_samples(config)
    chosen = _evenly(job.shards, min(_SHARDS, config.preflight.samples))
    a_shard = -(-config.preflight.samples // len(chosen))
    tables = [read_stored(store, int(shard)) for shard in chosen]
    tables = [table.take(pa.array(_evenly(table.num_rows, a_shard))) for table in tables]
    samples = pa.concat_tables(tables, promote_options="permissive").slice(0, config.preflight.samples)
    one = Trial(config, engine, {f.name: str(f.type) for f in samples.schema if f.name in job.passthrough})
    measured = one.run(samples, expected)
    one.same_versions()
    for check in one.checks:
        tell = {"OK": log.info, "WARN": log.warning, "FAIL": log.error}[check.state]
        tell(f"preflight: {check.name}: {check.finding}", **({"remedy": check.remedy} if check.remedy else {}))
    failed = [check for check in one.checks if check.state == "FAIL"]
    if failed:
        kind = SystemFault if all(check.passing for check in failed) else UserError
        raise kind(
            "; ".join(f"preflight: {check.name}: {check.finding}" for check in failed),
            " ".join([*dict.fromkeys(check.remedy for check in failed), "Or set preflight.enabled=false."]),
        )
    if measured:
        ahead = forecast(measured, possible_load(config, job.shards, cpus), job.rows, config)
        log.info(
            f"preflight: about {ahead.images_per_s:,.1f} images/s, limited by {ahead.limit}, {duration(ahead.seconds)} in all"
        )


class _Preflight:
    def __init__(self, config: JobConfig, address: str | None, one_actor: bool) -> None:
        self._config, self._one_actor = config, one_actor
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._checks: list[Check] = []
        self._notes: list[str] = []

    def run(self) -> Preflight:
        store = self._try("output", self._open_output, self._output)
        found = self._try("input", lambda: find_inputs(self._config), self._inputs)
        engine = self._try("model", lambda: resolve_engine(self._config), self._engine)
        if store and engine:
            self._try("job", lambda: Ledger(store).job() and self._resume(store, engine), lambda text: text or "")
        if store and is_local(store.uri):
            with contextlib.suppress(OSError):  # an empty folder that this has made; a job's is not empty
                Path(local_path(store.uri)).rmdir()
        expected = self._try("golden samples", lambda: golden_samples(self._config), lambda _: "")
        if not engine or not found:
            return Preflight(tuple(c for c in self._checks if c.finding))
        config = self._config
        has_gpus, wants_gpus = _gpus(self._address), config.inference.gpus_per_actor > 0
        if wants_gpus and not has_gpus:
            cpu = {"gpus_per_actor": 0.0}
            config = config.model_copy(update={"inference": config.inference.model_copy(update=cpu)})
            engine = resolve_engine(config)
        begun = time.perf_counter()
        with connected(of_one_actor(config), self._address, None):
            ray_s = time.perf_counter() - begun
            measured = self._measure(Trial(config, engine, _types(found)), found, expected)
            load = possible_load(self._config, -(-found.table.num_rows // self._config.shard_size), self._cpus())
            if not self._one_actor:
                self._fits(has_gpus or not wants_gpus)
        predicted = None
        if measured:
            measured = replace(measured, load_s=ray_s + measured.load_s)
            if not self._one_actor and (has_gpus or not wants_gpus):
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

    def _measure(self, trial: Trial, found: Inputs, expected: pa.Table | None) -> Measured | None:
        import ray

        places = pa.array(_evenly(found.table.num_rows, self._config.preflight.samples))
        measured, failure = None, None
        try:
            measured = trial.run(found.table.take(places), expected)
        except BatchInferenceError as exc:
            failure = Check("forward pass", "FAIL", exc.message, exc.remedy)
        except ray.exceptions.RayError as exc:
            text = " ".join(str(exc).split())[-300:]
            remedy = "Look at memory and Ray's logs."
            failure = Check("forward pass", "FAIL", f"the actor did not survive: {text}", remedy)
        if not self._own:
            trial.same_versions()
        self._checks += [*trial.checks, *([failure] if failure else [])]
        return measured

    def _open_output(self) -> Store:
        self._notes = check_output(self._config)
        return open_output(self._config)

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
        works = f"{display(store.uri)}: write, list, read, delete and put-if-absent work ({time.perf_counter() - begun:.2f} s)"
        return "; ".join([works, *self._notes])

    def _inputs(self, found: Inputs) -> str:
        check_columns(self._config, found.table.column_names)
        rows = found.table.num_rows
        left_out = sum(found.skipped.values())
        return (
            f"{rows:,} images, {-(-rows // self._config.shard_size):,} shards"
            + (f"; {left_out:,} files left out by name or kind" if left_out else "")
            + (f"; {found.duplicates:,} listed twice" if found.duplicates else "")
            + "".join(f"; {kind}" for kind in found.unreadable)
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
        differing = differences(self._config, engine, job)
        if differing and ledger.untouched(job) and at_work(store) is None:
            names = ", ".join(line.partition(":")[0] for line in differing)
            return f"the output holds another job, which has committed nothing; a run takes it over (it differs in {names})"
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
            finding = f"the job does not fit into {where}: {'; '.join(problems)}"
            self._checks.append(Check("room", "WARN", finding, remedy))

    @property
    def _own(self) -> bool:
        return self._address in (None, "local")

    def _cpus(self) -> float:
        return float(available_cpus()) if self._own else float("inf")


def of_one_actor(config: JobConfig) -> JobConfig:
    """One is enough to try, and fits where the whole job may not."""
    return config.model_copy(update={"inference": config.inference.model_copy(update={"actors": 1})})


def _evenly(count: int, most: int) -> np.ndarray:
    """Up to so many places of so many, spread over all of them."""
    return np.unique(np.linspace(0, count - 1, most).astype(np.int64))


def _types(found: Inputs) -> dict[str, str]:
    inputs, _ = apart(found.table)
    return {field.name: str(field.type) for field in inputs.schema if field.name != "uri"}


def _gpus(address: str | None) -> bool:
    """Whether there are GPUs where the job would run."""
    from batch_inference.cluster import local_gpus

    if address in (None, "local"):
        return local_gpus() > 0
    return True  # a cluster without them is found when the actor is placed
