from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from batch_inference import startup
from batch_inference.config import InferenceConfig, JobConfig, ModelConfig, PredictorConfig
from batch_inference.errors import SystemFault, UserError
from batch_inference.identity import Engine, resolve_engine
from batch_inference.startup import EngineAhead, starts_ray

MODEL = JobConfig(model=ModelConfig(name="mobilenet_v3_small"), inference=InferenceConfig(gpus_per_actor=0))


def test_a_model_is_looked_at_as_in_this_process() -> None:
    with EngineAhead(MODEL) as ahead:
        assert ahead.result() == resolve_engine(MODEL)
        assert ahead.result() is ahead.result()


def test_the_driver_needs_no_torch() -> None:
    """It would take seconds and hundreds of megabytes."""
    code = (
        "import sys; from batch_inference import driver, startup, config, pipeline, preparation; import ray.data\n"
        "job = config.JobConfig(model=config.ModelConfig(name='resnet18'))\n"
        "with startup.EngineAhead(job) as ahead: assert ahead.result().transform.crop == 224\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_is_wrong_with_a_model_is_raised_where_the_engine_is_asked_for() -> None:
    with EngineAhead(MODEL.model_copy(update={"model": ModelConfig(name="resnet1")})) as ahead:
        with pytest.raises(UserError, match="no classification network named 'resnet1'") as caught:
            ahead.result()
        assert "resnet18" in caught.value.remedy


def test_modules_are_found_where_this_process_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nprint('words of its own')\n"
        "def build(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(7))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = ModelConfig(source="package", name="mine:build", weights=None)
    with EngineAhead(MODEL.model_copy(update={"model": model})) as ahead:
        assert ahead.result().identity["model.name"] == "mine:build"


def test_a_process_that_dies_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = ModelConfig(source="package", name="deadly:build", weights=None)
    with EngineAhead(MODEL.model_copy(update={"model": model})) as ahead, pytest.raises(SystemFault, match="code -9"):
        ahead.result()


def test_a_predictor_is_imported_here_and_an_engine_that_is_there_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no module 'nowhere'"):
        EngineAhead(MODEL.model_copy(update={"predictor": PredictorConfig(path="nowhere:X")}))
    engine = Engine(None, None, {}, True)
    with EngineAhead(MODEL, engine) as ahead:
        assert ahead.result() is engine


def test_an_interrupted_caller_does_not_wait() -> None:
    with pytest.raises(KeyboardInterrupt), EngineAhead(MODEL) as ahead:
        raise KeyboardInterrupt
    assert ahead._process is not None
    assert ahead._process.returncode == -9


@pytest.mark.parametrize(("address", "own"), [(None, True), ("local", True), ("auto", False), ("head:6379", False)])
def test_only_a_job_without_a_cluster_starts_ray(
    address: str | None, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup.sys, "modules", {})
    assert starts_ray(address) is own
