"""A job on a cluster that has no workers until someone asks, with Ray's own autoscaler and the nodes that Ray fakes for tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray._private.services import get_node_ip_address

from tests.support.jobs import HERE, job_args, verified
from tests.support.limits import HANG_S
from tests.support.servers import BIN, free_ports, stop

WAIT = "BATCH_INFERENCE_WAIT_FOR_WORKERS_S"
HEAD = "f" * 51 + "00000"  # The ID that the fake nodes' provider gives to the head.
IDLE_S = 6


@contextlib.contextmanager
def growing_cluster(folder: Path, most: int) -> Iterator[str]:
    """A cluster whose head has no CPUs, and up to so many workers of two CPUs each that come on demand; yields its address."""
    folder.mkdir(parents=True)
    port, dashboard_agent = free_ports(2)
    # The fake nodes have this machine's address, so the head must have it, too.
    address = f"{get_node_ip_address()}:{port}"
    config = {
        "cluster_name": "growing",
        "max_workers": most,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            # By its class: the name that Ray has for it wants a file that is not in the package.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": HEAD,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "foreground_node_launch": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 2, "object_store_memory": 200_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": most,
            },
        },
        "head_node_type": "ray.head.default",
        **{
            key: []
            for key in ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
        },
        **{"cluster_synced_files": [], "file_mounts": {}, "auth": {}},
    }
    file = folder / "autoscaling.json"
    file.write_text(json.dumps(config))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(HERE),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_raylet_start_wait_time_s": "150",
    }
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=0", f"--port={port}", f"--autoscaling-config={file}",
        "--include-dashboard=false", "--disable-usage-stats", f"--dashboard-agent-listen-port={dashboard_agent}",
        "--object-store-memory=200000000",
    ]  # fmt: skip
    log = folder / "ray-head.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + HANG_S
        while b"Ray runtime started" not in log.read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.3)
        yield address
    finally:
        # Workers are children of the autoscaler, and not all of the head's group.
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        stop(process)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with growing_cluster(tmp_path_factory.mktemp("growing") / "ray", most=2) as address:
        yield address


def nodes(address: str) -> list[dict[str, Any]]:
    """The live nodes of a cluster that have CPUs."""
    code = f"import json, ray; ray.init('{address}', log_to_driver=False); print(json.dumps(ray.nodes()))"
    done = subprocess.run(
        [BIN / "python", "-c", code], capture_output=True, text=True, timeout=HANG_S, check=True, env=disabled()
    )
    return [node for node in json.loads(done.stdout) if node["Alive"] and node["Resources"].get("CPU")]


def disabled() -> dict[str, str]:
    return {**os.environ, "RAY_AUTH_MODE": "disabled"}


def test_workers_come_for_a_job_and_go_afterwards(
    growing: str,
    photos: Callable[..., Path],
    tmp_path: Path,
    program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    assert nodes(growing) == []
    args = job_args(photos(40), tmp_path / "out")
    args[args.index("inference.actors=1")] = "inference.actors=3"  # And a task: two workers.
    done = program(*args, "--address", growing, "--log-format", "json", env={WAIT: str(HANG_S)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting for workers" in done.stderr
    assert verified(str(tmp_path / "out"), program)["predictions"] == 40
    deadline = time.monotonic() + IDLE_S + HANG_S
    while nodes(growing):
        assert time.monotonic() < deadline, "workers stay although nobody needs them"
        time.sleep(1)


def test_missing_workers_are_waited_for_as_long_as_configured(
    growing: str,
    photos: Callable[..., Path],
    tmp_path: Path,
    program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    args = job_args(photos(4), tmp_path / "out")
    args[args.index("inference.actors=1")] = "inference.actors=8"
    done = program(*args, "--address", growing, env={WAIT: "8"})
    assert done.returncode == 5, done.stdout + done.stderr
    assert f"the workers did not come within 8 s ({WAIT}): 9 CPUs are needed" in done.stdout
