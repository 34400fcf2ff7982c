from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.cloudpickle

from batch_inference.config import JobConfig, PredictorConfig, load_config
from batch_inference.pipeline.bottleneck import RunTimings
from batch_inference.pipeline.engine import resolve_engine, without_output
from batch_inference.pipeline.factories import CustomFactory
from batch_inference.pipeline.schemas import RESULT_SCHEMA
from batch_inference.preflight.forecast import TrialMeasurements, forecast
from batch_inference.preflight.golden import check_golden, matches_expected
from batch_inference.preflight.node_checks import GIB, _check_free, check_node
from batch_inference.preflight.preflight import preflight
from batch_inference.preflight.trial_actor import TrialActor, available_memory
from tests.support.batches import image, prepared
from tests.support.images import jpeg

# A GPU that predicts 2,000 images per second, CPUs that decode 500 each, and a store that answers in 50 ms.
ONE = TrialMeasurements(64, 0.05, 0.002, 0.0005, 30.0, {}, 100 * GIB, 100 * GIB)
FOUR = RunTimings(0, 0, 0, 0, actors=4, cpus_per_actor=1, on_gpu=True, decode_cpus=32, fetch_threads=512, cpus=36)


def config(**inference: Any) -> JobConfig:
    return JobConfig(inference=inference)


def test_forecast_of_a_job_that_its_gpus_limit() -> None:
    result = forecast(ONE, FOUR, 8_000_000, config())
    assert result.limit == "inference"
    assert result.images_per_s == pytest.approx(8000)
    assert result.seconds == pytest.approx(1030)
    assert result.gpu_hours == pytest.approx(4 * 1030 / 3600)
    assert result.actor_images_per_s == pytest.approx(2000)
    # 2,000 images a second are four CPUs that decode 500.
    assert result.cpus_per_gpu == pytest.approx(4)


@pytest.mark.parametrize(
    ("load", "limit", "rate"),
    [
        (replace(FOUR, decode_cpus=8), "decode", 4000),
        (replace(FOUR, fetch_threads=100), "fetch", 2000),
        # Decoding and the network share the CPUs: 2.5 ms an image on two of them.
        (replace(FOUR, on_gpu=False, cpus=2, decode_cpus=2), "cpu", 800),
    ],
)
def test_forecast_names_the_limit_of_a_job(load: RunTimings, limit: str, rate: float) -> None:
    result = forecast(ONE, load, 1000, config())
    assert (result.limit, result.images_per_s) == (limit, pytest.approx(rate))
    assert (result.cpus_per_gpu is None) == (not load.on_gpu)
    assert (result.gpu_hours == 0) == (not load.on_gpu)


def test_actors_that_share_a_gpu_need_the_cpus_together() -> None:
    assert forecast(ONE, FOUR, 1000, config(gpus_per_actor=0.5)).cpus_per_gpu == pytest.approx(8)


def test_mistakes_are_reported_before_ray_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    job = load_config(
        None,
        {
            "input": {"uris": [str(tmp_path / "none")]},
            "output": {"uri": str(tmp_path / "file/out")},
            "model": {"name": "resnet15"},
            "inference": {"gpus_per_actor": 0},
        },
    )
    result = preflight(job)
    assert not result.ok
    assert {c.name: c.state for c in result.checks} == {"output": "FAIL", "input": "FAIL", "model": "FAIL"}
    assert all(c.finding and c.remedy for c in result.checks)
    assert result.forecast is None


def test_nothing_stays_in_the_output_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    job = load_config(
        None,
        {
            "input": {"uris": [str(tmp_path / "a.jpg")]},
            "output": {"uri": str(tmp_path / "out")},
            "model": {"name": "resnet15"},
        },
    )
    result = preflight(job)
    assert {c.name: c.state for c in result.checks} == {"output": "OK", "input": "OK", "model": "FAIL"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("free", "state"), [(0.5, "FAIL"), (5, "WARN"), (50, "OK")])
def test_free_space_on_the_actors_node_is_checked(free: float, state: str) -> None:
    check = _check_free("temporary folder", int(free * GIB), 10.0, "Ray's logs", " here", minimum=1.0)
    assert (check.state, bool(check.remedy)) == (state, state != "OK")


@pytest.mark.parametrize(("share", "state"), [(1, "OK"), (0.5, "OK"), (0.3, "WARN")])
def test_actors_that_share_a_gpu_fit_into_its_memory(share: float, state: str) -> None:
    checks = check_node(replace(ONE, gpu_bytes=9 * GIB, gpu_total=24 * GIB), config(gpus_per_actor=share).inference, "")
    (check,) = [check for check in checks if check.name == "GPU memory"]
    assert (check.state, bool(check.remedy)) == (state, state != "OK")
    assert "9.0 GiB used by an actor" in check.finding


def test_available_memory_is_less_than_the_total() -> None:
    free, total = available_memory()
    assert 0 < free < total < 1 << 50


@pytest.mark.parametrize(("free", "total", "state"), [(2, 16, "OK"), (2, 64, "WARN"), (0.5, 4, "WARN")])
def test_memory_must_exceed_the_limit_at_which_ray_kills_processes(free: float, total: float, state: str) -> None:
    measured = replace(ONE, memory_free=int(free * GIB), memory_total=int(total * GIB))
    (check,) = [check for check in check_node(measured, config().inference, "") if check.name == "memory"]
    assert check.state == state


def test_golden_samples_are_compared_with_the_predictor_s_columns_only() -> None:
    """Columns of the input and of the predictor may have the names of internal columns."""
    expected = pa.table({"uri": ["a", "b"], "bytes": ["777", "777"], "mean": [1.0, 2.0], "stage": ["T1", "T2"]})
    rows = pa.table({"row": [1, 0], "stage": [None, None], "error_type": [None, None], "bytes": [1, 2]})
    columns = pa.table({"mean": [2.0, 1.0], "stage": ["T2", "T1"]})
    result = check_golden(expected, (rows, columns), {}, 0.01)
    assert result.finding == "2 samples, mean, stage (bytes not in the output) are as expected"
    expected, columns = (table.drop_columns(["stage"]) for table in (expected, columns))
    off = check_golden(expected, (rows.slice(0, 1), columns.slice(0, 1)), {0: "fetch NOT_FOUND"}, 0.01, " on L4")
    assert (off.state, off.finding) == (
        "FAIL",
        "1 of 2 samples, mean (bytes not in the output) are off on L4: a: fetch NOT_FOUND",
    )
    nothing = check_golden(expected, None, {0: "fetch NOT_FOUND", 1: "fetch TIMEOUT"}, 0.01)
    assert nothing.finding == "2 of 2 samples are off: a: fetch NOT_FOUND; b: fetch TIMEOUT"


def test_columns_of_a_trial_occur_once_whatever_their_names_and_types() -> None:
    """Ray does not serialize several columns of one name, and the predictor's may have the names of internal columns."""

    class Predictor:
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            number = int(batch["image"][0][0, 0, 0])
            if len(batch["image"]) > 1:
                raise ValueError("one by one")
            return {"stage": ["T1"], "error_type": [None if number == 2 else "benign"], "size": [number / 2 or 0]}

    trial_actor = TrialActor(CustomFactory(Predictor, PredictorConfig(path="m:Predictor")), None)
    rows, columns = trial_actor.predict(prepared([image(2), image(3), ("decode", "CORRUPT"), image(0)]), None)
    assert rows.schema == RESULT_SCHEMA
    assert rows["error_type"].to_pylist() == [None, None, "CORRUPT", None]
    assert columns.to_pylist() == [
        {"stage": "T1", "error_type": None, "size": 1.0},
        {"stage": "T1", "error_type": "benign", "size": 1.5},
        {"stage": None, "error_type": None, "size": None},
        {"stage": "T1", "error_type": "benign", "size": 0.0},
    ]
    assert ray.cloudpickle.loads(ray.cloudpickle.dumps(columns)) == columns
    assert trial_actor.measure(prepared([image(1)]), 1, 0).images == 1


@pytest.mark.parametrize(
    ("want", "got", "same"),
    [
        ("cat", "cat", True), ("cat", "dog", False), (3, 3, True), (3, 4, False), (None, "cat", True),
        (0.5, 0.51, True), (0.5, 0.53, False), (0.5, None, False), ([1.0, 2.0], [1.01, 2.0], True), ([1.0], [1.0, 2.0], False),
        ({"a": 1.0, "b": "x"}, {"a": 1.01, "b": "x"}, True), ({"a": 1.0}, {"a": 2.0}, False), ("3", 3, True),
        ("0.5", 0.51, True), ("3", 4, False), ("", 4, True),
        (float("nan"), float("nan"), True), (1.0, float("nan"), False), ("x", 0.5, False), ("3.5", 3, False),
    ],
)  # fmt: skip
def test_values_match_within_the_tolerance(want: Any, got: Any, same: bool) -> None:
    assert matches_expected(want, got, 0.02) is same


def test_decisions_of_a_trial_are_not_in_the_output() -> None:
    """Precision and batch size are decided once per job, from its own images."""
    job = load_config(
        None, {"output": {"uri": "/out"}, "model": {"name": "resnet18"}, "inference": {"gpus_per_actor": 0}}
    )
    engine = resolve_engine(job)
    assert engine.factory.config.output.uri == "/out"
    alone = without_output(engine, job)
    assert alone.factory.config.output.uri == ""
    assert alone.factory.config.inference == job.inference
    assert alone.fingerprint_parts == engine.fingerprint_parts
