"""The scheduler: starts one run of a schedule and follows it to its end, in a pod of the chart's CronJob.

Run: batch-inference schedule FOLDER

FOLDER holds ``rayjob.json``, the run as the chart renders it, and ``job.yaml``, its configuration. The Job of this pod owns the
run, so that Kubernetes' rules for Jobs of a schedule apply to runs too: ``concurrencyPolicy`` waits for this pod, or removes it
together with the run; history limits remove old runs. A replacement pod finds the run of its Job and continues to follow it.

Exit codes: 0 the run succeeded, 1 it ended otherwise (no retry), 5 the API server could not be reached (retried).
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

#: Placeholder of the run's name in ``rayjob.json``.
RUN_PLACEHOLDER = "__RUN__"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIME_PATTERN = re.compile(r"\{time(?P<back>-\d+[dhm])?:(?P<format>%[^}]*)\}")
SCHEDULED_ANNOTATION = "batch.kubernetes.io/cronjob-scheduled-timestamp"
_ENDED = frozenset({"Complete", "Failed", "ValidationFailed"})
_REQUEST_S, _POLL_S = 30.0, 10.0
# An API server may be away this long while its cluster is upgraded.
_AWAY_S = 600.0


class KubernetesApiError(Exception):
    """The API server refused a request, and would refuse it again."""


class KubernetesApi:
    """A client for the objects of one namespace.

    Args:
        url: The API server's URL and the namespace's path, ``https://…/{}/namespaces/NAME``; ``{}`` stands for the API group.
        token: File of the bearer token, or None. It is read for each request, since Kubernetes replaces it every hour.
        context: TLS settings with the cluster's own certificate authority.
    """

    def __init__(self, url: str, token: Path | None = None, context: ssl.SSLContext | None = None) -> None:
        self._url, self._token, self._context = url, token, context

    @classmethod
    def of_this_pod(cls) -> KubernetesApi:
        """Return a client with the identity of this pod."""
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
        host = f"[{host}]" if ":" in host else host
        namespace = (SERVICE_ACCOUNT / "namespace").read_text()
        context = ssl.create_default_context(cafile=str(SERVICE_ACCOUNT / "ca.crt"))
        return cls(f"https://{host}:{port}/{{}}/namespaces/{namespace}", SERVICE_ACCOUNT / "token", context)

    def get(self, group: str, kind: str, name: str) -> dict[str, Any] | None:
        """Return an object, or None if it does not exist."""
        status, body = self._ask("GET", f"{self._url.format(group)}/{kind}/{name}")
        return None if status == 404 else body

    def create(self, group: str, kind: str, body: dict[str, Any]) -> bool:
        """Create an object. Return False if its name is taken."""
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
                print(f"cannot reach the API server, next try in {wait:g} s: {exc}", flush=True)
            time.sleep(wait)
            wait = min(30.0, 2 * wait)

    def _once(self, method: str, url: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token.read_text()}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, method=method, headers=headers)  # noqa: S310 - https of the cluster
        try:
            with urllib.request.urlopen(request, timeout=_REQUEST_S, context=self._context) as response:  # noqa: S310
                return response.status, json.load(response)
        except urllib.error.HTTPError as exc:
            reply = exc.read().decode(errors="replace")[:2000]
            if (method, exc.code) in {("GET", 404), ("POST", 409)}:
                return exc.code, {}
            if exc.code < 500 and exc.code != 429:
                raise KubernetesApiError(f"{method} {url}: HTTP {exc.code}: {reply}") from None
            raise OSError(f"HTTP {exc.code}: {reply}") from None


def fill_in_times(text: str, at: datetime.datetime) -> str:
    """Replace the time placeholders of a text with the time of a run.

    Args:
        text: ``{time:FORMAT}`` stands for the time, ``{time-1d:FORMAT}`` for a day before it (``h`` hours, ``m`` minutes). FORMAT
            is that of ``strftime``, such as ``%Y-%m-%d``.
        at: Scheduled time of the run, in the schedule's time zone.
    """

    def expand(match: re.Match[str]) -> str:
        back = match["back"]
        units = {"d": "days", "h": "hours", "m": "minutes"}
        earlier = datetime.timedelta(**{units[back[-1]]: int(back[1:-1])}) if back else datetime.timedelta()
        return (at - earlier).strftime(match["format"])

    return TIME_PATTERN.sub(expand, text)


def start_run(api: KubernetesApi, folder: Path, job: dict[str, Any], zone: str) -> str:
    """Create the run of a Job unless it exists, and return its name.

    Raises:
        KubernetesApiError: If the API server refuses it, or the run of that minute belongs to another Job.
    """
    meta = job["metadata"]
    when = datetime.datetime.fromisoformat(
        meta.get("annotations", {}).get(SCHEDULED_ANNOTATION) or meta["creationTimestamp"]
    )
    rayjob = json.loads((folder / "rayjob.json").read_text())
    # Minutes since 1970, as in the names that Kubernetes gives to the Jobs of a schedule.
    name = f"{rayjob['metadata']['generateName']}{int(when.timestamp()) // 60}"
    owner = [{"apiVersion": "batch/v1", "kind": "Job", "name": meta["name"], "uid": meta["uid"]}]
    rayjob = json.loads(json.dumps(rayjob).replace(RUN_PLACEHOLDER, name))
    del rayjob["metadata"]["generateName"]
    metadata = {**rayjob["metadata"], "name": name, "ownerReferences": owner}
    text = fill_in_times((folder / "job.yaml").read_text(), when.astimezone(zoneinfo.ZoneInfo(zone)))
    config = {
        "apiVersion": "v1", "kind": "ConfigMap", "immutable": True, "data": {"job.yaml": text},
        "metadata": {"name": name, "labels": metadata["labels"], "ownerReferences": owner},
    }  # fmt: skip
    api.create("api/v1", "configmaps", config)
    if api.create("apis/ray.io/v1", "rayjobs", {**rayjob, "metadata": metadata}):
        print(f"started {name}, scheduled for {when.isoformat()}", flush=True)
    else:
        existing = api.get("apis/ray.io/v1", "rayjobs", name) or {}
        owners = [item["uid"] for item in existing.get("metadata", {}).get("ownerReferences", [])]
        if meta["uid"] not in owners:
            raise KubernetesApiError(
                f"the run {name} exists already and belongs to another Job: wait a minute and try again"
            )
        print(f"following {name}, which exists already", flush=True)
    return name


def follow_run(api: KubernetesApi, name: str, poll_s: float = _POLL_S) -> bool:
    """Print the states of a run until it ends, and return whether it succeeded.

    Raises:
        KubernetesApiError: If the run was deleted.
    """
    last_state = ""
    while True:
        run = api.get("apis/ray.io/v1", "rayjobs", name)
        if run is None:
            raise KubernetesApiError(f"the run {name} is gone: someone deleted it")
        status = run.get("status", {})
        state = status.get("jobDeploymentStatus") or ("Suspended" if run["spec"].get("suspend") else "New")
        if state != last_state:
            print(f"{name}: {state}", flush=True)
            last_state = state
        if state in _ENDED:
            print(status.get("message") or status.get("reason") or status.get("jobStatus", ""), flush=True)
            return bool(status.get("jobStatus") == "SUCCEEDED")
        time.sleep(poll_s)


def main(args: list[str]) -> int:
    """Run the scheduler and return its exit code."""
    if len(args) != 1:
        print("usage: batch-inference schedule FOLDER", file=sys.stderr)
        return 2
    if "KUBERNETES_SERVICE_HOST" not in os.environ or "SCHEDULE_JOB" not in os.environ:
        print("error: this command is for the pods of the chart's CronJob (schedule.cron)", file=sys.stderr)
        return 2
    try:
        api = KubernetesApi.of_this_pod()
        job = api.get("apis/batch/v1", "jobs", os.environ["SCHEDULE_JOB"])
        if job is None:
            raise KubernetesApiError("the Job of this pod is gone")
        name = start_run(api, Path(args[0]), job, os.environ.get("SCHEDULE_TIME_ZONE") or "UTC")
        return 0 if follow_run(api, name) else 1
    except KubernetesApiError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"error: the API server has not answered for {_AWAY_S:g} s: {exc}", file=sys.stderr)
        return 5
