"""A client of Ray's job server, which is a part of the dashboard: asks for one job, submits it, reads its log.

Ray's own client would load Ray, which takes more memory than a submitter's pod is worth.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp

from batch_inference.errors import UserError
from batch_inference.wording import last_line

_REQUEST_S = 30.0
# The first submission makes the cluster's job agent connect to Ray first.
_SUBMIT_S = 120.0
_ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


@dataclass(frozen=True)
class Job:
    """What the cluster knows of the job.

    Attributes:
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: Ray's own sentence, followed by the log's last lines where the job failed.
        exit_code: The driver's, if it has ended.
        submitted_ms: When it was submitted, by the cluster's clock.
    """

    status: str
    message: str
    exit_code: int | None
    submitted_ms: int | None

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status in _ENDED


class NoAnswer(Exception):  # noqa: N818 - named after the fact
    """The dashboard could not be reached, broke off, or said something that is no answer; worth another try."""


class JobServer:
    """Ray's job server, asked for one job.

    Args:
        session: Sends the token with every request.
        url: The dashboard's URL, without a slash at its end.
        job_id: The submission ID.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, job_id: str) -> None:
        self.url = url
        self.job_id = job_id
        self._session = session
        self._job_path = f"/api/jobs/{quote(job_id, safe='')}"

    async def read(self) -> Job | None:
        """The job, or None if the cluster does not know it.

        Raises:
            NoAnswer: If neither can be told.
            UserError: If the token is refused.
        """
        status, text = await self._ask("GET", self._job_path, _REQUEST_S)
        if status == 404 and "does not exist" in text:
            return None
        try:
            found = json.loads(text) if status == 200 else {}
            return Job(found["status"], found["message"] or "", found["driver_exit_code"], found["start_time"])
        except (ValueError, KeyError, TypeError):
            raise NoAnswer(f"answered {status}: {last_line(text)}") from None

    async def create(self, body: dict[str, Any]) -> bool:
        """Submits the job; False if there is one with its ID already.

        Raises:
            NoAnswer: If that failed; the job may have been created all the same.
            UserError: If the token or the request is refused.
        """
        status, text = await self._ask("POST", "/api/jobs/", _SUBMIT_S, json=body)
        if status == 200:
            return True
        if "Please use a different submission_id" in text:
            return False
        # The head answers 500 where the agent behind it has answered 400, and quotes it.
        if status == 400 or "with status code 400" in text:
            raise UserError(
                f"the Ray cluster refused the job: {last_line(text)}",
                "Compare the cluster's Ray version with this program's.",
            )
        raise NoAnswer(f"answered {status} to the submission: {last_line(text)}")

    @contextlib.asynccontextmanager
    async def log(self) -> AsyncIterator[LogStream]:
        """The job's log from its start, over a connection of its own.

        Raises:
            NoAnswer: If there is none to be had.
            UserError: If the token is refused.
        """
        wait = aiohttp.ClientWSTimeout(ws_close=0.5)  # the server does not answer a close
        try:
            socket = await asyncio.wait_for(
                self._session.ws_connect(f"{self.url}{self._job_path}/logs/tail", timeout=wait), _REQUEST_S
            )
        except aiohttp.WSServerHandshakeError as exc:
            self._check_allowed(exc.status)
            raise NoAnswer(f"answered {exc.status} when asked for the log") from None
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
            raise NoAnswer(_reason(exc)) from None
        try:
            yield LogStream(socket)
        finally:
            await socket.close()

    async def _ask(self, method: str, path: str, timeout_s: float, **arguments: Any) -> tuple[int, str]:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            # A redirected POST would become a GET.
            async with self._session.request(
                method, self.url + path, timeout=timeout, allow_redirects=False, **arguments
            ) as response:
                text = await response.text(errors="replace")
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
            raise NoAnswer(_reason(exc)) from None
        self._check_allowed(response.status)
        return response.status, text

    def _check_allowed(self, status: int) -> None:
        if status in (401, 403):
            raise UserError(
                f"the Ray dashboard at {self.url} " + ("asks for a token" if status == 401 else "refuses the token"),
                "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or ~/.ray/auth_token) to the cluster's token.",
            )


class LogStream:
    """One connection to a log."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse[bool]) -> None:
        self._socket = socket

    async def next(self, timeout_s: float) -> str | None:
        """More of the log: an empty text if there was none within ``timeout_s`` seconds, None if the server says that this was all.

        Raises:
            NoAnswer: If the connection broke.
        """
        try:
            message = await self._socket.receive(timeout=timeout_s)
        except asyncio.TimeoutError:
            return ""
        if message.type is aiohttp.WSMsgType.TEXT:
            return str(message.data)
        # A lost connection is CLOSED or ERROR, without the close frame that the server sends at the end.
        if message.type is aiohttp.WSMsgType.CLOSE and message.data == aiohttp.WSCloseCode.OK:
            return None
        raise NoAnswer(f"the connection was lost ({message.type.name.lower()})")


def token_from_environment() -> str | None:
    """The cluster's token, found where Ray 2.60 looks for it; None if ``RAY_AUTH_MODE`` is ``disabled`` or there is none."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return None
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if not token:
        path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token"
        with contextlib.suppress(OSError):
            token = Path(path).read_text(encoding="utf-8").strip()
    return token or None


def base_url(address: str) -> str:
    """The dashboard's URL without a slash at its end; a scheme that is given is kept.

    Raises:
        UserError: If it is the address of something else, such as ``ray://``.
    """
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        good = False
    if not good:
        raise UserError(
            f"{address} is not the address of a Ray dashboard", "Write host:port or http://host:port; its port is 8265."
        )
    return url


def _reason(exc: BaseException) -> str:
    return "no answer in time" if isinstance(exc, asyncio.TimeoutError) else last_line(str(exc) or type(exc).__name__)
