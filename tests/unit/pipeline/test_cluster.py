"""A job must fit into the Ray cluster, and waits for one that grows; tests/job/test_autoscaling.py has a real one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from batch_inference.config import parse_config
from batch_inference.environment import WAIT_VARIABLE
from batch_inference.errors import InfrastructureError, UserError
from batch_inference.pipeline import cluster, ray_errors
from batch_inference.pipeline.cluster import ResourceRequest
from tests.support.privileges import unprivileged

GPU_JOB = ResourceRequest.of(parse_config({"inference": {"actors": 2, "gpus_per_actor": 0.5, "cpus_per_actor": 1.5}}))


class Group:
    def __init__(self, bundles: list[dict[str, float]]) -> None:
        self.bundles = bundles
        self.events: list[str] = []

    def wait(self, seconds: float) -> bool:
        self.events.append("reserved")
        return True


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no token of this machine be found: one that is asks for it in the environment, also of all tests that follow."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """The placement groups that were asked for; time passes only while the cluster is waited for."""
    requested: list[Group] = []
    groups = sys.modules["ray.util.placement_group"]
    monkeypatch.setattr(groups, "placement_group", lambda bundles: requested.append(Group(bundles)) or requested[-1])
    monkeypatch.setattr(groups, "remove_placement_group", lambda group: group.events.append("removed"))
    now = [1000.0]
    sleep = lambda seconds: now.append(now[-1] + seconds)  # noqa: E731
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: now[-1], sleep=sleep))
    monkeypatch.delenv(WAIT_VARIABLE, raising=False)
    return requested


def resources(monkeypatch: pytest.MonkeyPatch, *answers: dict[str, float]) -> None:
    """Let Ray report these resources of the cluster, one answer after the other, the last one forever."""
    left = list(answers)
    monkeypatch.setattr(ray, "cluster_resources", lambda: left.pop(0) if len(left) > 1 else left[0])


def test_request_adds_up_its_bundles() -> None:
    assert (GPU_JOB.actor_cpus, GPU_JOB.actor_gpus, GPU_JOB.cpus) == (3, 1, 4)
    assert GPU_JOB.bundles == [{"CPU": 1.5, "GPU": 0.5}, {"CPU": 1.5, "GPU": 0.5}, {"CPU": 1}]
    on_cpus = ResourceRequest.of(parse_config({"inference": {"actors": 1, "gpus_per_actor": 0}}))
    assert on_cpus.bundles == [{"CPU": 1}, {"CPU": 1}]


def test_job_that_fits_requests_nothing(monkeypatch: pytest.MonkeyPatch, asked: list[Group]) -> None:
    resources(monkeypatch, {"CPU": 4, "GPU": 1})
    cluster.wait_until_it_fits(GPU_JOB)
    monkeypatch.setenv(WAIT_VARIABLE, "9")
    cluster.wait_until_it_fits(GPU_JOB)
    assert asked == []


def test_fixed_cluster_that_is_too_small_is_refused_soon(monkeypatch: pytest.MonkeyPatch, asked: list[Group]) -> None:
    resources(monkeypatch, {"CPU": 2})
    with pytest.raises(UserError) as caught:
        cluster.wait_until_it_fits(GPU_JOB)
    assert "the actors need 1 GPUs (inference.actors x gpus_per_actor), there are 0" in caught.value.message
    assert "4 CPUs are needed (3 for the actors and 1 for a preparation task), there are 2" in caught.value.message
    assert WAIT_VARIABLE in caught.value.remedy
    assert asked == []


def test_growing_cluster_is_asked_and_waited_for(monkeypatch: pytest.MonkeyPatch, asked: list[Group]) -> None:
    monkeypatch.setenv(WAIT_VARIABLE, "9")
    resources(monkeypatch, {}, {"CPU": 2}, {"CPU": 4, "GPU": 1})
    cluster.wait_until_it_fits(GPU_JOB)
    (group,) = asked
    assert group.bundles == GPU_JOB.bundles
    assert group.events == ["reserved", "removed"]


def test_missing_workers_are_an_infrastructure_error_and_no_longer_requested(
    monkeypatch: pytest.MonkeyPatch, asked: list[Group]
) -> None:
    monkeypatch.setenv(WAIT_VARIABLE, "90")
    resources(monkeypatch, {})
    with pytest.raises(InfrastructureError) as caught:
        cluster.wait_until_it_fits(GPU_JOB)
    assert f"the workers did not come within 90 s ({WAIT_VARIABLE}): the actors need 1 GPUs" in caught.value.message
    assert "pending pods" in caught.value.remedy
    assert asked[0].events == ["removed"]


def test_interrupted_wait_leaves_no_request(monkeypatch: pytest.MonkeyPatch, asked: list[Group]) -> None:
    monkeypatch.setenv(WAIT_VARIABLE, "9")
    answers: list[Any] = [{}, KeyboardInterrupt()]

    def interrupted() -> dict[str, float]:
        answer = answers.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return dict(answer)

    monkeypatch.setattr(ray, "cluster_resources", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cluster.wait_until_it_fits(GPU_JOB)
    assert asked[0].events == ["removed"]


@pytest.mark.parametrize("text", ["soon", "", "10 s"])
def test_invalid_waiting_time_is_a_user_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WAIT_VARIABLE, text)
    with pytest.raises(UserError, match=f"{WAIT_VARIABLE} is '{text}', not a number of seconds"):
        cluster.wait_until_it_fits(GPU_JOB)


def test_request_of_a_killed_driver_expires_soon() -> None:
    """Ray Data reads it when it is first imported, which is after the program has connected."""
    code = (
        "import os; from batch_inference.pipeline import cluster; os.environ.update(cluster._RAY_ENVIRONMENT)\n"
        "from ray.data._internal.cluster_autoscaler.default_cluster_autoscaler_v2 import DefaultClusterAutoscalerV2 as V2\n"
        "assert 2 * V2.MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS < V2.AUTOSCALING_REQUEST_EXPIRE_TIME_S <= 30\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


ENDED_AT_ONCE = """Initialization failure from server:
Traceback (most recent call last):
  File "ray/util/client/server/proxier.py", line 772, in Datapath
RuntimeError: Starting Ray client server failed. See ray_client_server_23000.err for detailed logs.
"""


@pytest.mark.parametrize(("failures", "tries"), [(2, 3), (99, cluster._CLIENT_TRIES)])
def test_ray_client_is_tried_again_when_its_process_ended_at_once(
    monkeypatch: pytest.MonkeyPatch, failures: int, tries: int
) -> None:
    asked: list[str] = []

    def init(address: str, **options: Any) -> str:
        asked.append(address)
        if len(asked) <= failures:
            raise ConnectionAbortedError(ENDED_AT_ONCE)
        return "joined"

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "_check_listening", lambda address: None)
    if failures < tries:
        assert cluster._join("ray://head:10001") == "joined"
    else:
        with pytest.raises(
            InfrastructureError, match=r"ray://head:10001: RuntimeError: Starting Ray client server failed\. See ray_"
        ):
            cluster._join("ray://head:10001")
    assert len(asked) == tries


def test_address_without_a_cluster_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def init(address: str, **options: Any) -> str:
        asked.append(address)
        raise ConnectionError("ray client connection timeout")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(cluster, "_check_listening", lambda address: None)
    with pytest.raises(InfrastructureError, match="ray client connection timeout"):
        cluster._join("ray://head:10001")
    assert len(asked) == 1


# --- Ray's folder --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)


def test_default_folder_of_ray_is_used_if_it_can_be(
    no_folder: None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with tempfile.TemporaryDirectory(prefix="r") as short:
        for name in ("TMPDIR", "RAY_TMPDIR"):
            monkeypatch.setenv(name, short)
            assert ray_errors.ray_folder() == f"{short}/ray"
            assert ray_errors.ray_logs() == f"{short}/ray/session_latest/logs"


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("name", ["a" * 90, "é" * 40])
def test_folder_with_a_long_name_is_not_used(
    variable: str, name: str, no_folder: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, f"/tmp/{name}")  # noqa: S108
    folder = ray_errors.ray_folder()
    assert folder in ("/tmp/ray", f"/tmp/ray-{os.getuid()}")  # noqa: S108
    assert len(os.fsencode(f"{folder}/session_2026-11-29_14-47-48_918990_4194304/sockets/plasma_store")) <= 107


def test_longest_usable_folder_has_sockets_of_107_bytes(no_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.utils import validate_socket_filepath

    own = 107 - len(ray_errors._SOCKET) - len("/ray")
    for length, does in ((own, True), (own + 1, False)):
        monkeypatch.setenv("RAY_TMPDIR", "/tmp/".ljust(length, "a"))  # noqa: S108
        assert (ray_errors.ray_folder() == f"{os.environ['RAY_TMPDIR']}/ray") is does
    validate_socket_filepath("/tmp/".ljust(own, "a") + "/ray" + ray_errors._SOCKET)  # noqa: S108


def test_folder_of_another_user_is_not_used(
    no_folder: None, monkeypatch: pytest.MonkeyPatch, public_path: Path
) -> None:
    (public_path / "ray").mkdir()
    (public_path / "ray").chmod(0o777)
    (public_path / "ray/session_latest").symlink_to("session_1")
    (public_path / "closed").mkdir(mode=0o755)
    with unprivileged():
        monkeypatch.setenv("RAY_TMPDIR", str(public_path))
        reason = ray_errors._unusable(str(public_path / "ray"))
        closed = ray_errors._unusable(str(public_path / "closed/new/ray"))
        folder = ray_errors.ray_folder()
    assert reason == "it has sessions of another user"
    assert closed == f"{public_path}/closed may not be written to"
    assert folder != f"{public_path}/ray"


def test_error_without_a_usable_folder_names_the_variable(no_folder: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_errors, "_unusable", lambda folder: f"{folder} is no good")
    with pytest.raises(UserError, match="Ray cannot keep its sockets in /tmp/ray: /tmp/ray is no good") as caught:
        ray_errors.ray_folder()
    assert "RAY_TMPDIR" in caught.value.remedy
    assert ray_errors.ray_logs()
