from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from batch_inference.config import InferenceConfig, JobConfig, ModelConfig, PredictorConfig
from batch_inference.driver import startup
from batch_inference.driver.startup import EngineResolver, starts_ray
from batch_inference.errors import InfrastructureError, UserError
from batch_inference.pipeline.engine import Engine, resolve_engine

MODEL = JobConfig(model=ModelConfig(name="mobilenet_v3_small"), inference=InferenceConfig(gpus_per_actor=0))


def test_engine_is_the_one_that_this_process_resolves() -> None:
    with EngineResolver(MODEL) as ahead:
        assert ahead.result() == resolve_engine(MODEL)
        assert ahead.result() is ahead.result()


def test_driver_does_not_import_torch() -> None:
    """The import takes seconds and hundreds of megabytes."""
    code = (
        "import sys; from batch_inference import config; from batch_inference.driver import attempt, run, startup\n"
        "from batch_inference.pipeline import prepare, stream; import ray.data\n"
        "job = config.JobConfig(model=config.ModelConfig(name='resnet18'))\n"
        "with startup.EngineResolver(job) as ahead: assert ahead.result().transform.crop == 224\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_error_of_a_model_is_raised_by_result() -> None:
    with EngineResolver(MODEL.model_copy(update={"model": ModelConfig(name="resnet1")})) as ahead:
        with pytest.raises(UserError, match="no classification network named 'resnet1'") as caught:
            ahead.result()
        assert "resnet18" in caught.value.remedy


def test_modules_are_found_on_the_path_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nprint('words of its own')\n"
        "def build(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(7))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = ModelConfig(source="package", name="mine:build", weights=None)
    with EngineResolver(MODEL.model_copy(update={"model": model})) as ahead:
        assert ahead.result().fingerprint_parts["model.name"] == "mine:build"


def test_process_that_dies_is_an_infrastructure_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = ModelConfig(source="package", name="deadly:build", weights=None)
    with (
        EngineResolver(MODEL.model_copy(update={"model": model})) as ahead,
        pytest.raises(InfrastructureError, match="code -9"),
    ):
        ahead.result()


def test_predictor_is_imported_in_this_process_and_a_known_engine_is_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no module 'nowhere'"):
        EngineResolver(MODEL.model_copy(update={"predictor": PredictorConfig(path="nowhere:X")}))
    engine = Engine(None, None, {}, True)
    with EngineResolver(MODEL, engine) as ahead:
        assert ahead.result() is engine


def test_interrupted_caller_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), EngineResolver(MODEL) as ahead:
        raise KeyboardInterrupt
    assert ahead._process is not None
    assert ahead._process.stop() == -9


@pytest.mark.parametrize(("address", "own"), [(None, True), ("local", True), ("auto", False), ("head:6379", False)])
def test_only_job_without_a_cluster_starts_ray(address: str | None, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup.sys, "modules", {})
    assert starts_ray(address) is own
