"""Inputs that are replaced between plan and reading."""

from __future__ import annotations

import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pytest
from structlog.testing import capture_logs

from batch_inference.config import InputConfig, JobConfig, StorageConfig
from batch_inference.containers import PLACE_SCHEMA, without_versions
from batch_inference.fetcher import Fetcher
from batch_inference.listing import Listed, list_uris
from batch_inference.manifest import apart, cut, encode_shard, find_inputs, read_parquet
from batch_inference.members import runs
from batch_inference.runs import fetched
from batch_inference.versions import replaced, version_of


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('"0x8DC"', "0x8DC", True),
        ('W/"abc"', '"abc"', True),
        ('"abc"', '"abd"', False),
        ('"d41d8cd98f00b204e9800998ecf8427e-2"', '"d41d8cd98f00b204e9800998ecf8427e-3"', False),
    ],
)
def test_entity_tags(one: str, other: str, same: bool) -> None:
    assert (version_of(one) == version_of(other)) is same


@pytest.mark.parametrize("tag", [None, ""])
def test_a_store_without_entity_tags_replaces_nothing(tag: str | None) -> None:
    assert version_of(tag) is None
    assert not replaced(version_of(tag), 1) and not replaced(1, version_of(tag))


def read(found: pa.Table, storage: StorageConfig) -> dict[str, str | None]:
    """What becomes of inputs, by the last part of their names, after they have been in the manifest's files."""
    (shard,) = (read_parquet(encode_shard(part)) for _, part in cut(found, 1000))
    inputs, places = apart(shard)
    assert inputs.column_names == ["uri", "shard", "row"]
    uris = inputs["uri"].to_pylist()
    return {
        uris[one.row].rpartition("/")[2]: one.error and one.error.error_type
        for one in fetched(runs(uris, places, Fetcher(storage), 1000), 4)
    }


def test_local_files_have_no_version(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "d.jpg").symlink_to("nowhere")
    found = find_inputs(JobConfig(input=InputConfig(uris=(str(tmp_path),)))).table
    assert found.column_names == ["uri"]
    (tmp_path / "b.jpg").write_bytes(b"newer")
    assert read(found, StorageConfig()) == {"a.jpg": None, "b.jpg": None, "d.jpg": "NOT_FOUND"}


def test_members_keep_their_versions_and_objects_lose_them() -> None:
    columns = [[0, None], [3, None], [7, 8], ["", None], [None, None]]
    places = pa.table([pa.array(c, f.type) for c, f in zip(columns, PLACE_SCHEMA, strict=True)], schema=PLACE_SCHEMA)
    assert without_versions(places)["_version"].to_pylist() == [7, None]


def test_an_input_that_is_listed_twice_is_done_once(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.jpg"):
        (tmp_path / name).write_bytes(name.encode() * (1 + (name == "a.jpg")))
    section = InputConfig(uris=(str(tmp_path), f"{tmp_path}/b.jpg", f"{tmp_path}/*.jpg"))
    found = find_inputs(JobConfig(input=section))
    assert found.table.to_pydict() == {"uri": [f"file://{tmp_path}/a.jpg", f"file://{tmp_path}/b.jpg"]}
    assert found.duplicates == 3


def test_an_object_that_is_listed_twice_keeps_its_version(bucket: Bucket, storage: StorageConfig) -> None:
    section = InputConfig(uris=("s3://photos/", "s3://photos/b.jpg", "s3://photos/?.jpg"))
    found = find_inputs(JobConfig(input=section, storage=storage))
    assert found.table.to_pydict() == {
        "uri": [f"s3://photos/{key}" for key in bucket.tags],
        "_version": [version_of(tag) for tag in bucket.tags.values()],
    }
    assert found.duplicates == 4


# --- a store ---


class Bucket:
    """Answers listing and reading as S3 does; how it writes entity tags is the test's.

    Attributes:
        tags: By key.
        listed: How a tag is written in a listing.
        denied: Keys that are not to be read.
    """

    def __init__(self) -> None:
        self.tags = {f"{name}.jpg": name * 8 for name in "abc"}
        self.listed: Callable[[str], str] = '"{}"'.format
        self.denied: set[str] = set()
        self.requests: list[str] = []


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture
def storage(bucket: Bucket) -> Iterator[StorageConfig]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            bucket.requests.append(f"{self.command} {self.path}")
            path, _, query = self.path.partition("?")
            key = path.removeprefix("/photos").lstrip("/")
            if key in bucket.denied:
                self.send_error(403)
                return
            body = b"data"
            if not key:
                prefix = urllib.parse.parse_qs(query).get("prefix", [""])[0]
                keys = "".join(
                    f"<Contents><Key>{k}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                    f"<ETag>{bucket.listed(tag)}</ETag><Size>4</Size></Contents>"
                    for k, tag in bucket.tags.items()
                    if k.startswith(prefix)
                )
                body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{keys}</ListBucketResult>".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            if key:
                self.send_header("ETag", f'"{bucket.tags[key]}"')
                self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield StorageConfig(endpoint_url=f"http://127.0.0.1:{server.server_port}", anonymous=True, max_retries=0)
        server.shutdown()


def test_an_object_that_was_replaced_after_planning_is_a_failed_row(bucket: Bucket, storage: StorageConfig) -> None:
    config = JobConfig(input=InputConfig(uris=("s3://photos/",)), storage=storage)
    found = find_inputs(config).table
    # Of many objects a few are asked for.
    asked = [request for request in bucket.requests if request.startswith("HEAD")]
    assert asked == ["HEAD /photos/a.jpg", "HEAD /photos/b.jpg"]
    bucket.tags["b.jpg"] = "another"
    expected = {"a.jpg": None, "b.jpg": "CHANGED", "c.jpg": None}
    assert read(found, storage) == expected
    assert read(without_versions(found), storage) == expected | {"b.jpg": None}


@pytest.mark.parametrize(
    ("written", "known"),
    [
        ('"{}"'.format, True),
        ("{}".format, True),
        ("&quot;{}&quot;".format, True),
        ('"{}-of-the-listing"'.format, False),
    ],
)
def test_tags_count_only_where_listing_and_reading_give_the_same(
    written: Callable[[str], str], known: bool, bucket: Bucket, storage: StorageConfig
) -> None:
    bucket.listed = written
    found = list(list_uris("s3://photos/", True, storage))
    assert [one.version is not None for one in found] == [known] * 3
    table = pa.table(
        {"uri": [one.uri for one in found], "_version": pa.array([one.version for one in found], pa.int32())}
    )
    assert set(read(table, storage).values()) == {None}


@pytest.mark.parametrize("place", ["b.jpg", "e.jpg"])
def test_one_object_of_another_kind_is_enough_to_compare_none(
    place: str, bucket: Bucket, storage: StorageConfig
) -> None:
    """Where only objects that were uploaded in parts have other tags in listings, or only the largest has."""
    bucket.tags |= {f"{name}.jpg": name * 8 for name in "defg"}
    bucket.tags[place] = "abcdefab-2" if place == "e.jpg" else bucket.tags[place]
    bucket.listed = lambda tag: f'"{tag}"' if tag != bucket.tags[place] else f'"{tag[:8]}-3"'
    with capture_logs() as said:
        found = list(list_uris("s3://photos/", True, storage))
    assert [one.version for one in found] == [None] * 7
    assert "other entity tags than its objects have" in said[0]["event"]


def test_a_first_object_that_may_not_be_read_leaves_the_others_their_versions(
    bucket: Bucket, storage: StorageConfig
) -> None:
    bucket.denied = {"a.jpg"}
    assert all(one.version is not None for one in list_uris("s3://photos/", True, storage))


def test_an_object_that_was_named_has_its_version_too(bucket: Bucket, storage: StorageConfig) -> None:
    assert list(list_uris("s3://photos/a.jpg", True, storage)) == [
        Listed("s3://photos/a.jpg", named=True, version=version_of(bucket.tags["a.jpg"]))
    ]
