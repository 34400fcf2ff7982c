"""An S3 server in the tests' own process that lists keys of any form and answers as a test tells it to."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from batch_inference.config import StorageConfig


@dataclass
class Request:
    """A request that the server received."""

    method: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass
class Answer:
    """The server's answer instead of the object: a status, a code of S3's, more of the body, headers."""

    status: int
    code: str = "Error"
    extra: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """Body of the answer as S3 writes it."""
        return f"<Error><Code>{self.code}</Code><Message>{self.code}</Message>{self.extra}</Error>".encode()


@dataclass
class StubS3:
    """A running server with one bucket.

    Attributes:
        url: Its endpoint.
        objects: Keys and contents; may be changed while it runs.
        page: Keys that one page of a listing has.
        answer: Asked before anything is done; an :class:`Answer` is sent instead.
        requests: All that was asked.
        in_folders: List by folders, as stores on file systems do, instead of by the whole key.
    """

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    page: int = 1000
    answer: Callable[[Request], Answer | None] = lambda request: None
    requests: list[Request] = field(default_factory=list, repr=False)
    in_folders: bool = False

    @property
    def storage(self) -> StorageConfig:
        """Settings with which the program reaches it."""
        return StorageConfig(endpoint_url=self.url, region="us-east-1", max_retries=1, timeout_s=10)

    @property
    def listings(self) -> list[dict[str, str]]:
        """Queries of all listings."""
        return [request.query for request in self.requests if "list-type" in request.query]

    def order(self, key: str) -> Any:
        """Return the sort key of an object's key."""
        return key.split("/") if self.in_folders else key.encode()

    def keys_after(self, prefix: str, after: str) -> list[str]:
        """Return the keys of a listing."""
        found = [key for key in self.objects if key.startswith(prefix)]
        return sorted((k for k in found if not after or self.order(k) > self.order(after)), key=self.order)


@contextlib.contextmanager
def stub_s3(objects: dict[str, bytes], **options: Any) -> Iterator[StubS3]:
    """Serve a bucket of any name on a free port while the context lasts."""
    stub = StubS3(objects=dict(objects), **options)
    handler = type("Handler", (_Handler,), {"stub": stub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    stub: ClassVar[StubS3]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        key = unquote(parts.path.lstrip("/").partition("/")[2])
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.command, key, query, {name.lower(): value for name, value in self.headers.items()})
        self.stub.requests.append(request)
        if told := self.stub.answer(request):
            self._send(told.status, told.body, {"Content-Type": "application/xml", **told.headers})
        elif "list-type" in query:
            self._list(query)
        elif self.command == "PUT":
            self._put(key, body)
        elif self.command == "DELETE":
            self.stub.objects.pop(key, None)
            self._send(204)
        else:
            self._object(key)

    do_HEAD = do_PUT = do_DELETE = do_POST = do_GET  # noqa: N815

    def _put(self, key: str, body: bytes) -> None:
        if self.headers.get("If-None-Match") and key in self.stub.objects:
            told = Answer(412, "PreconditionFailed")
            self._send(told.status, told.body)
            return
        self.stub.objects[key] = body
        self._send(200, headers={"ETag": tag(body)})

    def _object(self, key: str) -> None:
        data = self.stub.objects.get(key)
        if data is None:
            self._send(404, Answer(404, "NoSuchKey").body)
            return
        headers = {"ETag": tag(data), "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
        span = self.headers.get("Range")
        if not span or not data:
            self._send(200, data, headers)
            return
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, end = (
            (int(first), min(len(data), int(last or len(data)) + 1))
            if first
            else (max(0, len(data) - int(last)), len(data))
        )
        if start >= len(data):
            self._send(416, Answer(416, "InvalidRange").body)
            return
        self._send(206, data[start:end], {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})

    def _list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys = self.stub.keys_after(prefix, query.get("continuation-token") or query.get("start-after", ""))
        rows, folders = [], []
        for key in keys[: self.stub.page]:
            folder, slash, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if slash:
                folders.append(prefix + folder + slash)
                continue
            data = self.stub.objects[key]
            rows.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified>"
                f"<ETag>{escape(tag(data))}</ETag><Size>{len(data)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            )
        rows += [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in dict.fromkeys(folders)]
        more = len(keys) > self.stub.page
        token = f"<NextContinuationToken>{escape(keys[self.stub.page - 1])}</NextContinuationToken>" if more else ""
        self._send(
            200,
            (
                f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>b</Name><KeyCount>{len(rows)}</KeyCount>'
                f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(rows)}</ListBucketResult>"
            ).encode(),
            {"Content-Type": "application/xml"},
        )

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def tag(data: bytes) -> str:
    """Return the ETag of an object."""
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
