"""A job from start to end, on local files and on S3, with every kind of input and predictor."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest

from batch_inference.config import StorageConfig
from batch_inference.output.attempts import read_attempts
from batch_inference.storage.store import Store
from tests.support.images import jpeg
from tests.support.jobs import job_args, start, verified, wait_for
from tests.support.limits import HANG_S
from tests.support.servers import Proxy, stop

Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_every_input_ends_as_one_row_and_a_second_run_is_done_at_once(
    where: str,
    photos: Callable[..., Path],
    tmp_path: Path,
    attached: Program,
    cluster: dict[str, str],
    request: pytest.FixtureRequest,
) -> None:
    folder = photos(60, bad_percent=10)
    output, extra = str(tmp_path / "out"), []
    source = str(folder)
    if where == "s3":
        url = request.getfixturevalue("s3")
        extra = ["--set", f"storage.endpoint_url={url}"]
        source, output = f"s3://tests/{tmp_path.name}/in", f"s3://tests/{tmp_path.name}/out"
        store = Store(source, StorageConfig(endpoint_url=url))
        for file in folder.iterdir():
            store.put(file.name, file.read_bytes())
    args = [*job_args(source, output), "--address", cluster["address"], *extra]
    first = attached(*args)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.splitlines()[0] == "SUCCEEDED: 60 of 60 images accounted for, 54 predictions and 6 errors"
    assert len(first.stdout.splitlines()) == 5
    found = verified(output, attached, *extra)
    assert (found["rows"], found["predictions"], found["errors"]) == (60, 54, 6)
    second = attached(*args)
    assert second.returncode == 0
    assert "was done already" in second.stdout.splitlines()[0]
    if where == "local":
        table = pd.read_parquet(f"{output}/predictions")
        assert list(table.columns) == ["uri", "shard", "row", "mean", "pid"]
        errors = pd.read_parquet(f"{output}/errors")
        assert len(table) + len(errors) == 60
        assert set(errors["stage"]) == {"decode"}
        assert set(table["uri"]) | set(errors["uri"]) == {f"file://{p}" for p in folder.iterdir()}
        assert not list(Path(output, "_manifest").glob("*.tar"))


def test_the_articles_predictor_runs_unchanged_on_500_jpegs(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    folder, output = photos(500), tmp_path / "out"
    args = job_args(folder, output, predictor="predictors:ArticlePredictor", shard_size=100)
    done = attached(*args, "--address", cluster["address"])
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_parquet(output / "predictions")
    assert len(table) == 500
    assert table["predicted_class_idx"].between(0, 9).all()
    assert table["confidence"].between(0, 1).all()


def test_ray_client_addresses_run_the_driver_in_the_cluster(
    photos: Callable[..., Path], tmp_path: Path, program: Program, attached: Program, cluster: dict[str, str]
) -> None:
    """With a predictor from the current folder, which the cluster's processes can't import by its name."""
    (tmp_path / "here").mkdir()
    text = Path(__file__).with_name("predictors.py").read_text()
    (tmp_path / "here/my_own.py").write_text(text)
    args = job_args(photos(40, bad_percent=5), tmp_path / "out", predictor="my_own:MeanColor")
    done = program(*args, "--address", cluster["client"], cwd=tmp_path / "here")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 of 40 images accounted for, 38 predictions and 2 errors" in done.stdout
    verified(str(tmp_path / "out"), attached)


def test_a_signal_ends_the_driver_in_the_cluster_as_it_does_one_here(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    output = tmp_path / "out"
    args = [
        *job_args(photos(120), output, shard_size=10),
        "--address",
        cluster["client"],
        "--set",
        "predictor.args=[0.2]",
    ]
    log = tmp_path / "log"
    process = start(*args, log=log)
    try:
        wait_for(lambda: len(list(output.glob("_commits/*"))) >= 2, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 130, log.read_text()
    finally:
        stop(process)
    assert "stopped by SIGTERM" in log.read_text()
    # It has said itself how it ended, after it had committed what was complete; a driver that is killed can't.
    (attempt,) = read_attempts(Store(str(output), StorageConfig()))
    assert attempt.state == "interrupted"
    committed = {file.name for file in output.glob("_commits/*")}
    assert 2 <= len(committed) < 12
    done = attached(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert committed <= {file.name for file in output.glob("_commits/*")}
    verified(str(output), attached)


def test_manifest_columns_pass_through_and_wide_outputs_do_not_pass_the_driver(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    folder = photos(40)
    manifest = tmp_path / "list.csv"
    lines = [f"photos/image-{i:06d}.jpg,{i:05d}" for i in range(40)] + ["photos/none.jpg,77777", "ftp://x/y.jpg,88888"]
    manifest.write_text("uri,id\n" + "\n".join(lines) + "\n")
    args = job_args("unused", tmp_path / "out", predictor="predictors:Embedding", shard_size=16)
    args[1:2] = ["--manifest", str(manifest)]
    done = attached(*args, "--address", cluster["address"])
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_parquet(tmp_path / "out/predictions").sort_values("id")
    assert list(table["id"]) == [f"{i:05d}" for i in range(40)]
    assert table["uri"].iloc[7] == f"file://{folder}/image-000007.jpg"
    assert all(len(value) == 512 for value in table["embedding"])
    errors = pd.read_parquet(tmp_path / "out/errors").set_index("id")
    assert errors.loc["77777", ["stage", "error_type"]].tolist() == ["fetch", "NOT_FOUND"]
    assert errors.loc["88888", ["stage", "error_type"]].tolist() == ["list", "INVALID_URI"]
    verified(str(tmp_path / "out"), attached)


def test_decoding_is_not_fused_into_the_actors(tmp_path: Path, cluster: dict[str, str]) -> None:
    """With equal CPU requests Ray Data would decode inside the actors, and a CPU job would have no decoders."""
    import ray
    from ray.data._internal.logical.optimizers import get_execution_plan

    from batch_inference.config import load_config
    from batch_inference.pipeline.engine import resolve_engine
    from batch_inference.pipeline.stream import PipelineSpec, build

    config = load_config(
        None,
        {"output": {"uri": str(tmp_path)}, "predictor": "predictors:MeanColor", "inference": {"gpus_per_actor": 0}},
    )
    ray.init(cluster["address"], log_to_driver=False)
    try:
        store = Store(str(tmp_path), config.storage)
        dataset = build(PipelineSpec(store, config, resolve_engine(config), {0: 10}, "test"))
        plan = get_execution_plan(dataset._logical_plan)
        plan = plan[0] if isinstance(plan, tuple) else plan
        names, operator = [], plan.dag
        while operator is not None:
            names.append(type(operator).__name__)
            operator = operator.input_dependencies[0] if operator.input_dependencies else None
        assert names == ["ActorPoolMapOperator", "TaskPoolMapOperator", "InputDataBuffer"]
    finally:
        ray.shutdown()


def test_a_store_that_ignores_put_if_absent_is_refused(
    photos: Callable[..., Path], proxy: Proxy, attached: Program, tmp_path: Path
) -> None:
    proxy.ignore_put_if_absent = True
    done = attached(*job_args(photos(5), f"s3://tests/{tmp_path.name}"), "--set", f"storage.endpoint_url={proxy.url}")
    assert done.returncode == 2
    assert "does not honor put-if-absent" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_finished_and_failed_jobs_leave_no_actor_in_a_process_that_stays(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    """A notebook stays in the cluster after its job, and what that leaves takes memory until the notebook ends."""
    folder = photos(20)
    assert attached(*job_args(folder, tmp_path / "out")).returncode == 0
    assert attached(*job_args(folder, tmp_path / "failed", predictor="predictors:FailsOnEverything")).returncode == 2

    def actors() -> list[str]:
        titles = []
        for process in psutil.Process(int(cluster["process"])).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # one that has just ended
                titles.append(" ".join(process.cmdline()))
        return [title for title in titles if title.startswith(("ray::ShardWriter", "ray::MapWorker", "ray::Inference"))]

    deadline = time.monotonic() + HANG_S
    while actors():
        assert time.monotonic() < deadline, actors()
        time.sleep(0.1)


def test_another_configuration_on_the_same_output_is_refused(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    folder, output = photos(10), tmp_path / "out"
    args = [*job_args(folder, output), "--address", cluster["address"]]
    assert attached(*args).returncode == 0
    fingerprint = json.loads((output / "_job.json").read_text())["fingerprint"]
    other = attached(*args, "--set", "preprocess.max_pixels=1000", "--set", "predictor.args=[0.5]")
    assert other.returncode == 2
    text = other.stdout + other.stderr
    assert fingerprint[:12] in text
    assert "preprocess.max_pixels: 178956970 there, 1000 now" in text
    assert "predictor.args: nothing there, (0.5,) now" in text
    assert "Traceback" not in text
    # What does not change a row may change between attempts.
    assert attached(*args, "--set", "inference.batch_size=4", "--set", "errors.max_count=7").returncode == 0


def test_the_builtin_classifier_on_a_state_dict_writes_the_contracts_columns(
    photos: Callable[..., Path], tmp_path: Path, attached: Program, cluster: dict[str, str]
) -> None:
    import safetensors.torch
    import torchvision

    weights = tmp_path / "small.safetensors"
    safetensors.torch.save_file(torchvision.models.resnet18(num_classes=7).state_dict(), weights)
    (tmp_path / "labels.txt").write_text("\n".join(f"class {i}" for i in range(7)))
    args = [
        "run", str(photos(30, bad_percent=10)), "-o", str(tmp_path / "out"), "--address", cluster["address"],
        "--set", "model.source=file", "--model", "resnet18", "--weights", str(weights), "--set", f"model.labels={tmp_path}/labels.txt",
        "--set", "inference.actors=1", "--set", "inference.gpus_per_actor=0", "--set", "shard_size=8", "--set", "inference.top_k=3",
    ]  # fmt: skip
    done = attached(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30 images are few" in done.stderr
    table = pq.read_table(tmp_path / "out/predictions")
    fields = {f.name: str(f.type) for f in table.schema}
    assert list(fields) == ["uri", "shard", "row", "predicted_class_idx", "label", "confidence", "top_k"]
    assert fields["predicted_class_idx"] == "int32"
    assert fields["confidence"] == "float"
    assert "struct<class_idx: int32, label: string, confidence: float>" in fields["top_k"]
    for row in table.to_pylist():
        assert row["label"] == f"class {row['predicted_class_idx']}"
        assert len(row["top_k"]) == 3
        assert row["top_k"][0] == {
            "class_idx": row["predicted_class_idx"],
            "label": row["label"],
            "confidence": row["confidence"],
        }
    assert table.num_rows == 27
    verified(str(tmp_path / "out"), attached)


def test_library_use_without_the_command_line(photos: Callable[..., Path], tmp_path: Path) -> None:
    import ray

    from batch_inference import JobConfig, run, verify

    config = JobConfig(
        input={"uris": [str(photos(12))]},
        output={"uri": str(tmp_path / "out")},
        predictor="predictors:MeanColor",
        inference={"actors": 2, "gpus_per_actor": 0},
        shard_size=5,
    )
    phases: list[str] = []
    result = run(config, on_progress=lambda snapshot: phases.append(snapshot.phase))
    assert (result.rows, result.predictions, result.errors, result.shards) == (12, 12, 0, 3)
    assert list(dict.fromkeys(phases)) == ["plan", "start", "run", "finish", "done"]
    assert verify(str(tmp_path / "out")).ok
    assert not ray.is_initialized()
    assert run(config).already_done
    assert len(jpeg(1)) > 100
