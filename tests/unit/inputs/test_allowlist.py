"""Locations that a manifest may name, and those that it may not."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_inference.config import InputConfig, PreprocessConfig, StorageConfig
from batch_inference.inputs import member_locations
from batch_inference.inputs.allowlist import Allowlist
from batch_inference.pipeline.prepare import Preparation
from tests.support.containers import tar
from tests.support.images import encode, photo


def refused(manifest: str, prefixes: list[str] | None, uri: str) -> bool:
    allowlist = Allowlist.from_config(InputConfig(manifest=manifest, allowed_prefixes=prefixes))
    return allowlist is not None and allowlist.refusal(uri) is not None


@pytest.mark.parametrize(
    ("manifest", "prefixes", "uri", "expected"),
    [
        # Without prefixes: a list on a store may not open the machine's own files.
        ("s3://b/list.csv", None, "s3://other/1.jpg", False),
        ("s3://b/list.csv", None, "gs://other/1.jpg", False),
        ("s3://b/list.csv", None, "file:///etc/passwd", True),
        ("s3://b/list.csv", None, "file:///proc/self/environ", True),
        ("/data/list.csv", None, "file:///data/1.jpg", False),
        ("/data/list.csv", None, "s3://b/1.jpg", False),
        # What no store takes is another error.
        ("s3://b/list.csv", None, "http://169.254.169.254/latest/meta-data", False),
        ("s3://b/list.csv", None, "", False),
        # With them.
        ("s3://b/list.csv", ["s3://b/photos"], "s3://b/photos/1.jpg", False),
        ("s3://b/list.csv", ["s3://b/photos/"], "s3://b/photos/1.jpg", False),
        ("s3://b/list.csv", ["s3://b/photos"], "s3://b/photos-private/1.jpg", True),
        ("s3://b/list.csv", ["s3://b/photos"], "s3://b/photos/../private/1.jpg", True),
        ("s3://b/list.csv", ["s3://b/a.tar"], "s3://b/a.tar#1.jpg", False),
        ("s3://b/list.csv", ["s3://b/a.tar"], "s3://b/b.tar#1.jpg", True),
        ("s3://b/list.csv", ["s3://"], "s3://anything/1.jpg", False),
        ("s3://b/list.csv", ["s3://"], "gs://anything/1.jpg", True),
        ("s3://b/list.csv", ["file:///data"], "file:///data/1.jpg", False),
        ("s3://b/list.csv", ["file:///data"], "file:///data/../etc/passwd", True),
        ("/data/list.csv", ["s3a://b/x"], "s3://b/x/1.jpg", False),
        ("/data/list.csv", [], "file:///data/1.jpg", True),
    ],
)
def test_location_is_allowed_or_refused(manifest: str, prefixes: list[str] | None, uri: str, expected: bool) -> None:
    assert refused(manifest, prefixes, uri) is expected


def test_link_does_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (tmp_path / "in/link.jpg").symlink_to(tmp_path / "secret.jpg")
    assert refused("/list.csv", [str(tmp_path / "in")], f"file://{tmp_path}/in/link.jpg")
    (tmp_path / "alias").symlink_to(tmp_path / "in")
    (tmp_path / "in/1.jpg").write_bytes(b"x")
    assert not refused("/list.csv", [str(tmp_path / "alias")], f"file://{tmp_path}/in/1.jpg")


def test_inputs_of_the_configuration_are_the_users_own() -> None:
    assert Allowlist.from_config(InputConfig(uris=("/anywhere",))) is None


def test_location_that_is_not_allowed_is_a_failed_row_and_is_not_opened(tmp_path: Path) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(encode(photo(), "JPEG"))
        (tmp_path / name / "a.tar").write_bytes(tar({"1.jpg": encode(photo(), "JPEG")}))
    uris = [f"file://{tmp_path}/{name}" for name in ("in/1.jpg", "out/1.jpg", "in/a.tar#1.jpg", "out/a.tar#1.jpg")]
    pq.write_table(pa.table({"uri": uris}), tmp_path / "list.parquet")
    config = InputConfig(manifest=str(tmp_path / "list.parquet"), allowed_prefixes=(str(tmp_path / "in"),))
    locations, _ = member_locations.locate_members(pa.chunked_array([uris]), config, StorageConfig())
    assert locations is not None
    assert [value is None for value in locations["_offset"].to_pylist()] == [True, True, False, True]
    preparation = Preparation(StorageConfig(), PreprocessConfig(), None, allowlist=Allowlist.from_config(config))
    for table_of_locations in (
        locations,
        member_locations.locate_members(pa.chunked_array([uris]), InputConfig(manifest="/x"), StorageConfig())[0],
    ):
        table = pa.concat_tables(preparation.rows(0, uris, table_of_locations))
        error_types = dict(zip(table["row"].to_pylist(), table["error_type"].to_pylist(), strict=True))
        assert error_types == {0: None, 1: "NOT_ALLOWED", 2: None, 3: "NOT_ALLOWED"}
        assert set(table["stage"].to_pylist()) == {None, "list"}
