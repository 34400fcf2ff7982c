"""Jobs in Kueue's queues: order, priority, and what Kueue accepts."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.charts.render import merged, rayjob
from tests.charts.rules import CASES, Case
from tests.e2e.runs import BROKEN, PHOTOS, SLOW, Releases, Run, verified
from tests.e2e.world import NAMESPACE, World, until
from tests.platform.argocd import Argo, Timeline
from tests.platform.kueue import POOL, Queue, print_history

ONE_GPU: dict[str, Any] = {"job": {"inference": {"actors": 1}}}
ROUNDS = 10
OF_PATIENT = "app.kubernetes.io/instance=patient"


def queued(priority: str = "") -> dict[str, Any]:
    return {"queue": {"name": "gpus", "priorityClass": priority}}


def pods(run: Run) -> dict[str, Any]:
    """Return the pods of a run by role, once they exist."""

    def there() -> dict[str, Any] | None:
        found = {pod.metadata.labels["app.kubernetes.io/component"]: pod for pod in run.pods}
        return found if {"head", "workers"} <= found.keys() else None

    return until(f"pods of {run.name}", there, 120)


def test_two_jobs_share_a_quota_one_after_the_other(world: World, queue: Queue, releases: Releases) -> None:
    queue.set_up("on-demand", {"gpu-on-demand": 1, "gpu-spot": 0})
    first = releases.rayjob("first", merged(ONE_GPU, queued()))
    queue.until_admitted(first)
    second = releases.rayjob("second", merged(ONE_GPU, queued()))
    why = queue.until_waiting(second)
    print(f"\nthe second job waits: {why}")
    assert "insufficient unused quota for nvidia.com/gpu" in why
    assert second.object["spec"]["suspend"] is True

    # The workers are sent to the pool that they have quota in, head and submitter to none.
    assert queue.flavors(first)["gpu"]["nvidia.com/gpu"] == "gpu-on-demand"
    found = pods(first)
    assert found["workers"].spec.node_selector == {POOL: "on-demand"}
    assert not found["head"].spec.node_selector

    def ended() -> bool:
        assert not (queue.condition(first, "Finished") == {} and second.pods), "both run"
        return bool(queue.condition(first, "Finished"))

    until("the first ends", ended, 420)
    first.succeeded()
    second.succeeded()
    history = queue.history(first, second, reasons=("Admitted", "FinishedWorkload", "Finished"))
    print_history(history)
    steps = [(name, reason.removesuffix("Workload")) for _, name, reason in history]
    assert list(dict.fromkeys(steps)) == [
        ("first", "Admitted"),
        ("first", "Finished"),
        ("second", "Admitted"),
        ("second", "Finished"),
    ]
    for release in ("first", "second"):
        verified(world, f"s3://images/out/{release}/", PHOTOS, BROKEN)


def test_next_job_gets_the_other_pool_if_one_is_full(queue: Queue, releases: Releases) -> None:
    """On-demand first, then spot, as in the example; other tests cover that pods start there."""
    queue.set_up("on-demand", {"gpu-on-demand": 1, "gpu-spot": 1})
    first = releases.rayjob("first", merged(ONE_GPU, queued()))
    queue.until_admitted(first)
    second = releases.rayjob("second", merged(ONE_GPU, queued()))
    queue.until_admitted(second)
    got = {run.name: queue.flavors(run)["gpu"]["nvidia.com/gpu"] for run in (first, second)}
    print(f"\n{got}")
    assert list(got.values()) == ["gpu-on-demand", "gpu-spot"]
    worker = pods(second)["workers"].spec
    assert worker.node_selector == {POOL: "spot"}
    assert {"nvidia.com/gpu", "spot"} <= {item.key for item in worker.tolerations}


def test_urgent_job_takes_the_gpus_of_one_that_can_wait_which_resumes(
    world: World, queue: Queue, releases: Releases, slow_predictor: Path
) -> None:
    """The only quota is that of spot nodes; Kueue adds their labels and tolerations."""
    queue.set_up("spot", {"gpu-on-demand": 0, "gpu-spot": 1})
    names = [item.path for item in world.store("s3://images/photos/").objects()]
    rows = [f"s3://images/photos/{name},{i}" for i in range(ROUNDS) for name in sorted(names)]
    world.store("s3://images").put("many.csv", "\n".join(["uri,round", *rows]).encode())
    output = world.store("s3://images/out/patient/")

    job = merged(SLOW, {"job": {"shard_size": 20, "inference": {"actors": 1}}})
    patient = releases.rayjob("patient", merged(job, queued("nightly")))
    queue.until_admitted(patient)
    worker = pods(patient)["workers"].spec
    assert worker.node_selector == {POOL: "spot"}
    assert {"nvidia.com/gpu", "spot"} <= {item.key for item in worker.tolerations}
    patient.until_running()
    until("two shards of the patient job", lambda: len(list(output.objects("_commits"))) >= 2, 420)

    urgent = releases.rayjob("urgent", merged(ONE_GPU, queued("urgent")))
    until("the patient job gives way", lambda: patient.status.get("jobDeploymentStatus") == "Suspended", 180)
    before = {item.path: item for item in output.objects("_commits")}
    queue.until_admitted(urgent)
    begun = time.monotonic()
    until("the pods of the patient job go", lambda: not patient.kubernetes.pods(OF_PATIENT), 90)
    gone = time.monotonic() - begun
    urgent.succeeded()
    patient.succeeded()

    history = queue.history(patient, urgent, reasons=("Admitted", "Preempted", "FinishedWorkload", "Finished"))
    print()
    print_history(history)
    steps = list(dict.fromkeys((name, reason.removesuffix("Workload")) for _, name, reason in history))
    wanted = [
        ("patient", "Admitted"),
        ("patient", "Preempted"),
        ("urgent", "Admitted"),
        ("urgent", "Finished"),
        ("patient", "Finished"),
    ]
    assert [step for step in steps if step in wanted] == wanted

    # Nothing is lost, nothing is done twice: each input once, and what was committed before is as it was.
    verified(world, "s3://images/out/patient/", len(rows), ROUNDS * BROKEN)
    after = {item.path: item for item in output.objects("_commits")}
    attempts = {path: json.loads(output.get(path))["attempt"] for path in after}
    print(
        f"{len(before)} of {len(after)} shards were there when the job was suspended, its pods were gone {gone:.0f} s later"
    )
    assert 2 <= len(before) < len(after)
    assert {path: after[path] for path in before} == before
    assert len({attempts[path] for path in before}) == 1
    assert len(set(attempts.values())) == 2
    verified(world, "s3://images/out/urgent/", PHOTOS, BROKEN)


def created(world: World, manifest: dict[str, Any]) -> str:
    """Return the answer of the API server, with Kueue's webhooks, to a dry run of an object."""
    text = yaml.safe_dump({**manifest, "metadata": {**manifest["metadata"], "namespace": NAMESPACE}})
    return world.cluster.kubectl("create", "--dry-run=server", "--filename=-", stdin=text, check=False)


@pytest.mark.parametrize("case", [case for case in CASES if case.queued], ids=lambda case: case.title)
def test_kueue_refuses_by_hand_what_the_chart_refuses_in_values(case: Case, world: World, queue: Queue) -> None:
    """`tests/charts/test_rules.py` shows that the chart refuses the same cases."""
    manifest = copy.deepcopy(rayjob(merged(case.base, queued())))
    assert "created (server dry run)" in created(world, manifest)
    assert case.queued
    case.queued(manifest)
    said = created(world, manifest)
    assert "denied the request" in said
    assert case.kueue in said


def test_kueue_takes_a_job_that_may_grow(world: World, queue: Queue) -> None:
    values = {"queue": {"name": "gpus", "elastic": True}, "autoscaling": {"enabled": True}}
    assert "created (server dry run)" in created(world, rayjob(values))


def test_argo_cd_leaves_a_queued_job_to_kueue(world: World, argo: Argo, queue: Queue) -> None:
    """Kueue writes suspension and placement of pods into the run, which are not in Git, and Argo CD does not undo them."""
    queue.set_up("spot", {"gpu-on-demand": 0, "gpu-spot": 1})
    queue.hold("Hold")
    repository = argo.repository("queued-jobs")
    commit = repository.commit({"jobs/photos.yaml": argo.values("s3://images/out/git-queued/", queued())})
    timeline = Timeline()
    argo.example("application.yaml", repository)
    argo.until_synced("photos", commit, timeline)
    argo.until_healthy_is("Suspended", "photos", timeline)
    run = argo.only_run()
    # Longer than self-healing takes to begin.
    time.sleep(15)
    assert run.object["spec"]["suspend"] is True
    assert argo.application("photos").sync == "Synced"
    queue.hold("None")
    queue.until_admitted(run)
    generations, syncs = set(), set()

    def ended() -> bool:
        now = argo.application("photos")
        timeline.add(now)
        syncs.add(now.sync)
        generations.add(run.object["metadata"]["generation"])
        return now.health == "Healthy"

    until("the job ends well", ended, 420)
    print()
    timeline.print()
    print(f"sync: {sorted(syncs)}, generations of the run: {sorted(generations)}")
    assert timeline.of(run.name) == ["Suspended", "Progressing", "Healthy"]
    assert syncs == {"Synced"}
    assert argo.only_run().name == run.name
    assert queue.condition(run, "Evicted") == {}
    (group,) = run.object["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["template"]["spec"]["nodeSelector"] == {POOL: "spot"}
    verified(world, "s3://images/out/git-queued/", PHOTOS, BROKEN)
