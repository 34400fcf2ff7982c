"""Jobs that the real Argo CD syncs from Git into a real cluster."""

from __future__ import annotations

import time

from tests.charts.render import Values, merged
from tests.e2e.runs import BROKEN, PHOTOS, WITHOUT_GPUS, Kubernetes, verified
from tests.e2e.world import NAMESPACE, World, until
from tests.platform.argocd import Argo, Timeline
from tests.support.limits import HANG_S

# Argo CD begins to heal what it sees out of step within 5 s.
HEALED_SECONDS = HANG_S


def test_commit_that_changes_the_job_starts_one_run_and_no_other_does(
    world: World, kubernetes: Kubernetes, argo: Argo
) -> None:
    repository = argo.repository("batch-jobs")
    photos = argo.values("s3://images/out/git-1/")
    commit = repository.commit({"jobs/photos.yaml": photos})
    timeline = Timeline()
    argo.example("application.yaml", repository)
    argo.until_synced("photos", commit, timeline)
    first = argo.only_run()
    argo.until_healthy_is("Healthy", "photos", timeline)
    assert timeline.of(first.name) == ["Progressing", "Healthy"]
    verified(world, "s3://images/out/git-1/", PHOTOS, BROKEN)
    first.until_cluster_is_gone()
    done = first.object

    # Neither a file that is not the job's nor a comment in it is another run.
    commit = repository.commit({"README.md": "Jobs.\n", "jobs/photos.yaml": f"# For the photos.\n{photos}"})
    argo.until_synced("photos", commit, timeline)
    time.sleep(10)
    assert argo.only_run().object == done
    assert argo.application("photos").health == "Healthy"

    an_edited_run_is_mended_and_does_not_run_again(argo, kubernetes, first.name)
    a_deleted_run_comes_back_and_does_nothing(world, argo, first.name)

    # Two commits are two runs; each goes when the next comes, running or not.
    begun = time.monotonic()
    commit = repository.commit({"jobs/photos.yaml": argo.values("s3://images/out/git-2/")})
    argo.until_synced("photos", commit, timeline)
    second = argo.only_run()
    assert second.name != first.name
    second.until_running()
    print(f"\nthe second run runs {time.monotonic() - begun:.0f} s after its commit, the first is pruned")
    wrong = argo.values("s3://images/out/git-3/", {"job": {"input": {"uris": ["s3://images/phots/"]}}})
    commit = repository.commit({"jobs/photos.yaml": wrong})
    argo.until_synced("photos", commit, timeline)
    third = argo.only_run()
    assert third.name not in (first.name, second.name)
    application = argo.until_healthy_is("Degraded", "photos", timeline)
    timeline.print()
    assert timeline.of(third.name)[-1] == "Degraded"
    message = application.runs[third.name]["message"]
    assert message.startswith("AppFailed: ")
    assert "s3://images/phots/" in message
    assert "FAILED" in message
    assert len(message.splitlines()) <= 5


def an_edited_run_is_mended_and_does_not_run_again(argo: Argo, kubernetes: Kubernetes, name: str) -> None:
    run = argo.run(name)
    before = run.object
    body = {"spec": {"ttlSecondsAfterFinished": 77}}
    kubernetes.custom.patch_namespaced_custom_object(
        "ray.io", "v1", before["metadata"]["namespace"], "rayjobs", name, body
    )
    begun = time.monotonic()
    wanted = before["spec"]["ttlSecondsAfterFinished"]
    until("the edit is undone", lambda: run.object["spec"]["ttlSecondsAfterFinished"] == wanted, HEALED_SECONDS)
    print(f"\nan edit of the finished run was undone after {time.monotonic() - begun:.0f} s")
    time.sleep(10)
    after = run.object
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    for key in ("jobId", "startTime", "endTime", "jobStatus", "jobDeploymentStatus", "rayClusterName"):
        assert after["status"].get(key) == before["status"].get(key)
    assert kubernetes.ray("rayclusters") == []


def a_deleted_run_comes_back_and_does_nothing(world: World, argo: Argo, name: str) -> None:
    output = world.store("s3://images/out/git-1/")
    before = {item.path: item for item in output.objects() if not item.path.startswith("_report")}
    uid = argo.run(name).object["metadata"]["uid"]
    world.cluster.kubectl(
        "delete", "rayjob", name, "--namespace=batch-inference", f"--timeout={HANG_S}s", timeout=HANG_S
    )
    again = until(
        "the run comes back",
        lambda: [item for item in argo.run(name).kubernetes.ray("rayjobs") if item["metadata"]["uid"] != uid],
        HEALED_SECONDS,
    )
    assert again[0]["metadata"]["name"] == name
    run = argo.run(name)
    run.succeeded()
    assert "was done already" in run.log()
    argo.until_healthy_is("Healthy", "photos")
    assert {item.path: item for item in output.objects() if not item.path.startswith("_report")} == before


def test_preflight_goes_before_a_sync_and_where_it_fails_nothing_changes(
    world: World, kubernetes: Kubernetes, argo: Argo
) -> None:
    repository = argo.repository("tried-jobs")

    def job(number: int, more: Values | None = None) -> str:
        tried = merged(WITHOUT_GPUS, {"preflightHook": {"enabled": True}})
        return argo.values(f"s3://images/out/git-tried-{number}/", merged(tried, more or {}))

    commit = repository.commit({"jobs/photos.yaml": job(1)})
    argo.example("application.yaml", repository)
    once_more = '{"spec": {"syncPolicy": {"retry": {"limit": 1}}}}'
    world.cluster.kubectl("patch", "application", "photos", "--namespace=argocd", "--type=merge", "--patch", once_more)
    argo.until_synced("photos", commit)
    application = argo.until_sync_ended("Succeeded", "photos", commit)
    assert application.hooks == {"photos-preflight": ("PreSync", "Succeeded")}
    first = argo.only_run()
    argo.until_healthy_is("Healthy", "photos")
    verified(world, "s3://images/out/git-tried-1/", PHOTOS, BROKEN)
    first.until_cluster_is_gone()
    done = first.object
    jobs = ("get", "jobs", "--namespace", NAMESPACE, "--output=name")
    assert "photos-preflight" not in world.cluster.kubectl(*jobs)

    # An edit is undone by a sync of that one object, which has no hooks.
    an_edited_run_is_mended_and_does_not_run_again(argo, kubernetes, first.name)
    assert argo.application("photos").hooks == {}

    wrong = job(2, {"job": {"input": {"uris": ["s3://images/phots/"]}}})
    commit = repository.commit({"jobs/photos.yaml": wrong})
    application = argo.until_sync_ended("Failed", "photos", commit)
    print(f"\n{application.operation['message']}")
    assert application.hooks == {"photos-preflight": ("PreSync", "Failed")}
    assert argo.only_run().object["status"] == done["status"]
    said = world.cluster.kubectl("logs", "--namespace", NAMESPACE, "job/photos-preflight")
    assert "FAIL" in said and "s3://images/phots/" in said

    commit = repository.commit({"jobs/photos.yaml": job(3)})
    application = argo.until_sync_ended("Succeeded", "photos", commit)
    assert application.hooks == {"photos-preflight": ("PreSync", "Succeeded")}
    assert argo.only_run().name != first.name
    assert "photos-preflight" not in world.cluster.kubectl(*jobs)


def test_applicationset_has_one_application_for_each_file(argo: Argo, kubernetes: Kubernetes) -> None:
    """The jobs are suspended, since another test covers their run."""
    repository = argo.repository("many-jobs")

    def job(name: str) -> str:
        return argo.values(f"s3://images/out/{name}/", {"run": {"suspend": True}})

    def are(*names: str) -> None:
        argo.look("applicationset", "batch-jobs")

        def there() -> bool:
            found = argo.applications()
            return found.keys() == set(names) and all(item.health == "Suspended" for item in found.values())

        until(f"applications {names}", there, 180, every=2)
        runs = [item["metadata"]["labels"]["app.kubernetes.io/instance"] for item in kubernetes.ray("rayjobs")]
        assert sorted(runs) == sorted(names)

    repository.commit({"jobs/cats.yaml": job("cats"), "jobs/dogs.yaml": job("dogs"), "README.md": "Jobs.\n"})
    argo.example("applicationset.yaml", repository)
    are("cats", "dogs")
    repository.commit({"jobs/birds.yaml": job("birds"), "jobs/cats.yaml": None})
    are("birds", "dogs")
