"""The charts' alerts and dashboard: `promtool test rules` on each alert, and no query uses a metric that does not exist."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from batch_inference.telemetry.metrics import METRICS
from tests.charts import check
from tests.charts.render import HELM, REPOSITORY, Manifest, find, render
from tests.support.prometheus import dashboard_queries, program

ON = {"monitoring": {"podMonitor": {"enabled": True}, "rules": {"enabled": True}, "dashboard": {"enabled": True}}}
MINE = 'namespace="default", app_kubernetes_io_instance="demo", run="demo-0123abcd"'
RUNBOOK = REPOSITORY / "k8s" / "monitoring.md"
charts = pytest.mark.parametrize("chart", ["rayjob", "raycluster"])


def series(name: str, values: str, labels: str = "", mine: str = MINE) -> dict[str, str]:
    """Return a series of this release's run, one value per minute: `0+5x60` is 0, 5, … 300."""
    return {"series": f"{name}{{{', '.join(filter(None, (mine, labels)))}}}", "values": values}


def images(values: str, outcome: str = "prediction", mine: str = MINE) -> dict[str, str]:
    return series("ray_batch_inference_images_total", values, f'outcome="{outcome}"', mine)


def left(values: str = "1000x300", mine: str = MINE) -> dict[str, str]:
    return series("ray_batch_inference_inputs", values, 'state="left"', mine)


def busy(values: str, device: str = "gpu") -> dict[str, str]:
    return series("ray_batch_inference_actor_busy_seconds_total", values, f'device="{device}"')


def actors(state: str, values: str) -> dict[str, str]:
    return series("ray_batch_inference_actors", values, f'state="{state}"')


def retries(kind: str, values: str) -> dict[str, str]:
    return series("ray_batch_inference_retries_total", values, f'kind="{kind}"')


def attempt(number: int, values: str) -> dict[str, str]:
    return series("ray_batch_inference_attempts_total", values, f'pod="head-{number}"')


def commits(values: str) -> dict[str, str]:
    return series("ray_batch_inference_commits_total", values, 'driver="own"')


def status(name: str, state: str, values: str, namespace: str = 'namespace="default"') -> dict[str, str]:
    """Return KubeRay's metric for a RayJob."""
    labels = f'{namespace}, name="{name}", deployment_status="{state}"'
    return {"series": f"kuberay_job_deployment_status{{{labels}}}", "values": values}


@dataclass(frozen=True)
class Case:
    """Series, and whether an alert fires at a minute; if so, `says` is its summary."""

    alert: str
    title: str
    given: list[dict[str, str]]
    minute: int
    says: str = ""
    labels: dict[str, str] = field(default_factory=dict)


OURS = {"namespace": "default", "run": "demo-0123abcd"}
OTHERS = MINE.replace('"demo"', '"other"')
RENAMED = 'namespace="kuberay-system", exported_namespace="default"'
RENAMED_ELSEWHERE = 'namespace="kuberay-system", exported_namespace="elsewhere"'
CASES = [
    Case("NoProgress", "nothing comes back", [images("0+5x20 100x60"), left()], 50,
         "No row of run demo-0123abcd has come back for 15 minutes, though inputs are left", {"severity": "critical"}),
    Case("NoProgress", "nothing ever came back", [images("0x60"), left()], 30,
         "No row of run demo-0123abcd has come back for 15 minutes, though inputs are left", {"severity": "critical"}),
    Case("NoProgress", "too early to say", [images("0+5x20 100x60"), left()], 35),
    Case("NoProgress", "slow, but alive", [images("0+1x60"), left()], 50),
    Case("NoProgress", "only errors come back", [images("0x60"), images("0+1x60", "error"), left()], 50),
    Case("NoProgress", "all is done", [images("0+5x20 100x60"), left("100-5x20 0x60")], 50),
    Case("NoProgress", "another release's", [images("0x60", mine=OTHERS), left(mine=OTHERS)], 50),
    Case("ErrorRate", "3 % fail", [images("0+97x60"), images("0+3x60", "error"), left()], 30,
         "Of the rows of run demo-0123abcd in the last ten minutes 3.0 % failed", {"severity": "warning"}),
    Case("ErrorRate", "1 % fail", [images("0+99x60"), images("0+1x60", "error"), left()], 30),
    Case("ErrorRate", "one of two failed", [images("0 1x60"), images("0 1x60", "error"), left()], 5),
    Case("ErrorRate", "failed long ago", [images("0+97x60"), images("0+3x10 30x60", "error"), left()], 40),
    Case("GpuIdle", "two GPUs, each busy a tenth", [busy("0+12x60"), actors("ready", "2x60"), left()], 40,
         "The GPUs of run demo-0123abcd are busy 10 % of the time, though inputs are left", {"severity": "warning"}),
    Case("GpuIdle", "busy enough", [busy("0+96x60"), actors("ready", "2x60"), left()], 40),
    Case("GpuIdle", "nothing is left to do", [busy("0+12x60"), actors("ready", "2x60"), left("0x60")], 40),
    Case("GpuIdle", "no actor is ready", [busy("0x60"), actors("ready", "0x60"), left()], 40),
    Case("GpuIdle", "CPUs may be idle", [busy("0+12x60", "cpu"), actors("ready", "2x60"), left()], 40),
    Case("GpuIdle", "a short pause", [busy("0+48x20 960x10 960+48x30"), actors("ready", "1x60"), left()], 33),
    Case("ActorsMissing", "two of four", [actors("wanted", "4x60"), actors("ready", "2x60"), left()], 20,
         "2 actors of run demo-0123abcd have been missing for 15 minutes: pods are pending, or the model does not load",
         {"severity": "warning"}),
    Case("ActorsMissing", "they come in time", [actors("wanted", "4x60"), actors("ready", "0x10 4x50"), left()], 20),
    Case("ActorsMissing", "at the end they go", [actors("wanted", "4x60"), actors("ready", "0x60"), left("0x60")], 20),
    Case("PodsPending", "a run that does not start", [status("demo-0123abcd", "Initializing", "1x60")], 20,
         "demo-0123abcd has waited 15 minutes for its pods", {"severity": "warning"}),
    Case("PodsPending", "the operator's label renamed", [status("demo-0123abcd", "Initializing", "1x60", RENAMED)], 20,
         "demo-0123abcd has waited 15 minutes for its pods", {"severity": "warning"}),
    Case("PodsPending", "started in time",
         [status("demo-0123abcd", "Initializing", "1x10 _x50"), status("demo-0123abcd", "Running", "_x10 1x50")], 20),
    Case("PodsPending", "another release's", [status("demo2-0123abcd", "Initializing", "1x60")], 20),
    Case("PodsPending", "in another namespace", [status("demo-0123abcd", "Initializing", "1x60", RENAMED_ELSEWHERE)], 20),
    Case("RetryLoop", "actors die and nothing is committed", [retries("actor", "0+1x60"), commits("3x60"), left()], 40,
         "Run demo-0123abcd is begun again and again (30 times)", {"severity": "critical"}),
    Case("RetryLoop", "actors die, but work goes on", [retries("actor", "0+1x60"), commits("0+1x60"), left()], 40),
    Case("RetryLoop", "requests are sent again", [retries("request", "0+9x60"), commits("3x60"), left()], 40),
    Case("RetryLoop", "the third attempt", [attempt(1, "1x10"), attempt(2, "_x20 1x10"), attempt(3, "_x40 1x20"), left("9x60")], 45,
         "Run demo-0123abcd is begun again and again (3 times)", {"severity": "critical"}),
    Case("RetryLoop", "the second attempt", [attempt(1, "1x10"), attempt(2, "_x20 1x40"), left("9x60")], 45),
    Case("RetryLoop", "the third attempt made it",
         [attempt(1, "1x10"), attempt(2, "_x20 1x10"), attempt(3, "_x40 1x20"), left("9x40 0x20")], 58),
]  # fmt: skip
CLUSTER = 'namespace="default", name="demo", condition="{}"'
SHARED_CASES = [
    Case("PodsPending", "a cluster that does not come up",
         [{"series": f"kuberay_cluster_condition_provisioned{{{CLUSTER.format('false')}}}", "values": "1x60"}], 20,
         "demo has waited 15 minutes for its pods", {"severity": "warning", "run": "demo"}),
    Case("PodsPending", "a cluster that is up",
         [{"series": f"kuberay_cluster_condition_provisioned{{{CLUSTER.format('true')}}}", "values": "1x60"}], 20),
    *(case for case in CASES if case.alert != "PodsPending"),
]  # fmt: skip


def alerts(chart: str) -> dict[str, Manifest]:
    (group,) = find(render(chart, ON), "PrometheusRule")["spec"]["groups"]
    return {rule["alert"].removeprefix("BatchInference"): rule for rule in group["rules"]}


@charts
def test_alerts_fire_when_they_should_and_only_then(chart: str, tmp_path: Path) -> None:
    cases = CASES if chart == "rayjob" else SHARED_CASES
    rules = tmp_path / "rules.yml"
    rules.write_text(yaml.safe_dump({"groups": find(render(chart, ON), "PrometheusRule")["spec"]["groups"]}))
    tests = []
    for case in cases:
        rule = alerts(chart)[case.alert]
        anchor = f"k8s/monitoring.md#batchinference{case.alert.lower()}"
        expected = {
            "exp_labels": {**OURS, **case.labels},
            "exp_annotations": {"summary": case.says, "runbook_url": anchor},
        }
        tests.append(
            {
                "name": f"{case.alert}: {case.title}",
                "interval": "1m",
                "input_series": case.given,
                "alert_rule_test": [
                    {
                        "eval_time": f"{case.minute}m",
                        "alertname": rule["alert"],
                        "exp_alerts": [expected] if case.says else [],
                    }
                ],
            }
        )
    file = tmp_path / "tests.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": tests}))
    done = subprocess.run([program("promtool"), "test", "rules", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    fired = {case.alert for case in cases if case.says}
    assert fired == {case.alert for case in cases if not case.says} == set(alerts(chart))
    print(
        f"\n{chart}: promtool test rules: {len(fired)} alerts, {sum(bool(c.says) for c in cases)} times to fire, ",
        end="",
    )
    print(f"{sum(not c.says for c in cases)} times not to: {done.stdout.strip().splitlines()[-1].strip()}")


@charts
def test_thresholds_are_the_values(chart: str) -> None:
    rules = {"enabled": True, "noProgressMinutes": 7, "errorPercent": 0.5, "gpuBusyPercent": 44, "pendingMinutes": 9}
    (group,) = find(render(chart, {"monitoring": {"podMonitor": {"enabled": True}, "rules": rules}}), "PrometheusRule")[
        "spec"
    ]["groups"]
    found = {rule["alert"].removeprefix("BatchInference"): rule for rule in group["rules"]}
    assert found["NoProgress"]["for"] == "7m"
    assert "> 0.5\n" in found["ErrorRate"]["expr"]
    assert "< 44\n" in found["GpuIdle"]["expr"]
    assert found["PodsPending"]["for"] == found["ActorsMissing"]["for"] == "9m"


@pytest.mark.parametrize(
    "waits", [{"queue": {"name": "gpus"}}, {"cluster": {"suspend": True}}], ids=["queued", "suspended"]
)
def test_cluster_that_may_be_suspended_is_not_reported_as_pending(waits: dict[str, Any]) -> None:
    (group,) = find(render("raycluster", {**ON, **waits}), "PrometheusRule")["spec"]["groups"]
    assert {rule["alert"].removeprefix("BatchInference") for rule in group["rules"]} == set(alerts("rayjob")) - {
        "PodsPending"
    }


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\b((?:ray|kuberay)_\w+)\{", expression))


def test_dashboard_and_alerts_ask_for_metrics_that_there_are() -> None:
    """KubeRay's metrics, whose names only a cluster knows, are tested there."""
    known = {metric.prometheus_name for metric in METRICS}
    known |= {f"{metric.prometheus_name}{end}" for metric in METRICS for end in ("_bucket", "_sum", "_count")}
    known |= {"kuberay_job_deployment_status", "kuberay_cluster_condition_provisioned"}
    asked = set()
    for chart in ("rayjob", "raycluster"):
        for expression in (rule["expr"] for rule in alerts(chart).values()):
            asked |= metrics_in(expression)
    for _, expression in dashboard_queries(dashboard("rayjob"), {"namespace": "x", "run": "y"}):
        assert metrics_in(expression), expression
        asked |= metrics_in(expression)
    assert asked <= known
    unseen = {m.prometheus_name for m in METRICS} - {name.removesuffix("_sum").removesuffix("_count") for name in asked}
    assert unseen == set(), "metrics that neither a panel nor an alert shows"


def dashboard(chart: str) -> dict[str, Any]:
    maps = [item for item in render(chart, ON) if item["kind"] == "ConfigMap"]
    (found,) = [item for item in maps if item["metadata"]["name"].endswith("-dashboard")]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    loaded: dict[str, Any] = json.loads(found["data"]["batch-inference.json"])
    return loaded


def test_both_charts_bring_the_same_dashboard() -> None:
    assert dashboard("rayjob") == dashboard("raycluster")
    assert dashboard("rayjob") == json.loads((HELM / "common" / "files" / "dashboard.json").read_text())


def test_panels_say_what_they_show_and_do_not_overlap() -> None:
    panels = dashboard("rayjob")["panels"]
    for panel in panels:
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        apart = (
            one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        )  # fmt: skip
        assert apart, (one, other)


@charts
def test_every_alert_has_its_section_in_the_runbook(chart: str) -> None:
    headings = {f"#{line.lstrip('# ').lower()}" for line in RUNBOOK.read_text().splitlines() if line.startswith("#")}
    for rule in alerts(chart).values():
        assert "#" + rule["annotations"]["runbook_url"].partition("#")[2] in headings


@charts
def test_monitor_finds_the_ray_pods_and_no_other(chart: str) -> None:
    monitor = find(render(chart, ON), "PodMonitor")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    selected = dict(monitor["selector"]["matchLabels"])
    # The operator puts this one on head and workers.
    assert selected.pop("ray.io/is-ray-node") == "yes"
    for role, template in check.pods(find(render(chart, ON), "RayJob" if chart == "rayjob" else "RayCluster")):
        assert selected.items() <= template["metadata"]["labels"].items()
        ports = [port["name"] for port in template["spec"]["containers"][0].get("ports", [])]
        assert (endpoint["port"] in ports) is (role != "submitter")
    assert "app.kubernetes.io/instance" in monitor["podTargetLabels"]


@charts
def test_monitoring_is_off_unless_asked_for_and_changes_no_run(chart: str) -> None:
    kinds = {item["kind"] for item in render(chart)}
    assert not kinds & {"PodMonitor", "PrometheusRule"}
    kind = "RayJob" if chart == "rayjob" else "RayCluster"
    assert find(render(chart), kind) == find(render(chart, ON), kind)
