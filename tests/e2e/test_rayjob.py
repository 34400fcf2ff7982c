"""The charts on a real cluster: what users start, and what is left when it has ended."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from tests.charts.render import merged
from tests.e2e.cluster.process import CommandError
from tests.e2e.runs import BROKEN, PHOTOS, SLOW, WITHOUT_GPUS, Kubernetes, Releases, Run, verified
from tests.e2e.world import CREDENTIALS, GPUS, NAMESPACE, World, until

HOOK = "app.kubernetes.io/component=preflight"
# Of the photos, one after the other: 100 s in one slow actor, more than twice as long as a submitter is cut off.
ROUNDS = 10


@pytest.fixture
def many(world: World, slow_predictor: Path) -> int:
    """A manifest that names the photos again and again; how many rows it has."""
    names = [item.path for item in world.store("s3://images/photos/").objects()]
    rows = [f"s3://images/photos/{name},{i}" for i in range(ROUNDS) for name in sorted(names)]
    world.store("s3://images").put("many.csv", "\n".join(["uri,round", *rows]).encode())
    return len(rows)


def verdict(log: str) -> str:
    """The last lines, for a person."""
    return "\n".join(log.strip().splitlines()[-8:])


@pytest.mark.seconds(180)
def test_two_actors_get_two_workers_with_a_gpu_each(world: World, kubernetes: Kubernetes, releases: Releases) -> None:
    run = releases.rayjob("photos")
    run.until_running()
    workers = [pod for pod in run.pods if pod.metadata.labels["ray.io/node-type"] == "worker"]
    assert [pod.spec.containers[0].resources.limits["nvidia.com/gpu"] for pod in workers] == ["1", "1"]
    (head,) = [pod for pod in run.pods if pod.metadata.labels["ray.io/node-type"] == "head"]
    assert "nvidia.com/gpu" not in head.spec.containers[0].resources.limits
    nodes = kubernetes.dashboard(f"{run.name}-head-svc", "api/v0/nodes")["data"]["result"]["result"]
    total = [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]
    assert [sum(node.get(kind, 0) for node in total) for kind in ("GPU", "CPU")] == [2, 4]
    ray_answers_nobody_without_its_token(world, run)
    credentials_are_in_no_object(world, run)
    run.succeeded()
    print(f"the cluster was gone {run.until_cluster_is_gone():.0f} s after the end")
    assert run.object["metadata"]["name"] == run.name
    (submitter,) = run.submitters
    assert submitter.status.phase == "Succeeded"
    # More of them are broken than errors.max_percent allows a larger job, which the verdict's first words say.
    errors = f"{100 * BROKEN / PHOTOS:.1f} % ERRORS"
    assert f"SUCCEEDED WITH {errors}: {PHOTOS} of {PHOTOS} images accounted for" in verdict(run.log())
    verified(world, "s3://images/out/photos/", PHOTOS, BROKEN)
    assert f"OK: all {PHOTOS} inputs are there exactly once" in releases.test("photos")

    # The same values again are the same run; another model is another, and the first one stays as it is.
    before = run.object
    assert releases.rayjob("photos").name == run.name
    assert run.object["metadata"]["uid"] == before["metadata"]["uid"]
    another_model = {"job": {"model": put_mobilenet(world), "inference": {"actors": 1}}}
    other = releases.rayjob("photos", another_model, "s3://images/out/photos-2/")
    assert other.name != run.name
    other.succeeded()
    verified(world, "s3://images/out/photos-2/", PHOTOS, BROKEN)
    described = [
        json.loads(world.store(f"s3://images/out/{name}/").get("_job.json")) for name in ("photos", "photos-2")
    ]
    assert [job["config"]["model"]["source"] for job in described] == ["package", "file"]
    assert run.object["metadata"]["uid"] == before["metadata"]["uid"]
    assert (run.object["spec"], run.object["status"]) == (before["spec"], before["status"])
    assert run.log()
    assert kubernetes.names("rayjobs", "photos") == {run.name, other.name}

    # Only the runs that are asked for are kept.
    values = {**another_model, "run": {"history": 0}}
    assert releases.rayjob("photos", values, "s3://images/out/photos-2/").name == other.name
    until("the earlier run goes", lambda: kubernetes.names("rayjobs", "photos") == {other.name})
    notes_commands_work(world, releases.printed[-1])


def ray_answers_nobody_without_its_token(world: World, run: Run) -> None:
    """A request from within the cluster, whose network enforces no policies."""
    code = (
        "import os, sys, urllib.request, urllib.error\n"
        "head = sys.argv[1]\n"
        "try: print(urllib.request.urlopen(f'http://{head}:8265/api/jobs/', timeout=120).status)\n"
        "except urllib.error.HTTPError as error: print(error.code)\n"
    )
    head = f"{run.name}-head-svc"
    inside = ("exec", "--namespace", NAMESPACE, f"service/{head}", "--container=ray-head", "--", "python", "-c")
    assert world.cluster.kubectl(*inside, code, head).strip() == "401"


def credentials_are_in_no_object(world: World, run: Run) -> None:
    """Secrets are referred to, wherever Kubernetes keeps and shows anything else."""
    kinds = (
        "pods,jobs,configmaps,services,events,serviceaccounts,networkpolicies,poddisruptionbudgets,rayjobs,rayclusters"
    )
    text = world.cluster.kubectl("get", kinds, "--namespace", NAMESPACE, "--output=json")
    assert run.name in text and "s3-credentials" in text
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in text + run.log()


def put_mobilenet(world: World) -> dict[str, Any]:
    """Puts the weights of another network into the store, and returns the job's `model`; what it predicts means nothing."""
    # Imported here: of several processes that run tests, only the one with this test needs them.
    import safetensors.torch
    import torch
    import torchvision

    torch.manual_seed(0)
    weights = safetensors.torch.save(torchvision.models.mobilenet_v3_small(weights=None).state_dict())
    world.store("s3://images/models").put("mobilenet.safetensors", weights)
    uri = "s3://images/models/mobilenet.safetensors"
    return {"source": "file", "name": "mobilenet_v3_small", "weights": uri, "args": []}


def notes_commands_work(world: World, notes: str) -> None:
    """Runs those commands of the notes that come to an end by themselves."""
    commands = [line.strip() for line in notes.splitlines() if line.strip().startswith("kubectl ")]
    ending = [line for line in commands if not re.search(r"--watch|--follow|port-forward| exec ", line)]
    assert len(ending) >= 4
    assert re.search(r"a head without tasks, [12] workers? of 1 GPU and \d+ CPUs?\.", notes), notes
    for line in ending:
        assert world.cluster.kubectl(*shlex.split(line)[1:])


@pytest.mark.seconds(100)
def test_job_is_tried_before_it_is_installed_and_needs_no_gpus(world: World, releases: Releases) -> None:
    output = "s3://images/out/cpu/"
    # Tried before it is installed, in a pod of its own, and once more by the job itself.
    tried = merged(
        WITHOUT_GPUS, {"job": {"preflight": {"enabled": True, "samples": 4}}, "preflightHook": {"enabled": True}}
    )
    first = releases.rayjob("cpu", tried, output)
    first.succeeded()
    assert "preflight: forward pass: a batch of" in first.log()
    assert not world.cluster.kubectl("get", "jobs", "--namespace", NAMESPACE, "--selector", HOOK, "--output=name")
    verified(world, output, PHOTOS, BROKEN)


@pytest.mark.seconds(25)
def test_a_preflight_that_fails_installs_nothing(world: World, kubernetes: Kubernetes, releases: Releases) -> None:
    wrong = {"job": {"input": {"uris": ["s3://images/phots/"]}}, "preflightHook": {"enabled": True}}
    with pytest.raises(CommandError, match="job tried-preflight failed"):
        releases.rayjob("tried", merged(WITHOUT_GPUS, wrong))
    said = world.cluster.kubectl("logs", "--namespace", NAMESPACE, "job/tried-preflight")
    assert "FAIL" in said and "s3://images/phots/" in said
    assert "Traceback" not in said
    assert not [name for name in kubernetes.names("rayjobs") if name.startswith("tried")]
    # Helm has removed what the pod needed; its log stays.
    world.cluster.kubectl("delete", "job", "tried-preflight", "--namespace", NAMESPACE)
    until("nothing is left", lambda: not releases.left("tried"))


@pytest.mark.seconds(40)
def test_a_wrong_input_fails_with_the_verdict_in_the_status(releases: Releases) -> None:
    run = releases.rayjob("wrong", {"job": {"input": {"uris": ["s3://images/phots/"]}, **WITHOUT_GPUS["job"]}})
    status = run.until_ended()
    assert (status["jobStatus"], status["jobDeploymentStatus"], status["reason"]) == ("FAILED", "Failed", "AppFailed")
    assert "s3://images/phots/" in status["message"]
    assert "FAILED" in status["message"]
    assert [pod.status.phase for pod in run.submitters] == ["Succeeded"]
    assert "Traceback" not in run.log()


@pytest.mark.seconds(60)
def test_gpus_that_nobody_has_end_the_job_at_its_deadline(releases: Releases) -> None:
    # With the chart's own number of retries. No pod of a worker starts, whichever GPUs other tests use at the time.
    values = {
        "job": {"inference": {"actors": 1, "gpus_per_actor": GPUS + 1}},
        "workers": {"gpusPerWorker": GPUS + 1},
        "run": {"preRunningDeadlineSeconds": 20, "backoffLimit": None},
    }
    run = releases.rayjob("too-many", values)
    status = run.until_ended()
    assert (status["jobDeploymentStatus"], status["reason"]) == ("Failed", "PreRunningDeadlineExceeded")
    assert status["failed"] == 2
    run.until_cluster_is_gone()


@pytest.mark.parametrize("helm", ["helm", "helm4"])
@pytest.mark.seconds(10)
def test_upgrade_edits_no_run(helm: str, kubernetes: Kubernetes, releases: Releases) -> None:
    """Edits of the operator, edits by hand, and suspension stay as they are."""
    name = f"held-{helm}"
    values: dict[str, Any] = {**WITHOUT_GPUS, "run": {"suspend": True}}
    first = releases.rayjob(name, values, helm=helm)
    until("the operator has the run", lambda: first.status.get("jobDeploymentStatus") == "Suspended")
    before = first.object
    assert releases.rayjob(name, values, helm=helm).name == first.name
    values = {**WITHOUT_GPUS, "run": {"suspend": True, "id": "2"}, "serviceAccount": {"name": "another"}}
    second = releases.rayjob(name, values, helm=helm)
    assert second.name != first.name
    assert first.object["spec"] == before["spec"]
    assert first.object["metadata"]["uid"] == before["metadata"]["uid"]
    accounts = {item.metadata.name for item in kubernetes.core.list_namespaced_service_account(NAMESPACE).items}
    assert {name, "another"} <= accounts
    releases.uninstall(name)
    until("both runs go", lambda: not {first.name, second.name} & kubernetes.names("rayjobs"))
    accounts = {item.metadata.name for item in kubernetes.core.list_namespaced_service_account(NAMESPACE).items}
    assert not {name, "another"} & accounts


@pytest.mark.seconds(90)
def test_jobs_join_a_shared_cluster_one_after_the_other(
    world: World, kubernetes: Kubernetes, releases: Releases
) -> None:
    releases.raycluster("shared", {"actorPool": {"actors": 1, "gpusPerActor": 1}})
    assert "OK: 1 of 1 workers have joined" in releases.test("shared")
    joins = {"clusterSelector": "shared", "job": {"inference": {"actors": 1}}}
    for name in ("first", "second"):
        run = releases.rayjob(name, joins)
        run.succeeded()
        assert run.status["rayClusterName"] == "shared"
        verified(world, f"s3://images/out/{name}/", PHOTOS, BROKEN)
    a_finished_job_is_done_at_once_in_another_release_and_without_gpus(world, releases)
    assert kubernetes.names("rayclusters", "shared", "first", "second", "again") == {"shared"}


def a_finished_job_is_done_at_once_in_another_release_and_without_gpus(world: World, releases: Releases) -> None:
    output = world.store("s3://images/out/first/")
    commits = {item.path: item for item in output.objects("_commits")}
    again = releases.rayjob("again", {"clusterSelector": "shared", **WITHOUT_GPUS}, "s3://images/out/first/")
    again.succeeded()
    assert "was done already" in verdict(again.log())
    assert commits
    assert {item.path: item for item in output.objects("_commits")} == commits


@pytest.mark.seconds(150)
def test_the_job_goes_on_when_its_submitter_is_cut_off_or_lost(
    world: World, kubernetes: Kubernetes, releases: Releases, many: int
) -> None:
    # The cluster stays after the end, so that the driver's own log can be read; it goes with the release.
    run = releases.rayjob("cut", {**SLOW, "run": {"ttlSecondsAfterFinished": 3600}})
    run.until_running()
    (submitter,) = run.submitters
    # From then on there is a line every two seconds. A connection without any traffic would not notice that it is cut off.
    until("the first shard in the log", lambda: '"event": "committed"' in run.log(submitter))
    with cut_off(world, submitter):
        # The operator fails a running job 30 s after its own kind of submitter has lost the log.
        time.sleep(40)
        assert run.status["jobStatus"] == "RUNNING"
    until("the log goes on", lambda: "re-attached" in run.log(submitter))
    before = run.log(submitter).splitlines()
    kubernetes.core.delete_namespaced_pod(submitter.metadata.name, NAMESPACE, grace_period_seconds=1)
    run.succeeded()
    verified(world, "s3://images/out/cut/", many, many // PHOTOS * BROKEN)
    jobs = kubernetes.dashboard(f"{run.name}-head-svc", "api/jobs/")
    assert [job["submission_id"] for job in jobs if job["type"] == "SUBMISSION"] == [run.status["jobId"]]
    driver = kubernetes.dashboard(f"{run.name}-head-svc", f"api/jobs/{run.status['jobId']}/logs")["logs"]
    lines = driver.strip().splitlines()
    assert len(lines) > 10
    # Each line once: by the one that was cut off as far as it came, by its successor all of them.
    assert [line for line in run.log().splitlines() if line in lines] == lines
    seen = [line for line in before if line in lines]
    assert seen and seen == lines[: len(seen)]


class cut_off:  # noqa: N801 - reads as what it does
    """For a while, whatever a submitter's pod sends to the dashboard is answered by a reset."""

    def __init__(self, world: World, submitter: Any) -> None:
        self._world = world
        self._container = submitter.status.container_statuses[0].container_id.removeprefix("containerd://")

    def __enter__(self) -> None:
        self._rule("--insert")

    def __exit__(self, *_: object) -> None:
        self._rule("--delete")

    def _rule(self, verb: str) -> None:
        rule = f"iptables {verb} OUTPUT --protocol tcp --dport 8265 --jump REJECT --reject-with tcp-reset"
        tasks = self._world.cluster.in_node("ctr", "--namespace", "k8s.io", "tasks", "list")
        (process,) = re.findall(rf"^{self._container} +(\d+) +RUNNING", tasks, re.MULTILINE)
        self._world.cluster.in_node("nsenter", "--target", process, "--net", *rule.split())


@pytest.mark.seconds(50)
def test_uninstalling_a_running_job_leaves_nothing(world: World, releases: Releases, many: int) -> None:
    run: Run = releases.rayjob("gone", SLOW)
    run.until_running()
    cluster = f"ray.io/cluster={run.status['rayClusterName']}"
    start = time.monotonic()
    releases.uninstall("gone")
    until("everything goes", lambda: not releases.left("gone") and not run.kubernetes.pods(cluster))
    print(f"everything was gone after {time.monotonic() - start:.0f} s")
    assert run.name not in run.kubernetes.names("rayjobs")


def test_admission_has_had_no_warnings(all_releases: Releases) -> None:
    """Each test that installs releases looks for warnings at its end; this one, the last, looks once more."""
    assert all_releases.admitted()
    assert not all_releases.warnings()
