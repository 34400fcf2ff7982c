"""The end of a job, as the terminal, the output, the report and the next start show it; without Ray."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_inference.cli.verdict import verdict_of, verdict_of_failure
from batch_inference.config import ErrorsConfig, JobConfig
from batch_inference.driver import run
from batch_inference.driver.connection import RayConnection
from batch_inference.driver.events import AttemptInfo
from batch_inference.driver.job import create_job, fail_fast_on_known_error
from batch_inference.driver.progress import Progress
from batch_inference.errors import ErrorThresholdExceeded, InfrastructureError, NoPredictionError, UserError
from batch_inference.inputs.find import find_inputs
from batch_inference.output.attempts import AttemptRecord
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import now
from batch_inference.output.retries import start_retry
from batch_inference.output.status import status
from batch_inference.output.tally import Tally
from batch_inference.pipeline.engine import resolve_engine
from batch_inference.pipeline.fingerprint import differences
from batch_inference.preflight.preflight import _PreflightRun
from batch_inference.report import build
from batch_inference.storage.store import Store
from tests.support.outputs import CONFIG, commit_shard, totals_of

Make = Callable[..., JobConfig]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a function that writes photos and two predictors, and returns a configuration; Ray does not start."""
    (tmp_path / "one.py").write_text("class Mean:\n    def __call__(self, batch):\n        return {}\n")
    (tmp_path / "two.py").write_text("class Mean:\n    def __call__(self, batch):\n        return {'x': 1}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def no_ray(*_: Any) -> Any:
        raise InfrastructureError("Ray was to be started", "")

    monkeypatch.setattr(RayConnection, "open", no_ray)

    def config(good: int, bad: int, predictor: str = "one:Mean", **keys: Any) -> JobConfig:
        (tmp_path / "photos").mkdir(exist_ok=True)
        for prefix, count in (("good", good), ("bad", bad)):
            for number in range(count):
                (tmp_path / f"photos/{prefix}-{number:04d}.jpg").write_bytes(b"")
        given: dict[str, Any] = {
            "input": {"uris": ["photos"]},
            "output": {"uri": str(tmp_path / "out")},
            "shard_size": 4,
        }
        return JobConfig.model_validate(
            {**given, "predictor": {"path": predictor}, "report": {"enabled": False}, **keys}
        )

    return config


def committed(config: JobConfig) -> Ledger:
    """Plan and commit every shard of an output; images with "bad" in their names have failed."""
    attempt, ledger = AttemptInfo(""), Ledger(Store(config.output.uri, CONFIG))
    job = create_job(config, attempt, ledger, resolve_engine(config), find_inputs(config))
    ledger.complete_manifest(job)
    for shard in range(job.shards):
        commit_shard(ledger.store, shard, attempt.id)
    return ledger


def outcome_of(output: Path | str) -> tuple[str, str, dict[str, Any]]:
    """Return state and verdict of ``status``, and the content of ``_FAILED``."""
    outcome = status(str(output))
    return outcome.state, outcome.verdict, json.loads(Store(str(output), CONFIG).get_or_none("_FAILED") or b"{}")


# --- no prediction at all --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4, 9])
def test_job_without_a_prediction_fails_and_says_so_again(count: int, make: Make) -> None:
    config = make(0, count)
    ledger = committed(config)
    rows = "the only row" if count == 1 else f"all {count} rows"
    for _ in range(2):
        with pytest.raises(
            NoPredictionError, match=f"no prediction at all: {rows} failed .decode TRUNCATED {count}."
        ) as caught:
            run.run(config)
        assert caught.value.exit_code == 3
        assert "for example file://" in caught.value.message and ": cut off" in caught.value.message
        assert "retry --stage decode" not in caught.value.remedy
        assert f"batch-inference retry {config.output.uri} --stage decode" in caught.value.remedy
        assert ledger.store.get_or_none("_SUCCESS") is None
        state, verdict, failed = outcome_of(config.output.uri)
        assert (state, verdict) == ("failed", caught.value.message)
        assert (failed["exit_code"], failed["remedy"]) == (3, caught.value.remedy)
    summary = json.loads(ledger.store.get("_report/summary.json"))
    assert (summary["state"], summary["verdict"]) == ("FAILED", caught.value.message)
    first = verdict_of_failure(caught.value, config.output.uri, Progress())[0]
    assert first.startswith("FAILED (exit 3): no prediction at all: ")


def test_automatic_retry_ends_in_seconds_with_the_same_verdict(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH_INFERENCE_RUN", "photos-1")
    config = make(0, 3)
    ledger = committed(config)
    with pytest.raises(NoPredictionError):
        run.run(config)
    with pytest.raises(ErrorThresholdExceeded, match="this one would as well: no prediction at all"):
        fail_fast_on_known_error(ledger, ledger.require_job(), "photos-1")
    with pytest.raises(ErrorThresholdExceeded, match="this one would as well: no prediction at all"):
        run.run(config)


def test_success_of_an_earlier_version_without_a_prediction_is_a_failure(make: Make) -> None:
    config = make(0, 5)
    ledger = committed(config)
    commits, job = ledger.commits(), ledger.require_job()
    ledger.finish(job, commits, {**totals_of(job, commits), "errors_by": {"decode": {"TRUNCATED": 5}}, "files": 2})
    assert outcome_of(config.output.uri)[0] == "failed"
    assert "no prediction at all: all 5 rows failed" in outcome_of(config.output.uri)[1]
    assert build.make_report(config.output.uri, config).state == "failed"
    with pytest.raises(NoPredictionError):
        run.run(config)
    assert ledger.store.get_or_none("_SUCCESS") is None


def test_failed_rows_of_a_job_without_a_prediction_can_be_retried(make: Make) -> None:
    config = make(0, 5)
    ledger = committed(config)
    with pytest.raises(NoPredictionError):
        run.run(config)
    for generation in (1, 2):
        retry = start_retry(ledger, stages=[], error_types=[], retryable=False, attempt="again")
        assert retry is not None and (retry.generation, retry.rows) == (generation, 5)
        # There is work again, for which Ray is needed; what then fails again is committed.
        with pytest.raises(InfrastructureError, match="Ray was to be started"):
            run.run(config)
        for commit in ledger.commits():
            ledger.commit(replace(commit, generation=generation))
        with pytest.raises(NoPredictionError, match="all 5 rows failed"):
            run.run(config)


def test_report_of_a_job_without_a_prediction_has_no_check_mark(make: Make, tmp_path: Path) -> None:
    config = make(0, 1)
    committed(config)
    with pytest.raises(NoPredictionError):
        run.run(config)
    build.make_report(config.output.uri, config)
    html = (tmp_path / "out/_report/report.html").read_text()
    assert "Failed (exit code 3)" in html
    assert "no prediction at all: the only row failed (decode TRUNCATED 1)" in html
    assert "1 of 1 image is committed, 0 predictions and 1 error. It stays." in html
    assert "\N{CHECK MARK}" not in html


# --- more errors than max_percent, below min_rows -------------------------------------------------------------------------

LIMIT = "more than errors.max_percent = 5 (not enforced below errors.min_rows = 1,000 rows)"


def test_excess_of_errors_stands_first_everywhere(make: Make, tmp_path: Path) -> None:
    config = make(8, 12)
    ledger = committed(config)
    for already in (False, True):
        result = run.run(config)
        assert result.excess == f"60.0 % errors, {LIMIT}"
        lines = verdict_of(result)
        assert lines[0].startswith("SUCCEEDED WITH 60.0 % ERRORS: ")
        assert f"20 of 20 images accounted for, 8 predictions and 12 errors, {LIMIT}" in lines[0]
        assert result.already_done == already
        assert outcome_of(config.output.uri)[:2] == ("succeeded", result.excess)
    summary = json.loads(ledger.store.get("_report/summary.json"))
    assert (summary["state"], summary["verdict"]) == ("SUCCEEDED", result.excess)
    assert json.loads(ledger.store.get("_SUCCESS"))["verdict"] == result.excess
    build.make_report(config.output.uri, config)
    html = (tmp_path / "out/_report/report.html").read_text()
    assert f"Succeeded with 60.0 % errors: 8 predictions and 12 errors, {LIMIT}" in html
    assert "<title>Succeeded with 60.0 % errors" in html
    assert "\N{CHECK MARK}" not in html


@pytest.mark.parametrize(("good", "bad", "keys"), [(19, 1, {}), (4, 4, {"errors": {"max_percent": None}})])
def test_success_within_its_limits_is_one(
    good: int, bad: int, keys: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    config = make(good, bad, **keys)
    committed(config)
    result = run.run(config)
    errors = "1 error" if bad == 1 else f"{bad} errors"
    first = f"SUCCEEDED: {good + bad} of {good + bad} images accounted for, {good} predictions and {errors}"
    assert verdict_of(result)[0] == first
    assert outcome_of(config.output.uri)[:2] == ("succeeded", "")
    build.make_report(config.output.uri, config)
    html = (tmp_path / "out/_report/report.html").read_text()
    assert f"Succeeded: all {good + bad} images are accounted for" in html
    assert "\N{CHECK MARK}" in html


def test_one_image_is_one(make: Make, tmp_path: Path) -> None:
    config = make(1, 0)
    committed(config)
    lines = verdict_of(run.run(config))
    assert lines[0] == "SUCCEEDED: 1 of 1 image accounted for, 1 prediction and 0 errors"
    assert "/errors" not in "".join(lines)
    build.make_report(config.output.uri, config)
    assert "Succeeded: the only image is accounted for" in (tmp_path / "out/_report/report.html").read_text()


tallies = st.builds(
    lambda rows, share: (rows, min(rows, round(rows * share))),
    st.integers(0, 3000),
    st.one_of(st.floats(0, 1), st.just(1.0)),
)


@given(tallies, st.one_of(st.none(), st.floats(0, 100)), st.integers(1, 2000))
def test_errors_beyond_the_limit_end_the_job_or_are_told(
    counts: tuple[int, int], max_percent: float | None, min_rows: int
) -> None:
    tally = Tally(rows=counts[0])
    tally.add_errors({"decode": {"CORRUPT": counts[1]}})
    limits = ErrorsConfig(max_percent=max_percent, min_rows=min_rows)
    beyond = max_percent is not None and 100 * counts[1] / max(1, counts[0]) > max_percent
    try:
        tally.check(limits)
        ended = False
    except ErrorThresholdExceeded as exc:
        ended = True
        assert exc.message.startswith("no prediction at all: ") == (counts[0] == counts[1])
    assert ended == (beyond and counts[0] >= min_rows)
    assert bool(tally.excess(limits)) == beyond


def test_verdict_names_no_folder_that_is_missing(make: Make) -> None:
    """Every path in a verdict exists, however the job ended."""
    for good, bad in ((3, 0), (3, 2), (0, 2)):
        config = make(good, bad)
        config = config.model_copy(
            update={"output": config.output.model_copy(update={"uri": f"{config.output.uri}-{good}-{bad}"})}
        )
        for file in Path("photos").iterdir():
            keep = int(file.stem.partition("-")[2]) < (bad if "bad" in file.name else good)
            if not keep:
                file.unlink()
        committed(config)
        try:
            lines = verdict_of(run.run(config))
        except NoPredictionError as exc:
            lines = verdict_of_failure(exc, config.output.uri, Progress())
        named = set(re.findall(rf"{re.escape(config.output.uri)}(?:/\w+)*", "\n".join(lines)))
        assert any("/" in path for path in named)
        missing = [path for path in named if not Path(path).exists() and not path.endswith("summary")]
        assert missing == []


def test_verdict_of_too_many_errors_names_their_folder_only_if_it_exists(make: Make) -> None:
    config = make(3, 3, errors={"max_count": 1})
    committed(config)
    with pytest.raises(ErrorThresholdExceeded) as caught:
        run.run(config)
    assert f"{config.output.uri}/errors, then batch-inference retry {config.output.uri} --all" in caught.value.remedy
    with pytest.raises(ErrorThresholdExceeded) as raised:
        Tally(rows=3, errors=3).check(config.errors)
    assert raised.value.remedy == "Fix the cause and start the same command again, or raise errors.max_count."


# --- fix it and start again --------------------------------------------------------------------------------------------------


def planned(config: JobConfig) -> Ledger:
    with pytest.raises(InfrastructureError, match="Ray was to be started"):
        run_elsewhere(config)
    return Ledger(Store(config.output.uri, CONFIG))


def run_elsewhere(config: JobConfig) -> None:
    """Run a job that plans before Ray is needed, as on an existing cluster."""
    run.run(config, address="somewhere:6379")


def test_output_without_a_commit_is_taken_over_with_a_note(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = planned(make(3, 0))
    assert json.loads(ledger.store.get("_FAILED"))["exit_code"] == 5
    before, config = ledger.require_job(), make(3, 0, "two:Mean")
    planned(config)
    note = f"took over {config.output.uri}: an earlier configuration had committed nothing; differs in predictor.path, predictor.sha256"
    assert note in "".join(capsys.readouterr())
    job = ledger.require_job()
    assert job.replaces == before.plan
    assert differences(config, resolve_engine(config), job) == []
    assert planned(config).require_job() == job


def test_preflight_says_whether_the_run_takes_an_output_over(make: Make) -> None:
    ledger = planned(make(3, 0))
    other = make(3, 0, "two:Mean")
    tried: Any = _PreflightRun(other, None, one_actor=True)
    finding = tried._describe_job(ledger.store, resolve_engine(other))
    assert finding.startswith("the output holds another job that has committed nothing; a run takes it over")
    assert finding.endswith("(it differs in predictor.path, predictor.sha256)")
    commit_shard(ledger.store, 0)
    with pytest.raises(UserError, match="belongs to another job"):
        tried._describe_job(ledger.store, resolve_engine(other))


def test_output_of_another_job_with_rows_is_refused_with_commands(make: Make, tmp_path: Path) -> None:
    config = make(3, 0)
    ledger = planned(config)
    commit_shard(ledger.store, 0)
    other = make(3, 0, "two:Mean")
    with pytest.raises(UserError, match="belongs to another job") as caught:
        run_elsewhere(other)
    assert re.search(r"- predictor\.path: one:Mean there, two:Mean now", caught.value.message)
    assert (
        f"--output {tmp_path}/out-2, or delete the other job's rows with: rm -r {tmp_path}/out" in caught.value.remedy
    )
    (tmp_path / "out-2").mkdir()
    (tmp_path / "out/photos").mkdir()
    (tmp_path / "out/photos/a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="belongs to another job") as caught:
        run_elsewhere(make(3, 0, input={"uris": [str(tmp_path / "out/photos")]}))
    assert f"--output {tmp_path}/out-3" in caught.value.remedy
    assert "rm -r" not in caught.value.remedy  # the images are in it


@pytest.mark.parametrize(
    ("uri", "command"),
    [
        ("s3://b/o ut", "aws s3 rm --recursive 's3://b/o ut'"),
        ("gs://b/out", "gcloud storage rm --recursive gs://b/out"),
        ("az://c/out", "az storage blob delete-batch --source c --pattern 'out/*'"),
    ],
)
def test_command_that_deletes_an_output_is_that_of_its_store(uri: str, command: str) -> None:
    from batch_inference.pipeline.fingerprint import other_output

    remedy = other_output(JobConfig.model_validate({"input": {"uris": ["s3://b/in"]}, "output": {"uri": uri}}))
    assert remedy.endswith(command)


def test_output_in_which_an_attempt_is_at_work_is_not_taken_over(make: Make) -> None:
    ledger = planned(make(3, 0))
    ledger.store.delete(["_FAILED"])
    AttemptRecord("other", "running", now(), "", now(), 1, 0, 0, 0, 0, {}, {}, 1, 0, 1).write(ledger.store)
    with pytest.raises(UserError, match=r"another job is at work in .*: its attempt gave a sign of life") as caught:
        run_elsewhere(make(3, 0, "two:Mean"))
    assert "--output" in caught.value.remedy
    # Long ago, or ended: nobody is at work.
    for record in (
        AttemptRecord("other", "interrupted", now(), "", now(), 1, 0, 0, 0, 0, {}, {}, 1, 0, 1),
        AttemptRecord("other", "running", now(), "", "2024-01-01T00:00:00.000+00:00", 1, 0, 0, 0, 0, {}, {}, 1, 0, 1),
    ):
        record.write(ledger.store)
        planned(make(3, 0, "two:Mean"))
        planned(make(3, 0, "one:Mean"))


def test_job_whose_output_was_taken_over_says_so_whatever_its_error(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, other = make(3, 0), make(3, 0, "two:Mean")

    def meanwhile(*_: Any) -> Any:
        ledger = Ledger(Store(config.output.uri, CONFIG))
        job = ledger.require_job()
        create_job(other, AttemptInfo(""), ledger, resolve_engine(other), find_inputs(config), job)
        raise InfrastructureError("the actors went away", "")

    monkeypatch.setattr(RayConnection, "open", meanwhile)
    with pytest.raises(UserError, match="another configuration has taken over"):
        run_elsewhere(config)
    assert not (Path(config.output.uri) / "_FAILED").exists()
