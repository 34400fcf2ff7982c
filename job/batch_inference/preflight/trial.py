"""The trial: a few of a job's images on one actor, for ``preflight`` and for a job before all of its actors start."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from batch_inference.config import InputConfig, JobConfig
from batch_inference.errors import NOT_TRIED, STORE_ERROR_TYPES, BatchInferenceError, InfrastructureError
from batch_inference.inputs.allowlist import Allowlist
from batch_inference.inputs.manifest_files import with_locations
from batch_inference.output.manifest import split_locations
from batch_inference.output.tally import systemic_failure
from batch_inference.pipeline.checks import Check, State, first_few
from batch_inference.pipeline.engine import Engine, without_output
from batch_inference.pipeline.prepare import Preparation
from batch_inference.pipeline.ray_errors import STUCK_S
from batch_inference.pipeline.schemas import raise_if_fatal
from batch_inference.preflight.forecast import TrialMeasurements
from batch_inference.preflight.golden import check_golden
from batch_inference.preflight.node_checks import check_node
from batch_inference.preflight.trial_actor import TrialActor
from batch_inference.storage.uris import display_uri
from batch_inference.telemetry.tracebacks import with_traceback
from batch_inference.version import version_info

# Seconds for which a batch is repeated, after a first one that is not timed.
_MEASURE_S = 5.0
# One task holds all decoded samples; a photo of 12 megapixels has 36 MB.
_MAX_SAMPLE_BYTES = 512 << 20
# Nodes that do not answer within this time are busy or gone.
_VERSIONS_TIMEOUT_S = 30.0
# Prefix of Ray's resource for a type of GPU, such as accelerator_type:L4; each node with such a GPU has 1 of it.
_GPU_TYPE_PREFIX = "accelerator_type:"
_ERRORS_TABLE_REMEDY = "In the job these rows would end in the errors table."
# Columns of prepared rows that the driver gets; the pixels stay with the actors.
_DRIVER_COLUMNS = ("row", "stage", "error_type", "message", "fetch_s", "decode_s")


@dataclass(frozen=True)
class _Prepared:
    """Samples that a task fetched and decoded.

    Attributes:
        facts: Columns ``_DRIVER_COLUMNS`` of all samples, and their ``uri``.
        rows: Ray's reference to the rows that were decoded.
    """

    facts: pa.Table
    rows: Any


class Trial:
    """A trial of images on one actor of the cluster that Ray is connected to, which collects a check for each part.

    Nothing of it is kept: the actor's decisions, on precision or batch sizes, are not those of the job.

    Args:
        config: Configuration of the job.
        engine: Model or predictor.
        passthrough: Columns of the input that the output has, too, with their types.
    """

    def __init__(self, config: JobConfig, engine: Engine, passthrough: dict[str, str]) -> None:
        self._config, self._engine, self._passthrough = config, engine, passthrough
        self.checks: list[Check] = []

    def run(self, samples: pa.Table, expected: pa.Table | None = None) -> TrialMeasurements | None:
        """Fetch, decode and predict the samples, on each type of GPU that the cluster has.

        Args:
            samples: Inputs of the job: ``uri``, and their location if they are members of files.
            expected: Table of :func:`~batch_inference.preflight.golden.read_golden_samples`.

        Returns:
            Measurements on the slowest type of GPU; None if nothing could be predicted, for which there is a check.

        Raises:
            BatchInferenceError: What a job would end with at once; InfrastructureError also if no actor or task has answered for 30 min.
            RayError: If the actor or its node died.
        """
        prepared = self._prepare(samples, Allowlist.from_config(self._config.input))
        decoded = prepared.facts.filter(prepared.facts["error_type"].is_null())
        self._check_samples(prepared.facts)
        if not decoded.num_rows:
            return None
        # The allowed prefixes restrict the job's own input only.
        golden = (
            None
            if expected is None
            else self._prepare(with_locations(expected, InputConfig(), self._config.storage), None)
        )
        gpu_types = self._gpu_types()
        trials = [self._try_gpu_type(gpu_type, prepared.rows, expected, golden) for gpu_type in gpu_types]
        measurements = [measured for measured in trials if measured is not None]
        if len(measurements) < len(gpu_types):
            return None
        slowest = replace(
            max(measurements, key=lambda measured: measured.infer_s),
            images=decoded.num_rows,
            fetch_s=_mean_of(decoded, "fetch_s"),
            decode_s=_mean_of(decoded, "decode_s"),
        )
        self._add(
            "output schema", "OK", ", ".join(f"{name} {column_type}" for name, column_type in slowest.columns.items())
        )
        return slowest

    def check_versions(self) -> None:
        """Check that all nodes have the package versions of this process.

        Other versions may fail to unpickle what the driver sends, and another Pillow gives other pixels.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        versions = version_info()
        version_task: Any = ray.remote(num_cpus=0, max_retries=0)(version_info)
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        answers = []
        for node in nodes:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answers.append(version_task.options(scheduling_strategy=strategy).remote())
        done, waiting = ray.wait(answers, num_returns=len(answers), timeout=_VERSIONS_TIMEOUT_S)
        differing_nodes = []
        for node, answer in zip(nodes, answers, strict=True):
            node_versions = ray.get(answer) if answer in done else {}
            differences = [
                f"{name} {node_versions.get(name, 'none')}, not {version}"
                for name, version in versions.items()
                if node_versions.get(name) != version
            ]
            if node_versions and differences:
                differing_nodes.append(f"{node['NodeManagerAddress']}: {', '.join(differences)}")
        if differing_nodes:
            finding = f"nodes have other versions than this process: {first_few(differing_nodes)}"
            self._add("versions", "FAIL", finding, "Use the same image for all nodes.")
        elif waiting:
            remedy = "Check these nodes in Ray's dashboard; a busy cluster may need longer."
            self._add(
                "versions",
                "WARN",
                f"{len(waiting)} of {len(nodes)} nodes did not answer in {_VERSIONS_TIMEOUT_S:g} s",
                remedy,
            )
        else:
            self._add("versions", "OK", f"the same on {len(nodes)} nodes and in this process")

    def _add(self, name: str, state: State, finding: str, remedy: str = "") -> None:
        self.checks.append(Check(name, state, finding, remedy))

    def _prepare(self, samples: pa.Table, prefixes: Allowlist | None) -> _Prepared:
        """Fetch and decode samples in a task. If one of them kills the process, repeat it with a process for each sample."""
        import ray

        preparation = Preparation(
            self._config.storage, self._config.preprocess, self._engine.transform, allowlist=prefixes
        )
        inputs, locations = split_locations(samples)
        uris = inputs["uri"].to_pylist()
        task: Any = ray.remote(num_cpus=self._config.preprocess.cpus_per_task, max_retries=0, num_returns=2)(
            _prepare_rows
        )
        try:
            facts, rows = task.remote(preparation, uris, locations, False)
            return _Prepared(_get_answer(facts), rows)
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
            facts, rows = task.remote(preparation, uris, locations, True)
            return _Prepared(_get_answer(facts), rows)

    def _gpu_types(self) -> list[str | None]:
        """Return the types of GPU that the job's actors may run on, as Ray names them; [None] if there is one type or none."""
        import ray

        if not self._config.inference.gpus_per_actor:
            return [None]
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpu_types = sorted(name for name in resources if name.startswith(_GPU_TYPE_PREFIX))
        return list(gpu_types) if len(gpu_types) > 1 else [None]

    def _try_gpu_type(
        self, gpu_type: str | None, rows: Any, expected: pa.Table | None, golden: _Prepared | None
    ) -> TrialMeasurements | None:
        """Predict and measure a batch on one type of GPU; return None if no image could be predicted."""
        import ray

        inference = self._config.inference
        batch = 32 if inference.batch_size == "auto" else inference.batch_size
        where = "" if gpu_type is None else f" on {gpu_type.removeprefix(_GPU_TYPE_PREFIX)}"
        started = time.perf_counter()
        actor: Any = ray.remote(
            num_gpus=inference.gpus_per_actor,
            num_cpus=inference.cpus_per_actor,
            resources={} if gpu_type is None else {gpu_type: 0.001},
            max_restarts=0,
        )(TrialActor).remote(
            without_output(self._engine, self._config).with_passthrough(self._passthrough).factory,
            self._engine.decoder,
            self._config.preprocess.damaged == "accept",
        )
        try:
            first_batch, predicted = _get_answer(actor.predict.remote(rows, batch))
            load_s = time.perf_counter() - started
            raise_if_fatal(first_batch)
            if not self._check_forward_pass(first_batch, where):
                return None
            rows_check: Check | None = _get_answer(actor.rows_check.remote())
            if rows_check is not None:
                self.checks.append(replace(rows_check, finding=rows_check.finding + where))
            if expected is not None and golden is not None:
                self.checks.append(self._check_golden_samples(expected, golden, actor, where))
            # The batch has fewer images if they are large.
            measured: TrialMeasurements = _get_answer(actor.measure.remote(rows, first_batch.num_rows, _MEASURE_S))
        finally:
            ray.kill(actor)
        self.checks += check_node(measured, inference, where)
        row_columns = {"uri": "string", "shard": "int32", "row": "int32"}
        columns = {field.name: str(field.type) for field in predicted.schema}
        return replace(measured, load_s=load_s, columns={**row_columns, **columns, **self._passthrough})

    def _check_forward_pass(self, first_batch: pa.Table, where: str) -> bool:
        """Check the first batch; return whether any of its images was predicted."""
        batch = first_batch.num_rows
        failed = first_batch.filter(first_batch["error_type"].is_valid())
        if not failed.num_rows:
            self._add("forward pass", "OK", f"a batch of {batch} gave {batch} predictions{where}")
            return True
        all_failed = failed.num_rows == batch
        reason = f"{failed['error_type'][0]}: {failed['message'][0]}"
        finding = f"{failed.num_rows} of {batch} images failed{where} with {reason}"
        self._add(
            "forward pass",
            "FAIL" if all_failed else "WARN",
            with_traceback(finding, failed["traceback"][0].as_py()),
            "Fix the predictor, or model.* in the configuration." if all_failed else _ERRORS_TABLE_REMEDY,
        )
        return not all_failed

    def _check_golden_samples(self, expected: pa.Table, golden: _Prepared, actor: Any, where: str) -> Check:
        failed = {
            row["row"]: f"{row['stage']} {row['error_type']}"
            for row in golden.facts.to_pylist()
            if row["error_type"] is not None
        }
        result: tuple[pa.Table, pa.Table] | None = None
        if len(failed) < expected.num_rows:
            result = _get_answer(actor.predict.remote(golden.rows, None))
            raise_if_fatal(result[0])
        return check_golden(expected, result, failed, self._config.preflight.golden_tolerance, where)

    def _check_samples(self, facts: pa.Table) -> None:
        """Check how many samples were fetched and decoded; raise InfrastructureError if the store failed for all of them."""
        failed = facts.filter(facts["error_type"].is_valid()).to_pylist()
        samples = f"{facts.num_rows} samples"
        if not failed:
            self._add("samples", "OK", f"all {samples} were fetched and decoded")
            return
        all_failed = len(failed) == facts.num_rows
        if all_failed and {row["error_type"] for row in failed} <= STORE_ERROR_TYPES:
            tried = next((row for row in failed if row["error_type"] != NOT_TRIED), failed[0])
            raise systemic_failure(f"every one of {samples}", tried["stage"], tried["error_type"], tried["message"])
        examples = first_few([f"{display_uri(row['uri'])}: {row['stage']} {row['error_type']}" for row in failed])
        percent = 100 * len(failed) / facts.num_rows
        max_percent = self._config.errors.max_percent
        if all_failed:
            state: State = "FAIL"
            remedy = "Fix the input, or use another: none of its samples could be used."
        else:
            state = "WARN"
            too_many = max_percent is not None and percent > max_percent
            remedy = (
                f"This is more than errors.max_percent = {max_percent:g} allows: fix the input, or raise it."
                if too_many
                else _ERRORS_TABLE_REMEDY
            )
        self._add("samples", state, f"{len(failed)} of {samples} ({percent:.0f} %) failed: {examples}", remedy)


def _get_answer(answer: Any) -> Any:
    """Return the answer of a task or an actor, waiting for it as long as a job waits for its actors.

    Raises:
        InfrastructureError: If there is no answer in time.
        BatchInferenceError: If the task raised it.
    """
    import ray

    try:
        return ray.get(answer, timeout=STUCK_S)
    except ray.exceptions.GetTimeoutError:
        raise InfrastructureError(
            f"the one actor that was tried has not answered for {STUCK_S} s: it does not start, or the predictor does not return",
            "Check its log and pending pods; then run the same command again.",
        ) from None
    except ray.exceptions.RayTaskError as exc:
        if isinstance(exc.cause, BatchInferenceError):
            raise exc.cause from None
        raise


def _prepare_rows(
    preparation: Preparation, uris: list[str], locations: pa.Table | None, careful: bool
) -> tuple[pa.Table, pa.Table]:
    """Fetch and decode samples; return facts of all, and the decoded rows up to ``_MAX_SAMPLE_BYTES``."""
    facts: list[pa.Table] = []
    kept: list[pa.Table] = []
    kept_bytes = 0
    for table in preparation.rows(0, uris, locations, careful=careful):
        facts.append(table.select(_DRIVER_COLUMNS))
        decoded = table.filter(table["error_type"].is_null())
        # The first rows are kept whatever their size.
        if decoded.num_rows and (not kept or kept_bytes + decoded.nbytes <= _MAX_SAMPLE_BYTES):
            kept.append(decoded)
            kept_bytes += decoded.nbytes
    all_facts = pa.concat_tables(facts)
    row_uris = pa.array([uris[row] for row in all_facts["row"].to_pylist()], pa.string())
    return all_facts.append_column("uri", row_uris), pa.concat_tables(kept) if kept else pa.table({})


def _mean_of(table: pa.Table, name: str) -> float:
    return float(np.mean(table[name].to_numpy()))
