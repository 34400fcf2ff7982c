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
from batch_inference.inputs.coalesce import plan_reads
from batch_inference.inputs.find import find_inputs
from batch_inference.inputs.listing import ListedObject, list_uris
from batch_inference.inputs.reads import fetch_inputs
from batch_inference.output.manifest import (
    LOCATION_SCHEMA,
    cut_shards,
    encode_shard,
    read_parquet,
    split_locations,
    without_etags,
)
from batch_inference.storage.etags import hash_etag, is_replaced
from batch_inference.storage.fetcher import Fetcher


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ('"0x8DC"', "0x8DC", True),
        ('W/"abc"', '"abc"', True),
        ('"abc"', '"abd"', False),
        ('"d41d8cd98f00b204e9800998ecf8427e-2"', '"d41d8cd98f00b204e9800998ecf8427e-3"', False),
    ],
)
def test_etag_hashes(one: str, other: str, same: bool) -> None:
    assert (hash_etag(one) == hash_etag(other)) is same


@pytest.mark.parametrize("tag", [None, ""])
def test_store_without_etags_replaces_nothing(tag: str | None) -> None:
    assert hash_etag(tag) is None
    assert not is_replaced(hash_etag(tag), 1) and not is_replaced(1, hash_etag(tag))


def read(found: pa.Table, storage: StorageConfig) -> dict[str, str | None]:
    """Read inputs after they were in the manifest's files; return the results by the last part of their names."""
    (shard,) = (read_parquet(encode_shard(part)) for _, part in cut_shards(found, 1000))
    inputs, places = split_locations(shard)
    assert inputs.column_names == ["uri", "shard", "row"]
    uris = inputs["uri"].to_pylist()
    return {
        uris[one.row].rpartition("/")[2]: one.error and one.error.error_type
        for one in fetch_inputs(plan_reads(uris, places, Fetcher(storage), 1000), 4)
    }


def test_local_files_have_no_etag(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"old")
    (tmp_path / "d.jpg").symlink_to("nowhere")
    found = find_inputs(JobConfig(input=InputConfig(uris=(str(tmp_path),)))).table
    assert found.column_names == ["uri"]
    (tmp_path / "b.jpg").write_bytes(b"newer")
    assert read(found, StorageConfig()) == {"a.jpg": None, "b.jpg": None, "d.jpg": "NOT_FOUND"}


def test_members_keep_their_etags_and_objects_lose_them() -> None:
    columns = [[0, None], [3, None], [7, 8], ["", None], [None, None]]
    places = pa.table(
        [pa.array(c, f.type) for c, f in zip(columns, LOCATION_SCHEMA, strict=True)], schema=LOCATION_SCHEMA
    )
    assert without_etags(places)["_version"].to_pylist() == [7, None]


def test_input_listed_twice_is_processed_once(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.jpg"):
        (tmp_path / name).write_bytes(name.encode() * (1 + (name == "a.jpg")))
    section = InputConfig(uris=(str(tmp_path), f"{tmp_path}/b.jpg", f"{tmp_path}/*.jpg"))
    found = find_inputs(JobConfig(input=section))
    assert found.table.to_pydict() == {"uri": [f"file://{tmp_path}/a.jpg", f"file://{tmp_path}/b.jpg"]}
    assert found.duplicates == 3


def test_object_listed_twice_keeps_its_etag(bucket: Bucket, storage: StorageConfig) -> None:
    section = InputConfig(uris=("s3://photos/", "s3://photos/b.jpg", "s3://photos/?.jpg"))
    found = find_inputs(JobConfig(input=section, storage=storage))
    assert found.table.to_pydict() == {
        "uri": [f"s3://photos/{key}" for key in bucket.tags],
        "_version": [hash_etag(tag) for tag in bucket.tags.values()],
    }
    assert found.duplicates == 4


# --- a store ---


class Bucket:
    """Answers listings and reads as S3 does; the test decides how it writes ETags.

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


def test_object_that_was_replaced_after_planning_is_a_failed_row(bucket: Bucket, storage: StorageConfig) -> None:
    config = JobConfig(input=InputConfig(uris=("s3://photos/",)), storage=storage)
    found = find_inputs(config).table
    # Of many objects a few are asked for.
    asked = [request for request in bucket.requests if request.startswith("HEAD")]
    assert asked == ["HEAD /photos/a.jpg", "HEAD /photos/b.jpg"]
    bucket.tags["b.jpg"] = "another"
    expected = {"a.jpg": None, "b.jpg": "CHANGED", "c.jpg": None}
    assert read(found, storage) == expected
    assert read(without_etags(found), storage) == expected | {"b.jpg": None}


@pytest.mark.parametrize(
    ("written", "known"),
    [
        ('"{}"'.format, True),
        ("{}".format, True),
        ("&quot;{}&quot;".format, True),
        ('"{}-of-the-listing"'.format, False),
    ],
)
def test_etags_count_only_if_listing_and_reading_agree(
    written: Callable[[str], str], known: bool, bucket: Bucket, storage: StorageConfig
) -> None:
    bucket.listed = written
    found = list(list_uris("s3://photos/", True, storage))
    assert [one.etag_hash is not None for one in found] == [known] * 3
    table = pa.table(
        {"uri": [one.uri for one in found], "_version": pa.array([one.etag_hash for one in found], pa.int32())}
    )
    assert set(read(table, storage).values()) == {None}


@pytest.mark.parametrize("place", ["b.jpg", "e.jpg"])
def test_one_object_with_differing_etag_disables_comparison(place: str, bucket: Bucket, storage: StorageConfig) -> None:
    """Only objects that were uploaded in parts have other ETags in listings, or only the largest has."""
    bucket.tags |= {f"{name}.jpg": name * 8 for name in "defg"}
    bucket.tags[place] = "abcdefab-2" if place == "e.jpg" else bucket.tags[place]
    bucket.listed = lambda tag: f'"{tag}"' if tag != bucket.tags[place] else f'"{tag[:8]}-3"'
    with capture_logs() as said:
        found = list(list_uris("s3://photos/", True, storage))
    assert [one.etag_hash for one in found] == [None] * 7
    assert "other ETags than its objects have" in said[0]["event"]


def test_unreadable_first_object_leaves_others_their_etags(bucket: Bucket, storage: StorageConfig) -> None:
    bucket.denied = {"a.jpg"}
    assert all(one.etag_hash is not None for one in list_uris("s3://photos/", True, storage))


def test_named_object_has_its_etag_too(bucket: Bucket, storage: StorageConfig) -> None:
    assert list(list_uris("s3://photos/a.jpg", True, storage)) == [
        ListedObject("s3://photos/a.jpg", named=True, etag_hash=hash_etag(bucket.tags["a.jpg"]))
    ]
