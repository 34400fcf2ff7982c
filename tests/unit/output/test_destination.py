from __future__ import annotations

from pathlib import Path

import pytest

from batch_inference.config import JobConfig
from batch_inference.errors import UserError
from batch_inference.output.destination import check_output
from batch_inference.output.ledger import Ledger
from batch_inference.storage.store import Store
from tests.support.outputs import CONFIG, commit_shard, planned


def config(output: object, *uris: object, **section: object) -> JobConfig:
    return JobConfig.model_validate(
        {"input": {"uris": [str(uri) for uri in uris], **section}, "output": {"uri": str(output)}}
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"")
    return folder


@pytest.mark.parametrize("name", ["out.csv", "out.parquet", "x/out.JSON", "out.zip", "out.xyz.jsonl"])
def test_file_name_is_refused(tmp_path: Path, photos: Path, name: str) -> None:
    output = tmp_path / name
    with pytest.raises(UserError, match="is the name of a file, and an output is a folder") as caught:
        check_output(config(output, photos))
    assert f"Write --output {output.with_suffix('')}" in caught.value.remedy
    assert ("read_parquet" in caught.value.remedy) == (not name.endswith(".zip"))
    output.mkdir(parents=True)
    assert check_output(config(output, photos)) == []


@pytest.mark.parametrize("name", ["out", "run.2024-01-01", "v1.2", "model.onnx-out"])
def test_folder_may_have_a_dot_in_its_name(tmp_path: Path, photos: Path, name: str) -> None:
    assert check_output(config(tmp_path / name, photos)) == []


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/null"])
def test_pipe_is_refused(photos: Path, name: str) -> None:
    with pytest.raises(UserError, match="is a pipe or a device") as caught:
        check_output(config(name, photos))
    assert "--output out" in caught.value.remedy


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/.", "file://{}"])
def test_input_folder_itself_is_refused(photos: Path, spelling: str) -> None:
    with pytest.raises(UserError, match="is the input folder itself") as caught:
        check_output(config(spelling.format(photos), photos))
    assert f"--output {photos}-predictions" in caught.value.remedy


def test_link_to_the_input_folder_is_the_input_folder(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "link").symlink_to(photos)
    with pytest.raises(UserError, match="is the input folder itself"):
        check_output(config(tmp_path / "link", photos))


def test_input_folder_in_a_bucket_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[str] = []
    monkeypatch.setattr(Store, "size", lambda self, path: 1 if self.uri in there else None)
    with pytest.raises(UserError, match="s3://bucket/photos is the input folder itself"):
        check_output(config("s3a://bucket/photos", "s3://bucket/photos/"))
    with pytest.raises(UserError, match="is the name of a file"):
        check_output(config("s3://bucket/out.csv", "s3://bucket/photos/"))
    there.append("s3://bucket/out.csv")
    assert check_output(config("s3://bucket/out.csv", "s3://bucket/photos/")) == []


def test_job_that_an_earlier_version_began_there_resumes(photos: Path) -> None:
    planned(str(photos), ["s3://b/0.jpg"], 2)
    (note,) = check_output(config(photos, photos))
    assert "is the folder of the input" in note


def test_output_in_the_input_folder_or_above_it_is_worth_a_warning(tmp_path: Path, photos: Path) -> None:
    (note,) = check_output(config(photos / "out", photos))
    assert "lies in the input folder" in note
    assert check_output(config(photos / "out", photos, recursive=False)) == []
    (note,) = check_output(config(tmp_path, photos))
    assert "deleting the output deletes the images" in note
    (note,) = check_output(config(photos, photos / "*.jpg"))
    assert "is the folder of the input" in note
    assert check_output(config(tmp_path / "photos-out", photos)) == []


def test_inputs_in_folders_of_data_files_are_refused(tmp_path: Path) -> None:
    for place in ("predictions", "errors/below"):
        (tmp_path / "out" / place).mkdir(parents=True)
        with pytest.raises(UserError, match="where a job deletes what is not its own"):
            check_output(config(tmp_path / "out", tmp_path / "out" / place))
        listed = tmp_path / "out" / place / "list.csv"
        with pytest.raises(UserError, match="where a job deletes what is not its own"):
            check_output(config(tmp_path / "out", manifest=str(listed)))


def test_foreign_files_in_folders_of_data_files_are_refused(tmp_path: Path) -> None:
    ledger = Ledger(Store(str(tmp_path), CONFIG))
    ledger.check_empty()
    ledger.store.put("predictions/shard-00000-4f2a91c0.parquet", b"left by a driver that died")
    ledger.check_empty()
    ledger.store.put("predictions/mine.csv", b"1")
    with pytest.raises(UserError, match=r"predictions/mine\.csv is not of a job") as caught:
        ledger.check_empty()
    assert "another --output" in caught.value.remedy


def test_commits_without_their_job_are_refused(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), ["s3://b/0.jpg"], 2)
    commit_shard(ledger.store, 0)
    (tmp_path / "_job.json").unlink()
    with pytest.raises(UserError, match=r"has commits of a job, but its _job\.json is gone"):
        ledger.check_empty()
