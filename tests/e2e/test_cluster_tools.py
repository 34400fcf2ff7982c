"""Promises of the test cluster's tools that need no cluster."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.e2e import conftest, world
from tests.e2e.cluster import Cluster, CommandError, cache, cluster, engines, layers, programs
from tests.e2e.cluster.process import run


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "ROOT", tmp_path / "cache")


def test_a_digest_changes_with_every_input(tmp_path: Path) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    file = folder / "a"
    seen = {cache.digest("x", folder), cache.digest("y", folder)}
    file.write_text("1")
    seen.add(cache.digest("x", folder))
    file.write_text("2")
    seen.add(cache.digest("x", folder))
    file.chmod(0o755)
    seen.add(cache.digest("x", folder))
    file.rename(folder / "b")
    seen.add(cache.digest("x", folder))
    assert len(seen) == 6
    assert cache.digest("ab", "c") != cache.digest("a", "bc")


def test_a_product_is_made_once() -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("whole")

    first = cache.product("thing", "key", make)
    assert cache.product("thing", "key", make) == first
    assert (first / "file").read_text() == "whole"
    assert len(made) == 1


def test_leftovers_of_an_interrupted_run_are_never_used() -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.product("thing", "key", interrupted)
    folder = cache.product("thing", "key", lambda partial: partial.joinpath("whole").touch())
    assert [file.name for file in folder.iterdir()] == ["whole"]


def test_prune_keeps_what_was_wanted_lately() -> None:
    folder = cache.product("thing", "key", lambda partial: None)
    assert cache.prune() == []
    assert cache.prune(days=-1) == [folder]
    assert not folder.exists()


def test_a_command_is_ended_in_time_and_its_last_words_are_told() -> None:
    with pytest.raises(CommandError, match=r"no end after 3 s: bash .*\n.*started"):
        run("bash", "-c", "echo started; sleep 60", timeout=3)


@pytest.mark.parametrize(
    ("choice", "works", "answers", "expected"),
    [
        ("auto", ["docker", "podman"], True, ("docker", True)),
        ("auto", ["podman"], True, ("podman", True)),
        ("auto", ["docker"], False, ("podman", False)),
        ("auto", [], True, ("podman", False)),
        ("source", ["docker"], True, ("podman", False)),
        ("upstream", ["docker"], True, ("docker", True)),
        ("upstream", ["docker"], False, "no answer from"),
        ("upstream", [], True, "neither docker nor podman runs"),
        ("else", [], True, "auto, upstream or source"),
    ],
)
def test_images_come_from_upstream_where_an_engine_and_the_registries_answer(
    choice: str,
    works: list[str],
    answers: bool,
    expected: tuple[str, bool] | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLUSTER_IMAGES", choice)
    monkeypatch.setattr(engines, "_works", works.__contains__)
    monkeypatch.setattr(engines, "_answers", lambda url: answers)
    monkeypatch.setattr(engines, "_podman", lambda: engines.Engine("podman", False))
    choose = engines.engine.__wrapped__
    if isinstance(expected, str):
        with pytest.raises(CommandError, match=expected):
            choose()
    else:
        found = choose()
        assert (found.command, found.upstream) == expected


def test_every_program_has_a_pinned_version() -> None:
    for name, program in programs.PROGRAMS.items():
        if program.pinned:
            assert programs.version(name).startswith("v")
    assert programs.version("kuberay-operator").startswith("v1.6.")


def test_both_kinds_of_node_run_the_same_kubernetes_and_kind_release() -> None:
    image = yaml.safe_load(cluster.CONFIG.read_text())["nodes"][0]["image"]
    minor = ".".join(programs.version("kubelet").split(".")[:2])
    assert image.startswith(f"kindest/node:{minor}.")
    assert f"kind {programs.version('kind')}" in cluster.CONFIG.read_text()


def test_configurations_merge() -> None:
    base = {"kind": "Cluster", "nodes": [1], "networking": {"a": 1}}
    extra = {"nodes": [2], "networking": {"b": 2}, "patches": ["x"]}
    merged = {"kind": "Cluster", "nodes": [1, 2], "networking": {"a": 1, "b": 2}, "patches": ["x"]}
    assert cluster._merged(base, extra) == merged


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a_b", "a" * 41, "../a"])
def test_a_cluster_has_a_name_that_kubernetes_takes(name: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="cannot name a cluster"):
        Cluster(name, tmp_path / "kubeconfig").up()


@pytest.mark.parametrize("image", ["batch-inference", "batch-inference:dev", "team/batch-inference:dev"])
def test_an_image_is_loaded_by_its_full_name(image: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no registry"):
        Cluster("any", tmp_path / "kubeconfig").load_image(image)


def test_cluster_stays_while_another_process_uses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    @contextlib.contextmanager
    def set_up(name: str, folder: Path) -> Iterator[None]:
        users = world.Users(folder / "users.lock")
        happened.append("alone" if users.alone() else "beside others")
        users.join()
        yield
        users.leave()

    monkeypatch.setattr(world, "set_up", set_up)
    monkeypatch.setattr(world.Cluster, "down", lambda self: happened.append("removed"))
    monkeypatch.delenv("KEEP_CLUSTER", raising=False)
    first, second, third = (world.for_tests("any", tmp_path) for _ in range(3))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert happened == ["alone", "beside others"]
    second.__exit__(None, None, None)
    assert happened == ["alone", "beside others", "removed"]
    monkeypatch.setenv("KEEP_CLUSTER", "1")
    third.__enter__()
    third.__exit__(None, None, None)
    assert happened == ["alone", "beside others", "removed", "alone"]


def test_processes_begin_with_the_cluster_and_with_what_needs_none() -> None:
    def item(name: str, seconds: float, *fixtures: str) -> Any:
        marker = SimpleNamespace(args=(seconds,)) if seconds else None
        return SimpleNamespace(name=name, fixturenames=fixtures, get_closest_marker=lambda _: marker)

    last = item("test_admission_has_had_no_warnings", 0, "world")
    items = [
        item("quick", 0),
        item("slow", 5),
        item("slower", 9),
        last,
        item("upgrade", 10, "world"),
        *(item(f"job-{seconds}", seconds, "world") for seconds in (60, 30, 20, 50, 40, 90)),
    ]
    names = [found.name for found in conftest.in_order(items)]
    in_cluster = ["job-60", "job-20", "job-50", "job-30", "job-40"]
    assert names == ["job-90", "upgrade", "slower", "slow", *in_cluster, "quick", last.name]


@pytest.mark.parametrize(("gib", "processes"), [(64, 3), (23.5, 3), (15.6, 2), (8, 1), (4, 1)])
def test_processes_are_as_many_as_memory_has_room_for(
    gib: float, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": int(gib * 2**30 / 4096)}
    monkeypatch.setattr(conftest.os, "sysconf", sizes.__getitem__)
    assert conftest.pytest_xdist_auto_num_workers() == processes


def test_layers_are_named_as_containerd_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"rootfs": {"type": "layers", "diff_ids": ["sha256:aa", "sha256:bb", "sha256:cc"]}}
    below = hashlib.sha256(b"sha256:aa sha256:bb").hexdigest()
    above = hashlib.sha256(f"sha256:{below} sha256:cc".encode()).hexdigest()
    text = json.dumps(config).encode()
    identity = hashlib.sha256(text).hexdigest()
    files = tmp_path / "overlay-images" / identity
    files.mkdir(parents=True)
    manifest = json.dumps({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"}).encode()
    (files / "manifest").write_bytes(manifest)
    (files / ("=" + base64.b64encode(f"sha256:{identity}".encode()).decode())).write_bytes(text)
    driver = {
        "UpperDir": f"{tmp_path}/overlay/3/diff",
        "LowerDir": f"{tmp_path}/overlay/2/diff:{tmp_path}/overlay/1/diff",
    }
    found = [{"Id": identity, "GraphDriver": {"Data": driver}}]
    monkeypatch.setattr(layers, "engine_run", lambda *arguments: json.dumps(found))
    image = layers.Image.find("localhost/any:1", tmp_path)
    assert image.chains() == ["sha256:aa", f"sha256:{below}", f"sha256:{above}"]
    assert image.folders == ("/engine/1/diff", "/engine/2/diff", "/engine/3/diff")
    with tarfile.open(fileobj=io.BytesIO(image.archive())) as archive:
        content = {member.name: archive.extractfile(member).read() for member in archive.getmembers()}  # type: ignore[union-attr]
    (descriptor,) = json.loads(content["index.json"])["manifests"]
    assert descriptor["annotations"] == {"io.containerd.image.name": "localhost/any:1"}
    assert content[f"blobs/sha256/{descriptor['digest'].removeprefix('sha256:')}"] == manifest
    assert content[f"blobs/sha256/{identity}"] == text


@pytest.mark.parametrize(
    ("driver", "folders", "shared"),
    [("overlay", 1, True), ("overlay", 2, False), ("overlay", 0, False), ("vfs", 1, False)],
)
def test_only_images_that_are_kept_in_the_known_way_share_layers(
    driver: str, folders: int, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str, root: Path) -> layers.Image:
        if not folders:
            raise FileNotFoundError(root)
        return layers.Image(name, b"{}", b'{"rootfs": {"diff_ids": ["sha256:aa"]}}', ("/engine/1/diff",) * folders)

    monkeypatch.setattr(layers, "engine", lambda: engines.Engine("podman", False))
    monkeypatch.setattr(layers, "engine_run", lambda *arguments: f"{driver} {tmp_path}")
    monkeypatch.setattr(layers.Image, "find", found)
    assert (layers.find("localhost/any:1") is not None) == shared
    monkeypatch.setattr(layers, "engine", lambda: engines.Engine("docker", True))
    assert layers.find("localhost/any:1") is None
    assert layers.mounts() == []
