from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import obstore
import pyarrow as pa
import pytest
from obstore import exceptions as obx

from batch_inference.cli import tables
from batch_inference.cli.app import app, main
from batch_inference.config import json_schema
from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.errors import (
    AccountingError,
    BatchInferenceError,
    ErrorThresholdExceeded,
    InfrastructureError,
    JobInterruptedError,
    UserError,
)
from batch_inference.output import verify
from tests.support.images import jpeg
from tests.support.outputs import commit_shard, finished, planned, totals_of, write

COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]
URIS = ["s3://b/0.jpg", "s3://b/bad-1.jpg", "s3://b/2.jpg"]
SMALL = ["--model", "resnet18", "--set", "inference.gpus_per_actor=0"]


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Stdout and stderr as one line, since tables break lines."""
        return " ".join((self.out + self.err).split())


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*argv: object) -> Said:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in argv])
        code = caught.value.code
        return Said(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b [x] ü.jpg", "sub/c.png"):
        (photos / name).write_bytes(jpeg(0))
    (photos / "notes.txt").write_text("x")
    return photos


# --- what every command has ----------------------------------------------------------------------------------------------


def test_commands_of_the_contract_are_there() -> None:
    assert {"run", "plan", "status", "verify", "schema", "demo"} <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_command_explains_itself_by_an_example(command: str, flag: str, program: Callable[..., Said]) -> None:
    said = program(command, flag)
    assert said.code == 0
    assert f"Example: batch-inference {command}" in said.text
    assert said.err == ""


def test_help_names_every_command(program: Callable[..., Said]) -> None:
    said = program("--help")
    assert said.code == 0
    assert all(f" {command} " in said.text for command in COMMANDS)


def test_version(program: Callable[..., Said]) -> None:
    said = program("--version")
    assert said.code == 0
    assert said.out.startswith("batch-inference 0.")
    assert "torch " in said.out


def test_program_is_a_module_and_starts_without_torch_or_ray() -> None:
    code = "import sys; from batch_inference.cli.app import main; main(['schema'])"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert json.loads(done.stdout) == json_schema()
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "ray", "pandas"}
    done = subprocess.run(
        [sys.executable, "-m", "batch_inference", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "No such command 'nonsense'" in done.stderr


# --- plan ----------------------------------------------------------------------------------------------------------------


def test_plan_counts_and_changes_nothing(folder: Path, tmp_path: Path, program: Callable[..., Said]) -> None:
    output = tmp_path / "out"
    said = program("plan", folder, folder / "a.jpg", "--output", output, *SMALL, "--set", "shard_size=2")
    assert said.code == 0, said
    assert "3 images in 2 shards of 2" in said.text
    assert f"file://{folder}/b [x] ü.jpg" in said.out
    assert "1 file ending with .txt" in said.text
    assert "1 inputs listed more than once, done once" in said.text
    assert "resnet18" in said.text
    assert "does not fit" not in said.text
    assert not output.exists()


def test_dry_run_shows_the_plan_and_writes_nothing(folder: Path, tmp_path: Path, program: Callable[..., Said]) -> None:
    said = program("run", folder, "--output", tmp_path / "out", *SMALL, "--limit", "2", "--dry-run")
    assert said.code == 0
    assert "2 images in 1 shard" in said.text
    assert not (tmp_path / "out").exists()


def test_sample_is_chosen_by_its_seed(folder: Path, program: Callable[..., Said]) -> None:
    def first(*args: str) -> list[str]:
        found: list[str] = json.loads(program("plan", folder, *SMALL, "--sample", "2", *args, "--json").out)["first"]
        return found

    assert len(first()) == 2
    assert first() == first("--seed", "0")
    assert len({tuple(first("--seed", str(seed))) for seed in range(8)}) > 1
    assert program("plan", folder, *SMALL, "--seed", "1").err == (
        "error: --seed 1 is given without a sample\nremedy: Add --sample N.\n"
    )


def test_plan_as_json(folder: Path, program: Callable[..., Said]) -> None:
    said = program("plan", folder, *SMALL, "--set", "inference.actors=3", "--json")
    found = json.loads(said.out)
    assert (said.code, said.err) == (0, "")
    assert (found["inputs"], found["shards"], found["shard_size"]) == (3, 1, 1000)
    assert found["first"] == [f"file://{folder}/{n}" for n in ("a.jpg", "b [x] ü.jpg", "sub/c.png")]
    assert (found["skipped"], found["duplicates"], found["repeated"]) == ({".txt": 1}, 0, 0)
    assert (found["actors"], found["gpus"], found["cpus"]) == (3, 0, 4)
    assert found["problems"] == []
    assert any(value == "resnet18" for value in found["engine"].values())


def test_plan_of_a_manifest(tmp_path: Path, program: Callable[..., Said]) -> None:
    (tmp_path / "list.csv").write_text("path,id\na.jpg,1\na.jpg,2\n")
    said = program("plan", "--manifest", tmp_path / "list.csv", "--set", "input.uri_column=path", *SMALL, "--json")
    found = json.loads(said.out)
    assert (found["inputs"], found["repeated"], found["passthrough"]) == (2, 1, ["id"])


def test_plan_names_what_does_not_fit_with_its_numbers(folder: Path, program: Callable[..., Said]) -> None:
    args = ["plan", folder, "--model", "resnet18", "--set", "inference.actors=1000"]
    (problem,) = json.loads(program(*args, "--json").out)["problems"]
    assert problem.startswith("the actors need 1000 GPUs (inference.actors x gpus_per_actor), there are ")
    assert "lower inference.actors, or set inference.gpus_per_actor=0" in problem
    assert "does not fit the actors need 1000 GPUs" in program(*args).text


VALUES = """
job:
  input: {{uris: ["{}"]}}
  model: {{name: resnet18}}
  inference: {{actors: 6, gpus_per_actor: 0.5}}
workers: {{gpusPerWorker: 2, gpuResource: nvidia.com/gpu}}
cpuWorkers: {{replicas: 1}}
"""


def test_plan_with_values_of_the_chart_shows_its_pods(
    folder: Path, tmp_path: Path, program: Callable[..., Said]
) -> None:
    first, second = tmp_path / "values.yaml", tmp_path / "more.yaml"
    first.write_text(VALUES.format(folder))
    second.write_text("workers: {memoryGiB: 50}\nautoscaling: {enabled: true, minWorkers: 1}\n")
    said = program("plan", "--values", first, "--set", "shard_size=2")
    assert said.code == 0, said
    assert "3 images in 2 shards of 2" in said.text
    assert "head 1: 2 CPUs, 8 GiB of memory with 2,457 MiB of object store" in said.text
    assert "workers 2: 2 GPUs, 8 CPUs, 40 GiB of memory" in said.text
    assert "room for 4 actors and 4 tasks" in said.text
    assert "CPU workers 1: 8 CPUs, 12 GiB of memory" in said.text
    assert "in all 4 GPUs, 26 CPUs, 100 GiB of memory, and the submitter" in said.text
    assert "this machine" not in said.text
    said = program("plan", "--values", first, "-f", second, "--json")
    found = json.loads(said.out)["kubernetes"]
    assert (said.code, found["problems"], found["min_workers"]) == (0, [], 1)
    assert (found["workers"]["replicas"], found["workers"]["memory_mib"]) == (2, 50 * 1024)
    assert "workers 1 to 2, as Ray asks for them: 2 GPUs" in program("plan", "-f", first, "-f", second).text


def test_plan_with_a_preset_and_a_price_shows_pods_and_cost(folder: Path, program: Callable[..., Said]) -> None:
    args = ["plan", folder, "--model", "resnet18", "--set", "inference.actors=3", "--preset", "gke-spot"]
    said = program(*args, "--gpu-hour-price", "0.7")
    assert "workers 3: 1 GPU," in said.text
    assert "3 GPUs at 0.70 are 2.10 an hour; --images-per-s RATE" in said.text
    found = json.loads(program(*args, "--gpu-hour-price", "0.7", "--images-per-s", "0.01", "--json").out)
    hours = found["inputs"] / 0.03 / 3600
    assert found["cost"] == pytest.approx(
        {"gpus": 3.0, "gpu_hour_price": 0.7, "per_hour": 2.1, "hours": hours, "total": 2.1 * hours}
    )


def test_plan_of_a_schedule_is_that_of_the_run_that_starts_now(tmp_path: Path, program: Callable[..., Said]) -> None:
    today = datetime.datetime.now(datetime.timezone.utc)
    (tmp_path / f"{today:%Y}").mkdir()
    (tmp_path / f"{today:%Y}" / "a.jpg").write_bytes(jpeg(1))
    values = tmp_path / "values.yaml"
    uris = f"{{input: {{uris: ['{tmp_path}/{{time:%Y}}/']}}, output: {{uri: 's3://o/{{time:%Y}}/'}}}}"
    values.write_text(f"schedule: {{cron: '@daily'}}\njob: {uris}\n")
    assert "1 image in 1 shard" in program("plan", "--values", values, *SMALL).text
    values.write_text(f"schedule: {{cron: '@daily', timeZone: Mars}}\njob: {uris}\n")
    assert "schedule.timeZone is 'Mars', which is no time zone" in program("plan", "--values", values, *SMALL).text


def test_plan_refuses_what_the_chart_refuses_in_its_words(
    folder: Path, tmp_path: Path, program: Callable[..., Said]
) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(VALUES.format(folder) + "head: {memoryGiB: 1, objectStorePercent: 5}\n")
    args = ["plan", "--values", file, "--set", "inference.gpus_per_actor=4"]
    said = program(*args)
    assert said.code == 2
    assert (
        "refused job.inference.gpus_per_actor is 4, workers.gpusPerWorker is 2: no worker can hold an actor"
        in said.text
    )
    assert "refused head has 51 MiB of object store" in said.text
    said = program(*args, "--json")
    assert (said.code, len(json.loads(said.out)["kubernetes"]["problems"])) == (2, 2)


def test_plan_of_a_job_that_joins_a_cluster(folder: Path, tmp_path: Path, program: Callable[..., Said]) -> None:
    file = tmp_path / "values.yaml"
    file.write_text(VALUES.format(folder) + "clusterSelector: shared\n")
    said = program("plan", "--values", file)
    assert said.code == 0
    assert "joins a Ray cluster that is up" in said.text


def test_plan_without_values_says_what_the_chart_would_make(folder: Path, program: Callable[..., Said]) -> None:
    said = program("plan", folder, "--model", "resnet18")
    assert "on Kubernetes 4 workers, each with 1 GPU, 5 CPUs, 15 GiB of memory" in said.text
    said = program("plan", folder, "--model", "resnet18", "--set", "inference.gpus_per_actor=2")
    assert said.code == 0
    assert "needs values for the chart; job.inference.gpus_per_actor is 2, workers.gpusPerWorker is 1" in said.text


def test_configuration_file_and_the_command_line_together(
    folder: Path, tmp_path: Path, program: Callable[..., Said]
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "input: {uris: [none/], recursive: false}\nmodel: {name: resnet50}\ninference: {gpus_per_actor: 0}\nshard_size: 2\n"
    )
    found = json.loads(program("plan", folder, "--config", file, "--model", "resnet18", "--json").out)
    assert (found["inputs"], found["shards"]) == (2, 1)
    assert "resnet18" in found["engine"].values()


# --- status and verify ---------------------------------------------------------------------------------------------------


def test_status_and_verify_of_a_finished_job(tmp_path: Path, program: Callable[..., Said]) -> None:
    _, job = finished(str(tmp_path), URIS, 2)
    said = program("status", tmp_path)
    assert said.code == 0
    assert "succeeded" in said.out
    assert "3 of 3 (100.0 %): 2 predictions, 1 errors" in said.text
    assert "2 of 2 committed, by 1 attempt" in said.text
    assert "decode TRUNCATED 1" in said.text
    found = json.loads(program("status", tmp_path, "--json").out)
    assert (found["state"], found["fingerprint"], found["shards_done"]) == ("succeeded", job.fingerprint, 2)
    said = program("verify", tmp_path)
    assert (said.code, said.out) == (
        0,
        "OK: all 3 inputs are there exactly once: 2 predictions, 1 errors, 2 shards\n",
    )
    assert json.loads(program("verify", tmp_path, "--json").out)["ok"] is True


def test_status_is_watched_until_the_end(
    tmp_path: Path, program: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, job = planned(str(tmp_path), URIS, 2)
    commit_shard(ledger.store, 0)

    def end(seconds: float) -> None:
        assert seconds == 0.5
        commits = [*ledger.commits(), commit_shard(ledger.store, 1)]
        ledger.finish(job, commits, totals_of(job, commits))

    # The job ends while the first pause lasts.
    monkeypatch.setattr(tables, "time", SimpleNamespace(sleep=end))
    said = program("status", tmp_path, "--watch", "--every", "0.5")
    lines = said.out.splitlines()
    assert lines[0].startswith("unfinished: 2 of 3 rows, 1 errors, ETA ")
    assert lines[-1] == "succeeded: 3 of 3 rows, 1 errors, ETA -"
    assert program("status", tmp_path, "--watch", "--json").code == 2


def test_diff_says_what_changed_and_fails_where_it_shall(tmp_path: Path, program: Callable[..., Said]) -> None:
    outputs = []
    for name in ("one", "two"):
        ledger, _ = planned(str(tmp_path / name), URIS, 2)
        outputs.append(tmp_path / name)
        commit_shard(ledger.store, 0)
    said = program("diff", *outputs, "--column", "value", "--fail-above", "0")
    assert said.code == 0
    assert "changed 0 (0.00 % of those predicted in both)" in said.text
    ledger, _ = planned(str(tmp_path / "three"), ["s3://b/2.jpg", "s3://b/0.jpg"], 2)
    writer, errors = write(ledger.store, 0, "x")
    table = pa.table({"shard": pa.array([0, 0], pa.int32()), "row": pa.array([0, 1], pa.int32()), "value": [1, 2]})
    writer = ShardWriter(ledger.store, "x", "zstd")
    writer.add(0, table)
    assert ledger.commit(writer.write(0, errors))
    said = program("diff", outputs[0], tmp_path / "three", "--column", "value", "--fail-above", "50")
    assert said.code == 3
    assert "changed 1 (100.00 %" in said.text
    assert "s3://b/0.jpg: " in said.text
    found = json.loads(program("diff", outputs[0], tmp_path / "three", "--column", "value", "--json").out)
    assert (found["changed"], found["only_after"], found["examples"][0]["after"]) == (1, 1, "2")


def test_status_and_verify_of_an_unfinished_job(tmp_path: Path, program: Callable[..., Said]) -> None:
    ledger, _ = planned(str(tmp_path), URIS, 2)
    assert "planned" in program("status", tmp_path).out
    commit_shard(ledger.store, 0)
    ledger.store.put("_FAILED", b'{"verdict": "every one of [the] last rows"}')
    said = program("status", tmp_path)
    assert "2 of 3 (66.7 %)" in said.text
    assert "every one of [the] last rows" in said.text
    said = program("verify", tmp_path)
    assert said.code == 0
    assert "OK so far: 2 of 3 inputs are there exactly once, 1 of 2 shards are committed" in said.out


def test_verify_names_what_is_wrong_and_ends_with_4(tmp_path: Path, program: Callable[..., Said]) -> None:
    finished(str(tmp_path), URIS, 2)
    (damaged,) = (tmp_path / "predictions").glob("shard-00001-*")
    damaged.unlink()
    said = program("verify", tmp_path)
    assert said.code == 4
    assert f"  - predictions/{damaged.name} is committed but missing" in said.out.splitlines()
    assert "WRONG: 2 problems; 2 of 3 inputs found (1 predictions, 1 errors)" in said.out
    assert "remedy: " in said.out
    said = program("verify", tmp_path, "--json")
    assert said.code == 4
    assert json.loads(said.out)["problems"][0] == f"predictions/{damaged.name} is committed but missing"
    (tmp_path / "_commits/shard-00000.json").write_text("{")
    said = program("status", tmp_path)
    assert said.code == 4
    assert "_commits/shard-00000.json is not a valid commit" in said.err
    assert "remedy: Delete _commits/shard-00000.json" in said.err


# --- the user's mistakes -------------------------------------------------------------------------------------------------

# Arguments (`{}` is a folder with photos/, notes/, list.csv, ...), what the message says, what the remedy says.
MISTAKES: list[tuple[str, str, str]] = [
    ("plan", "no input is given", "input.uris or input.manifest"),
    ("plan {}/none", "there is no file or folder {}/none", "Check the path"),
    ("plan {}/notes", "no images in {}/notes: only 1 file ending with .txt", "input.extensions"),
    ("plan {}/photos/*.tif", "nothing was found in {}/photos/*.tif", "Check the location"),
    ("plan ftp://x/y", "the scheme ftp://, which is not supported", "s3://"),
    ("plan {}/list.csv", "{}/list.csv looks like a manifest, not like an image", "Write --manifest {}/list.csv."),
    ("plan --manifest {}/none.csv", "cannot read the manifest", "Check the location"),
    (
        "plan --manifest {}/list.csv --set input.uri_column=path",
        "has no column 'path'; it has: uri, id",
        "input.uri_column",
    ),
    ("plan --manifest {}/clash.csv", "columns that the predictions have of their own: label", "Rename"),
    ("plan {}/photos --model resnet15", "no classification network named 'resnet15'", "Did you mean resnet"),
    ("plan {}/photos --weights IMAGENET1K_V9", "IMAGENET1K_V9", "DEFAULT"),
    ("plan {}/photos --config {}/none.yaml", "no configuration file at {}/none.yaml", "--config"),
    ("plan {}/photos --config {}/list.csv", "{}/list.csv", "input:"),
    ("plan {}/photos --config {}/broken.yaml", "{}/broken.yaml is not valid YAML", "Fix the line"),
    ("plan --values {}/none.yaml", "no configuration file at {}/none.yaml", "--values"),
    ("plan --values {}/broken.yaml", "{}/broken.yaml is not valid YAML", "Fix the line"),
    (
        "plan --values {}/wrong.yaml",
        "workers.gpusPerWorker: Input should be a valid integer, not 'two'",
        "helm/README.md",
    ),
    ("plan --values {}/nojob.yaml", "job is None in the values", "Put the configuration under it"),
    (
        "plan --config {}/a.yaml --values {}/wrong.yaml",
        "both --config {}/a.yaml and --values are given",
        "Keep --values",
    ),
    ("plan {}/photos --set actors", "--set actors is not of the form key=value", "--set inference.actors=2"),
    (
        "plan {}/photos --set inference.actor=2",
        "inference.actor: there is no such key; did you mean 'actors'?",
        "schema",
    ),
    ("plan {}/photos --set inference.actors=none", "inference.actors: ", "batch-inference schema"),
    ("plan {}/photos --set predictor=nocolon", "'nocolon' is not of the form module:Class", "schema"),
    ("plan {}/photos --set predictor=no_module:X", "there is no module 'no_module'", "Put no_module.py into {}"),
    ("plan {}/photos --set predictor=mine:X", "mine has no 'X'; its classes: Mine", "after the colon"),
    ("plan {}/photos --set predictor=needs:X", "needs imports 'not_installed_anywhere'", "install"),
    ("plan {}/photos --set predictor=breaks:X", "importing breaks failed: RuntimeError: at import", "Fix the module"),
    ("status {}/none", "there is no folder {}/none", "Check the location"),
    ("status {}/photos", "there is no job in {}/photos", "Check the location"),
    ("verify {}/photos", "there is no job in {}/photos", "Check the location"),
    ("verify {}/foreign", "{}/foreign/_job.json is not a job of this program", "Choose another output"),
    (
        "verify {}/photos --set storage.timeout=1",
        "storage.timeout: there is no such key; did you mean 'timeout_s'?",
        "schema",
    ),
]


@pytest.fixture
def place(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {
        "notes/a.txt": "x",
        "list.csv": "uri,id\na.jpg,1\n",
        "clash.csv": "uri,label\na.jpg,cat\n",
        "broken.yaml": "input: [\n",
        "wrong.yaml": "workers: {gpusPerWorker: two}\n",
        "nojob.yaml": "job:\n",
        "foreign/_job.json": "{}",
        "mine.py": "class Mine:\n    pass\n",
        "needs.py": "import not_installed_anywhere\n",
        "breaks.py": "raise RuntimeError('at import')\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("line", "fact", "remedy"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_mistake_is_a_fact_and_a_remedy(
    line: str, fact: str, remedy: str, place: Path, program: Callable[..., Said]
) -> None:
    argv = [word.replace("{}", str(place)) for word in line.split()]
    fact, remedy = fact.replace("{}", str(place)), remedy.replace("{}", str(place))
    said = program(*argv)
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    message, _, advice = said.err.partition("\nremedy: ")
    assert fact in message
    assert remedy in advice
    assert "Traceback" not in said.err
    said = program(*argv, "--json")
    found: dict[str, Any] = json.loads(said.out)
    assert (said.code, said.err) == (2, "")
    assert (found["state"], found["exit_code"]) == ("FAILED", 2)
    assert fact in found["verdict"]
    assert remedy in found["remedy"]


@pytest.mark.parametrize(
    ("line", "fact", "remedy"),
    [
        ("run {}/photos", "no output is given", "--output"),
        ("run {}/none -o {}/out", "there is no file or folder {}/none", "Check the path"),
        (
            "run {}/photos -o {}/list.csv",
            "{}/list.csv is the name of a file, and an output is a folder",
            "; afterwards: python -c",
        ),
        ("run {}/photos -o {}/out --model resnet15", "no classification network named 'resnet15'", "Did you mean"),
        ("run {}/photos -o {}/foreign", "_job.json is not a job of this program", "Choose another output"),
    ],
)
def test_run_that_cannot_start_ends_with_its_verdict(
    line: str, fact: str, remedy: str, place: Path, program: Callable[..., Said]
) -> None:
    said = program(*[word.replace("{}", str(place)) for word in line.split()])
    assert said.code == 2
    lines = said.out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("FAILED (exit 2): ")
    assert fact.replace("{}", str(place)) in lines[0]
    assert lines[3].startswith("remedy: ")
    assert remedy in lines[3]
    assert "Traceback" not in said.out + said.err


@pytest.mark.parametrize("argv", [["plan", "--nonsense"], ["nonsense"], ["status"], ["verify", "a", "b"], []])
def test_wrong_usage_ends_with_2(argv: list[str], program: Callable[..., Said]) -> None:
    said = program(*argv)
    assert said.code == 2
    assert "Usage:" in said.out + said.err


# --- exit codes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (UserError("fact", "remedy"), 2),
        (ErrorThresholdExceeded("fact", "remedy"), 3),
        (AccountingError("fact", "remedy"), 4),
        (InfrastructureError("fact", "remedy"), 5),
        (JobInterruptedError("fact", "remedy"), 130),
    ],
)
def test_every_error_class_has_its_exit_code(
    exc: BatchInferenceError, code: int, program: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise exc

    monkeypatch.setattr(verify, "verify", fail)
    assert program("verify", "out") == Said(code, "", "error: fact\nremedy: remedy\n")
    said = program("verify", "out", "--json")
    state = "INTERRUPTED" if code == 130 else "FAILED"
    assert json.loads(said.out) == {"state": state, "exit_code": code, "verdict": "fact", "remedy": "remedy"}
    assert said.code == code


def test_ctrl_c_ends_with_130(program: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "verify", interrupt)
    said = program("verify", "out")
    assert said.code == 130
    assert "Traceback" not in said.err


def test_store_that_is_down_ends_with_5(
    tmp_path: Path, program: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise obx.GenericError("error sending request: connection refused\n\nDebug source:\nlong")

    monkeypatch.setattr(obstore, "get", fail)
    said = program("status", tmp_path)
    assert said.code == 5
    assert "connection refused\nremedy: Check the store and the network" in said.err
    assert "Debug source" not in said.err


def test_internal_error_ends_with_5_and_says_so(program: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(verify, "verify", fail)
    said = program("verify", "out")
    assert said.code == 5
    assert "ZeroDivisionError: oops" in said.err
    assert "internal error: please report it" in said.err


def test_broken_pipe_is_no_silent_end(program: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(verify, "verify", fail)
    said = program("verify", "out")
    assert said.code == 5
    assert "a process that the program was talking to went away" in said.err


def test_program_ends_quietly_if_nobody_reads_its_output() -> None:
    command = [sys.executable, "-m", "batch_inference", "schema"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert (process.stderr.read() if process.stderr else "") == ""
    assert process.wait() == 1


def test_one_source_replaces_the_other_of_the_file_and_two_are_refused(
    folder: Path, tmp_path: Path, program: Callable[..., Said]
) -> None:
    (tmp_path / "list.txt").write_text("photos/a.jpg\n")
    (tmp_path / "job.yaml").write_text(f"input: {{manifest: {tmp_path}/list.txt}}\n")
    assert json.loads(program("plan", "--config", tmp_path / "job.yaml", *SMALL, "--json").out)["inputs"] == 1
    assert json.loads(program("plan", folder, "--config", tmp_path / "job.yaml", *SMALL, "--json").out)["inputs"] == 3
    said = program("plan", folder, "--manifest", tmp_path / "list.txt")
    assert said.code == 2
    assert "both INPUT and --manifest" in said.text


def test_unknown_preset_is_named_with_those_there_are(folder: Path, program: Callable[..., Said]) -> None:
    said = program("plan", folder, *SMALL, "--preset", "gcp")
    assert said.code == 2
    assert "there is no preset gcp\nremedy: Take one of aks, aks-karpenter" in said.err


def test_unknown_log_format_is_refused(program: Callable[..., Said]) -> None:
    assert program("run", "x", "--log-format", "xml").code == 2
