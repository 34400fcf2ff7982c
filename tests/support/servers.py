"""Real servers for the tests: an S3 store, a proxy that counts and injects faults, a Ray cluster."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from batch_inference.config import StorageConfig
from batch_inference.errors import BatchInferenceError
from batch_inference.storage.store import Store
from tests.support.limits import HANG_S

BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below the range that the kernel gives to outgoing connections."""
    ports: list[int] = []
    # Far from those of a process beside this one, whose number is the next.
    candidate = 20000 + os.getpid() * 101 % 8000
    while len(ports) < count:
        candidate += 1
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", candidate)) != 0:
                with contextlib.suppress(OSError):
                    probe2 = socket.socket()
                    probe2.bind(("127.0.0.1", candidate))
                    probe2.close()
                    ports.append(candidate)
    return ports


def stop(process: subprocess.Popen[bytes], wait_s: float = 5) -> None:
    """Ends a process that a test started, with all of its group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait_s)
            return


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """A SeaweedFS server with an S3 endpoint and the bucket ``tests``; yields its URL.

    It accepts the credentials in ``AWS_ACCESS_KEY_ID`` and ``AWS_SECRET_ACCESS_KEY`` and no others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc = free_ports(8)
    command = [
        str(BIN / "weed"), "server", f"-dir={folder}", "-ip=127.0.0.1", "-s3", "-s3.iam=false",
        f"-master.port={master}", f"-master.port.grpc={master_grpc}", f"-volume.port={volume}", f"-volume.port.grpc={volume_grpc}",
        f"-filer.port={filer}", f"-filer.port.grpc={filer_grpc}", f"-s3.port={s3}", f"-s3.port.grpc={s3_grpc}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-volume.max=50", "-master.volumeSizeLimitMB=64",
    ]  # fmt: skip
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + HANG_S
        url = f"http://127.0.0.1:{s3}"
        while not _ready(filer, url, "tests"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not come up:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.3)
        yield url
    finally:
        stop(process)


def _ready(filer: int, url: str, bucket: str) -> bool:
    """Makes the bucket and writes an object, which needs every part of the server."""
    try:
        # A bucket is a folder of the filer, which asks for no credentials.
        connection = http.client.HTTPConnection("127.0.0.1", filer, timeout=5)
        connection.request("POST", f"/buckets/{bucket}/")
        if connection.getresponse().status not in (200, 201, 409):
            return False
        Store(f"s3://{bucket}", StorageConfig(endpoint_url=url, max_retries=0)).put("ready", b"x")
    except (OSError, BatchInferenceError):
        return False
    return True


class Proxy:
    """Stands between the program and a store: counts requests by method and path, and answers some itself, or badly.

    Args:
        target: URL of the store.
    """

    #: Bad answers: the connection ends before one, in the middle of one, after the store has done what was asked; or none comes.
    RESET, CUT, LOST, SILENT = "reset", "cut", "lost", "silent"

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self.target = (host, int(port))
        self.requests: list[tuple[str, str]] = []
        self.answer: Callable[[str, str], int | str | None] = lambda method, path: None
        """Status to answer with instead of asking the store, a bad answer, or None to ask it."""
        self.silent_s = 3.0
        """Seconds for which a silent connection stays open."""
        self.ignore_put_if_absent = False
        """Say yes to every conditional put, as stores do that do not know the condition."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Else the kernel holds a small answer back until its head is acknowledged, 40 ms later.
            disable_nagle_algorithm = True

            def _forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path
                outer.requests.append((self.command, path))
                status = outer.answer(self.command, path)
                if status == outer.SILENT:
                    time.sleep(outer.silent_s)
                if status in (outer.SILENT, outer.RESET):
                    self._break_off()
                    return
                if isinstance(status, int):
                    # S3's own answer to credentials that were good once is a 400.
                    code = "ExpiredToken" if status == 400 else "Injected"
                    self._reply(status, [], f"<Error><Code>{code}</Code></Error>".encode())
                    return
                if (refused := outer.refusal(self.command, path, self.headers)) is not None:
                    self._reply(refused[0], [], refused[1])
                    return
                headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
                connection = http.client.HTTPConnection(host, int(port), timeout=HANG_S)
                try:
                    method, target_path, headers, body = outer.request(self.command, path, headers, body)
                    connection.request(method, target_path, body=body or None, headers=headers)
                    response = connection.getresponse()
                    reached, answered, data = outer.response(
                        self.command, path, response.status, response.getheaders(), response.read()
                    )
                except OSError:
                    self._reply(502, [], b"")
                    return
                finally:
                    connection.close()
                if status == outer.LOST:
                    self._break_off()
                    return
                if status == outer.CUT:
                    self._reply(reached, answered, data, cut=True)
                    self._break_off()
                    return
                # S3's and Google's answer, and Azure's.
                if outer.ignore_put_if_absent and reached in (409, 412):
                    self._reply(200, [("ETag", '"1"')], b"")
                    return
                self._reply(reached, answered, data)

            def _break_off(self) -> None:
                """Ends the connection with a reset, as a machine does that goes away."""
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_WR)

            def _reply(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: bool = False) -> None:
                self.send_response_only(status)
                length = str(len(data))
                for key, value in headers:
                    if key.lower() == "content-length":
                        length = value if self.command == "HEAD" else length
                    elif key.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(key, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if cut else data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *args: object) -> None:
                pass  # a client that was killed leaves its connection behind

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def refusal(self, method: str, path: str, headers: http.client.HTTPMessage) -> tuple[int, bytes] | None:
        """Return an answer to a request that is not let through, or None."""
        return None

    def request(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[str, str, dict[str, str], bytes]:
        """Return what the store is asked."""
        return method, path, headers, body

    def response(
        self, method: str, path: str, status: int, headers: list[tuple[str, str]], data: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Return what the client is answered."""
        return status, headers, data

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def ray_cluster(
    cpus: int, folder: Path, *, dashboard: bool = False, token: str | None = None, options: tuple[str, ...] = ()
) -> Iterator[dict[str, str]]:
    """A Ray cluster in processes of its own; yields its ``address``, its ``client`` address, its
    ``dashboard``'s URL, the ``metrics``' host and port, the folder of its ``logs``, and the ID of the ``process`` that is above all others.

    Without ``dashboard`` it starts faster, and there is no job server. With ``token`` it asks for that one.
    ``options`` are more of ``ray start``.
    """
    port, client, dashboard_agent, web, metrics = free_ports(5)
    log = folder / "ray-head.log"
    folder.mkdir(parents=True, exist_ok=True)
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    # Jobs that are submitted to it find the program as they do in the image.
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    # As the image has it: else Ray Client's processes end at once now and then.
    fork = {"GRPC_ENABLE_FORK_SUPPORT": "0"}
    # The tests' predictors, and the checkout under test rather than what happens to be installed.
    tests = Path(__file__).resolve().parents[1]
    modules = os.pathsep.join([str(tests / "job"), str(tests.parent / "job")])
    env = {**os.environ, **auth, **fork, "PYTHONPATH": modules, "PATH": path}
    with contextlib.ExitStack() as stack:
        # Ray sends a submitted job to the cluster whose address is in its temporary folder; in a shared one that is the
        # cluster of this machine that was started last. Short, since sockets live in it.
        temporary = tempfile.mkdtemp(prefix="ray-")
        stack.callback(_remove, temporary)
        command = [
            str(BIN / "ray"), "start", "--head", "--block", f"--num-cpus={cpus}", f"--port={port}",
            f"--ray-client-server-port={client}", f"--include-dashboard={dashboard}".lower(), "--disable-usage-stats",
            f"--dashboard-port={web}", f"--dashboard-agent-listen-port={dashboard_agent}", "--node-ip-address=127.0.0.1",
            "--object-store-memory=1000000000", f"--temp-dir={temporary}", f"--metrics-export-port={metrics}", *options,
        ]  # fmt: skip
        out = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)
        stack.callback(stop, process)
        deadline = time.monotonic() + HANG_S
        while not all(_listens(p) for p in (port, client, *([web] if dashboard else []))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not come up:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.3)
        yield {
            "address": f"127.0.0.1:{port}",
            "client": f"ray://127.0.0.1:{client}",
            "dashboard": f"http://127.0.0.1:{web}",
            "metrics": f"127.0.0.1:{metrics}",
            "logs": f"{temporary}/session_latest/logs",
            "process": str(process.pid),
        }


def _remove(folder: str) -> None:
    """Removes a folder that processes which are just ending may still write to."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not Path(folder).exists():
            return
        time.sleep(0.5)


class TcpProxy:
    """Forwards connections to ``host:port`` and breaks them on demand: a load balancer on a bad day."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("http://").rpartition(":")
        self._target = (host, int(port))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._frozen: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> int:
        """Resets every connection; returns how many there were."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.shutdown(socket.SHUT_RDWR)
        return len(pairs)

    def freeze(self) -> int:
        """From now on the connections that there are stay open and carry nothing; returns how many there are."""
        for pair in self._pairs:
            self._frozen.update(pair)
        return len(self._pairs)

    def close(self) -> None:
        """Stops listening and cuts everything."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target, 5)
            except OSError:
                near.close()
                continue
            self._pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, sink, (near, far)), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, pair: tuple[socket.socket, socket.socket]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if source not in self._frozen:
                    sink.sendall(data)
        if source in self._frozen:
            return  # the other side does not hear of it
        for end in pair:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(ValueError):
            self._pairs.remove(pair)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
