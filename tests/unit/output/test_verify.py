from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_inference.errors import UserError
from batch_inference.output.verify import Verification, verify
from tests.support.outputs import commit_shard, finished, planned

# Shards of three: the first has a bad one, the second none, the third is one bad image alone.
URIS = ["s3://b/0.jpg", "s3://b/bad-1.jpg", "s3://b/2.jpg", *(f"s3://b/{i}.jpg" for i in (3, 4, 5)), "s3://b/bad-6.jpg"]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    finished(str(tmp_path / "out"), URIS, 3)
    return tmp_path / "out"


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def problems(output: Path) -> tuple[str, ...]:
    found = verify(str(output))
    assert found.ok is (not found.problems)
    return found.problems


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads(path.read_bytes())
    change(raw)
    path.write_text(json.dumps(raw))


def rewrite(output: Path, pattern: str, change: Callable[[pa.Table], pa.Table], *, shard: int = 0) -> str:
    """Change a data file and make its commit agree, so that only the rows reveal it."""
    file = only(output, pattern)
    table = change(pq.read_table(file))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    data = sink.getvalue()
    file.write_bytes(data)
    name = str(file.relative_to(output))

    def agree(raw: dict[str, Any]) -> None:
        for entry in raw["files"]:
            if entry["path"] == name:
                entry["sha256"], entry["bytes"] = hashlib.sha256(data).hexdigest(), len(data)

    edit_json(output / f"_commits/shard-0000{shard}.json", agree)
    return name


# --- what is right -------------------------------------------------------------------------------------------------------


def test_finished_output_is_right(output: Path) -> None:
    found = verify(str(output))
    assert found == Verification(7, 5, 2, 3, 3, True)
    assert found.ok
    assert json.loads(json.dumps(found.to_dict()))["ok"] is True


def test_unfinished_output_is_right_so_far(tmp_path: Path) -> None:
    ledger, _ = planned(str(tmp_path), URIS, 3)
    assert verify(str(tmp_path)) == Verification(7, 0, 0, 3, 0, False)
    commit_shard(ledger.store, 1)
    ledger.store.put("predictions/shard-00000-dead.parquet", b"of a driver that was killed")
    found = verify(str(tmp_path))
    assert found == Verification(7, 3, 0, 3, 1, False, (), ("predictions/shard-00000-dead.parquet",))
    assert found.ok


def test_folder_without_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        verify(str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no job in"):
        verify(str(tmp_path))


# --- what is wrong -------------------------------------------------------------------------------------------------------


def test_data_file_that_is_missing(output: Path) -> None:
    file = only(output, "predictions/shard-00001-*.parquet")
    file.unlink()
    assert problems(output) == (
        f"predictions/{file.name} is committed but missing",
        "shard-00001: 3 of 3 rows are missing, the first is row 0, s3://b/3.jpg",
    )


def test_error_file_that_is_missing(output: Path) -> None:
    file = only(output, "errors/shard-00000-*.parquet")
    file.unlink()
    assert problems(output) == (
        f"errors/{file.name} is committed but missing",
        "shard-00000: 1 of 3 rows is missing, the first is row 1, s3://b/bad-1.jpg",
    )


@pytest.mark.parametrize("left", [0, 3, 100, -1, -8])
def test_data_file_that_was_cut_off(left: int, output: Path) -> None:
    file = only(output, "predictions/shard-00001-*.parquet")
    file.write_bytes(file.read_bytes()[:left])
    found = problems(output)
    assert found[0] == f"predictions/{file.name} is not what was committed (its SHA-256 differs)"
    assert any(p.startswith(f"predictions/{file.name} can't be read: ") for p in found)
    assert any(p.startswith("shard-00001: 3 of 3 rows are missing") for p in found)


def test_any_byte_that_differs_is_found(output: Path) -> None:
    rng = random.Random(1)
    file = only(output, "predictions/shard-00001-*.parquet")
    data = file.read_bytes()
    for _ in range(60):
        place = rng.randrange(len(data))
        file.write_bytes(data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :])
        assert f"predictions/{file.name} is not what was committed (its SHA-256 differs)" in problems(output)
    file.write_bytes(data)
    assert problems(output) == ()


def test_value_that_was_altered(output: Path) -> None:
    file = only(output, "predictions/shard-00000-*.parquet")
    table = pq.read_table(file)
    pq.write_table(table.set_column(3, "value", pa.array([1] * table.num_rows)), file)
    assert problems(output) == (f"predictions/{file.name} is not what was committed (its SHA-256 differs)",)


def test_row_that_is_there_twice(output: Path) -> None:
    rewrite(output, "predictions/shard-00000-*.parquet", lambda t: pa.concat_tables([t, t.slice(0, 1)]))
    assert problems(output) == ("shard-00000: 1 of 3 rows is there more than once, the first is row 0, s3://b/0.jpg",)


def test_row_that_is_a_prediction_and_an_error(output: Path) -> None:
    rewrite(
        output,
        "errors/shard-00000-*.parquet",
        lambda t: t.set_column(0, "uri", pa.array([URIS[2]])).set_column(2, "row", pa.array([2], pa.int32())),
    )
    assert problems(output) == (
        "shard-00000: 1 of 3 rows is missing, the first is row 1, s3://b/bad-1.jpg",
        "shard-00000: 1 of 3 rows is there more than once, the first is row 2, s3://b/2.jpg",
    )


def test_row_that_is_missing(output: Path) -> None:
    rewrite(output, "predictions/shard-00001-*.parquet", lambda t: t.slice(0, 2), shard=1)
    assert problems(output) == ("shard-00001: 1 of 3 rows is missing, the first is row 2, s3://b/5.jpg",)


def test_row_of_another_image(output: Path) -> None:
    name = rewrite(
        output,
        "predictions/shard-00001-*.parquet",
        lambda t: t.set_column(0, "uri", pa.array([URIS[4], URIS[3], URIS[5]])),
        shard=1,
    )
    found = problems(output)
    assert f"{name}: row 0 is s3://b/4.jpg, the manifest says s3://b/3.jpg" in found
    assert f"{name}: row 1 is s3://b/3.jpg, the manifest says s3://b/4.jpg" in found


@pytest.mark.parametrize(("column", "value"), [("row", 3), ("row", -1), ("row", None), ("shard", 2), ("shard", None)])
def test_row_that_does_not_belong_here(column: str, value: int | None, output: Path) -> None:
    place = ["uri", "shard", "row"].index(column)
    name = rewrite(
        output,
        "predictions/shard-00001-*.parquet",
        lambda t: t.set_column(place, column, pa.array([value, *t[column].to_pylist()[1:]], pa.int32())),
        shard=1,
    )
    found = problems(output)
    assert any(p.startswith(f"{name}: row ") and p.endswith("does not belong here") for p in found)
    assert "shard-00001: 1 of 3 rows is missing, the first is row 0, s3://b/3.jpg" in found


def test_data_file_without_its_columns(output: Path) -> None:
    name = rewrite(output, "predictions/shard-00001-*.parquet", lambda t: t.drop_columns(["row"]), shard=1)
    assert any(p.startswith(f"{name} can't be read: ") for p in problems(output))


@pytest.mark.parametrize("kind", ["predictions", "errors"])
def test_file_that_was_put_into_the_finished_output(kind: str, output: Path) -> None:
    (output / kind / "shard-00001-other.parquet").write_bytes(b"x")
    found = verify(str(output))
    assert found.problems == (
        f"{kind}/shard-00001-other.parquet is not committed, but stands among the finished output",
    )
    assert found.uncommitted == (f"{kind}/shard-00001-other.parquet",)


def test_manifest_shard_that_is_missing(output: Path) -> None:
    (output / "_manifest/shard-00001.parquet").unlink()
    assert "_manifest/shard-00001.parquet is missing or unreadable (FileNotFoundError)" in problems(output)


def test_manifest_shard_that_is_garbled(output: Path) -> None:
    rng = random.Random(2)
    file = output / "_manifest/shard-00001.parquet"
    data = file.read_bytes()
    changes = [b"", data[:50], data[:-1]]
    for _ in range(60):
        place = rng.randrange(len(data))
        changes.append(data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :])
    for change in changes:
        file.write_bytes(change)
        assert problems(output)


def test_manifest_shard_with_another_list(output: Path) -> None:
    file = output / "_manifest/shard-00001.parquet"
    table = pq.read_table(file)
    pq.write_table(table.slice(0, 2), file)
    assert "_manifest/shard-00001.parquet has 2 rows, the job says 3" in problems(output)
    pq.write_table(table.set_column(0, "uri", pa.array(["s3://b/x.jpg", *URIS[4:6]])), file)
    assert any("row 0 is s3://b/3.jpg, the manifest says s3://b/x.jpg" in p for p in problems(output))
    pq.write_table(table.append_column("id", pa.array([1, 2, 3])), file)
    assert problems(output) == ("the manifest's files are not those that the job was planned with (digest differs)",)


def test_commit_that_is_missing(output: Path) -> None:
    file = only(output, "predictions/shard-00001-*.parquet")
    (output / "_commits/shard-00001.json").unlink()
    assert problems(output) == (
        f"predictions/{file.name} is not committed, but stands among the finished output",
        "shard-00001 has no commit, although _SUCCESS says that all is done",
    )


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"shard": 1}'])
def test_commit_that_is_garbled(content: bytes, output: Path) -> None:
    (output / "_commits/shard-00001.json").write_bytes(content)
    found = problems(output)
    assert found[0].startswith("_commits/shard-00001.json is not a valid commit: ")


def test_commit_whose_counts_are_not_its_files(output: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["predictions"], raw["errors"] = raw["errors"], raw["predictions"]

    edit_json(output / "_commits/shard-00000.json", change)
    assert problems(output) == ("shard-00000: its commit says 1 prediction and 2 errors, its files hold 2 and 1",)


def test_commit_of_unknown_shard(output: Path) -> None:
    raw = json.loads((output / "_commits/shard-00001.json").read_bytes())
    (output / "_commits/shard-00009.json").write_text(json.dumps(raw | {"shard": 9}))
    assert problems(output) == ("shard-00009 is committed but not in the manifest",)


@pytest.mark.parametrize(
    ("key", "fact"), [("predictions", "_SUCCESS says 6 predictions, the files hold 5"), ("errors", "3 errors")]
)
def test_success_with_wrong_counts(key: str, fact: str, output: Path) -> None:
    edit_json(output / "_SUCCESS", lambda raw: raw.update({key: raw[key] + 1}))
    (found,) = problems(output)
    assert fact in found


def test_success_of_another_job(output: Path) -> None:
    edit_json(output / "_SUCCESS", lambda raw: raw.update(fingerprint="f" * 64))
    (found,) = problems(output)
    assert found.startswith("_SUCCESS belongs to the fingerprint ffffffffffff, the job's is ")


def test_success_that_is_garbled(output: Path) -> None:
    (output / "_SUCCESS").write_bytes(b"")
    assert any(p.startswith("_SUCCESS is not readable") for p in problems(output))


def test_thousand_problems_are_a_hundred_and_a_count(tmp_path: Path) -> None:
    finished(str(tmp_path), [f"s3://b/{i}.jpg" for i in range(200)], 1)
    for file in (tmp_path / "predictions").iterdir():
        file.unlink()
    found = problems(tmp_path)
    assert len(found) == 101
    assert found[-1] == "and 300 more"
