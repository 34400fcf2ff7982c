from __future__ import annotations

import datetime
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from batch_inference.kubernetes import schedule
from batch_inference.kubernetes.schedule import KubernetesApi, KubernetesApiError, fill_in_times, follow_run, start_run

AT = datetime.datetime(2026, 3, 1, 0, 5, tzinfo=datetime.timezone.utc)
JOB = {"metadata": {"name": "nightly-1", "uid": "u1", "creationTimestamp": "2026-03-01T00:05:07Z"}}
RUN = f"nightly-{int(AT.timestamp()) // 60}"


@pytest.mark.parametrize(
    ("text", "becomes"),
    [
        ("s3://b/{time:%Y-%m-%d}/", "s3://b/2026-03-01/"),
        ("{time-1d:%Y-%m-%d} {time-6h:%d %H} {time-10m:%H:%M}", "2026-02-28 28 18 23:55"),
        ("s3://b/{a,b}/*.{jpg,png} {time}", "s3://b/{a,b}/*.{jpg,png} {time}"),
    ],
)
def test_time_placeholders_are_replaced(text: str, becomes: str) -> None:
    assert fill_in_times(text, AT) == becomes


class Server:
    """A stand-in for the API server with a few kinds of objects."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.fail: list[int] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                if server.fail:
                    return self.answer(server.fail.pop(), {"message": "not now"})
                found = server.objects.get(self.path)
                return self.answer(200 if found else 404, found or {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                path = f"{self.path}/{body['metadata']['name']}"
                if server.fail:
                    return self.answer(server.fail.pop(), {"message": "forbidden: quota"})
                if path in server.objects:
                    return self.answer(409, {})
                server.objects[path] = body
                return self.answer(201, body)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.api = KubernetesApi(f"http://127.0.0.1:{self.http.server_port}/{{}}/namespaces/n")

    def put(self, kind: str, name: str, body: dict[str, Any]) -> None:
        self.objects[f"/apis/ray.io/v1/namespaces/n/{kind}/{name}"] = body


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = {
        "apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"generateName": "nightly-", "labels": {"a": "b"}},
        "spec": {"name": "__RUN__"},
    }  # fmt: skip
    (tmp_path / "rayjob.json").write_text(json.dumps(run))
    (tmp_path / "job.yaml").write_text("output: {uri: 's3://b/{time:%d}/'}\n")
    return tmp_path


def test_run_is_made_once_and_found_again(server: Server, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start_run(server.api, folder, JOB, "Asia/Tokyo") == RUN
    assert start_run(server.api, folder, JOB, "Asia/Tokyo") == RUN
    assert "following" in capsys.readouterr().out
    run = server.objects[f"/apis/ray.io/v1/namespaces/n/rayjobs/{RUN}"]
    assert run["spec"] == {"name": RUN}
    assert run["metadata"]["ownerReferences"][0]["uid"] == "u1"
    config = server.objects[f"/api/v1/namespaces/n/configmaps/{RUN}"]
    assert config["data"]["job.yaml"] == "output: {uri: 's3://b/01/'}\n"


def test_run_of_another_job_of_that_minute_is_not_taken_over(server: Server, folder: Path) -> None:
    start_run(server.api, folder, JOB, "UTC")
    with pytest.raises(KubernetesApiError, match="belongs to another Job"):
        start_run(server.api, folder, {"metadata": {**JOB["metadata"], "uid": "u2"}}, "UTC")


@pytest.mark.parametrize(
    ("status", "good"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "message": "all rows"}, True),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, False),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "all rows"}, False),
        ({"jobDeploymentStatus": "ValidationFailed"}, False),
    ],
)
def test_end_of_a_run_is_that_of_its_ray_job(
    status: dict[str, str], good: bool, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.put("rayjobs", RUN, {"spec": {}, "status": {"jobDeploymentStatus": "Running"}})
    threading.Timer(0.2, lambda: server.put("rayjobs", RUN, {"spec": {}, "status": status})).start()
    assert follow_run(server.api, RUN, 0.05) is good
    said = capsys.readouterr().out
    assert f"{RUN}: Running\n{RUN}: {status['jobDeploymentStatus']}\n" in said
    assert status.get("message", "") in said


def test_run_that_is_deleted_is_an_end(server: Server) -> None:
    with pytest.raises(KubernetesApiError, match="someone deleted it"):
        follow_run(server.api, RUN)


def test_server_that_is_away_is_asked_again_and_one_that_refuses_is_not(
    server: Server, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.put("rayjobs", RUN, {"spec": {}, "status": {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}})
    server.fail = [503]
    assert follow_run(server.api, RUN)
    assert "HTTP 503" in capsys.readouterr().out
    server.fail = [403]
    with pytest.raises(KubernetesApiError, match=r"HTTP 403: .*quota"):
        start_run(server.api, folder, JOB, "UTC")


def test_server_that_stays_away_ends_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_AWAY_S", 0.5)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(OSError, match="refused"):
        follow_run(server.api, RUN)


def test_wrong_usage(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert schedule.main([]) == 2
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert schedule.main([str(folder)]) == 2
    assert "for the pods of the chart's CronJob" in capsys.readouterr().err
