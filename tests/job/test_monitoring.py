"""A real Prometheus scrapes a run in which images are bad, requests fail, memory ends and processes are killed."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from batch_inference.config import StorageConfig
from batch_inference.storage.store import Store
from batch_inference.telemetry.metrics import METRICS
from tests.charts.render import HELM, find, render
from tests.support.jobs import job_args, start, verified
from tests.support.limits import HANG_S
from tests.support.prometheus import Prometheus, dashboard_queries, server, unanswered
from tests.support.servers import Proxy

IMAGES, BAD_PERCENT, SHARD = 240, 10, 12
RUN, RELEASE, NAMESPACE = "demo-0123abcd", "demo", "default"
RUN_S = SETTLE_S = HANG_S
# Only a cluster with (claimed) GPUs and KubeRay's operator has these.
ELSEWHERE = ("kuberay_", 'device="gpu"')


def alert_rules() -> dict[str, Any]:
    on = {"monitoring": {"podMonitor": {"enabled": True}, "rules": {"enabled": True}}}
    groups: dict[str, Any] = {"groups": find(render("rayjob", on, name=RELEASE), "PrometheusRule")["spec"]["groups"]}
    return groups


def all_queries() -> list[tuple[str, str]]:
    """Each panel's, and what each alert compares."""
    dashboard = json.loads((HELM / "common" / "files" / "dashboard.json").read_text())
    queries = dashboard_queries(dashboard, {"namespace": NAMESPACE, "run": RUN})
    return queries + [(rule["alert"], rule["expr"]) for rule in alert_rules()["groups"][0]["rules"]]


def test_prometheus_sees_what_the_summary_says_and_every_query_has_data(
    photos: Callable[..., Path],
    tmp_path: Path,
    attached: Callable[..., subprocess.CompletedProcess[str]],
    cluster: dict[str, str],
    proxy: Proxy,
) -> None:
    source, settings = f"s3://tests/{tmp_path.name}/in", ("--set", f"storage.endpoint_url={proxy.url}")
    store = Store(source, StorageConfig(endpoint_url=proxy.url))
    for file in photos(IMAGES, bad_percent=BAD_PERCENT).iterdir():
        store.put(file.name, file.read_bytes())
    gets = iter(range(10**9))
    held = threading.Event()

    def at_times(method: str, path: str) -> int | None:
        if method == "GET" and path.endswith(".jpg"):
            number = next(gets)
            if number == IMAGES // 2:
                held.set()
                time.sleep(5)  # the task that waits for it is killed meanwhile
            return 503 if number % 40 == 10 else None
        return None

    proxy.answer = at_times
    labels = {"namespace": NAMESPACE, "app_kubernetes_io_instance": RELEASE, "pod": "head"}
    scraped = [{"targets": [cluster["metrics"]], "labels": labels}]
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "scrape_configs": [{"job_name": "ray", "static_configs": scraped}],
    }
    output, log = tmp_path / "out", tmp_path / "run.log"
    args = job_args(source, output, shard_size=SHARD, predictor="predictors:NoMemoryForMany")
    args += [*settings, "--address", cluster["address"], "--log-format", "json"]
    with server(tmp_path / "prometheus", config, alert_rules()) as prometheus:
        process = start(*args, env={"BATCH_INFERENCE_RUN": RUN}, log=log)
        pending = all_queries()
        killed: set[str] = set()
        try:
            deadline = time.monotonic() + RUN_S
            while process.poll() is None:
                assert time.monotonic() < deadline, log.read_text()
                if held.is_set() and "task" not in killed:
                    kill(cluster, "ray::ReadShards", "task", killed)
                done = prometheus.value(f'ray_batch_inference_inputs{{run="{RUN}", state="done"}}') or 0
                if done > IMAGES // 4 and "actor" not in killed:
                    kill(cluster, "ray::MapWorker", "actor", killed)
                pending = unanswered(prometheus, pending)
                time.sleep(1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        assert process.returncode == 0, log.read_text()
        assert killed == {"task", "actor"}
        summary = json.loads((output / "_report" / "summary.json").read_text())
        assert verified(str(output), attached, *settings)["errors"] == summary["rows"]["errors"] > 0
        # Some of the tasks that were killed had only just begun, and left no mark.
        tasks_again = sum(line["event"].startswith("the shard was begun before") for line in workers_lines(cluster))
        assert tasks_again >= 1
        expected = counts(summary, tasks_again)
        settle = time.monotonic() + SETTLE_S
        while (seen := {name: prometheus.value(name) for name in expected}) != expected and time.monotonic() < settle:
            time.sleep(1)
        values = last_values(prometheus)
        print("\n| metric | labels | value |\n| --- | --- | --- |")
        for (name, labels), value in values.items():
            print(f"| {name} | {labels} | {value:g} |")
        assert seen == expected
        assert {name for name, _ in values} == {metric.prometheus_name for metric in METRICS}
        assert values["ray_batch_inference_out_of_memory_splits_total", ""] >= 10
        assert values["ray_batch_inference_retries_total", "kind=request"] >= 3
        broken = [rule["lastError"] for rule in prometheus.rules() if rule["health"] == "err"]
        assert broken == []
        missing = [(title, query) for title, query in pending if not any(word in query for word in ELSEWHERE)]
        print(
            f"queries: {len(all_queries())}, without data: {len(missing)}; {len(pending) - len(missing)} need a cluster"
        )
        assert missing == []
    lines_say_whose_they_are(log, workers_lines(cluster))


def kill(cluster: dict[str, str], title: str, kind: str, killed: set[str]) -> None:
    """Kills the cluster's processes with that title (Ray names its workers by what they run)."""
    for process in psutil.Process(int(cluster["process"])).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that has just ended
            if " ".join(process.cmdline()).startswith(title):
                process.kill()
                killed.add(kind)


def workers_lines(cluster: dict[str, str]) -> list[dict[str, Any]]:
    """Return the lines that tasks and actors of the run have logged."""
    text = "\n".join(file.read_text() for file in Path(cluster["logs"]).glob("worker-*.err"))
    return [json.loads(line) for line in text.splitlines() if line.startswith("{") and RUN in line]


def counts(summary: dict[str, Any], tasks_again: int) -> dict[str, float]:
    """Queries, and what they must give: the driver's counts, to the last one."""
    mine = f'run="{RUN}"'
    rows, attempt = summary["rows"], summary["this_attempt"]
    found = {
        f'sum(ray_batch_inference_images_total{{{mine}, outcome="prediction"}})': rows["predictions"],
        f'sum(ray_batch_inference_images_total{{{mine}, outcome="error"}})': rows["errors"],
        f"sum(ray_batch_inference_commits_total{{{mine}}})": summary["shards"]["done"],
        f"sum(ray_batch_inference_fetched_bytes_total{{{mine}}})": attempt["bytes"],
        f'sum(ray_batch_inference_retries_total{{{mine}, kind="request"}})': attempt["retries"],
        f'sum(ray_batch_inference_retries_total{{{mine}, kind="actor"}})': 1,
        f'sum(ray_batch_inference_retries_total{{{mine}, kind="task"}})': tasks_again,
        f"sum(ray_batch_inference_attempts_total{{{mine}}})": 1,
    }
    for stage, kinds in summary["errors_by"].items():
        for kind, count in kinds.items():
            labels = f'{mine}, stage="{stage}", error_type="{kind}"'
            found[f"sum(ray_batch_inference_errors_total{{{labels}}})"] = count
    return {query: float(value) for query, value in found.items()}


def last_values(prometheus: Prometheus) -> dict[tuple[str, str], float]:
    """The value of each metric that was scraped last, by its name and labels; of histograms the count."""
    values = {}
    for metric in METRICS:
        ours = [label for label in metric.labels if label != "run"]
        name = metric.prometheus_name + ("_count" if metric.type == "histogram" else "")
        # Gauges are gone when the run is.
        query = f"sum by ({', '.join(['run', *ours])}) (last_over_time({name}{{run={json.dumps(RUN)}}}[5m]))"
        for one in sorted(prometheus.query(query), key=lambda one: sorted(one["metric"].items())):
            labels = ", ".join(f"{label}={one['metric'][label]}" for label in ours)
            values[metric.prometheus_name, labels] = float(one["value"][1])
    return values


def lines_say_whose_they_are(log: Path, theirs: list[dict[str, Any]]) -> None:
    """Every JSON line has run and attempt; each shard was prepared in a task and committed by the driver, in a line each."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert {line["run"] for line in lines} == {RUN}
    (attempt,) = {line["attempt"] for line in lines}
    assert re.fullmatch(r"[0-9a-f]{8}", attempt)
    shards = list(range(IMAGES // SHARD))
    assert sorted(line["shard"] for line in lines if line["event"] == "committed") == shards
    assert {line["attempt"] for line in theirs} == {attempt}
    assert {line["shard"] for line in theirs if line["event"] == "prepared"} == set(shards)
    assert {line["run"] for line in theirs} == {RUN}
