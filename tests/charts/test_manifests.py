"""Rendered manifests, feature by feature."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from batch_inference.config import StorageConfig, load_config
from batch_inference.environment import RUN_VARIABLE, WAIT_VARIABLE
from batch_inference.kubernetes.submitter import request_body
from tests.charts import check
from tests.charts.render import Manifest, find, merged, rayjob, render

GPU = "nvidia.com/gpu"


def cluster(values: dict[str, Any] | None = None) -> Manifest:
    spec: Manifest = rayjob(values)["spec"]["rayClusterSpec"]
    return spec


def pods(values: dict[str, Any] | None = None) -> dict[str, Manifest]:
    return {role: template["spec"] for role, template in check.pods(rayjob(values))}


def container(pod: Manifest) -> Manifest:
    (only,) = pod["containers"]
    return only


def environment(pod: Manifest) -> dict[str, Any]:
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in container(pod).get("env", [])}


# --- the run and its name ---


def test_same_values_are_the_same_run_and_others_another() -> None:
    name = rayjob()["metadata"]["name"]
    assert re.fullmatch(r"demo-[0-9a-f]{8}", name)
    assert rayjob({"run": {"history": 9}})["metadata"]["name"] == name
    changes = [
        {"job": {"model": {"name": "resnet18"}}},
        {"job": {"shard_size": 500}},
        {"run": {"id": "again"}},
        {"run": {"annotations": {"a": "b"}}},
        {"image": {"tag": "2"}},
        {"workers": {"memoryGiB": 64}},
        {"queue": {"name": "q"}},
    ]
    names = {rayjob(change)["metadata"]["name"] for change in changes}
    assert len(names) == len(changes)
    assert name not in names


def test_longest_name_fits() -> None:
    assert len(rayjob(name="a" * 38)["metadata"]["name"]) == 47


def test_version_of_the_chart_does_not_change_a_run() -> None:
    text = yaml.safe_dump(rayjob()["spec"])
    assert "helm.sh/chart" not in text
    assert "app.kubernetes.io/version" not in text


def test_job_is_mounted_in_every_pod_under_the_run_s_name() -> None:
    manifests = render("rayjob")
    config = find(manifests, "ConfigMap")
    assert list(config["data"]) == ["job.yaml"]
    assert config["immutable"] is True
    for pod in pods().values():
        (volume,) = [item for item in pod["volumes"] if item["name"] == "job"]
        assert (
            volume["configMap"]["name"] == config["metadata"]["name"] == find(manifests, "RayJob")["metadata"]["name"]
        )
        assert {"name": "job", "mountPath": "/etc/batch-inference", "readOnly": True} in container(pod)["volumeMounts"]


def test_submitter_is_ours_and_no_shell_reads_it() -> None:
    spec = rayjob()["spec"]
    assert spec["submissionMode"] == "K8sJobMode"
    submitter = container(pods()["submitter"])
    assert submitter["command"] == ["batch-inference", "submit"]
    assert submitter["args"] == ["--config", "/etc/batch-inference/job.yaml"]
    assert pods()["submitter"]["restartPolicy"] == "Never"
    assert spec["submitterConfig"]["backoffLimit"] == 10


@pytest.mark.parametrize("values", [{}, {"clusterSelector": "shared"}], ids=["own cluster", "shared cluster"])
def test_entrypoint_is_what_the_submitter_submits(values: dict[str, Any], tmp_path: Path) -> None:
    """With the chart's own arguments; the file is in the pod, so only its path is checked."""
    spec = rayjob(values)["spec"]
    args = container(spec["submitterPodTemplate"]["spec"])["args"]
    (tmp_path / "job.yaml").write_text("{}")
    submitted = request_body(str(tmp_path / "job.yaml"), "id", inline="--inline" in args)["entrypoint"]
    assert spec["entrypoint"] == submitted.replace(str(tmp_path), "/etc/batch-inference")


def test_safe_defaults() -> None:
    spec = rayjob()["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["preRunningDeadlineSeconds"] == 1800
    assert spec["backoffLimit"] == 1
    assert "suspend" not in spec
    assert spec["rayClusterSpec"]["enableInTreeAutoscaling"] is False


def test_job_on_a_shared_cluster_brings_no_cluster_and_sends_its_configuration_along() -> None:
    spec = rayjob({"clusterSelector": "shared"})["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": "shared"}
    assert "rayClusterSpec" not in spec
    assert spec["backoffLimit"] == 0
    assert spec["submitterPodTemplate"]["spec"]["containers"][0]["args"][-1] == "--inline"


def test_deadlines_suspend_retries_and_time_to_live() -> None:
    run = {"suspend": True, "activeDeadlineSeconds": 2592000, "ttlSecondsAfterFinished": 600, "backoffLimit": 3}
    spec = rayjob({"run": run})["spec"]
    assert {key: spec[key] for key in run} == run


def test_deletion_rules() -> None:
    ends = [{"jobStatus": "SUCCEEDED"}, {"jobStatus": "FAILED"}, {"jobDeploymentStatus": "Failed"}]
    rules = [{"policy": "DeleteCluster", "condition": {**end, "ttlSeconds": 60}} for end in ends]
    spec = rayjob({"run": {"shutdownAfterJobFinishes": False, "deletionRules": rules}})["spec"]
    assert spec["deletionStrategy"]["deletionRules"] == rules


def test_queue_labels_the_job_and_leaves_suspension_to_kueue() -> None:
    job = rayjob({"queue": {"name": "gpus", "priorityClass": "nightly"}})
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "nightly"
    assert "suspend" not in job["spec"]
    elastic = rayjob({"queue": {"name": "gpus", "elastic": True}, "autoscaling": {"enabled": True}})
    assert elastic["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"


# --- the cluster ---


def test_head_runs_no_tasks_and_sees_no_gpu() -> None:
    head = cluster()["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    assert GPU not in container(pods()["head"])["resources"]["limits"]
    assert environment(pods()["head"])["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_gpu_requests_equal_limits_and_are_told_to_ray() -> None:
    values = {
        "job": {"inference": {"actors": 8}},
        "workers": {"gpusPerWorker": 4, "gpuResource": "nvidia.com/mig-1g.10gb"},
    }
    (group,) = cluster(values)["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"]["nvidia.com/mig-1g.10gb"] == resources["limits"]["nvidia.com/mig-1g.10gb"] == "4"
    assert group["rayStartParams"]["num-gpus"] == "4"
    assert GPU not in resources["limits"]
    assert "cpu" not in resources["limits"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_zero_gpus_alone_runs_on_cpus() -> None:
    (group,) = cluster({"job": {"inference": {"gpus_per_actor": 0, "actors": 2}}})["workerGroupSpecs"]
    assert (group["groupName"], group["replicas"], group["rayStartParams"]["num-gpus"]) == ("actors", 2, "0")
    assert "gpu" not in yaml.safe_dump(group["template"]["spec"]["containers"][0]["resources"])


def test_cpu_workers_feed_the_gpu_workers() -> None:
    gpu, cpu = cluster({"cpuWorkers": {"replicas": 2, "limitCpus": True}})["workerGroupSpecs"]
    assert (gpu["groupName"], cpu["groupName"]) == ("gpu", "cpu")
    assert cpu["replicas"] == cpu["minReplicas"] == cpu["maxReplicas"] == 2
    assert cpu["rayStartParams"]["num-gpus"] == "0"
    assert cpu["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] == "8000m"


def test_shared_memory_holds_the_object_store_within_the_memory() -> None:
    for group in [cluster()["headGroupSpec"], *cluster()["workerGroupSpecs"]]:
        spec = group["template"]["spec"]
        (volume,) = [item["emptyDir"] for item in spec["volumes"] if item["name"] == "shared-memory"]
        shared = int(volume["sizeLimit"].removesuffix("Mi"))
        memory = int(spec["containers"][0]["resources"]["limits"]["memory"].removesuffix("Mi"))
        store = int(group["rayStartParams"]["object-store-memory"]) // 2**20
        assert volume["medium"] == "Memory"
        assert store < shared < memory


def test_autoscaling_is_version_2_up_to_the_actor_pool() -> None:
    spec = cluster({"autoscaling": {"enabled": True, "minWorkers": 1}})
    assert spec["autoscalerOptions"]["version"] == "v2"
    (group,) = spec["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (1, 1, 4)
    assert spec["headGroupSpec"]["template"]["spec"]["restartPolicy"] == "Never"
    check.hardened(spec["autoscalerOptions"]["securityContext"])


def test_submitter_knows_the_name_of_its_run() -> None:
    job = find(render("rayjob", {}), "RayJob")
    (submitter,) = (pod["spec"] for role, pod in check.pods(job) if role == "submitter")
    assert environment(submitter)[RUN_VARIABLE] == job["metadata"]["name"]


@pytest.mark.parametrize("chart", ["rayjob", "raycluster"])
def test_jobs_wait_for_workers_where_these_come_on_demand(chart: str) -> None:
    def waits(values: dict[str, Any]) -> list[Any]:
        kind = "RayJob" if chart == "rayjob" else "RayCluster"
        roles = dict(check.pods(find(render(chart, values), kind)))
        return [environment(pod["spec"]).get(WAIT_VARIABLE) for role, pod in roles.items() if role != "submitter"]

    assert waits({}) == [None, None]
    assert waits({"autoscaling": {"enabled": True}}) == ["1800", "1800"]
    assert waits({"autoscaling": {"enabled": True, "waitSeconds": 60}}) == ["60", "60"]


def test_tokens_of_ray() -> None:
    spec = cluster({"auth": {"enabled": True, "secretName": "token"}})
    assert spec["authOptions"] == {"mode": "token", "secretName": "token"}
    assert cluster()["authOptions"] == {"mode": "token"}
    assert "authOptions" not in cluster({"auth": {"enabled": False}})
    # Where nothing is said, only where Ray knows how.
    assert "authOptions" not in cluster({"rayVersion": "2.51.0"})


def test_cluster_of_raycluster_is_that_of_rayjob() -> None:
    shared = find(render("raycluster"), "RayCluster")
    assert shared["metadata"]["name"] == "demo"
    own = cluster()
    for spec in (own, shared["spec"]):
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            template = group["template"]
            del template["metadata"]
            template["spec"]["volumes"] = [item for item in template["spec"]["volumes"] if item["name"] != "job"]
            ray = template["spec"]["containers"][0]
            ray["volumeMounts"] = [item for item in ray["volumeMounts"] if item["name"] != "job"]
    assert shared["spec"].pop("upgradeStrategy") == {"type": "None"}
    assert own == shared["spec"]


@pytest.mark.parametrize("resource", ["amd.com/gpu", "nvidia.com/mig-2g.20gb", "nvidia.com/gpu.shared"])
def test_any_gpu_resource_is_told_to_ray_as_gpus(resource: str) -> None:
    (group,) = cluster({"workers": {"gpuResource": resource}})["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert (
        resources["requests"][resource] == resources["limits"][resource] == group["rayStartParams"]["num-gpus"] == "1"
    )


def test_claimed_gpus_are_told_to_ray_too() -> None:
    (group,) = cluster({"workers": {"gpusPerWorker": 2, "gpuClaimTemplate": "two-gpus"}})["workerGroupSpecs"]
    spec = group["template"]["spec"]
    resources = spec["containers"][0]["resources"]
    assert spec["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": "two-gpus"}]
    assert resources["claims"] == [{"name": "gpus"}]
    assert not {"nvidia.com/gpu"} & (resources["requests"].keys() | resources["limits"].keys())
    assert group["rayStartParams"]["num-gpus"] == "2"


def test_pods_without_gpus_claim_none() -> None:
    values = {"workers": {"gpuClaimTemplate": "two-gpus"}, "job": {"inference": {"gpus_per_actor": 0}}}
    assert "resourceClaims" not in cluster(values)["workerGroupSpecs"][0]["template"]["spec"]


def test_overcommitted_cpus_are_ray_s_and_not_kubernetes() -> None:
    spec = cluster({"cpuOvercommit": 4})
    (group,) = spec["workerGroupSpecs"]
    assert group["rayStartParams"]["num-cpus"] == "5"
    assert group["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "1250m"
    assert spec["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"] == "500m"


def test_more_parameters_of_ray_and_the_size_of_scratch() -> None:
    spec = cluster({"workers": {"rayStartParams": {"node-name": "x"}}, "scratch": {"sizeGiB": 7}})
    (group,) = spec["workerGroupSpecs"]
    assert group["rayStartParams"]["node-name"] == "x"
    assert {"name": "scratch", "emptyDir": {"sizeLimit": "7Gi"}} in group["template"]["spec"]["volumes"]


def test_shared_cluster_has_its_queue_labels_and_suspension() -> None:
    own = {"labels": {"team": "a"}, "annotations": {"example.com/b": "c"}, "suspend": True}
    metadata = find(render("raycluster", {"cluster": own}), "RayCluster")["metadata"]
    assert metadata["labels"]["team"] == "a"
    assert metadata["annotations"] == own["annotations"]
    assert find(render("raycluster", {"cluster": own}), "RayCluster")["spec"]["suspend"] is True
    queued = {"queue": {"name": "gpus", "priorityClass": "nightly", "elastic": True}, "autoscaling": {"enabled": True}}
    manifest = find(render("raycluster", queued), "RayCluster")
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "nightly"
    assert manifest["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"
    assert "suspend" not in manifest["spec"]


def test_labels_and_annotations_of_the_run() -> None:
    metadata = rayjob({"run": {"labels": {"team": "a"}, "annotations": {"example.com/b": "c"}}})["metadata"]
    assert metadata["labels"]["team"] == "a"
    assert metadata["annotations"] == {"example.com/b": "c"}


# --- helm test ---


def hook(chart: str, values: dict[str, Any] | None = None) -> Manifest:
    pod = find(render(chart, values), "Pod")
    assert pod["metadata"]["annotations"] == {
        "helm.sh/hook": "test",
        "helm.sh/hook-delete-policy": "before-hook-creation",
    }
    return pod


@pytest.mark.parametrize("chart", ["rayjob", "raycluster"])
def test_test_s_pod_is_restricted_and_placed_as_the_head(chart: str) -> None:
    claim = {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}
    values = {
        "pods": {"volumes": [claim], "volumeMounts": [{"name": "data", "mountPath": "/data"}]},
        "head": {**PLACEMENT, "envFrom": [{"secretRef": {"name": "s3"}}], "env": [{"name": "A", "value": "1"}]},
        "image": {"pullSecrets": ["s"]},
        "serviceAccount": {"name": "mine"},
    }
    spec = hook(chart, values)["spec"]
    check.restricted(spec)
    check.unique(spec)
    assert {key: spec[key] for key in PLACEMENT} == PLACEMENT
    assert spec["serviceAccountName"] == "mine"
    assert spec["automountServiceAccountToken"] is False
    assert spec["imagePullSecrets"] == [{"name": "s"}]
    assert claim in spec["volumes"]
    assert container(spec)["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert environment(spec)["A"] == "1"


def test_helm_test_of_a_job_recounts_its_output_with_the_job_s_storage() -> None:
    storage = {"endpoint_url": "http://minio:9000", "anonymous": True, "timeout_s": 7.5, "region": "eu-1"}
    command = container(hook("rayjob", {"job": {"storage": storage}})["spec"])["command"]
    assert command[:3] == ["batch-inference", "verify", "s3://predictions/"]
    settings = [word for word in command[3:] if word != "--set"]
    assert len(command) == 3 + 2 * len(storage)
    assert load_config(None, None, settings).storage == StorageConfig(**storage)
    assert container(hook("rayjob")["spec"])["command"] == command[:3]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, 4),
        ({"cpuWorkers": {"replicas": 2}}, 6),
        ({"cpuWorkers": {"replicas": 2}, "autoscaling": {"enabled": True, "minWorkers": 1}}, 3),
    ],
    ids=str,
)
def test_helm_test_of_a_cluster_counts_the_workers(values: dict[str, Any], wanted: int) -> None:
    command = container(hook("raycluster", values)["spec"])["command"]
    assert command[:2] == ["python", "-c"]
    assert command[3:] == ["http://demo-head-svc:8265", str(wanted), "240"]


def test_helm_test_of_a_cluster_has_its_token() -> None:
    key = {"name": "demo", "key": "auth_token"}
    own = environment(hook("raycluster", {"auth": {"enabled": True}})["spec"])
    assert own["RAY_AUTH_TOKEN"] == {"secretKeyRef": key}
    given = environment(hook("raycluster", {"auth": {"enabled": True, "secretName": "mine"}})["spec"])
    assert given["RAY_AUTH_TOKEN"] == {"secretKeyRef": {**key, "name": "mine"}}
    assert environment(hook("raycluster")["spec"])["RAY_AUTH_TOKEN"] == {"secretKeyRef": key}
    assert "RAY_AUTH_TOKEN" not in environment(hook("raycluster", {"auth": {"enabled": False}})["spec"])


@pytest.mark.parametrize(
    ("workers", "code", "says"),
    [(2, 0, "OK: 2 of 2 workers have joined"), (1, 1, "FAILED after 1 s: 1 of 2 workers"), (None, 1, "no answer from")],
)
def test_test_s_script_counts_what_the_dashboard_says(workers: int | None, code: int, says: str) -> None:
    """The dashboard's answer is that of Ray 2.60, cut to what is read."""
    nodes = [{"state": "ALIVE", "is_head_node": True}, {"state": "DEAD", "is_head_node": False}]
    nodes += [{"state": "ALIVE", "is_head_node": False}] * (workers or 0)

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            good = workers is not None and self.headers["Authorization"] == "Bearer token"
            self.send_response(200 if good and self.path.startswith("/api/v0/nodes?") else 503)
            self.end_headers()
            self.wfile.write(json.dumps({"data": {"result": {"result": nodes}}}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        script = container(hook("raycluster")["spec"])["command"][2]
        done = subprocess.run(
            [sys.executable, "-c", script, f"http://127.0.0.1:{server.server_port}", "2", "1"],
            env={"RAY_AUTH_TOKEN": "token"},
            capture_output=True,
            text=True,
            check=False,
        )
        server.shutdown()
    assert done.returncode == code
    assert says in done.stdout + done.stderr


# --- pods ---


@pytest.mark.parametrize("values", [{}, {"cpuWorkers": {"replicas": 1}}, {"autoscaling": {"enabled": True}}], ids=str)
def test_every_pod_is_restricted(values: dict[str, Any]) -> None:
    for pod in pods(values).values():
        check.restricted(pod)


def test_only_the_autoscaler_s_pod_gets_a_token() -> None:
    tokens = {
        role: pod["automountServiceAccountToken"] for role, pod in pods({"autoscaling": {"enabled": True}}).items()
    }
    assert tokens == {"submitter": False, "head": True, "gpu": False}
    assert not any(pod["automountServiceAccountToken"] for pod in pods().values())
    accounts = [item for item in render("rayjob") if item["kind"] == "ServiceAccount"]
    assert [account["automountServiceAccountToken"] for account in accounts] == [False, False]


def test_cloud_identity_is_the_ray_pods_alone() -> None:
    values = {"serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/reader"}}}
    reader, submitter = [item for item in render("rayjob", values) if item["kind"] == "ServiceAccount"]
    assert reader["metadata"]["annotations"] == values["serviceAccount"]["annotations"]
    assert "annotations" not in submitter["metadata"]
    assert pods(values)["gpu"]["serviceAccountName"] == reader["metadata"]["name"]
    assert pods(values)["submitter"]["serviceAccountName"] == submitter["metadata"]["name"]
    own = {"serviceAccount": {"create": False, "name": "mine"}}
    assert pods(own)["head"]["serviceAccountName"] == "mine"
    assert len([item for item in render("rayjob", own) if item["kind"] == "ServiceAccount"]) == 1


def test_image_by_digest_and_its_secrets() -> None:
    digest = "sha256:" + "0" * 64
    for pod in pods({"image": {"repository": "r/i", "tag": "1", "digest": digest, "pullSecrets": ["s"]}}).values():
        assert container(pod)["image"] == f"r/i@{digest}"
        assert pod["imagePullSecrets"] == [{"name": "s"}]
    assert container(pods({"image": {"tag": "1"}})["head"])["image"] == "batch-inference:1"


PLACEMENT = {
    "nodeSelector": {"pool": "x"},
    "tolerations": [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}],
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}],
    "affinity": {
        "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": []}]}}
    },
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "schedulerName": "volcano",
}


@pytest.mark.parametrize(
    ("section", "role"), [("head", "head"), ("workers", "gpu"), ("cpuWorkers", "cpu"), ("submitter", "submitter")]
)
def test_placement_of_one_role(section: str, role: str) -> None:
    found = pods(merged({"cpuWorkers": {"replicas": 1}}, {section: PLACEMENT}))
    assert {key: found[role][key] for key in PLACEMENT} == PLACEMENT
    for other in found.keys() - {role}:
        # The submitter goes where the head goes, unless it says otherwise.
        shared = (
            {"nodeSelector", "tolerations", "affinity", "priorityClassName"}
            if (role, other) == ("head", "submitter")
            else set()
        )
        assert PLACEMENT.keys() & found[other].keys() == shared


def test_head_and_submitter_ask_not_to_be_moved() -> None:
    stay = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
    own = {"pods": {"annotations": {"karpenter.sh/do-not-disrupt": "false"}}}
    for values, expected in (({}, stay), (own, stay | own["pods"]["annotations"])):
        found = {role: template["metadata"].get("annotations", {}) for role, template in check.pods(rayjob(values))}
        assert found["head"] == found["submitter"] == expected
        assert "cluster-autoscaler.kubernetes.io/safe-to-evict" not in found["gpu"]


def test_placement_of_all_pods_is_added_to_and_overridden() -> None:
    values = {
        "pods": {"nodeSelector": {"a": "1", "b": "1"}, "priorityClassName": "low", "annotations": {"x": "1"}},
        "workers": {"nodeSelector": {"b": "2"}, "priorityClassName": "high", "annotations": {"y": "2"}},
    }
    found = pods(values)
    assert found["gpu"]["nodeSelector"] == {"a": "1", "b": "2"}
    assert found["head"]["nodeSelector"] == {"a": "1", "b": "1"}
    assert (found["gpu"]["priorityClassName"], found["head"]["priorityClassName"]) == ("high", "low")
    metadata = {role: template["metadata"]["annotations"] for role, template in check.pods(rayjob(values))}
    assert metadata["gpu"] == {"x": "1", "y": "2"}


def test_variables_are_merged_by_name_the_role_s_winning() -> None:
    secret = {"secretKeyRef": {"name": "s", "key": "k"}}
    values = {
        "pods": {
            "env": [{"name": "A", "value": "1"}, {"name": "B", "valueFrom": secret}],
            "envFrom": [{"secretRef": {"name": "s3"}}],
        },
        "workers": {"env": [{"name": "A", "value": "2"}, {"name": "HOME", "value": "/data"}]},
    }
    found = pods(values)
    assert environment(found["gpu"]) | {"A": "2", "B": secret, "HOME": "/data"} == environment(found["gpu"])
    assert environment(found["head"])["A"] == "1"
    assert all(container(pod)["envFrom"] == [{"secretRef": {"name": "s3"}}] for pod in found.values())


def test_model_cache_is_a_folder_or_a_claim() -> None:
    def cache(values: dict[str, Any]) -> Manifest:
        (volume,) = [item for item in pods(values)["gpu"]["volumes"] if item["name"] == "model-cache"]
        return volume

    assert cache({})["emptyDir"] == {"sizeLimit": "20Gi"}
    assert cache({"modelCache": {"claimName": "models"}})["persistentVolumeClaim"] == {"claimName": "models"}
    assert environment(pods({"modelCache": {"mountPath": "/m"}})["gpu"])["XDG_CACHE_HOME"] == "/m"


def test_local_output_on_a_mounted_volume_is_fine() -> None:
    volume = {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}
    values = {
        "job": {"output": {"uri": "/data/out"}},
        "pods": {"volumes": [volume], "volumeMounts": [{"name": "data", "mountPath": "/data"}]},
    }
    for pod in pods(values).values():
        assert volume in pod["volumes"]


@pytest.mark.parametrize("chart", ["rayjob", "raycluster"])
def test_defaults_are_valid(chart: str) -> None:
    check.valid(render(chart))


@pytest.mark.parametrize("chart", ["rayjob", "raycluster"])
def test_pods_keep_the_name_that_the_operator_gives_them(chart: str) -> None:
    """The operator's head service of a job selects `app.kubernetes.io/name: kuberay`, and finds no pod with another name."""
    for item in render(chart, {"cpuWorkers": {"replicas": 1}}):
        spec = item.get("spec", {})
        cluster = spec.get("rayClusterSpec", spec)
        for group in [cluster.get("headGroupSpec"), *cluster.get("workerGroupSpecs", [])]:
            if group:
                assert "app.kubernetes.io/name" not in group["template"]["metadata"]["labels"]


# --- the end of a pod ---


@pytest.mark.parametrize("role", ["head", "workers", "cpuWorkers"])
def test_each_pod_ends_its_work_within_the_time_it_has(role: str) -> None:
    """The head's hook stops the driver, since Kubernetes' signal reaches only Ray; Ray drains the nodes of workers."""
    grace = {"head": 60, "workers": 30, "cpuWorkers": 30}
    for seconds in (grace[role], 10, 3600):
        values = merged({"cpuWorkers": {"replicas": 1}}, {role: {"terminationGracePeriodSeconds": seconds}})
        pod = pods(values)[{"head": "head", "workers": "gpu", "cpuWorkers": "cpu"}[role]]
        assert pod["terminationGracePeriodSeconds"] == seconds
        drains = environment(pod)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        if role == "head":
            command = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
            assert command == ["batch-inference", "prestop", str(seconds - 5)]
            assert drains == "0"
        else:
            assert "lifecycle" not in container(pod)
            assert drains == str(seconds - 5)
