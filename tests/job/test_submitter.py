"""The submitter against a real Ray head: one job whatever happens, its log once, and an end that says what it should."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.jobs import PROGRAM, environment, verified
from tests.support.limits import HANG_S
from tests.support.servers import TcpProxy, ray_cluster, stop

Program = Callable[..., subprocess.CompletedProcess[str]]

# A job on two busy cores; the test's own limit is five minutes.
WAIT_S = HANG_S


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Ray head's dashboard."""
    with ray_cluster(3, tmp_path_factory.mktemp("head"), dashboard=True) as addresses:
        yield addresses["dashboard"]


@pytest.fixture
def tcp(head: str) -> Iterator[TcpProxy]:
    """A proxy before the dashboard."""
    proxy = TcpProxy(head)
    yield proxy
    proxy.close()


@pytest.fixture
def job_id(request: pytest.FixtureRequest) -> str:
    """An ID that no other test has."""
    return re.sub(r"\W+", "-", request.node.name)[-40:].strip("-")


@pytest.fixture
def job(photos: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes the configuration of a small job on the CPU; returns its path."""

    def write(count: int = 30, delay_s: float = 0.0, **changes: Any) -> Path:
        content = {
            "input": {"uris": [str(photos(count, bad_percent=10))]},
            "output": {"uri": str(tmp_path / "out")},
            "predictor": {"path": "predictors:MeanColor", "kwargs": {"delay_s": delay_s}},
            "inference": {"actors": 1, "gpus_per_actor": 0, "batch_size": 8},
            "shard_size": 10,
            "errors": {"max_percent": None},
            **changes,
        }
        file = tmp_path / "the job.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        return file

    return write


def ask(url: str, body: dict[str, Any] | None = None, token: str | None = None) -> Any:
    """An answer of Ray's job server."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=HANG_S) as response:  # noqa: S310
        return json.load(response)


def command(config: Path | str, address: str, job_id: str, *more: str) -> list[str]:
    return ["submit", "--config", str(config), "--address", address, "--submission-id", job_id, *more]


class Running:
    """A submitter in the background, whose output can be read while it runs."""

    def __init__(self, folder: Path, *args: str) -> None:
        self._out, self._err = folder / "submitter.out", folder / "submitter.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [PROGRAM, *args], stdout=out, stderr=err, env=environment(), start_new_session=True
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def said(self) -> list[dict[str, Any]]:
        """The submitter's own lines, all of which must be JSON."""
        return [json.loads(line) for line in self._err.read_text().splitlines()]

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not re.search(pattern, self.out + self._err.read_text()):
            assert self.process.poll() is None, self.out + self._err.read_text()
            assert time.monotonic() < deadline, self.out + self._err.read_text()
            time.sleep(0.1)

    def wait(self, timeout_s: float = WAIT_S) -> int:
        return self.process.wait(timeout_s)


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts submitters, and ends those that still run after the test."""
    started: list[Running] = []

    def start(*args: str) -> Running:
        folder = tmp_path / f"submitter-{len(started)}"
        folder.mkdir()
        started.append(Running(folder, *args))
        return started[-1]

    yield start
    for running in started:
        stop(running.process)


def talkative(head: str, job_id: str, lines: int, pause_s: float, gates: dict[int, Path] | None = None) -> list[str]:
    """Start a job that prints numbered lines with a pause after each; return the lines.

    Before a line in ``gates`` the job waits until its file exists.
    """
    files = {line: str(file) for line, file in (gates or {}).items()}
    code = (
        "import os, time\n"
        f"gates = {files}\n"
        f"for i in range({lines}):\n"
        "    while i in gates and not os.path.exists(gates[i]): time.sleep(0.05)\n"
        f"    print(f'line {{i}} of ümläut\\'s log', flush=True); time.sleep({pause_s})"
    )
    ask(f"{head}/api/jobs/", {"submission_id": job_id, "entrypoint": f'python -c "{code}"'})
    return [f"line {i} of ümläut's log" for i in range(lines)]


def test_a_job_is_submitted_once_however_often_the_command_runs(
    head: str, job_id: str, job: Callable[..., Path], tmp_path: Path, program: Program
) -> None:
    config = job()
    # As KubeRay starts it: the address without a scheme, both in the environment.
    env = {"RAY_DASHBOARD_ADDRESS": head.removeprefix("http://"), "RAY_JOB_SUBMISSION_ID": job_id}
    first = program("submit", "--config", str(config), env=env)
    assert first.returncode == 0, first.stdout + first.stderr
    lines = first.stdout.splitlines()
    assert lines[-5] == "SUCCEEDED: 30 of 30 images accounted for, 27 predictions and 3 errors"
    assert any(json.loads(line)["event"] == "working" or "progress" in line for line in lines if line.startswith("{"))
    said = [json.loads(line) for line in first.stderr.splitlines()]
    assert [line["event"] for line in said] == [f"job {job_id} is submitted", f"job {job_id} is SUCCEEDED"]
    assert said[-1]["exit_code"] == 0
    assert verified(str(tmp_path / "out"), program)["rows"] == 30

    again = program("submit", "--config", str(config), env=env)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert f"job {job_id} exists already: SUCCEEDED" in again.stderr
    assert [j["submission_id"] for j in ask(f"{head}/api/jobs/")].count(job_id) == 1


def test_two_submitters_at_the_same_moment_submit_one_job_and_follow_it(
    head: str, job_id: str, job: Callable[..., Path], background: Callable[..., Running]
) -> None:
    args = command(job(), head, job_id)
    both = [background(*args), background(*args)]
    assert [one.wait() for one in both] == [0, 0]
    assert both[0].out == both[1].out
    assert "SUCCEEDED: 30 of 30" in both[0].out
    assert sum("is submitted" in line["event"] for one in both for line in one.said) == 1
    assert [j["submission_id"] for j in ask(f"{head}/api/jobs/")].count(job_id) == 1


@pytest.mark.parametrize("mistake", ["input", "configuration"])
def test_a_failed_job_ends_it_with_0_and_the_verdict_is_in_the_jobs_message(
    mistake: str, head: str, job_id: str, job: Callable[..., Path], program: Program
) -> None:
    changes = {"input": {"uris": ["/nowhere/at/all"]}} if mistake == "input" else {"shard_sice": 5}
    done = program(*command(job(**changes), head, job_id))
    assert done.returncode == 0, done.stdout + done.stderr
    end = json.loads(done.stderr.splitlines()[-1])
    assert (end["event"], end["exit_code"]) == (f"job {job_id} is FAILED", 2)
    assert end["reason"] == "Job entrypoint command failed with exit code 2"
    # What `kubectl get rayjob -o jsonpath='{.status.message}'` shows.
    message = ask(f"{head}/api/jobs/{job_id}")["message"]
    print(message)
    assert "Traceback" not in message
    lines = message.splitlines()
    if mistake == "input":
        assert lines[-5].startswith("FAILED (exit 2): there is no file or folder")
        assert [line.partition(":")[0] for line in lines[-4:]] == ["rows", "errors", "remedy", "output"]
    else:
        assert "shard_sice: there is no such key; did you mean 'shard_size'?" in lines[-2]
        assert lines[-1].startswith("remedy: ")


def test_every_line_comes_once_though_the_connections_are_cut(
    head: str, job_id: str, tcp: TcpProxy, background: Callable[..., Running], tmp_path: Path
) -> None:
    """Lines go on while a connection is cut; the job only never gets so far that a cut comes too late."""
    counts = (20, 60, 100, 140, 180, 220, 260)
    expected = talkative(head, job_id, 300, 0.02, {count + 30: tmp_path / f"{count}-is-cut" for count in counts})
    running = background(*command("unused.yaml", tcp.address, job_id))
    cut = 0
    for count in counts:
        running.wait_for(f"line {count} of")
        cut += tcp.cut()
        (tmp_path / f"{count}-is-cut").touch()
    assert running.wait() == 0
    assert [line for line in running.out.splitlines() if line.startswith("line ")] == expected
    events = Counter(re.sub(r"\d+ s", "", line["event"]) for line in running.said)
    assert cut >= 7
    assert events["the log connection broke"] == events["re-attached to the log after "] >= 5


def test_a_connection_that_is_open_but_dead_is_replaced(
    head: str, job_id: str, tcp: TcpProxy, background: Callable[..., Running], tmp_path: Path
) -> None:
    release = tmp_path / "release"
    expected = talkative(head, job_id, 100, 0.1, {99: release})
    running = background(*command("unused.yaml", tcp.address, job_id, "--silent-s", "4"))
    running.wait_for("line 20 of")
    assert tcp.freeze() >= 1
    running.wait_for("line 98 of")
    assert ask(f"{head}/api/jobs/{job_id}")["status"] == "RUNNING"
    release.touch()
    assert running.wait() == 0
    assert [line for line in running.out.splitlines() if line.startswith("line ")] == expected


def test_inline_sends_the_configuration_along_and_no_shell_reads_it(
    head: str,
    job_id: str,
    job: Callable[..., Path],
    tmp_path: Path,
    program: Program,
    background: Callable[..., Running],
) -> None:
    config = job()
    nasty = f"# $(touch {tmp_path}/pwned) `touch {tmp_path}/pwned` '\" ; touch {tmp_path}/pwned # \\ ü\n"
    config.write_text(nasty + config.read_text(), encoding="utf-8")
    running = background(*command(config, head, job_id, "--inline"))
    running.wait_for("is submitted")
    config.unlink()
    assert running.wait() == 0
    assert "SUCCEEDED: 30 of 30" in running.out
    assert not (tmp_path / "pwned").exists()
    assert verified(str(tmp_path / "out"), program)["rows"] == 30
    assert str(tmp_path) not in ask(f"{head}/api/jobs/{job_id}")["entrypoint"]


def test_sigterm_ends_the_submitter_and_not_the_job(
    head: str,
    job_id: str,
    job: Callable[..., Path],
    tmp_path: Path,
    program: Program,
    background: Callable[..., Running],
) -> None:
    args = command(job(80, delay_s=1.0), head, job_id)
    running = background(*args)
    running.wait_for("Running entrypoint")
    os.kill(running.process.pid, signal.SIGTERM)
    assert running.wait() == 130
    assert f"job {job_id} is left as it is" in running.said[-1]["event"]
    assert ask(f"{head}/api/jobs/{job_id}")["status"] == "RUNNING"
    follower = program(*args)
    assert follower.returncode == 0, follower.stderr
    assert follower.stdout.startswith(running.out)
    assert verified(str(tmp_path / "out"), program)["rows"] == 80


def test_a_lost_head_is_no_end_of_the_job(
    job_id: str, job: Callable[..., Path], tmp_path: Path, background: Callable[..., Running]
) -> None:
    with ray_cluster(3, tmp_path / "head", dashboard=True) as addresses:
        args = command(job(80, delay_s=1.0), addresses["dashboard"], job_id, "--lost-s", "5")
        running = background(*args)
        running.wait_for("Running entrypoint")
    assert running.wait() == 5
    assert "has not answered for 5 s" in running.said[-1]["event"]
    assert "finished shards are not processed again" in running.said[-1]["remedy"]


def test_a_cluster_that_asks_for_a_token_gets_it(
    job_id: str, job: Callable[..., Path], tmp_path: Path, program: Program
) -> None:
    token = "a-token-of-thirty-two-characters"  # noqa: S105
    home = {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token"}
    with ray_cluster(3, tmp_path / "head", dashboard=True, token=token) as addresses:
        args = command(job(), addresses["dashboard"], job_id)
        for given, fact in (({}, "asks for a token"), ({"RAY_AUTH_TOKEN": token[:-1] + "x"}, "refuses the token")):
            refused = program(*args, env={**home, **given})
            assert refused.returncode == 2, refused.stderr
            last = json.loads(refused.stderr.splitlines()[-1])
            assert fact in last["event"]
            assert "RAY_AUTH_TOKEN" in last["remedy"]
            assert token[:-1] not in refused.stdout + refused.stderr
        with pytest.raises(urllib.error.HTTPError):
            ask(f"{addresses['dashboard']}/api/jobs/{job_id}", token=token)
        done = program(*args, env={**home, "RAY_AUTH_TOKEN": token})
        assert done.returncode == 0, done.stdout + done.stderr
        assert "SUCCEEDED: 30 of 30" in done.stdout


# Run by a small process in between: what a large one starts counts the large one's memory as its own until it is another program.
MEASURED = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], check=False).returncode
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime]), file=sys.stderr)
"""


def test_submitter_stays_small(head: str, job_id: str, tmp_path: Path) -> None:
    """Its pod has half a gigabyte and a quarter of a CPU."""
    talkative(head, job_id, 20_000, 0.0)
    submission = [str(PROGRAM), *command("unused.yaml", head, job_id)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *submission], capture_output=True, text=True, env=environment(), timeout=HANG_S
    )
    code, mebibytes, seconds = json.loads(done.stderr.splitlines()[-1])
    assert code == 0
    assert done.stdout.count("\nline ") == 20_000
    print(f"{mebibytes:.0f} MiB, {seconds:.1f} s of CPU")
    assert mebibytes < 150
