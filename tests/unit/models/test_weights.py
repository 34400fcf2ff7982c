from __future__ import annotations

import hashlib
import multiprocessing
import os
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from batch_inference.config import StorageConfig
from batch_inference.errors import InfrastructureError, UserError
from batch_inference.models import weights
from batch_inference.models.weights import cache_folder, file_digest, local_weights_file, node_lock

CONTENT = os.urandom(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Bucket:
    """A minimal S3 bucket over HTTP that counts requests."""

    def __init__(self) -> None:
        self.objects = {"/models/net.pt": CONTENT}
        self.requests: list[str] = []
        self.status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, body: bool) -> None:
                path = self.path.partition("?")[0]
                outer.requests.append(f"{self.command} {path}")
                data = outer.objects.get(path)
                status = outer.status if outer.status != 200 else 200 if data is not None else 404
                self.send_response(status)
                data = data if status == 200 and data is not None else b""
                self.send_header("Content-Length", str(len(data)))
                self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')  # noqa: S324
                self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def do_GET(self) -> None:
                self.answer(True)

            def do_HEAD(self) -> None:
                self.answer(False)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.storage = StorageConfig(
            endpoint_url=f"http://127.0.0.1:{self.server.server_port}",
            anonymous=True,
            max_retries=0,
            retry_timeout_s=2,
            timeout_s=60,
        )

    @property
    def downloads(self) -> int:
        return sum(request.startswith("GET") for request in self.requests)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    bucket = Bucket()
    yield bucket
    bucket.server.shutdown()
    bucket.server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("BATCH_INFERENCE_CACHE", str(folder))
    return folder


def test_local_files_are_used_in_place(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "net.pt"
    file.write_bytes(CONTENT)
    for location in (str(file), f"file://{file}"):
        assert local_weights_file(location, StorageConfig(), DIGEST) == file
    assert not cache.exists()


def test_missing_local_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        local_weights_file(str(tmp_path / "none.pt"), StorageConfig())
    with pytest.raises(UserError, match="folder"):
        local_weights_file(str(tmp_path), StorageConfig())


def test_wrong_digest_error_has_both_digests(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    file.write_bytes(b"other")
    with pytest.raises(UserError) as caught:
        local_weights_file(str(file), StorageConfig(), DIGEST)
    assert DIGEST in caught.value.message and file_digest(file) in caught.value.message


def test_remote_file_is_downloaded_once(bucket: Bucket, cache: Path) -> None:
    first = local_weights_file("s3://models/net.pt", bucket.storage)
    assert first.read_bytes() == CONTENT
    assert first.suffix == ".pt"
    assert cache in first.parents
    assert local_weights_file("s3://models/net.pt", bucket.storage) == first
    assert bucket.downloads == 1


def test_new_content_under_the_same_name_is_downloaded(bucket: Bucket) -> None:
    local_weights_file("s3://models/net.pt", bucket.storage)
    bucket.objects["/models/net.pt"] = b"new"
    assert local_weights_file("s3://models/net.pt", bucket.storage).read_bytes() == b"new"


def test_cache_with_a_digest_needs_no_network(bucket: Bucket) -> None:
    file = local_weights_file("s3://models/net.pt", bucket.storage, DIGEST)
    requests = len(bucket.requests)
    bucket.status = 500
    assert local_weights_file("s3://models/net.pt", bucket.storage, DIGEST) == file
    assert len(bucket.requests) == requests


def test_wrong_remote_content_is_not_kept(bucket: Bucket, cache: Path) -> None:
    with pytest.raises(UserError, match=DIGEST):
        local_weights_file("s3://models/net.pt", bucket.storage, "0" * 64)
    assert [path.name for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_missing_and_broken_remote_files_are_errors(bucket: Bucket) -> None:
    with pytest.raises(UserError, match=r"s3://models/other\.pt"):
        local_weights_file("s3://models/other.pt", bucket.storage)
    bucket.status = 403
    with pytest.raises(UserError, match="denied"):
        local_weights_file("s3://models/net.pt", bucket.storage)
    bucket.status = 500
    with pytest.raises(InfrastructureError):
        local_weights_file("s3://models/net.pt", bucket.storage)


def _ask(storage: StorageConfig, start: object, results: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    path = local_weights_file("s3://models/net.pt", storage)
    results.put(file_digest(path))  # type: ignore[attr-defined]


def test_eight_processes_at_once_download_once(bucket: Bucket) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=_ask, args=(bucket.storage, start, results)) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    assert [results.get() for _ in processes] == [DIGEST] * 8
    for process in processes:
        process.join()
    assert bucket.downloads == 1


def _hold(folder: str, held: object) -> None:
    os.environ["BATCH_INFERENCE_CACHE"] = folder
    with node_lock("x"):
        held.set()  # type: ignore[attr-defined]
        threading.Event().wait()


def test_lock_of_a_killed_process_is_free(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(str(cache), held))
    process.start()
    held.wait()
    process.kill()
    process.join()
    with node_lock("x"):
        pass


def test_lock_that_stays_held_ends_the_wait(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_LOCK_S", 0.2)
    with node_lock("x"), pytest.raises(InfrastructureError, match=r"has held .*x\.lock for 0 s"), node_lock("x"):
        pass


def test_cache_falls_back_where_home_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCH_INFERENCE_CACHE")
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    folder = cache_folder()
    assert folder.parent == tmp_path / "tmp"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(blocked))
    with pytest.raises(UserError, match="no cache folder") as caught:
        cache_folder()
    assert str(blocked) in caught.value.message
    assert "BATCH_INFERENCE_CACHE" in caught.value.remedy


def test_digest_is_the_sha256_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    assert file_digest(tmp_path / "a") == DIGEST
