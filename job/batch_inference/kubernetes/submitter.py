"""The submitter: submits a job to a Ray cluster over the dashboard's HTTP API, once, and follows its log to the end.

It runs in a small pod of its own that may be restarted at any moment, so all of its state is in the cluster. It loads neither
Ray nor torch, to fit into half a gigabyte of memory.

It relies on three properties of Ray 2.60. A submission ID can be used only once. The log is one file that only grows, and each
connection to ``logs/tail`` gets all of it from the start, so the number of characters printed so far says where to continue. The
server does not answer WebSocket pings, so silence is the only sign of a connection that is dead but open.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import structlog

from batch_inference.environment import CONFIG_VARIABLE, RUN_VARIABLE
from batch_inference.errors import InfrastructureError, JobInterruptedError, UserError
from batch_inference.kubernetes.ray_jobs import JobServer, JobServerError, LogStream, RayJobInfo, base_url

log = structlog.get_logger()

# Linux takes 128 KiB for one variable, and Ray escapes the text up to twice on its way.
INLINE_MAX_BYTES = 32 * 1024

# The job's state is read after the log stream has been silent for this long.
_POLL_S = 10.0
_SILENT_MAX_S = 600.0
# After the job's end: longest silence of a stream, and time for which reading the log's end is retried.
_LAST_SILENT_S = 15.0
_LAST_LOG_S = 60.0


@dataclass(frozen=True)
class SubmitTimeouts:
    """Timeouts of the submitter, in seconds.

    Attributes:
        start_s: Time for the dashboard to answer and to accept the job.
        lost_s: Time for the dashboard to come back once the job was seen.
        silent_s: Time without new log lines after which the log is read over a new connection. It doubles up to ten minutes while
            nothing new comes, since the server notices an abandoned connection only at the next line.
    """

    start_s: float = 300.0
    lost_s: float = 600.0
    silent_s: float = 60.0


class _UnreachableError(Exception):
    """The log stream has been silent for so long that its connection may be dead."""


def submit(
    config: str,
    address: str | None,
    submission_id: str | None,
    *,
    inline: bool = False,
    token: str | None = None,
    timeouts: SubmitTimeouts | None = None,
) -> None:
    """Submit the job unless it exists, copy its log to stdout, and return when the job has ended, even if it failed.

    Args:
        config: Path of the configuration file: in the cluster, or on this machine with ``inline``.
        address: The dashboard's ``host:port``, or its URL.
        submission_id: The job's name in the cluster; an existing name is followed, not submitted again.
        inline: Send the file's text with the request, for a cluster that does not have the file.
        token: The cluster's token, if it requires one.
        timeouts: How long to wait for the dashboard and the log.

    Raises:
        UserError: If an argument is missing, or the cluster refuses the token or the request.
        InfrastructureError: If the dashboard does not answer for too long, or has forgotten the job.
        JobInterruptedError: At SIGTERM or SIGINT. The Ray job continues: KubeRay stops it when the pod is deleted for good, and
            after any other end of the pod a new pod re-attaches to it.
    """
    if not address:
        raise UserError(
            "the address of the Ray dashboard is not known",
            "Give --address http://HEAD:8265, or set RAY_DASHBOARD_ADDRESS as KubeRay does.",
        )
    if not submission_id:
        raise UserError(
            "the submission ID is not known",
            "Give --submission-id NAME, or set RAY_JOB_SUBMISSION_ID as KubeRay does; the same name re-attaches.",
        )
    body = request_body(config, submission_id, inline=inline)
    asyncio.run(_until_stopped(base_url(address), submission_id, body, token, timeouts or SubmitTimeouts()))


def request_body(config: str, submission_id: str, *, inline: bool) -> dict[str, Any]:
    """Return the body of the request to ``/api/jobs/``.

    The configuration is not validated here. A mistake in it must end the Ray job, whose verdict the operator shows; here it would
    be a failing pod that is restarted again and again while GPUs wait. The body requests no entrypoint resources: then Ray runs
    the driver on the head, even if the head has no CPUs for tasks.

    Raises:
        UserError: If the file cannot be sent.
    """
    words = ["batch-inference", "run", "--config", f"env:{CONFIG_VARIABLE}" if inline else config]
    # Ray gives the entrypoint to a shell.
    body: dict[str, Any] = {
        "submission_id": submission_id,
        "entrypoint": shlex.join([*words, "--address", "auto", "--dashboard-host", "none", "--log-format", "json"]),
    }
    variables = {RUN_VARIABLE: os.environ[RUN_VARIABLE]} if os.environ.get(RUN_VARIABLE) else {}
    if inline:
        # Not in the entrypoint: Ray writes that to the start of the log, and so into the message of a job that fails early.
        variables[CONFIG_VARIABLE] = _inline_text(config)
    if variables:
        body["runtime_env"] = {"env_vars": variables}
    return body


def _inline_text(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise UserError(f"cannot read {path}: {exc}", "Give a readable UTF-8 text file with --config.") from None
    size = len(json.dumps(text))
    if size > INLINE_MAX_BYTES or "\0" in text:
        raise UserError(
            f"{path} cannot be sent with the job: it takes {size:,} bytes, {INLINE_MAX_BYTES:,} bytes of text are possible",
            "Put long lists into files that the configuration names: input.manifest, model.labels.",
        )
    return text


async def _until_stopped(
    url: str, job_id: str, body: dict[str, Any], token: str | None, timeouts: SubmitTimeouts
) -> None:
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        # A signal that is not handled does not end the first process of a container.
        loop.add_signal_handler(number, task.cancel)  # type: ignore[union-attr]
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    # A new connection for each request: a kept one may be dead by the next. Proxies of the environment are not used.
    connector = aiohttp.TCPConnector(force_close=True)
    # Every request has its own timeout; the log's connection has none.
    no_limit = aiohttp.ClientTimeout(total=None)
    try:
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=no_limit) as session:
            await Submitter(JobServer(session, url, job_id), body, timeouts).run()
    except asyncio.CancelledError:
        raise JobInterruptedError(
            f"the submitter was stopped; job {job_id} is left as it is", "Run the same command again: it re-attaches."
        ) from None


class LogCopy:
    """Copies each line of a log to stdout once, although every connection sends the log from its start."""

    def __init__(self) -> None:
        self.characters_read = 0
        """Number of characters read in all."""
        self._position = 0
        self._line = ""

    def rewind(self) -> None:
        """Continue with the text from its start; characters read before are skipped."""
        self._position = 0

    def feed(self, text: str) -> bool:
        """Copy the next part of the text. Return whether any of it is new."""
        new = text[max(0, self.characters_read - self._position) :]
        self._position += len(text)
        if not new:
            return False
        self.characters_read += len(new)
        lines, newline, rest = new.rpartition("\n")
        if newline:
            self._write(self._line + lines + newline)
            self._line = ""
        # An incomplete line waits, so that no line of the submitter's own lands in its middle.
        self._line += rest
        return True

    def finish(self) -> None:
        """Write the last line if it is incomplete."""
        if self._line:
            self._write(self._line + "\n")
            self._line = ""

    def _write(self, text: str) -> None:
        sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
        sys.stdout.buffer.flush()


class Submitter:
    """Takes one job from its submission to its end.

    Args:
        server: The cluster's job server.
        body: Body of the request that submits the job.
        timeouts: How long to wait for the dashboard and the log.
    """

    def __init__(self, server: JobServer, body: dict[str, Any], timeouts: SubmitTimeouts) -> None:
        self._server = server
        self._body = body
        self._timeouts = timeouts
        self._copy = LogCopy()
        self._silent_s = timeouts.silent_s
        self._submitted_ms: int | None = None
        self._answered_at = 0.0
        self._ended: RayJobInfo | None = None
        self._ended_at = 0.0

    async def run(self) -> RayJobInfo:
        """Submit and follow the job, and return it when it has ended, even if it failed.

        Raises:
            UserError: If the cluster refuses the token or the request.
            InfrastructureError: If the dashboard does not answer for too long, or has forgotten the job.
        """
        job = await self._submit_once()
        self._submitted_ms = job.submitted_ms
        self._answered_at = time.monotonic()
        try:
            job = await self._follow()
        finally:
            self._copy.finish()
        facts = {} if job.exit_code is None else {"exit_code": job.exit_code}
        # The other lines of the message are in the log too.
        sentence = job.message.partition("\n")[0].partition(", last available logs")[0]
        log.info(f"job {self._server.job_id} is {job.status}", reason=sentence, **facts)
        return job

    async def _submit_once(self) -> RayJobInfo:
        deadline = time.monotonic() + self._timeouts.start_s
        job_id, created = self._server.job_id, False
        for attempt, delay_s in enumerate(_delays()):
            try:
                job = await self._server.read()
                if job is None:
                    # The job exists now, even if another submitter was faster or an answer was lost on its way.
                    created = await self._server.create(self._body)
                    job = await self._server.read()
                if job is not None:
                    log.info(f"job {job_id} " + ("is submitted" if created else f"exists already: {job.status}"))
                    return job
                raise JobServerError(f"does not know job {job_id} right after it was submitted")
            except JobServerError as exc:
                if time.monotonic() + delay_s > deadline:
                    raise InfrastructureError(
                        f"the Ray dashboard at {self._server.url} did not take the job within {self._timeouts.start_s:g} s: {exc}",
                        "Check the address, and that the head is up and its port 8265 can be reached from here.",
                    ) from None
                if attempt == 0:
                    log.info(f"waiting for the Ray dashboard at {self._server.url}", reason=str(exc))
            await asyncio.sleep(delay_s)
        raise AssertionError("the delays have no end")

    async def _follow(self) -> RayJobInfo:
        broken_at: float | None = None
        announced = -1  # a break is reported once for each bit of progress, not for each attempt
        delays = _delays()
        while True:
            read_before, complete, reason = self._copy.characters_read, False, ""
            try:
                async with self._server.log() as stream:
                    if broken_at is not None:
                        log.info(f"re-attached to the log after {time.monotonic() - broken_at:.0f} s")
                        broken_at = None
                    await self._read(stream)
                complete, reason = True, "closed by the server"
            except _UnreachableError:
                pass
            except JobServerError as exc:
                reason = str(exc)
            job = await self._refresh()
            if job is not None and self._ended is not None:
                # Only the server says where the log ends; but once the job has ended, nothing waits for that for long.
                if not complete and time.monotonic() - self._ended_at > _LAST_LOG_S:
                    log.warning("the end of the log could not be read", reason=reason)
                    return job
                if complete:
                    if self._copy.characters_read <= max(announced, 0):
                        # Ray closes a log as if complete also at bytes that are not UTF-8 and before lines of more than 4 MB.
                        log.warning("the log may be incomplete: nothing of it came after its connection broke")
                    return job
            if self._copy.characters_read > read_before:
                delays = _delays()
            if reason:
                if self._copy.characters_read > announced:
                    announced, broken_at = self._copy.characters_read, time.monotonic()
                    log.info("the log connection broke", reason=reason)
                await asyncio.sleep(next(delays))

    async def _read(self, stream: LogStream) -> None:
        """Copy the log until the server has sent all of it.

        Raises:
            JobServerError: If the connection breaks.
            _UnreachableError: If it has been silent for too long.
        """
        self._copy.rewind()
        last_line_at = time.monotonic()
        while (text := await stream.next(min(_POLL_S, self._silent_s))) is not None:
            if text:
                last_line_at = self._answered_at = time.monotonic()
                if self._copy.feed(text):
                    self._silent_s = self._timeouts.silent_s
                continue
            await self._refresh()
            if time.monotonic() - last_line_at >= (self._silent_s if self._ended is None else _LAST_SILENT_S):
                self._silent_s = min(_SILENT_MAX_S, 2 * self._silent_s)
                raise _UnreachableError

    async def _refresh(self) -> RayJobInfo | None:
        """Return the job's state, or None if the dashboard does not answer; once the job has ended, return its last state.

        Raises:
            InfrastructureError: If it has not answered for too long, or no longer knows the job.
        """
        try:
            job = await self._server.read()
        except JobServerError as exc:
            if self._ended is not None:
                return self._ended
            if time.monotonic() - self._answered_at > self._timeouts.lost_s:
                raise InfrastructureError(
                    f"the Ray dashboard at {self._server.url} has not answered for {self._timeouts.lost_s:g} s: {exc}",
                    "Check the Ray head. The same command follows the job if it still exists, else it submits it again, "
                    "and finished shards are not processed again.",
                ) from None
            return None
        self._answered_at = time.monotonic()
        if job is None or job.submitted_ms != self._submitted_ms:
            if self._ended is not None:
                return self._ended
            raise InfrastructureError(
                f"the Ray cluster has forgotten job {self._server.job_id}: its head was lost, and the job with it",
                "The same command submits it again, and finished shards are not processed again.",
            )
        if job.ended and self._ended is None:
            self._ended, self._ended_at = job, self._answered_at
        return job


def _delays() -> Iterator[float]:
    """Yield the seconds between attempts, without end: doubling from half a second to 15, shortened at random to spread them."""
    delay_s = 0.5
    while True:
        yield delay_s * random.uniform(0.5, 1.0)  # noqa: S311 - no secret depends on it
        delay_s = min(15.0, 2 * delay_s)
