"""Preflight: check every part of a job, and try a few of its images on one actor, before the job is started."""

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

from batch_inference.config import JobConfig
from batch_inference.errors import BatchInferenceError, InfrastructureError, UserError
from batch_inference.inputs.find import Inputs, find_inputs
from batch_inference.output.attempts import seconds_since_sign_of_life
from batch_inference.output.destination import check_output
from batch_inference.output.ledger import Ledger
from batch_inference.output.manifest import read_stored, split_locations
from batch_inference.output.records import JobRecord, fingerprint
from batch_inference.pipeline.bottleneck import planned_timings
from batch_inference.pipeline.checks import Check
from batch_inference.pipeline.cluster import ResourceRequest, connected
from batch_inference.pipeline.engine import Engine, resolve_engine
from batch_inference.pipeline.fingerprint import check_columns, check_same_job, differences
from batch_inference.preflight.forecast import Forecast, TrialMeasurements, forecast
from batch_inference.preflight.golden import read_golden_samples
from batch_inference.preflight.trial import Trial
from batch_inference.storage.store import Store, open_output
from batch_inference.storage.uris import display_uri, is_local, local_path
from batch_inference.system.cpus import available_cpus
from batch_inference.text import format_count, format_duration

log = structlog.get_logger()

# Number of shards that the samples of a planned job come from; reading a shard costs a request.
_SAMPLE_SHARDS = 8


@dataclass(frozen=True)
class PreflightResult:
    """All checks, and the forecast if one could be made."""

    checks: tuple[Check, ...]
    measured: TrialMeasurements | None = None
    forecast: Forecast | None = None

    @property
    def ok(self) -> bool:
        """Whether no check failed; a warning is not a failure."""
        return all(check.state != "FAIL" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of ``preflight --json``."""
        return {"ok": self.ok, **asdict(self)}


def preflight(config: JobConfig, *, address: str | None = None, one_actor: bool = False) -> PreflightResult:
    """Check everything that a job needs, in the order in which it would need it. Nothing that is written stays.

    Args:
        config: Configuration of the job; its ``preflight`` section has the number of samples and the golden samples.
        address: Address of the Ray cluster to try it on, as for ``run``; None starts Ray on this machine.
        one_actor: Whether the job will run elsewhere: then room for all actors and a forecast are left out.

    Returns:
        A check for each part. Parts that depend on a failed one are left out.

    Raises:
        UserError: If no input or output is given.
        InfrastructureError: If Ray does not start.
    """
    return _PreflightRun(config, address, one_actor).run()


def check_before_start(config: JobConfig, engine: Engine, store: Store, job: JobRecord, cpus: float = math.inf) -> None:
    """Run the preflight of a planned job: try one actor on the cluster that Ray is connected to, before the others start.

    Args:
        config: Configuration of the job.
        engine: Model or predictor.
        store: The output, with the job's manifest.
        job: Record of the planned job.
        cpus: CPUs of the cluster, see :func:`~batch_inference.pipeline.bottleneck.planned_timings`.

    Raises:
        UserError: If a check fails; the message names all failed checks, each with its remedy.
        InfrastructureError: If the store fails, the actor does not start, or its node has no room.
        RayError: If the actor or its node died, which says nothing about the job.
    """
    expected = read_golden_samples(config)
    shards = _evenly_spaced(job.shards, min(_SAMPLE_SHARDS, config.preflight.samples))
    samples_per_shard = -(-config.preflight.samples // len(shards))
    tables = [read_stored(store, int(shard)) for shard in shards]
    tables = [table.take(pa.array(_evenly_spaced(table.num_rows, samples_per_shard))) for table in tables]
    samples = pa.concat_tables(tables, promote_options="permissive").slice(0, config.preflight.samples)
    trial = Trial(config, engine, {f.name: str(f.type) for f in samples.schema if f.name in job.passthrough})
    measured = trial.run(samples, expected)
    trial.check_versions()
    for check in trial.checks:
        log_method = {"OK": log.info, "WARN": log.warning, "FAIL": log.error}[check.state]
        log_method(f"preflight: {check.name}: {check.finding}", **({"remedy": check.remedy} if check.remedy else {}))
    failed = [check for check in trial.checks if check.state == "FAIL"]
    if failed:
        error_class = InfrastructureError if all(check.passing for check in failed) else UserError
        raise error_class(
            "; ".join(f"preflight: {check.name}: {check.finding}" for check in failed),
            " ".join([*dict.fromkeys(check.remedy for check in failed), "Or set preflight.enabled=false."]),
        )
    if measured:
        predicted = forecast(measured, planned_timings(config, job.shards, cpus), job.rows, config)
        log.info(
            f"preflight: about {predicted.images_per_s:,.1f} images/s, limited by {predicted.limit}, "
            f"{format_duration(predicted.seconds)} in all"
        )


class _PreflightRun:
    """One preflight, which collects its checks."""

    def __init__(self, config: JobConfig, address: str | None, one_actor: bool) -> None:
        self._config, self._one_actor = config, one_actor
        self._address = address or os.environ.get("RAY_ADDRESS")
        self._checks: list[Check] = []
        self._notes: list[str] = []

    def run(self) -> PreflightResult:
        store = self._check("output", self._open_output, self._describe_output)
        inputs = self._check("input", lambda: find_inputs(self._config), self._describe_inputs)
        engine = self._check("model", lambda: resolve_engine(self._config), self._describe_engine)
        if store and engine:
            self._check(
                "job", lambda: Ledger(store).job() and self._describe_job(store, engine), lambda text: text or ""
            )
        if store and is_local(store.uri):
            with contextlib.suppress(
                OSError
            ):  # removes an empty folder that this check created; one with a job is not empty
                Path(local_path(store.uri)).rmdir()
        expected = self._check("golden samples", lambda: read_golden_samples(self._config), lambda _: "")
        if not engine or not inputs:
            return PreflightResult(tuple(c for c in self._checks if c.finding))
        config = self._config
        has_gpus, wants_gpus = _has_gpus(self._address), config.inference.gpus_per_actor > 0
        if wants_gpus and not has_gpus:
            without_gpus = config.inference.model_copy(update={"gpus_per_actor": 0.0})
            config = config.model_copy(update={"inference": without_gpus})
            engine = resolve_engine(config)
        started = time.perf_counter()
        with connected(with_one_actor(config), self._address, None):
            ray_s = time.perf_counter() - started
            measured = self._run_trial(Trial(config, engine, _passthrough_types(inputs)), inputs, expected)
            shards = -(-inputs.table.num_rows // self._config.shard_size)
            parallel = planned_timings(self._config, shards, self._cpu_limit())
            if not self._one_actor:
                self._check_room(has_gpus or not wants_gpus)
        predicted = None
        if measured:
            measured = replace(measured, load_s=ray_s + measured.load_s)
            if not self._one_actor and (has_gpus or not wants_gpus):
                predicted = forecast(measured, parallel, inputs.table.num_rows, self._config)
        return PreflightResult(tuple(c for c in self._checks if c.finding), measured, predicted)

    def _check(self, name: str, call: Callable[[], Any], describe: Callable[[Any], str]) -> Any:
        """Make a call, add a check with the description of its value, and return the value; None if the check failed."""
        try:
            value = call()
            self._checks.append(Check(name, "OK", describe(value)))
        except BatchInferenceError as exc:
            self._checks.append(Check(name, "FAIL", exc.message, exc.remedy))
            return None
        return value

    def _run_trial(self, trial: Trial, inputs: Inputs, expected: pa.Table | None) -> TrialMeasurements | None:
        import ray

        indices = pa.array(_evenly_spaced(inputs.table.num_rows, self._config.preflight.samples))
        measured, failure = None, None
        try:
            measured = trial.run(inputs.table.take(indices), expected)
        except BatchInferenceError as exc:
            failure = Check("forward pass", "FAIL", exc.message, exc.remedy)
        except ray.exceptions.RayError as exc:
            text = " ".join(str(exc).split())[-300:]
            remedy = "Check the memory of its node and Ray's logs."
            failure = Check("forward pass", "FAIL", f"the actor died: {text}", remedy)
        if not self._starts_ray:
            trial.check_versions()
        self._checks += [*trial.checks, *([failure] if failure else [])]
        return measured

    def _open_output(self) -> Store:
        self._notes = check_output(self._config)
        return open_output(self._config)

    def _describe_output(self, store: Store) -> str:
        """Try every operation that a job needs on the output, and say that they work."""
        started = time.perf_counter()
        path = f"_probe/{uuid4().hex}"
        store.put(path, b"x")
        try:
            is_listed = any(info.path == path for info in store.objects("_probe"))
            is_readable = store.get(path) == b"x"
        finally:
            store.delete([path])
        if not (is_listed and is_readable):
            raise BatchInferenceError(
                f"an object written to {display_uri(store.uri)} cannot be {'read' if is_listed else 'listed'} at once",
                "Use a store that is consistent after a write, such as S3, GCS, Azure or a local disk.",
            )
        store.probe()
        works = f"{display_uri(store.uri)}: write, list, read, delete and put-if-absent work ({time.perf_counter() - started:.2f} s)"
        return "; ".join([works, *self._notes])

    def _describe_inputs(self, inputs: Inputs) -> str:
        check_columns(self._config, inputs.table.column_names)
        rows = inputs.table.num_rows
        skipped = sum(inputs.skipped.values())
        return (
            f"{rows:,} images, {-(-rows // self._config.shard_size):,} shards"
            + (f"; {skipped:,} files skipped by name or kind" if skipped else "")
            + (f"; {format_count(inputs.duplicates, 'duplicate')}" if inputs.duplicates else "")
            + "".join(f"; {note}" for note in inputs.unreadable)
        )

    def _describe_engine(self, engine: Engine) -> str:
        identity = {key.rpartition(".")[2]: value for key, value in engine.fingerprint_parts.items()}
        facts = [
            f"{key} {identity[key][:16] if key == 'sha256' else identity[key]}"
            for key in ("path", "name", "weights", "sha256")
            if identity.get(key)
        ]
        return f"{', '.join(facts)}; identity {fingerprint(engine.fingerprint_parts)[:12]}"

    def _describe_job(self, store: Store, engine: Engine) -> str:
        """Say how a run goes on with the job of the output; raise UserError if it is another job."""
        ledger = Ledger(store)
        job = ledger.require_job()
        differing = differences(self._config, engine, job)
        if differing and ledger.untouched(job) and seconds_since_sign_of_life(store) is None:
            names = ", ".join(line.partition(":")[0] for line in differing)
            return (
                f"the output holds another job that has committed nothing; a run takes it over (it differs in {names})"
            )
        check_same_job(self._config, engine, job, store)
        return f"the output holds this job already: {len(ledger.committed()):,} of {job.shards:,} shards are committed"

    def _check_room(self, tried_as_configured: bool) -> None:
        """Check that the cluster has the CPUs and GPUs that the job requests."""
        import ray

        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus = resources.get("GPU", 0.0)
        request = ResourceRequest.of(self._config)
        # A Ray that the job starts itself shares its CPUs among more processes than it has CPUs.
        cpus = float("inf") if self._starts_ray else resources.get("CPU", 0.0)
        problems = request.problems(cpus, gpus)
        where = "this machine" if self._starts_ray else "the cluster"
        if not problems:
            self._checks.append(
                Check("room", "OK", f"{request.cpus:g} CPUs and {request.actor_gpus:g} GPUs fit into {where}")
            )
        else:
            remedy = (
                "Run it on a larger machine or cluster, or change these keys."
                + ("" if tried_as_configured else " The rates below are measured on a CPU.")
            )  # fmt: skip
            finding = f"the job does not fit into {where}: {'; '.join(problems)}"
            self._checks.append(Check("room", "WARN", finding, remedy))

    @property
    def _starts_ray(self) -> bool:
        return self._address in (None, "local")

    def _cpu_limit(self) -> float:
        return float(available_cpus()) if self._starts_ray else float("inf")


def with_one_actor(config: JobConfig) -> JobConfig:
    """Return the configuration with one actor, which is enough for a trial and fits where the job may not."""
    return config.model_copy(update={"inference": config.inference.model_copy(update={"actors": 1})})


def _evenly_spaced(count: int, maximum: int) -> np.ndarray:
    """Return at most ``maximum`` of ``count`` indices, spread evenly."""
    return np.unique(np.linspace(0, count - 1, maximum).astype(np.int64))


def _passthrough_types(inputs: Inputs) -> dict[str, str]:
    rows, _ = split_locations(inputs.table)
    return {field.name: str(field.type) for field in rows.schema if field.name != "uri"}


def _has_gpus(address: str | None) -> bool:
    """Return whether there are GPUs where the job would run."""
    from batch_inference.pipeline.cluster import local_gpus

    if address in (None, "local"):
        return local_gpus() > 0
    return True  # a cluster without GPUs is noticed when the actor is placed
