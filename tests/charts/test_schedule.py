"""A release with a schedule: a CronJob, and the run that its pods create."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import yaml

from batch_inference.kubernetes.schedule import start_run
from tests.charts import check
from tests.charts.flows import Pod, allowed
from tests.charts.oracle import ask
from tests.charts.render import Manifest, find, merged, rayjob, render

DAILY = {
    "schedule": {"cron": "30 2 * * *", "timeZone": "Europe/Berlin"},
    "job": {
        "input": {"uris": ["s3://images/{time-1d:%Y/%m/%d}/"]},
        "output": {"uri": "s3://predictions/{time:%Y-%m-%d}/"},
    },
}
JOB = {
    "metadata": {
        "name": "demo-schedule-29401530",
        "uid": "the-uid",
        "creationTimestamp": "2025-11-25T01:30:07Z",
        "annotations": {"batch.kubernetes.io/cronjob-scheduled-timestamp": "2025-11-25T02:30:00+01:00"},
    }
}


class Cluster:
    """A stand-in for the API server that keeps created objects."""

    def __init__(self) -> None:
        self.there: dict[tuple[str, str], dict[str, Any]] = {}

    def get(self, group: str, kind: str, name: str) -> dict[str, Any] | None:
        return self.there.get((kind, name))

    def create(self, group: str, kind: str, body: dict[str, Any]) -> bool:
        new = (kind, body["metadata"]["name"]) not in self.there
        self.there.setdefault((kind, body["metadata"]["name"]), body)
        return new


def made(values: dict[str, Any], folder: Path) -> tuple[Manifest, Manifest]:
    """Return the RayJob and the ConfigMap that a pod of the schedule creates."""
    data = next(item for item in render("rayjob", values) if item["kind"] == "ConfigMap")["data"]
    for name, text in data.items():
        (folder / name).write_text(text)
    cluster = Cluster()
    name = start_run(cluster, folder, JOB, values["schedule"]["timeZone"])  # type: ignore[arg-type]
    return cluster.there["rayjobs", name], cluster.there["configmaps", name]


def test_schedule_renders_a_cronjob_and_no_run() -> None:
    manifests = render("rayjob", DAILY)
    check.valid(manifests)
    assert "RayJob" not in {item["kind"] for item in manifests}
    job = find(manifests, "CronJob")["spec"]["jobTemplate"]["spec"]
    check.restricted(job["template"]["spec"])
    assert job["template"]["spec"]["automountServiceAccountToken"] is True
    assert find(manifests, "Role")["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]},
        {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create"]},
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get"]},
    ]


def test_run_is_the_one_that_the_chart_would_make_at_once(tmp_path: Path) -> None:
    values = merged(DAILY, {"queue": {"name": "gpus"}, "run": {"labels": {"team": "vision"}}})
    scheduled, config = made(values, tmp_path)
    at_once = rayjob(
        merged(
            values, {"schedule": {"cron": ""}, "job": {"input": {"uris": ["s3://i/"]}, "output": {"uri": "s3://o/"}}}
        )
    )
    name = scheduled["metadata"]["name"]
    assert name == f"demo-{int(datetime.datetime(2025, 11, 25, 1, 30, tzinfo=datetime.timezone.utc).timestamp()) // 60}"
    assert json.loads(json.dumps(scheduled["spec"]).replace(name, "RUN")) == json.loads(
        json.dumps(at_once["spec"]).replace(at_once["metadata"]["name"], "RUN")
    )
    assert scheduled["metadata"]["labels"] | {"app.kubernetes.io/managed-by": "Helm"} == at_once["metadata"]["labels"]
    assert (
        scheduled["metadata"]["ownerReferences"]
        == config["metadata"]["ownerReferences"]
        == [{"apiVersion": "batch/v1", "kind": "Job", "name": "demo-schedule-29401530", "uid": "the-uid"}]
    )
    check.valid([scheduled, config])
    assert ask(yaml.safe_dump(scheduled)) == ([f"RayJob/{name}"], [])
    job = yaml.safe_load(config["data"]["job.yaml"])
    assert job["input"]["uris"] == ["s3://images/2025/11/24/"]
    assert job["output"]["uri"] == "s3://predictions/2025-11-25/"


def test_longest_name_fits_and_is_not_that_of_a_job_of_the_schedule(tmp_path: Path) -> None:
    values = merged(DAILY, {"nameOverride": "a" * 38})
    run, _ = made(values, tmp_path)
    assert len(run["metadata"]["name"]) == 47
    cronjob = find(render("rayjob", values), "CronJob")["metadata"]["name"]
    assert len(cronjob) <= 52
    # The operator makes a Job of the run's name, and Kubernetes one of the schedule's name and the same minute.
    minute = run["metadata"]["name"].rpartition("-")[2]
    assert f"{cronjob}-{minute}" != run["metadata"]["name"]


def test_scheduler_reaches_the_api_server_and_no_other_pod_does() -> None:
    manifests = render("rayjob", DAILY)
    policies = [item for item in manifests if item["kind"] == "NetworkPolicy"]
    labels = find(manifests, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    server = Pod("API server", "10.96.0.1")
    assert allowed(policies, Pod("scheduler", "10.0.0.8", "default", labels), server, 6443)
    worker = {**labels, "app.kubernetes.io/component": "workers"}
    assert not allowed(policies, Pod("worker", "10.0.0.9", "default", worker), server, 6443)
