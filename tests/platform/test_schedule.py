"""A release with a schedule, on a cluster: Kubernetes starts the runs and applies its rules for Jobs to them."""

from __future__ import annotations

import time
from typing import Any

from tests.e2e.runs import RUN_SECONDS, Kubernetes, Releases
from tests.e2e.world import NAMESPACE, World, until

EVERY_MINUTE = {
    "schedule": {"cron": "* * * * *"},
    "job": {"output": {"uri": "s3://images/out/{time:%Y-%m-%d-%H%M}/"}, "inference": {"actors": 1}},
}


def test_runs_start_by_the_clock_one_at_a_time_and_belong_to_their_jobs(
    world: World, kubernetes: Kubernetes, releases: Releases
) -> None:
    releases.schedule("nightly", EVERY_MINUTE)

    def runs() -> list[dict[str, Any]]:
        named = [run for run in kubernetes.ray("rayjobs") if run["metadata"]["name"].startswith("nightly-")]
        return sorted(named, key=lambda run: str(run["metadata"]["name"]))

    def ended() -> dict[str, Any] | None:
        found = runs()
        return (
            found[0]
            if found and found[0].get("status", {}).get("jobDeploymentStatus") in ("Complete", "Failed")
            else None
        )

    (first,) = until("the first run", runs, 150)
    # Its minute, and those that were left out while it went on.
    done = until("the end of the first run", ended, RUN_SECONDS)
    assert done["status"]["jobStatus"] == "SUCCEEDED", done["status"]
    jobs = [
        job for job in kubernetes.batch.list_namespaced_job(NAMESPACE).items if job.metadata.name.startswith("nightly-")
    ]
    by_name = {job.metadata.name: job for job in jobs}
    (owner,) = first["metadata"]["ownerReferences"]
    assert owner["uid"] == by_name[owner["name"]].metadata.uid
    until("the end of its Job", lambda: _succeeded(kubernetes, owner["name"]), 120)
    # The next minute after the end has the second run: none was made up for.
    second = until("the second run", lambda: runs()[1:], 150)[0]
    assert int(second["metadata"]["name"].rpartition("-")[2]) > int(first["metadata"]["name"].rpartition("-")[2])
    when = time.strftime("%Y-%m-%d-%H%M", time.gmtime(60 * int(first["metadata"]["name"].rpartition("-")[2])))
    checked = world.program("verify", f"s3://images/out/{when}/")
    print(checked.stdout)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    releases.uninstall("nightly")
    until("no runs without their schedule", lambda: not runs(), 120)


def _succeeded(kubernetes: Kubernetes, job: str) -> bool:
    return bool(kubernetes.batch.read_namespaced_job(job, NAMESPACE).status.succeeded)
