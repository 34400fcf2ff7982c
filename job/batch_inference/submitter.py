"""The submitter: hands a job to a Ray cluster over the dashboard's HTTP API, once, and follows its log to the end.

It runs in a small pod of its own and may be started again at any moment, so everything that it must remember is in the
cluster. It loads neither Ray nor torch: a pod of half a gigabyte is to hold it.

What it relies on, read in Ray 2.60: a submission ID can be taken only once; the log is one file that only grows, and each
connection to ``logs/tail`` gets all of it from the start, so that the characters printed so far are the place to go on from;
the server does not answer WebSocket pings, so that silence is the only sign of a connection that is dead but open.
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
from batch_inference.errors import Interrupted, SystemFault, UserError
from batch_inference.jobserver import Job, JobServer, LogStream, NoAnswer, base_url

log = structlog.get_logger()

# Linux takes 128 KiB for one variable, and Ray escapes the text up to twice on its way.
INLINE_MAX_BYTES = 32 * 1024

# How long a quiet log stream is trusted before the job's state is asked for.
_POLL_S = 10.0
_SILENT_MAX_S = 600.0
# After the job's end: how long a quiet stream may stay quiet, and for how long the log's end is still tried for.
_LAST_SILENT_S = 15.0
_LAST_LOG_S = 60.0


@dataclass(frozen=True)
class Patience:
    """How long the submitter puts up with what, in seconds.

    Attributes:
        start_s: For the dashboard to answer and to take the job.
        lost_s: For the dashboard to come back once the job was seen.
        silent_s: For a log without new lines, before it is read over a new connection; doubles up to ten minutes as long as
            nothing new comes, since the server notices an abandoned connection only at the next line.
    """

    start_s: float = 300.0
    lost_s: float = 600.0
    silent_s: float = 60.0


class _Silent(Exception):  # noqa: N818 - named after the fact
    """The log stream has said nothing for so long that it may be dead."""


def submit(
    config: str,
    address: str | None,
    submission_id: str | None,
    *,
    inline: bool = False,
    token: str | None = None,
    patience: Patience | None = None,
) -> None:
    """Submits the job unless it is there already, copies its log to stdout, and returns when it has ended, well or not.

    Args:
        config: The configuration file: on the cluster's side, or with ``inline`` on this side.
        address: The dashboard's ``host:port``, or its URL.
        submission_id: The job's name in the cluster; the same name is the same job.
        inline: Send the file's text along, for a cluster that does not have the file.
        token: The cluster's token, if it asks for one.
        patience: How long to wait for what.

    Raises:
        UserError: If something that is needed is missing, or the cluster refuses the token or the request.
        SystemFault: If the dashboard does not answer for too long, or has forgotten the job.
        Interrupted: At SIGTERM or SIGINT. The Ray job goes on: whoever deletes the pod for good, stops the job too (KubeRay's
            finalizer does), and any other end of the pod is followed by a new one that re-attaches.
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
    asyncio.run(_until_stopped(base_url(address), submission_id, body, token, patience or Patience()))


def request_body(config: str, submission_id: str, *, inline: bool) -> dict[str, Any]:
    """What is posted to ``/api/jobs/``.

    The configuration is not looked into. A mistake in it must end the Ray job, whose verdict the operator shows; here it
    would be a failing pod, started again and again while GPUs wait. No entrypoint resources are asked for either: then Ray
    runs the driver on the head, also where the head has no CPUs for tasks.

    Raises:
        UserError: If the file cannot be sent along.
    """
    words = ["batch-inference", "run", "--config", f"env:{CONFIG_VARIABLE}" if inline else config]
    # Ray gives the entrypoint to a shell.
    body: dict[str, Any] = {
        "submission_id": submission_id,
        "entrypoint": shlex.join([*words, "--address", "auto", "--dashboard-host", "none", "--log-format", "json"]),
    }
    variables = {RUN_VARIABLE: os.environ[RUN_VARIABLE]} if os.environ.get(RUN_VARIABLE) else {}
    if inline:
        # Not within the entrypoint, which Ray writes into the log's head and so into the message of a job that fails early.
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
            f"{path} cannot be sent along: it takes {size:,} bytes, {INLINE_MAX_BYTES:,} bytes of text are possible",
            "Put long lists into files that the configuration names: input.manifest, model.labels.",
        )
    return text


async def _until_stopped(url: str, job_id: str, body: dict[str, Any], token: str | None, patience: Patience) -> None:
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        # As the first process of a container it would not be ended by a signal that it does not handle.
        loop.add_signal_handler(number, task.cancel)  # type: ignore[union-attr]
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    # A new connection for each request: a kept one may be dead by the next. Proxies of the environment are not asked.
    connector = aiohttp.TCPConnector(force_close=True)
    # Every request has a limit of its own; the log's connection has none.
    no_limit = aiohttp.ClientTimeout(total=None)
    try:
        async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=no_limit) as session:
            await Submitter(JobServer(session, url, job_id), body, patience).run()
    except asyncio.CancelledError:
        raise Interrupted(
            f"the submitter was stopped; job {job_id} is left as it is", "Run the same command again: it re-attaches."
        ) from None


class LogCopy:
    """Copies whole lines to stdout, each once, of a text that only grows and is replayed from its start at every attempt."""

    def __init__(self) -> None:
        self.taken = 0
        """Characters taken in all."""
        self._place = 0
        self._line = ""

    def rewind(self) -> None:
        """The text starts anew: what was taken is not taken again."""
        self._place = 0

    def take(self, text: str) -> bool:
        """Goes on with the text; whether anything of it is new."""
        new = text[max(0, self.taken - self._place) :]
        self._place += len(text)
        if not new:
            return False
        self.taken += len(new)
        lines, newline, rest = new.rpartition("\n")
        if newline:
            self._write(self._line + lines + newline)
            self._line = ""
        # A line that is not complete yet waits, so that none of the submitter's own comes into its middle.
        self._line += rest
        return True

    def finish(self) -> None:
        """Writes the last line, if it has no end."""
        if self._line:
            self._write(self._line + "\n")
            self._line = ""

    def _write(self, text: str) -> None:
        sys.stdout.buffer.write(text.encode("utf-8", "backslashreplace"))
        sys.stdout.buffer.flush()


class Submitter:
    """One job's way, from its submission to its end.

    Args:
        server: The cluster's job server.
        body: What is posted if the job is not there.
        patience: How long to wait for what.
    """

    def __init__(self, server: JobServer, body: dict[str, Any], patience: Patience) -> None:
        self._server = server
        self._body = body
        self._patience = patience
        self._copy = LogCopy()
        self._silent_s = patience.silent_s
        self._submitted_ms: int | None = None
        self._heard_at = 0.0
        self._ended: Job | None = None
        self._ended_at = 0.0

    async def run(self) -> Job:
        """Submits and follows the job; returns it when it has ended, whether well or not.

        Raises:
            UserError: If the cluster refuses the token or the request.
            SystemFault: If the dashboard does not answer for too long, or has forgotten the job.
        """
        job = await self._ensure()
        self._submitted_ms = job.submitted_ms
        self._heard_at = time.monotonic()
        try:
            job = await self._follow()
        finally:
            self._copy.finish()
        facts = {} if job.exit_code is None else {"exit_code": job.exit_code}
        # The lines after the first are the log's last, or were written there too.
        sentence = job.message.partition("\n")[0].partition(", last available logs")[0]
        log.info(f"job {self._server.job_id} is {job.status}", reason=sentence, **facts)
        return job

    async def _ensure(self) -> Job:
        deadline = time.monotonic() + self._patience.start_s
        job_id, created = self._server.job_id, False
        for attempt, delay_s in enumerate(_delays()):
            try:
                job = await self._server.read()
                if job is None:
                    # Where another submitter was faster, or an answer was lost on its way, there is one now.
                    created = await self._server.create(self._body)
                    job = await self._server.read()
                if job is not None:
                    log.info(f"job {job_id} is " + ("submitted" if created else f"there already: {job.status}"))
                    return job
                raise NoAnswer(f"does not know job {job_id} right after it was submitted")
            except NoAnswer as exc:
                if time.monotonic() + delay_s > deadline:
                    raise SystemFault(
                        f"the Ray dashboard at {self._server.url} did not take the job within {self._patience.start_s:g} s: {exc}",
                        "Check the address, and whether the head is up and its port 8265 may be reached from here.",
                    ) from None
                if attempt == 0:
                    log.info(f"waiting for the Ray dashboard at {self._server.url}", reason=str(exc))
            await asyncio.sleep(delay_s)
        raise AssertionError("the delays have no end")

    async def _follow(self) -> Job:
        broken_at: float | None = None
        announced = -1  # a break is spoken of once for each bit of progress, not for each attempt
        delays = _delays()
        while True:
            taken, complete, reason = self._copy.taken, False, ""
            try:
                async with self._server.log() as stream:
                    if broken_at is not None:
                        log.info(f"re-attached to the log after {time.monotonic() - broken_at:.0f} s")
                        broken_at = None
                    await self._read(stream)
                complete, reason = True, "closed by the server"
            except _Silent:
                pass
            except NoAnswer as exc:
                reason = str(exc)
            job = await self._look()
            if job is not None and self._ended is not None:
                # Only the server's own word is the log's end; but nothing shall wait for it for long once the job is over.
                if not complete and time.monotonic() - self._ended_at > _LAST_LOG_S:
                    log.warning("the end of the log could not be read", reason=reason)
                    return job
                if complete:
                    if self._copy.taken <= max(announced, 0):
                        # Ray closes a log politely, too, at bytes that are not UTF-8 and before lines of more than 4 MB.
                        log.warning("the log may be incomplete: nothing of it came after its connection broke")
                    return job
            if self._copy.taken > taken:
                delays = _delays()
            if reason:
                if self._copy.taken > announced:
                    announced, broken_at = self._copy.taken, time.monotonic()
                    log.info("the log connection broke", reason=reason)
                await asyncio.sleep(next(delays))

    async def _read(self, stream: LogStream) -> None:
        """Copies the log until the server says that this was all.

        Raises:
            NoAnswer: If the connection breaks.
            _Silent: If it has been quiet for too long.
        """
        self._copy.rewind()
        spoke_at = time.monotonic()
        while (text := await stream.next(min(_POLL_S, self._silent_s))) is not None:
            if text:
                spoke_at = self._heard_at = time.monotonic()
                if self._copy.take(text):
                    self._silent_s = self._patience.silent_s
                continue
            await self._look()
            if time.monotonic() - spoke_at >= (self._silent_s if self._ended is None else _LAST_SILENT_S):
                self._silent_s = min(_SILENT_MAX_S, 2 * self._silent_s)
                raise _Silent

    async def _look(self) -> Job | None:
        """The job's state, or None if the dashboard does not answer; once the job was seen to end, that end.

        Raises:
            SystemFault: If it has not for too long, or does not know the job any more.
        """
        try:
            job = await self._server.read()
        except NoAnswer as exc:
            if self._ended is not None:
                return self._ended
            if time.monotonic() - self._heard_at > self._patience.lost_s:
                raise SystemFault(
                    f"the Ray dashboard at {self._server.url} has not answered for {self._patience.lost_s:g} s: {exc}",
                    "Look after the Ray head. The same command follows the job if it is still there, else it submits it again, "
                    "and finished shards are not done again.",
                ) from None
            return None
        self._heard_at = time.monotonic()
        if job is None or job.submitted_ms != self._submitted_ms:
            if self._ended is not None:
                return self._ended
            raise SystemFault(
                f"the Ray cluster has forgotten job {self._server.job_id}: its head was lost, and the job with it",
                "The same command submits it again, and finished shards are not done again.",
            )
        if job.ended and self._ended is None:
            self._ended, self._ended_at = job, self._heard_at
        return job


def _delays() -> Iterator[float]:
    """Seconds between attempts, without end: doubling from half a second to 15, shortened at random so that many do not meet."""
    delay_s = 0.5
    while True:
        yield delay_s * random.uniform(0.5, 1.0)  # noqa: S311 - no secret depends on it
        delay_s = min(15.0, 2 * delay_s)
