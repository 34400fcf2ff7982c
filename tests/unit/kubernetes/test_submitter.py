"""The submitter against a job server with faults that a real one has too rarely for a test."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
import structlog
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st

from batch_inference.cli.app import app, main
from batch_inference.config import load_config
from batch_inference.environment import CONFIG_VARIABLE, RUN_VARIABLE
from batch_inference.errors import InfrastructureError, JobInterruptedError, UserError
from batch_inference.kubernetes import submitter
from batch_inference.kubernetes.ray_jobs import JobServer, LogStream, RayJobInfo, base_url, token_from_environment
from batch_inference.kubernetes.submitter import LogCopy, Submitter, SubmitTimeouts, request_body
from batch_inference.text import last_line

LOG = "".join(f"line {i} ü\n" for i in range(20))
CONFLICT = "ValueError: Job with submission_id x already exists. Please use a different submission_id.\n."
Serve = Callable[[web.WebSocketResponse, int], Awaitable[None]]
_next_text = LogStream.next


class FakeServer:
    """A server that answers as Ray's job server does unless a test changes that.

    It also has the submitter's clock, which goes only while the submitter sleeps, or waits for a log that stays silent.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.received: dict[LogStream, int] = {}
        """Characters that the submitter has read from each connection, in the order of the connections."""
        self.silences: dict[int, int] = {}
        """Connections on which nothing comes after this many characters."""
        self.told = ""
        """The state that was answered last."""
        self.job: dict[str, Any] | None = None
        self.posts: list[dict[str, Any]] = []
        self.attached = 0
        self.before: Callable[[web.Request], web.Response | None] = lambda request: None
        """Answer in place of the handlers below."""
        self.log: Serve = self.whole_log

    def set(self, status: str, message: str = "", submitted_ms: int = 7) -> None:
        exit_code = {"SUCCEEDED": 0, "FAILED": 2}.get(status)
        self.job = {
            "status": status, "message": message, "driver_exit_code": exit_code, "start_time": submitted_ms
        }  # fmt: skip

    async def whole_log(self, socket: web.WebSocketResponse, attempt: int) -> None:
        await socket.send_str(LOG)
        self.set("SUCCEEDED", "Job finished successfully.")
        await socket.close()

    def has_read(self, attempt: int, characters: int) -> bool:
        """Return whether the submitter has read this much from a connection."""
        return [*self.received.values(), *[0] * attempt][attempt - 1] >= characters

    async def stay_silent(
        self, socket: web.WebSocketResponse, attempt: int, sent: int, until: Callable[[], bool] = lambda: False
    ) -> None:
        """Send nothing after so many characters until the condition holds, or the submitter leaves."""
        self.silences[attempt] = sent
        left = asyncio.ensure_future(socket.receive())
        while not left.done() and not until():
            await asyncio.sleep(0.001)
        del self.silences[attempt]
        left.cancel()
        await asyncio.wait([left])

    async def sleep(self, seconds: float) -> None:
        """Sleep by the submitter's clock."""
        self.now += seconds
        await asyncio.sleep(0)

    async def next_text(self, stream: LogStream, timeout_s: float) -> str | None:
        """Read more of a log; time passes only where the server has no more to say."""
        self.received.setdefault(stream, 0)
        number = list(self.received).index(stream) + 1
        read = asyncio.ensure_future(_next_text(stream, 3600.0))
        while not read.done():
            if self.received[stream] >= self.silences.get(number, sys.maxsize):
                read.cancel()
                await asyncio.wait([read])
                self.now += timeout_s
                return ""
            await asyncio.sleep(0.001)
        self.received[stream] += len(read.result() or "")
        return read.result()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        answer = self.before(request)
        if answer is not None:
            return answer
        if request.method == "POST":
            self.posts.append(await request.json())
            if self.job is not None:
                return web.Response(status=500, text=CONFLICT)
            self.set("RUNNING")
            return web.json_response({"submission_id": "x"})
        if self.job is None:
            return web.Response(status=404, text="Job x does not exist")
        if request.path.endswith("/logs/tail"):
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            self.attached += 1
            await self.log(socket, self.attached)
            return socket
        self.told = self.job["status"]
        return web.json_response(self.job)

    def follow(self, timeouts: SubmitTimeouts | None = None, token: str = "") -> RayJobInfo:
        """Run a submitter against this server until it ends."""

        async def run() -> RayJobInfo:
            application = web.Application()
            application.router.add_route("*", "/{path:.*}", self._handle)
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            async with TestServer(application) as server, aiohttp.ClientSession(headers=headers) as session:
                client = JobServer(session, str(server.make_url("")).rstrip("/"), "x")
                return await Submitter(
                    client, request_body("job.yaml", "x", inline=False), timeouts or SubmitTimeouts()
                ).run()

        return asyncio.run(run())


async def cut(socket: web.WebSocketResponse) -> None:
    """End the connection as a crash does."""
    transport = socket._req.transport if socket._req is not None else None
    assert transport is not None
    transport.abort()
    await asyncio.sleep(0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()
    monkeypatch.setattr(submitter, "_delays", lambda: iter([0.02] * 1000))
    monkeypatch.setattr(submitter, "time", SimpleNamespace(monotonic=lambda: server.now))
    monkeypatch.setattr(submitter, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": server.sleep}))
    monkeypatch.setattr(LogStream, "next", lambda stream, timeout_s: server.next_text(stream, timeout_s))
    return server


@pytest.fixture(autouse=True)
def said() -> Iterator[list[dict[str, Any]]]:
    """Return the submitter's own log lines."""
    lines: list[dict[str, Any]] = []

    def keep(logger: Any, method: str, event: Any) -> Any:
        lines.append(dict(event))
        raise structlog.DropEvent

    structlog.configure(processors=[keep])
    yield lines
    structlog.reset_defaults()


def events(said: list[dict[str, Any]]) -> list[str]:
    return [line["event"] for line in said]


# What is sent


def test_entrypoint_is_safe_from_the_shell() -> None:
    plain = request_body("/etc/batch-inference/job.yaml", "x", inline=False)
    # The chart shows the same; a test of the charts compares the two.
    words = "--config /etc/batch-inference/job.yaml --address auto --dashboard-host none --log-format json"
    assert plain == {"submission_id": "x", "entrypoint": f"batch-inference run {words}"}
    nasty = "/a b/$(reboot) `reboot` ' \" ; reboot #.yaml"
    entrypoint = request_body(nasty, "x", inline=False)["entrypoint"]
    assert shlex.split(entrypoint)[3] == nasty
    seen = subprocess.run(f"printf '%s\\n' {entrypoint}", shell=True, capture_output=True, text=True, check=True)  # noqa: S602
    assert seen.stdout.splitlines()[3] == nasty


def test_run_name_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_VARIABLE, "photos-1a2b3c4d")
    body = request_body("/etc/batch-inference/job.yaml", "x", inline=False)
    assert body["runtime_env"] == {"env_vars": {RUN_VARIABLE: "photos-1a2b3c4d"}}


def test_inline_configuration_is_sent_as_it_is_and_read_back_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("# ü $(x) '\ninput: {uris: [a]}\noutput: {uri: b}\n", encoding="utf-8")
    body = request_body(str(file), "x", inline=True)
    assert str(file) not in json.dumps(body)
    assert shlex.split(body["entrypoint"])[3] == f"env:{CONFIG_VARIABLE}"
    for name, value in body["runtime_env"]["env_vars"].items():
        monkeypatch.setenv(name, value)
    assert load_config(f"env:{CONFIG_VARIABLE}") == load_config(str(file))
    monkeypatch.delenv(CONFIG_VARIABLE)
    with pytest.raises(UserError, match=f"there is no environment variable {CONFIG_VARIABLE}"):
        load_config(f"env:{CONFIG_VARIABLE}")


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (None, "cannot read .*No such file"),
        (b"\xff\xfe", "cannot read .*utf-8"),
        (b"a" * 33_000, "takes 33,002 bytes, 32,768"),
        ("ü".encode() * 6000, "takes 36,002 bytes"),
        (b"a: b\0", "cannot be sent with the job"),
    ],
)
def test_unsendable_configuration_is_refused(content: bytes | None, fact: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=fact):
        request_body(str(file), "x", inline=True)


def test_mistake_in_the_configuration_is_left_to_the_driver(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("shard_sice: [", encoding="utf-8")
    assert request_body(str(file), "x", inline=True)["runtime_env"]["env_vars"] == {CONFIG_VARIABLE: "shard_sice: ["}


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("head:8265", "http://head:8265"),
        ("http://head:8265/", "http://head:8265"),
        ("https://ray.example/cluster/", "https://ray.example/cluster"),
        ("[fd00::1]:8265", "http://[fd00::1]:8265"),
    ],
)
def test_addresses(address: str, url: str) -> None:
    assert base_url(address) == url


@pytest.mark.parametrize("address", ["ray://head:10001", "head:port", "http://", "http://:8265", "head:99999"])
def test_addresses_of_something_else(address: str) -> None:
    with pytest.raises(UserError, match="not the address of a Ray dashboard"):
        base_url(address)


def test_token_is_found_where_ray_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert token_from_environment() is None
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("of-home\n")
    assert token_from_environment() == "of-home"
    (tmp_path / "mounted").write_text("of-file")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mounted"))
    assert token_from_environment() == "of-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", " of-variable\n")
    assert token_from_environment() == "of-variable"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert token_from_environment() is None


# What is copied


@given(
    text=st.text(st.sampled_from("ab\nü "), max_size=60),
    breaks=st.lists(st.integers(0, 60), max_size=6),
    step=st.integers(1, 7),
)
def test_copy_equals_the_text_wherever_connections_break(text: str, breaks: list[int], step: int) -> None:
    written: list[str] = []
    copy = LogCopy()
    copy._write = written.append  # type: ignore[method-assign]
    for end in [*breaks, len(text)]:
        copy.rewind()
        reached = text[:end]
        for place in range(0, len(reached), step):
            copy.feed(reached[place : place + step])
    assert all(part.endswith("\n") for part in written)
    copy.finish()
    assert "".join(written) == text + ("\n" if text and not text.endswith("\n") else "")


# What happens between


def test_job_is_submitted_followed_and_its_end_is_told(
    server: FakeServer, said: list[dict[str, Any]], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    assert server.follow().status == "SUCCEEDED"
    assert capfdbinary.readouterr().out == LOG.encode()
    assert server.posts == [request_body("job.yaml", "x", inline=False)]
    assert events(said) == ["job x is submitted", "job x is SUCCEEDED"]
    assert (said[-1]["reason"], said[-1]["exit_code"]) == ("Job finished successfully.", 0)


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED", "STOPPED"])
def test_job_that_has_ended_is_not_submitted_again(
    status: str, server: FakeServer, said: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    message = "Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):\nx\ny"

    async def replay(socket: web.WebSocketResponse, attempt: int) -> None:
        await socket.send_str(LOG)
        await socket.close()

    server.set(status, message)
    server.log = replay
    assert server.follow().status == status
    assert not server.posts
    assert capsys.readouterr().out == LOG
    assert events(said) == [f"job x exists already: {status}", f"job x is {status}"]
    assert said[-1]["reason"] == "Job entrypoint command failed with exit code 2"


def test_another_submitter_was_faster(server: FakeServer, said: list[dict[str, Any]]) -> None:
    def first_look_comes_too_early(request: web.Request) -> web.Response | None:
        if server.job is None:
            server.set("PENDING")
            return web.Response(status=404, text="Job x does not exist")
        return None

    server.before = first_look_comes_too_early
    assert server.follow().status == "SUCCEEDED"
    assert len(server.posts) == 1
    assert events(said)[0] == "job x exists already: PENDING"


def test_answer_to_the_submission_that_is_lost_makes_no_second_job(server: FakeServer) -> None:
    def lose(request: web.Request) -> web.Response | None:
        if request.method == "POST" and server.job is None:
            server.set("RUNNING")
            return web.Response(status=500, text="No available agent to submit job, please try again later.")
        return None

    server.before = lose
    assert server.follow().status == "SUCCEEDED"
    assert not server.posts


def test_dashboard_that_comes_up_late(server: FakeServer, said: list[dict[str, Any]]) -> None:
    asked: list[str] = []
    early = [
        web.Response(status=503, text="not yet"),
        web.Response(status=200, text="<html>a login page</html>"),
        web.Response(status=404, text="no such page"),
    ]

    def wait(request: web.Request) -> web.Response | None:
        asked.append(request.method)
        return early[len(asked) - 1] if len(asked) <= len(early) else None

    server.before = wait
    assert server.follow().status == "SUCCEEDED"
    assert asked[:6] == ["GET", "GET", "GET", "GET", "POST", "GET"]
    assert [e for e in events(said) if e.startswith("waiting for the Ray dashboard")] == [said[0]["event"]]
    assert said[0]["reason"] == "answered 503: not yet"


def test_redirected_submission_is_none(server: FakeServer) -> None:
    """A client that followed the redirect would send a GET and mistake the answer for success."""
    asked: list[str] = []

    def redirect(request: web.Request) -> web.Response | None:
        asked.append(request.path)
        if asked.count("/api/jobs/") == 1 and request.method == "POST":
            return web.Response(status=301, headers={"Location": "/elsewhere"})
        return None

    server.before = redirect
    assert server.follow().status == "SUCCEEDED"
    assert "/elsewhere" not in asked
    assert len(server.posts) == 1


def test_dashboard_that_never_takes_the_job(server: FakeServer) -> None:
    server.before = lambda request: web.Response(status=503, text="Traceback\n  x\nRuntimeError: nobody home\n.")
    with pytest.raises(
        InfrastructureError, match=r"did not take the job within 0\.3 s: answered 503: RuntimeError: nobody home"
    ) as caught:
        server.follow(SubmitTimeouts(start_s=0.3))
    assert caught.value.exit_code == 5


def test_submission_that_no_retry_makes_better(server: FakeServer) -> None:
    def refuse(request: web.Request) -> web.Response | None:
        text = "RuntimeError: Request failed with status code 400: Traceback\nTypeError: entrypoint must be a string\n."
        return web.Response(status=500, text=text) if request.method == "POST" else None

    server.before = refuse
    with pytest.raises(UserError, match="refused the job: TypeError: entrypoint must be a string"):
        server.follow()


@pytest.mark.parametrize(("status", "fact"), [(401, "asks for a token"), (403, "refuses the token")])
@pytest.mark.parametrize("where", ["x", "tail"])
def test_token_that_is_missing_or_wrong(where: str, status: int, fact: str, server: FakeServer) -> None:
    def refuse(request: web.Request) -> web.Response | None:
        assert request.headers["Authorization"] == "Bearer secret"
        return web.Response(status=status, text="no") if request.path.endswith(where) else None

    server.before = refuse
    with pytest.raises(UserError, match=fact) as caught:
        server.follow(token="secret")  # noqa: S106
    assert "secret" not in str(caught.value)


def test_log_that_breaks_in_every_way_is_copied_once(
    server: FakeServer, said: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    async def serve(socket: web.WebSocketResponse, attempt: int) -> None:
        if attempt > 6:
            await server.whole_log(socket, attempt)
            return
        reached = LOG[: attempt * 20]
        for place in range(0, len(reached), 7):
            await socket.send_str(reached[place : place + 7])
        while not server.has_read(attempt, len(reached)):
            await asyncio.sleep(0.001)
        if attempt % 3 == 0:
            await cut(socket)
        else:
            # A clean close is no end as long as the job runs: the head closes so when its agent is gone.
            await socket.close(code=1000 if attempt % 3 == 1 else 1011)

    server.log = serve
    assert server.follow().status == "SUCCEEDED"
    assert capsys.readouterr().out == LOG
    assert server.attached == 7
    assert events(said).count("the log connection broke") == 6
    assert events(said).count("re-attached to the log after 0 s") == 6


def test_breaks_without_progress_are_told_once(server: FakeServer, said: list[dict[str, Any]]) -> None:
    async def serve(socket: web.WebSocketResponse, attempt: int) -> None:
        if attempt > 8:
            await server.whole_log(socket, attempt)
        else:
            await socket.send_str(LOG[:30])
            await socket.close()

    server.log = serve
    assert server.follow().status == "SUCCEEDED"
    assert events(said).count("the log connection broke") == 1
    assert events(said).count("re-attached to the log after 0 s") == 1
    assert events(said)[-1] == "job x is SUCCEEDED"
    assert not [line for line in said if line.get("level") == "warning" or "incomplete" in line["event"]]


@pytest.mark.parametrize("place", [0, 30])
def test_log_that_cannot_be_read_further_is_not_passed_off_as_whole(
    place: int, server: FakeServer, said: list[dict[str, Any]]
) -> None:
    """Ray ends a log like this at bytes that are not text: each connection gets that far and is closed as if complete."""

    async def serve(socket: web.WebSocketResponse, attempt: int) -> None:
        if place:
            await socket.send_str(LOG[:place])
        if attempt == 3:
            server.set("SUCCEEDED")
        await socket.close()

    server.log = serve
    assert server.follow().status == "SUCCEEDED"
    assert events(said)[-2].startswith("the log may be incomplete")


def test_silent_log_is_read_over_a_new_connection(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    times: list[float] = []

    async def serve(socket: web.WebSocketResponse, attempt: int) -> None:
        times.append(server.now)
        if attempt == 5:
            await server.whole_log(socket, attempt)
            return
        text = LOG[: 10 * min(attempt, 2)]
        await socket.send_str(text)
        await server.stay_silent(socket, attempt, len(text))

    server.log = serve
    assert server.follow(SubmitTimeouts(silent_s=60)).status == "SUCCEEDED"
    assert capsys.readouterr().out == LOG
    # A minute, the same after the new line of the second connection, then doubling.
    assert [after - before for before, after in pairwise(times)] == [60, 60, 120, 240]


def test_new_lines_make_a_dead_connection_be_noticed_early_again(server: FakeServer) -> None:
    times: list[float] = []

    async def serve(socket: web.WebSocketResponse, attempt: int) -> None:
        times.append(server.now)
        if attempt == 9:
            await server.whole_log(socket, attempt)
            return
        text = LOG[: 10 * attempt]
        await socket.send_str(text)
        await server.stay_silent(socket, attempt, len(text))

    server.log = serve
    assert server.follow(SubmitTimeouts(silent_s=60)).status == "SUCCEEDED"
    assert [after - before for before, after in pairwise(times)] == [60] * 8


def test_end_is_not_waited_for_for_ever_where_the_log_cannot_be_read(
    server: FakeServer, said: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submitter, "_LAST_LOG_S", 0.2)

    async def serve(socket: web.WebSocketResponse, attempt: int) -> None:
        await socket.send_str("all there is, and no end of line")
        server.set("FAILED", "Job supervisor actor died: x\ny")
        await cut(socket)

    server.log = serve
    assert server.follow().status == "FAILED"
    assert capsys.readouterr().out == "all there is, and no end of line\n"
    assert events(said)[-2:] == ["the end of the log could not be read", "job x is FAILED"]
    assert said[-1]["reason"] == "Job supervisor actor died: x"


@pytest.mark.parametrize("became", ["nothing", "another"])
def test_job_that_the_cluster_has_forgotten(became: str, server: FakeServer) -> None:
    """The cluster's head was started again, and the job may have been submitted again."""

    async def serve(socket: web.WebSocketResponse, attempt: int) -> None:
        await socket.send_str(LOG[:30])
        if became == "nothing":
            server.job = None
        else:
            server.set("RUNNING", submitted_ms=8)
        await cut(socket)

    server.log = serve
    with pytest.raises(InfrastructureError, match="has forgotten job x: its head was lost"):
        server.follow()
    assert len(server.posts) == 1


@pytest.mark.parametrize("became", ["nothing", "another", "unreachable"])
def test_end_that_was_seen_stands_whatever_the_cluster_says_later(
    became: str, server: FakeServer, said: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a replacement would submit a finished job again."""
    monkeypatch.setattr(submitter, "_POLL_S", 0.05)
    monkeypatch.setattr(submitter, "_LAST_LOG_S", 0.3)
    away = False

    async def serve(socket: web.WebSocketResponse, attempt: int) -> None:
        nonlocal away
        await socket.send_str(LOG[:30])
        if attempt == 1:
            server.set("FAILED", "Job entrypoint command failed with exit code 2")
            await server.stay_silent(socket, attempt, 30, until=lambda: server.told == "FAILED")
            away = became == "unreachable"
            server.job = None if became == "nothing" else server.job
            if became == "another":
                server.set("RUNNING", submitted_ms=8)
        await cut(socket)

    server.log = serve
    server.before = lambda request: web.Response(status=502, text="bad gateway") if away else None
    assert server.follow(SubmitTimeouts(lost_s=0.1)).status == "FAILED"
    assert events(said)[-2:] == ["the end of the log could not be read", "job x is FAILED"]
    assert len(server.posts) == 1


def test_dashboard_that_is_gone_for_a_while_and_one_that_stays_away(
    server: FakeServer, said: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    gone_until = 0.0

    async def serve(socket: web.WebSocketResponse, attempt: int) -> None:
        nonlocal gone_until
        if attempt == 2:
            await server.whole_log(socket, attempt)
            return
        await socket.send_str(LOG[:30])
        gone_until = server.now + away_s
        await cut(socket)

    def gone(request: web.Request) -> web.Response | None:
        return web.Response(status=502, text="bad gateway") if server.now < gone_until else None

    server.log, server.before, away_s = serve, gone, 0.5
    assert server.follow(SubmitTimeouts(lost_s=5)).status == "SUCCEEDED"
    assert capsys.readouterr().out == LOG
    assert [event[:11] for event in events(said)[1:-1]] == ["the log con", "re-attached"]
    server.job, server.attached, away_s = None, 0, 60.0
    with pytest.raises(InfrastructureError, match=r"has not answered for 0\.3 s: answered 502: bad gateway"):
        server.follow(SubmitTimeouts(lost_s=0.3))


def test_state_that_cannot_be_had_does_not_break_a_log_that_flows(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = sent = 0

    async def serve(socket: web.WebSocketResponse, attempt: int) -> None:
        nonlocal sent
        for line in LOG.splitlines(keepends=True):
            await socket.send_str(line)
            sent, before = sent + len(line), refused
            await server.stay_silent(socket, attempt, sent, until=lambda before=before: refused >= before + 2)
        server.before = lambda request: None
        server.set("SUCCEEDED")
        await socket.close()

    def only_the_log(request: web.Request) -> web.Response | None:
        nonlocal refused
        if not server.attached or request.path.endswith("tail"):
            return None
        refused += 1
        return web.Response(status=503)

    monkeypatch.setattr(submitter, "_POLL_S", 0.02)
    server.log, server.before = serve, only_the_log
    assert server.follow(SubmitTimeouts(lost_s=0.5)).status == "SUCCEEDED"
    assert capsys.readouterr().out == LOG
    assert server.attached == 1
    # Without an answer for longer than it may be, and never without a line for so long.
    assert refused >= 40
    assert server.now > 1000.5


# The command


def test_command_names_missing_arguments(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RAY_DASHBOARD_ADDRESS", "RAY_JOB_SUBMISSION_ID"):
        monkeypatch.delenv(name, raising=False)
    for given_args, fact in (([], "address of the Ray dashboard"), (["--address", "h:1"], "submission ID")):
        with pytest.raises(SystemExit) as caught:
            main(["submit", "--config", "job.yaml", *given_args])
        assert caught.value.code == 2
        line = json.loads(capsys.readouterr().err)
        assert fact in line["event"]
        assert "as KubeRay does" in line["remedy"]
        assert line["level"] == "error"


def test_environment_says_what_options_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []
    monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", "head:8265")
    monkeypatch.setenv("RAY_JOB_SUBMISSION_ID", "run-x7f2k")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(submitter, "submit", lambda *args, **kwargs: got.append((args, kwargs)))
    app(["submit", "--config", "job.yaml", "--inline", "--lost-s", "30"], standalone_mode=False)
    assert got == [
        (
            ("job.yaml", "head:8265", "run-x7f2k"),
            {"inline": True, "token": "secret", "timeouts": SubmitTimeouts(300.0, 30.0, 60.0)},
        )
    ]


def test_stopped_submitter_says_so_and_leaves_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    async def forever(self: Submitter) -> None:
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), 15)
        await asyncio.sleep(3600)

    monkeypatch.setattr(Submitter, "run", forever)
    with pytest.raises(JobInterruptedError, match="job x is left as it is") as caught:
        submitter.submit("job.yaml", "head:8265", "x")
    assert caught.value.exit_code == 130


def test_submitter_loads_neither_ray_nor_torch() -> None:
    code = "import sys, batch_inference.cli.app, batch_inference.kubernetes.submitter; print({'ray', 'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_delays_grow_and_have_a_limit() -> None:
    delays = submitter._delays()
    first = [next(delays) for _ in range(12)]
    assert 0.25 <= first[0] <= 0.5
    assert all(7.5 <= delay <= 15 for delay in first[-3:])


def test_answers_are_told_in_one_line() -> None:
    assert last_line("a\nb c\n.\n") == "b c"
    assert last_line("") == "nothing"
