"""Starts one run of a schedule and follows it to its end: what the pods of the chart's CronJob do.

Run: python -m batch_inference.scheduler FOLDER

FOLDER has ``rayjob.json``, the run as the chart makes it, and ``job.yaml``, what it runs. The Job that this pod belongs to owns
the run, so that what Kubernetes does with Jobs of a schedule holds for runs: ``concurrencyPolicy`` waits for this pod or removes
it, and the run with it; history limits remove old runs. A pod that is replaced finds the run of its Job and follows it on.

Exit codes: 0 the run succeeded, 1 it ended otherwise (no retry), 5 the API server could not be asked (retried).
"""

from __future__ import annotations

import datetime
import http.client
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
import zoneinfo
from pathlib import Path
from typing import Any

#: Stands for the run's name in ``rayjob.json``.
PLACEHOLDER = "__RUN__"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIME = re.compile(r"\{time(?P<back>-\d+[dhm])?:(?P<format>%[^}]*)\}")
SCHEDULED = "batch.kubernetes.io/cronjob-scheduled-timestamp"
_ENDED = frozenset({"Complete", "Failed", "ValidationFailed"})
_REQUEST_S, _POLL_S = 30.0, 10.0
# As long as an API server may be away while its cluster is upgraded.
_AWAY_S = 600.0


class Refused(Exception):  # noqa: N818 - named after the fact
    """The API server said no, which asking again does not change."""


class Api:
    """The namespace's objects, through the API server.

    Args:
        url: The API server's URL and the namespace's path, ``https://…/namespaces/NAME`` filled in at ``{}`` with the API group.
        token: File of the bearer token, read anew for each request, since it is replaced every hour; None for none.
        context: TLS, with the cluster's own authority.
    """

    def __init__(self, url: str, token: Path | None = None, context: ssl.SSLContext | None = None) -> None:
        self._url, self._token, self._context = url, token, context

    @classmethod
    def of_this_pod(cls) -> Api:
        """With the pod's own identity."""
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        host = f"[{host}]" if ":" in host else host
        namespace = (ACCOUNT / "namespace").read_text()
        context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
        return cls(f"https://{host}:{port}/{{}}/namespaces/{namespace}", ACCOUNT / "token", context)

    def get(self, group: str, kind: str, name: str) -> dict[str, Any] | None:
        """Returns an object, or None where there is none."""
        status, body = self._ask("GET", f"{self._url.format(group)}/{kind}/{name}")
        return None if status == 404 else body

    def create(self, group: str, kind: str, body: dict[str, Any]) -> bool:
        """Creates an object; returns whether there was none of its name."""
        status, _ = self._ask("POST", f"{self._url.format(group)}/{kind}", body)
        return status != 409

    def _ask(self, method: str, url: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        deadline = time.monotonic() + _AWAY_S
        wait = 1.0
        while True:
            try:
                return self._once(method, url, body)
            except (OSError, http.client.HTTPException) as exc:
                if time.monotonic() + wait > deadline:
                    raise OSError(str(exc)) from exc
                print(f"the API server can't be asked, again in {wait:g} s: {exc}", flush=True)
            time.sleep(wait)
            wait = min(30.0, 2 * wait)

    def _once(self, method: str, url: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token.read_text()}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, method=method, headers=headers)  # noqa: S310 - https of the cluster
        try:
            with urllib.request.urlopen(request, timeout=_REQUEST_S, context=self._context) as answer:  # noqa: S310
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as exc:
            said = exc.read().decode(errors="replace")[:2000]
            if (method, exc.code) in {("GET", 404), ("POST", 409)}:
                return exc.code, {}
            if exc.code < 500 and exc.code != 429:
                raise Refused(f"{method} {url}: HTTP {exc.code}: {said}") from None
            raise OSError(f"HTTP {exc.code}: {said}") from None


def filled_in(text: str, at: datetime.datetime) -> str:
    """Puts the time of a run into a text.

    Args:
        text: ``{time:FORMAT}`` in it is the time, ``{time-1d:FORMAT}`` a day before (``h`` hours, ``m`` minutes); FORMAT as
            ``strftime`` takes it, such as ``%Y-%m-%d``.
        at: The time that the run was scheduled for, in the schedule's time zone.
    """

    def put(found: re.Match[str]) -> str:
        back = found["back"]
        units = {"d": "days", "h": "hours", "m": "minutes"}
        earlier = datetime.timedelta(**{units[back[-1]]: int(back[1:-1])}) if back else datetime.timedelta()
        return (at - earlier).strftime(found["format"])

    return TIME.sub(put, text)


def start(api: Api, folder: Path, job: dict[str, Any], zone: str) -> str:
    """Creates the run of a Job, unless it is there, and returns its name.

    Raises:
        Refused: If the API server refuses it, or a run of that minute is another Job's.
    """
    meta = job["metadata"]
    when = datetime.datetime.fromisoformat(meta.get("annotations", {}).get(SCHEDULED) or meta["creationTimestamp"])
    rayjob = json.loads((folder / "rayjob.json").read_text())
    # Minutes since 1970, as in the names that Kubernetes gives to Jobs of a schedule.
    name = f"{rayjob['metadata']['generateName']}{int(when.timestamp()) // 60}"
    owner = [{"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"]}]
    rayjob = json.loads(json.dumps(rayjob).replace(PLACEHOLDER, name))
    del rayjob["metadata"]["generateName"]
    metadata = {**rayjob["metadata"], "name": name, "ownerReferences": owner}
    text = filled_in((folder / "job.yaml").read_text(), when.astimezone(zoneinfo.ZoneInfo(zone)))
    config = {
        "apiVersion": "v1", "kind": "ConfigMap", "immutable": True, "data": {"job.yaml": text},
        "metadata": {"name": name, "labels": metadata["labels"], "ownerReferences": owner},
    }  # fmt: skip
    api.create("api/v1", "configmaps", config)
    if api.create("apis/ray.io/v1", "rayjobs", {**rayjob, "metadata": metadata}):
        print(f"started {name}, scheduled for {when.isoformat()}", flush=True)
    else:
        there = api.get("apis/ray.io/v1", "rayjobs", name) or {}
        owners = [item["uid"] for item in there.get("metadata", {}).get("ownerReferences", [])]
        if meta["uid"] not in owners:
            raise Refused(f"the run {name} is there already, and another Job's: wait a minute and try again")
        print(f"following {name}, which is there already", flush=True)
    return name


def follow(api: Api, name: str, poll_s: float = _POLL_S) -> bool:
    """Waits for the end of a run, prints how it gets on, and returns whether it succeeded.

    Raises:
        Refused: If the run is gone.
    """
    before = ""
    while True:
        run = api.get("apis/ray.io/v1", "rayjobs", name)
        if run is None:
            raise Refused(f"the run {name} is gone: someone deleted it")
        status = run.get("status", {})
        state = status.get("jobDeploymentStatus") or ("Suspended" if run["spec"].get("suspend") else "New")
        if state != before:
            print(f"{name}: {state}", flush=True)
            before = state
        if state in _ENDED:
            print(status.get("message") or status.get("reason") or status.get("jobStatus", ""), flush=True)
            return bool(status.get("jobStatus") == "SUCCEEDED")
        time.sleep(poll_s)


def main(args: list[str]) -> int:
    """Returns the exit code."""
    if len(args) != 1:
        print("usage: python -m batch_inference.scheduler FOLDER", file=sys.stderr)
        return 2
    if "KUBERNETES_SERVICE_HOST" not in os.environ or "SCHEDULE_JOB" not in os.environ:
        print("error: this is for the pods of the chart's CronJob (schedule.cron)", file=sys.stderr)
        return 2
    try:
        api = Api.of_this_pod()
        job = api.get("apis/batch/v1", "jobs", os.environ["SCHEDULE_JOB"])
        if job is None:
            raise Refused("the Job of this pod is gone")
        name = start(api, Path(args[0]), job, os.environ.get("SCHEDULE_TIME_ZONE") or "UTC")
        return 0 if follow(api, name) else 1
    except Refused as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"error: the API server has not answered for {_AWAY_S:g} s: {exc}", file=sys.stderr)
        return 5


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
