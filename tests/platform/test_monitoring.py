"""The real Prometheus scrapes what the charts' PodMonitor selects: every query of dashboard and alerts has data.

There is no Prometheus operator here. What it would make of PodMonitor and PrometheusRule is made of the objects in the API server, by
:func:`scrape_config`; pods are discovered by `discovery.py`.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from batch_inference.telemetry.metrics import METRICS
from tests.charts.vendor import crds
from tests.e2e.cluster import base_image
from tests.e2e.cluster.cache import digest
from tests.e2e.cluster.images import OPERATOR_NAMESPACE, engine_run, image_exists
from tests.e2e.runs import RUN_SECONDS, Kubernetes, Releases, Run
from tests.e2e.world import NAMESPACE, World, forwarded, until
from tests.platform import discovery
from tests.support.limits import HANG_S
from tests.support.prometheus import Prometheus, dashboard_queries, package, unanswered

MONITORING = "monitoring"
RELEASE, ROUNDS = "monitored", 20
READY_SECONDS = HANG_S
# The cluster stays for so long after the end, so that the last counts are scraped.
STAYS_S = 60
VALUES: dict[str, Any] = {
    "job": {
        "input": {"uris": [], "manifest": "s3://images/monitored.csv"},
        "predictor": "slow:Slow",
        "inference": {"batch_size": 4},
        "errors": {"max_percent": None},
        "shard_size": 20,
    },
    "pods": {
        "env": [{"name": "PYTHONPATH", "value": "/opt/predictors"}],
        "volumes": [{"name": "predictors", "configMap": {"name": "slow-predictor"}}],
        "volumeMounts": [{"name": "predictors", "mountPath": "/opt/predictors"}],
    },
    "run": {"ttlSecondsAfterFinished": STAYS_S},
    "monitoring": {
        "podMonitor": {"enabled": True, "intervalSeconds": 5},
        "prometheus": {"namespace": MONITORING},
        "rules": {"enabled": True},
        "dashboard": {"enabled": True},
    },
}


@pytest.fixture(scope="module")
def prometheus_image(world: World) -> str:
    """Prepare the cluster: the image with Prometheus, KubeRay's metrics, and the Prometheus operator's CRDs."""
    cluster = world.cluster
    for kind in ("podmonitors", "prometheusrules"):
        cluster.kubectl(
            "apply", "--server-side", "--filename", crds("Prometheus operator") / f"monitoring.coreos.com_{kind}.yaml"
        )
    named = ("deployment/kuberay-operator", "--namespace", OPERATOR_NAMESPACE)
    (container,) = json.loads(cluster.kubectl("get", *named, "--output=json"))["spec"]["template"]["spec"]["containers"]
    arguments = container.get("args", [])
    if not any("enable-metrics" in argument for argument in arguments):
        path = "/spec/template/spec/containers/0/args"
        patch = json.dumps([{"op": "add", "path": path, "value": [*arguments, "--enable-metrics"]}])
        cluster.kubectl("patch", *named, "--type=json", "--patch", patch)
        cluster.kubectl("rollout", "status", *named, f"--timeout={HANG_S}s")
    name = image()
    cluster.load_image(name)
    return name


def image() -> str:
    """Return the name of an image with Debian's Prometheus."""
    program = package() / "prometheus"
    name = f"localhost/prometheus:{digest(program)}"
    if not image_exists(name):
        with tempfile.TemporaryDirectory() as context:
            shutil.copy(program, context)
            file = Path(context, "Containerfile")
            file.write_text(f"FROM {base_image()}\nCOPY --chmod=755 prometheus /usr/bin/prometheus\n")
            engine_run("build", "--quiet", "--network=host", "--tag", name, "--file", file, context, timeout=HANG_S)
    return name


def sanitized(label: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_]", "_", label)


def discovery_of(namespace: str) -> dict[str, Any]:
    return {"url": f"http://127.0.0.1:{discovery.PORT}/{namespace}", "refresh_interval": "5s"}


def scrape_config(monitor: dict[str, Any]) -> dict[str, Any]:
    """Return the scrape configuration that the Prometheus operator makes of a PodMonitor."""
    spec, metadata = monitor["spec"], monitor["metadata"]
    (endpoint,) = spec["podMetricsEndpoints"]
    assert set(spec) == {"selector", "podTargetLabels", "podMetricsEndpoints"}
    assert set(endpoint) == {"port", "path", "interval"}
    pod = "__meta_kubernetes_pod"
    relabel: list[dict[str, Any]] = [
        {"source_labels": [f"{pod}_phase"], "regex": "(Failed|Succeeded)", "action": "drop"},
        *(
            {"source_labels": [f"{pod}_label_{sanitized(key)}"], "regex": re.escape(value), "action": "keep"}
            for key, value in spec["selector"]["matchLabels"].items()
        ),
        {"source_labels": [f"{pod}_container_port_name"], "regex": endpoint["port"], "action": "keep"},
        {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
        {"source_labels": [f"{pod}_name"], "target_label": "pod"},
        {"source_labels": [f"{pod}_container_name"], "target_label": "container"},
        *(
            {"source_labels": [f"{pod}_label_{sanitized(key)}"], "target_label": sanitized(key)}
            for key in spec["podTargetLabels"]
        ),
    ]
    return {
        "job_name": f"{metadata['namespace']}/{metadata['name']}",
        "metrics_path": endpoint["path"],
        "scrape_interval": endpoint["interval"],
        "http_sd_configs": [discovery_of(metadata["namespace"])],
        "relabel_configs": relabel,
    }


def operator_config() -> dict[str, Any]:
    """Return the scrape configuration of KubeRay's operator without honorLabels: its `namespace` is renamed."""
    pod = "__meta_kubernetes_pod"
    return {
        "job_name": "kuberay-operator",
        "scrape_interval": "5s",
        "http_sd_configs": [discovery_of(OPERATOR_NAMESPACE)],
        "relabel_configs": [
            {
                "source_labels": [f"{pod}_label_app_kubernetes_io_component"],
                "regex": "kuberay-operator",
                "action": "keep",
            },
            {"source_labels": [f"{pod}_container_port_number"], "regex": "8080", "action": "keep"},
            {"source_labels": ["__meta_kubernetes_namespace"], "target_label": "namespace"},
        ],
    }


def manifests(name: str, with_python: str, config: dict[str, Any], rules: dict[str, Any]) -> str:
    """Return the manifests of Prometheus in a namespace of its own, with the right to read pods."""
    files = {
        "prometheus.yml": yaml.safe_dump(config),
        "rules.yml": yaml.safe_dump(rules),
        "discovery.py": Path(discovery.__file__).read_text(),
    }
    metadata = {"name": "prometheus", "namespace": MONITORING}
    reader = {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    container = {
        "name": "prometheus",
        "image": name,
        "imagePullPolicy": "Never",
        "command": ["prometheus", "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/data"],
        "ports": [{"containerPort": 9090}],
        "readinessProbe": {"httpGet": {"path": "/-/ready", "port": 9090}, "periodSeconds": 2},
        "resources": {"requests": {"cpu": "10m", "memory": "256Mi"}, "limits": {"memory": "512Mi"}},
        "volumeMounts": [
            {"name": "config", "mountPath": "/etc/prometheus"},
            {"name": "data", "mountPath": "/data"},
        ],
    }
    beside = {
        "name": "discovery",
        "image": with_python,
        "imagePullPolicy": "Never",
        "command": ["python", "/etc/prometheus/discovery.py"],
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}},
        "volumeMounts": [{"name": "config", "mountPath": "/etc/prometheus"}],
    }
    objects: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": MONITORING}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": files},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "prometheus"},
         "rules": [reader]},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "prometheus"},
         "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "prometheus"},
         "subjects": [{"kind": "ServiceAccount", **metadata}]},
        {"apiVersion": "v1", "kind": "Pod",
         "metadata": {**metadata, "labels": {"app.kubernetes.io/name": "prometheus"}},
         "spec": {"serviceAccountName": "prometheus", "containers": [container, beside],
                  "volumes": [{"name": "config", "configMap": {"name": "prometheus"}}, {"name": "data", "emptyDir": {}}]}},
    ]  # fmt: skip
    return "\n---\n".join(json.dumps(item) for item in objects)


@pytest.fixture
def run(world: World, releases: Releases, prometheus_image: str, slow_predictor: Path) -> Run:
    """Return a monitored run that has just started."""
    names = sorted(item.path for item in world.store("s3://images/photos/").objects())
    rows = [f"s3://images/photos/{name},{number}" for number in range(ROUNDS) for name in names]
    world.store("s3://images").put("monitored.csv", "\n".join(["uri,round", *rows]).encode())
    return releases.rayjob(RELEASE, VALUES)


@pytest.fixture
def prometheus(world: World, run: Run, prometheus_image: str) -> Iterator[Prometheus]:
    """Yield Prometheus in the cluster, configured by the objects of the release."""

    def there(kind: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(
            world.cluster.kubectl("get", kind, RELEASE, "--namespace", NAMESPACE, "--output=json")
        )
        return found

    config = {
        "global": {"evaluation_interval": "5s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [scrape_config(there("podmonitor")), operator_config()],
    }
    rules = {"groups": there("prometheusrule")["spec"]["groups"]}
    world.cluster.kubectl("apply", "--filename", "-", stdin=manifests(prometheus_image, world.image, config, rules))
    try:
        wait = ("wait", "pod/prometheus", "--namespace", MONITORING, "--for=condition=Ready", f"--timeout={HANG_S}s")
        world.cluster.kubectl(*wait, timeout=HANG_S)
        with forwarded(world.cluster, MONITORING, "pod/prometheus", 9090) as port:
            yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        world.cluster.kubectl("delete", "namespace", MONITORING, "--ignore-not-found", timeout=HANG_S)


def test_every_query_of_dashboard_and_alerts_has_data(
    world: World, kubernetes: Kubernetes, run: Run, prometheus: Prometheus
) -> None:
    every = queries(kubernetes, run)
    pending, most_targets = every, 0
    deadline = time.monotonic() + RUN_SECONDS
    while (status := run.status).get("jobDeploymentStatus") not in ("Complete", "Failed"):
        assert time.monotonic() < deadline, (status, pending)
        pending = unanswered(prometheus, pending)
        scraped = [target for target in prometheus.targets() if target["labels"]["job"].endswith(f"/{RELEASE}")]
        most_targets = max(most_targets, sum(target["health"] == "up" for target in scraped))
        time.sleep(1)
    assert status["jobStatus"] == "SUCCEEDED", status
    assert [rule["lastError"] for rule in prometheus.rules() if rule["health"] == "err"] == []
    assert most_targets == 3, "the head and two workers; the submitter has nothing to scrape"
    print(f"\n{len(every)} queries of dashboard and alerts, without data: {len(pending)}")
    assert pending == []

    summary = json.loads(world.store(f"s3://images/out/{RELEASE}/").get("_report/summary.json"))
    expected = counts(run.name, summary)

    def seen() -> dict[str, float | None] | None:
        found = {query: prometheus.value(query) for query in expected}
        return found if found == expected else None

    try:
        until("the last counts are scraped", seen, STAYS_S / 2)
    finally:
        print(table(prometheus, run.name))
    lines_say_whose_they_are(run, summary)


def queries(kubernetes: Kubernetes, run: Run) -> list[tuple[str, str]]:
    """Return the queries of each panel in the ConfigMap and of each alert in the PrometheusRule."""
    maps = kubernetes.core.list_namespaced_config_map(NAMESPACE, label_selector="grafana_dashboard=1").items
    (dashboard,) = [json.loads(item.data["batch-inference.json"]) for item in maps]
    rule = kubernetes.custom.get_namespaced_custom_object(
        "monitoring.coreos.com", "v1", NAMESPACE, "prometheusrules", RELEASE
    )
    panels = dashboard_queries(dashboard, {"namespace": NAMESPACE, "run": run.name})
    return panels + [(one["alert"], one["expr"]) for one in rule["spec"]["groups"][0]["rules"]]


def counts(run: str, summary: dict[str, Any]) -> dict[str, float]:
    """Queries, with the values that they must have in the end."""
    found = {
        f'sum(ray_batch_inference_images_total{{run="{run}", outcome="{outcome}"}})': summary["rows"][f"{outcome}s"]
        for outcome in ("prediction", "error")
    }
    found[f'sum(ray_batch_inference_commits_total{{run="{run}"}})'] = summary["shards"]["done"]
    found[f'sum(ray_batch_inference_errors_total{{run="{run}"}})'] = summary["rows"]["errors"]
    found[f'sum(ray_batch_inference_fetched_bytes_total{{run="{run}"}})'] = summary["this_attempt"]["bytes"]
    return {query: float(value) for query, value in found.items()}


def table(prometheus: Prometheus, run: str) -> str:
    """Return each metric with its last value."""
    lines = ["| metric | labels | value |", "| --- | --- | --- |"]
    for metric in METRICS:
        ours = [label for label in metric.labels if label != "run"]
        name = metric.prometheus_name + ("_count" if metric.type == "histogram" else "")
        found = prometheus.query(f'sum by ({", ".join(["run", *ours])}) (last_over_time({name}{{run="{run}"}}[10m]))')
        for one in sorted(found, key=lambda one: sorted(one["metric"].items())):
            labels = ", ".join(f"{label}={one['metric'][label]}" for label in ours)
            lines.append(f"| {name} | {labels} | {float(one['value'][1]):g} |")
    return "\n".join(lines)


def lines_say_whose_they_are(run: Run, summary: dict[str, Any]) -> None:
    """The driver's lines in the submitter's log are JSON with run and attempt, and shard if they are about one."""
    lines = [json.loads(line) for line in run.log().splitlines() if line.startswith('{"')]
    theirs = [line for line in lines if "attempt" in line]
    assert {line["run"] for line in theirs} == {run.name}
    assert {line["attempt"] for line in theirs} == {summary["attempt"]}
    committed = sorted(line["shard"] for line in theirs if line["event"] == "committed")
    assert committed == list(range(summary["shards"]["total"]))
