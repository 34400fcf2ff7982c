"""An object store in the tests' own process: S3's protocol from memory, or any other answer that a test gives."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape


@dataclass(frozen=True)
class Asked:
    """A request: its method, the key below the bucket, the query and the headers (names in lower case)."""

    method: str
    key: str
    query: dict[str, str]
    headers: dict[str, str]

    @property
    def lists(self) -> bool:
        """Whether this lists a bucket."""
        return "list-type" in self.query


@dataclass(frozen=True)
class Answer:
    """The server's answer."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def error(cls, status: int, code: str, message: str = "no", inside: str = "", **headers: str) -> Answer:
        """Return an error as S3 sends it, with ``inside`` next to code and message; ``_`` in the names of headers stands for ``-``."""
        text = f"<Error><Code>{code}</Code><Message>{message}</Message>{inside}</Error>"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return cls(status, text.encode(), {"content-type": "application/xml"} | named)


@dataclass
class FaultyS3:
    """A running server.

    Attributes:
        endpoint: Its URL, for ``storage.endpoint_url``.
        objects: Content by key; one bucket of any name.
        classes: Storage classes by key, ``STANDARD`` of others.
        answer: Asked before each request is done; what it returns is sent instead.
        asked: Requests so far.
    """

    endpoint: str
    objects: dict[str, bytes] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    answer: Callable[[Asked], Answer | None] = lambda asked: None
    asked: list[Asked] = field(default_factory=list)

    def handle(self, asked: Asked, body: bytes) -> Answer:
        """Return the answer to a request."""
        self.asked.append(asked)
        told = self.answer(asked)
        if told is not None:
            return told
        if asked.lists:
            return self._listing(asked.query)
        if asked.method == "PUT":
            if "if-none-match" in asked.headers and asked.key in self.objects:
                return Answer.error(412, "PreconditionFailed")
            self.objects[asked.key] = body
            return Answer(200, headers={"etag": _tag(body)})
        if asked.method == "DELETE":
            self.objects.pop(asked.key, None)
            return Answer(204)
        if asked.key not in self.objects:
            return Answer.error(404, "NoSuchKey", "The specified key does not exist.")
        return _content(self.objects[asked.key], asked.headers.get("range"))

    def _listing(self, query: dict[str, str]) -> Answer:
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(_tag(data))}</ETag><Size>{len(data)}</Size>"
            f"<StorageClass>{self.classes.get(key, 'STANDARD')}</StorageClass></Contents>"
            for key, data in sorted(self.objects.items())
            if key.startswith(query.get("prefix", "")) and key > query.get("start-after", "")
        )
        text = f"<ListBucketResult><Name>b</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        return Answer(200, text.encode(), {"content-type": "application/xml"})


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _content(data: bytes, span: str | None) -> Answer:
    headers = {"etag": _tag(data), "last-modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
    if not span or not data:
        return Answer(200, data, headers)
    first, _, last = span.removeprefix("bytes=").partition("-")
    begin = int(first) if first else max(0, len(data) - int(last))
    end = min(len(data), int(last) + 1) if first and last else len(data)
    return Answer(206, data[begin:end], headers | {"content-range": f"bytes {begin}-{end - 1}/{len(data)}"})


@contextlib.contextmanager
def faulty_s3(certificate: Path | None = None) -> Iterator[FaultyS3]:
    """Serve on a free port of this machine, with TLS if a PEM file of certificate and key is given."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a head and a body sent apart wait 40 ms for each other

        def do_any(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
            headers = {name.lower(): value for name, value in self.headers.items()}
            key = unquote(parts.path.lstrip("/").partition("/")[2])
            answer = server.handle(Asked(self.command, key, query, headers), body)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = do_any  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Ignore a client that hangs up because it does not trust the certificate."""

    with Quiet(("127.0.0.1", 0), Handler) as http:
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            http.socket = context.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
            scheme = "https"
        server = FaultyS3(f"{scheme}://127.0.0.1:{http.server_port}")
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            yield server
        finally:
            http.shutdown()
