"""A client of Ray's job server, a part of the dashboard: reads the state of one job, submits it, and reads its log.

Ray's own client loads Ray, which takes more memory than a submitter's pod should need.
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
from batch_inference.text import last_line

_REQUEST_S = 30.0
# At the first submission the cluster's job agent connects to Ray first.
_SUBMIT_S = 120.0
_ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})


@dataclass(frozen=True)
class RayJobInfo:
    """The state of a job, as the cluster reports it.

    Attributes:
        status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: Ray's message, followed by the last lines of the log if the job failed.
        exit_code: Exit code of the driver, if it has ended.
        submitted_ms: Time of submission, by the cluster's clock.
    """

    status: str
    message: str
    exit_code: int | None
    submitted_ms: int | None

    @property
    def ended(self) -> bool:
        """Whether the status is final."""
        return self.status in _ENDED


class JobServerError(Exception):
    """The dashboard could not be reached, broke off, or sent an invalid response; the request may be repeated."""


class JobServer:
    """A client for one job of Ray's job server.

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

    async def read(self) -> RayJobInfo | None:
        """Return the job's state, or None if the cluster does not know the job.

        Raises:
            JobServerError: If the server gives no valid answer.
            UserError: If the token is refused.
        """
        status, text = await self._ask("GET", self._job_path, _REQUEST_S)
        if status == 404 and "does not exist" in text:
            return None
        try:
            info = json.loads(text) if status == 200 else {}
            return RayJobInfo(info["status"], info["message"] or "", info["driver_exit_code"], info["start_time"])
        except (ValueError, KeyError, TypeError):
            raise JobServerError(f"answered {status}: {last_line(text)}") from None

    async def create(self, body: dict[str, Any]) -> bool:
        """Submit the job. Return False if its submission ID is taken.

        Raises:
            JobServerError: If the request failed; the job may have been created nevertheless.
            UserError: If the token or the request is refused.
        """
        status, text = await self._ask("POST", "/api/jobs/", _SUBMIT_S, json=body)
        if status == 200:
            return True
        if "Please use a different submission_id" in text:
            return False
        # The head answers 500 and quotes the agent's answer when the agent behind it answered 400.
        if status == 400 or "with status code 400" in text:
            raise UserError(
                f"the Ray cluster refused the job: {last_line(text)}",
                "Compare the cluster's Ray version with this program's.",
            )
        raise JobServerError(f"answered {status} to the submission: {last_line(text)}")

    @contextlib.asynccontextmanager
    async def log(self) -> AsyncIterator[LogStream]:
        """Open the job's log, from its start, over a new connection.

        Raises:
            JobServerError: If it cannot be opened.
            UserError: If the token is refused.
        """
        wait = aiohttp.ClientWSTimeout(ws_close=0.5)  # the server does not answer a close
        try:
            socket = await asyncio.wait_for(
                self._session.ws_connect(f"{self.url}{self._job_path}/logs/tail", timeout=wait), _REQUEST_S
            )
        except aiohttp.WSServerHandshakeError as exc:
            self._check_allowed(exc.status)
            raise JobServerError(f"answered {exc.status} when asked for the log") from None
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
            raise JobServerError(_reason(exc)) from None
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
            raise JobServerError(_reason(exc)) from None
        self._check_allowed(response.status)
        return response.status, text

    def _check_allowed(self, status: int) -> None:
        if status in (401, 403):
            raise UserError(
                f"the Ray dashboard at {self.url} " + ("asks for a token" if status == 401 else "refuses the token"),
                "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or ~/.ray/auth_token) to the cluster's token.",
            )


class LogStream:
    """A connection to a log."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse[bool]) -> None:
        self._socket = socket

    async def next(self, timeout_s: float) -> str | None:
        """Return more of the log: "" if none came within ``timeout_s`` seconds, None once the server has sent all of it.

        Raises:
            JobServerError: If the connection broke.
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
        raise JobServerError(f"the connection was lost ({message.type.name.lower()})")


def token_from_environment() -> str | None:
    """Return the cluster's token from where Ray 2.60 looks for it, or None if there is none or ``RAY_AUTH_MODE`` is ``disabled``."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return None
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if not token:
        path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token"
        with contextlib.suppress(OSError):
            token = Path(path).read_text(encoding="utf-8").strip()
    return token or None


def base_url(address: str) -> str:
    """Return the dashboard's URL without a slash at its end; its scheme is http unless given.

    Raises:
        UserError: If it is not the address of a dashboard, such as ``ray://…``.
    """
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is not a number
        valid = False
    if not valid:
        raise UserError(
            f"{address} is not the address of a Ray dashboard", "Write host:port or http://host:port; its port is 8265."
        )
    return url


def _reason(exc: BaseException) -> str:
    return "no answer in time" if isinstance(exc, asyncio.TimeoutError) else last_line(str(exc) or type(exc).__name__)
