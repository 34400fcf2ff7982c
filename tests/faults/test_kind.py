"""At least three injections of each kind into jobs on a real cluster; `make test-faults` writes the table."""

from __future__ import annotations

import contextlib
import io
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from batch_inference.output.attempts import read_attempts
from tests.charts.render import merged
from tests.e2e.cluster.process import CommandError
from tests.e2e.runs import BROKEN, PHOTOS, SLOW, Kubernetes, Releases, Run, verified
from tests.e2e.world import NAMESPACE, World, until
from tests.faults.report import Outcome
from tests.support.limits import HANG_S

Record = Callable[[Outcome], None]
TIMES = 3
ROUNDS = 20
# In the middle of shards, and with many of them.
JOB = merged(SLOW, {"job": {"shard_size": 20, "inference": {"actors": 1}}})


@pytest.fixture
def many(world: World, slow_predictor: Path) -> int:
    """A manifest that names the photos again and again; how many rows it has."""
    names = [item.path for item in world.store("s3://images/photos/").objects()]
    rows = [f"s3://images/photos/{name},{i}" for i in range(ROUNDS) for name in sorted(names)]
    world.store("s3://images").put("many.csv", "\n".join(["uri,round", *rows]).encode())
    return len(rows)


def committed(world: World, release: str) -> int:
    return len(list(world.store(f"s3://images/out/{release}").objects("_commits")))


def goes_on(world: World, run: Run, release: str, before: int, seconds: float = 300) -> float:
    """Waits until a shard more is committed than there was; returns how long it took."""
    begun = time.monotonic()
    until(f"{run.name} commits again", lambda: committed(world, release) > before, seconds)
    return time.monotonic() - begun


def ends_well(world: World, run: Run, release: str, rows: int) -> None:
    run.succeeded()
    verified(world, f"s3://images/out/{release}/", rows, rows // PHOTOS * BROKEN)


class Count:
    """Injections into one job, and what became of them; `record` gets it whatever happens."""

    def __init__(self, fault: str, promise: str) -> None:
        self.fault, self.promise = fault, promise
        self.injected = self.held = self.lost = self.duplicated = 0
        self.longest = 0.0

    @contextlib.contextmanager
    def kept(self, record: Record, world: World, release: str = "", rows: int = 0) -> Iterator[None]:
        try:
            yield
        finally:
            if rows:
                self.rows(world, release, rows)
            record(
                Outcome(self.fault, self.promise, self.injected, self.held, self.lost, self.duplicated, self.longest)
            )

    def rows(self, world: World, release: str, rows: int) -> None:
        """Looks for the manifest's lines in the files of the output: a line is a photo and the number of its round."""
        store = world.store(f"s3://images/out/{release}")
        seen: Counter[Any] = Counter()
        for kind in ("predictions", "errors"):
            for info in list(store.objects(kind)):
                table = pd.read_parquet(io.BytesIO(store.get(info.path)))
                seen.update(zip(table["uri"], table["round"], strict=True))
        self.lost = rows - len(seen)
        self.duplicated = sum(count > 1 for count in seen.values())


def pod_of(run: Run, component: str) -> str:
    def running() -> str | None:
        for pod in run.pods:
            there = (
                pod.metadata.labels["app.kubernetes.io/component"] == component and not pod.metadata.deletion_timestamp
            )
            if (
                there
                and all(s.ready for s in pod.status.container_statuses or [None] if s is not None)
                and pod.status.phase == "Running"
            ):
                return str(pod.metadata.name)
        return None

    return until(f"a {component} pod of {run.name}", running, 300)


def kill_in_node(world: World, words: str, number: str = "KILL") -> None:
    world.cluster.in_node("pkill", f"-{number}", "--full", words)


@pytest.mark.parametrize("component", ["workers", "submitter", "operator", "drain", "store"])
def test_attempt_goes_on(
    component: str, world: World, kubernetes: Kubernetes, releases: Releases, many: int, record: Record
) -> None:
    """Pods other than the head may go at any time."""
    release = f"fault-{component}"
    run = releases.rayjob(release, JOB)
    run.until_running()
    goes_on(world, run, release, 0)
    count = Count(NAMES[component], "the same attempt goes on")
    with count.kept(record, world, release, many):
        for _ in range(TIMES):
            before = committed(world, release)
            count.injected += 1
            with FAULTS[component](world, kubernetes, run):
                pass
            count.longest = max(count.longest, goes_on(world, run, release, before))
            count.held += run.status["jobStatus"] in ("RUNNING", "SUCCEEDED") and not run.status.get("failed", 0)
        ends_well(world, run, release, many)
    assert run.status.get("failed", 0) == 0
    assert (count.injected, count.held, count.lost, count.duplicated) == (TIMES, TIMES, 0, 0)


@contextlib.contextmanager
def _worker(world: World, kubernetes: Kubernetes, run: Run) -> Iterator[None]:
    kubernetes.core.delete_namespaced_pod(pod_of(run, "workers"), NAMESPACE, grace_period_seconds=0)
    yield


@contextlib.contextmanager
def _submitter(world: World, kubernetes: Kubernetes, run: Run) -> Iterator[None]:
    before = {pod.metadata.name for pod in run.submitters}
    last = until("a submitter", lambda: [p for p in run.submitters if p.status.phase == "Running"], 120)[-1]
    kubernetes.core.delete_namespaced_pod(last.metadata.name, NAMESPACE, grace_period_seconds=0)
    yield
    until("another submitter", lambda: {pod.metadata.name for pod in run.submitters} - before, 180)


@contextlib.contextmanager
def _operator(world: World, kubernetes: Kubernetes, run: Run) -> Iterator[None]:
    found = world.cluster.kubectl(
        "get", "deployments", "--all-namespaces", "--selector", "app.kubernetes.io/component=kuberay-operator",
        "--output=jsonpath={.items[0].metadata.namespace} {.items[0].metadata.name}",
    )  # fmt: skip
    namespace, name = found.split()
    world.cluster.kubectl("rollout", "restart", f"deployment/{name}", f"--namespace={namespace}")
    world.cluster.kubectl(
        "rollout", "status", f"deployment/{name}", f"--namespace={namespace}", f"--timeout={HANG_S}s", timeout=HANG_S
    )
    yield


@contextlib.contextmanager
def _drain(world: World, kubernetes: Kubernetes, run: Run) -> Iterator[None]:
    """Of the run's pods: the worker goes, the head stays."""
    node = kubernetes.core.read_namespaced_pod(pod_of(run, "workers"), NAMESPACE).spec.node_name
    head = pod_of(run, "head")
    options = ("--ignore-daemonsets", "--delete-emptydir-data", "--force")

    def drain(component: str, seconds: int) -> None:
        selector = f"--pod-selector=app.kubernetes.io/component={component}"
        world.cluster.kubectl("drain", node, *options, selector, f"--timeout={seconds}s", timeout=HANG_S)

    try:
        drain("workers", 120)
        with pytest.raises(CommandError, match="disruption budget"):
            drain("head", 15)
    finally:
        world.cluster.kubectl("uncordon", node)
    assert pod_of(run, "head") == head
    yield


@contextlib.contextmanager
def _store(world: World, kubernetes: Kubernetes, run: Run) -> Iterator[None]:
    kill_in_node(world, "weed server", "STOP")
    try:
        time.sleep(30)
    finally:
        kill_in_node(world, "weed server", "CONT")
    yield


FAULTS: dict[str, Any] = {
    "workers": _worker, "submitter": _submitter, "operator": _operator, "drain": _drain, "store": _store
}  # fmt: skip
NAMES = {
    "workers": "worker pod killed", "submitter": "submitter killed", "operator": "operator restarted",
    "drain": "node drained", "store": "store stopped for 30 s",
}  # fmt: skip


def evicted(world: World, kubernetes: Kubernetes, run: Run, release: str) -> None:
    """The head goes as at a drain: its driver is told, and leaves word of its end. Ray, its log and the operator may be gone first."""

    def interrupted() -> int:
        return sum(one.state == "interrupted" for one in read_attempts(world.store(f"s3://images/out/{release}/")))

    before = interrupted()
    kubernetes.core.delete_namespaced_pod(pod_of(run, "head"), NAMESPACE)
    until("the driver ends by itself", lambda: interrupted() > before, 60, every=0.5)


@pytest.mark.parametrize("victim", ["driver", "head", "head evicted"])
def test_next_attempt_resumes(
    victim: str, world: World, kubernetes: Kubernetes, releases: Releases, many: int, record: Record
) -> None:
    """With the head goes the attempt. KubeRay makes another head or another cluster, where what is left is done."""
    release = f"fault-{victim.replace(' ', '-')}"
    run = releases.rayjob(release, merged(JOB, {"run": {"backoffLimit": TIMES}}))
    name = {"driver": "driver killed", "head": "head pod killed", "head evicted": "head pod evicted, with time to end"}
    count = Count(name[victim], "another attempt resumes by itself")
    with count.kept(record, world, release, many):
        resumes(victim, world, kubernetes, run, release, count)
        ends_well(world, run, release, many)
    assert (count.injected, count.held, count.lost, count.duplicated) == (TIMES, TIMES, 0, 0)


def resumes(victim: str, world: World, kubernetes: Kubernetes, run: Run, release: str, count: Count) -> None:
    for time_ in range(TIMES):
        run.until_running()
        before = committed(world, release)
        goes_on(world, run, release, before, 400)
        cluster, before = run.status["rayClusterName"], committed(world, release)
        begun = time.monotonic()
        head = pod_of(run, "head")
        count.injected += 1
        if victim == "driver":
            kill_in_node(world, "batch-inference run --config")
            until("another cluster", lambda old=cluster: run.status.get("rayClusterName") not in (None, "", old), 600)
        elif victim == "head":
            kubernetes.core.delete_namespaced_pod(head, NAMESPACE, grace_period_seconds=0)
        else:
            evicted(world, kubernetes, run, release)
        if victim != "driver":
            until("another head", lambda old=head: pod_of(run, "head") != old, 600)
        goes_on(world, run, release, before, 400)
        count.held += 1
        count.longest = max(count.longest, time.monotonic() - begun)
        print(f"{victim}, time {time_ + 1}: a shard more after {time.monotonic() - begun:.0f} s")


def test_gpus_that_nobody_has_end_the_job_with_the_reason(world: World, releases: Releases, record: Record) -> None:
    count = Count("GPU pods never scheduled", "the job ends with the reason in time")
    with count.kept(record, world):
        for number in range(TIMES):
            never_scheduled(releases, number, count)
    assert (count.injected, count.held) == (TIMES, TIMES)


def never_scheduled(releases: Releases, number: int, count: Count) -> None:
    begun = time.monotonic()
    count.injected += 1
    values = {"job": {"inference": {"actors": 8}}, "run": {"preRunningDeadlineSeconds": 20}}
    run = releases.rayjob(f"fault-gpus-{number}", values)
    status = run.until_ended()
    count.held += (status["jobDeploymentStatus"], status["reason"]) == ("Failed", "PreRunningDeadlineExceeded")
    count.longest = max(count.longest, time.monotonic() - begun)
