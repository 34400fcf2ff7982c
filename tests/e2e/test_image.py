"""The job image: what is in it, what it can do without a network or a writable disk, and what its build refuses."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement

from tests.e2e.cluster.cache import digest
from tests.e2e.cluster.images import engine_run
from tests.e2e.cluster.process import CommandError, run
from tests.e2e.image import ROOT, build_image, job_image

# What a pod of the charts is allowed, and less: not even a cache.
CONFINED = ("--read-only", "--tmpfs=/tmp", "--user=1000", "--cap-drop=ALL", "--security-opt=no-new-privileges")
# Ray waits half a minute for its own start, which is not always enough on a busy machine, and cannot be told to wait longer. The
# program's message says to start it again.
RAY_WAS_SLOW = "Ray did not come up in time"
STARTS = 5
Started = TypeVar("Started")
SBOM = "/usr/share/doc/batch-inference/sbom.cdx.json"
# Several processes run tests.
TRIAL = f"localhost/batch-inference-trial:{os.getpid()}"


def in_image(*command: str, options: tuple[str, ...] = (), timeout: float = 600, check: bool = True) -> str:
    """Runs a command in a new container without a network, and returns what it printed."""
    entrypoint = ("--entrypoint", command[0])
    started = ("run", "--rm", "--network=none", *options, *entrypoint, job_image(), *command[1:])
    return engine_run(*started, timeout=timeout, check=check)


def python(code: str) -> str:
    """Run a program with the image's Python; return what it prints."""
    return in_image("python", "-c", code)


def patiently(start: Callable[[], Started]) -> Started:
    """Start something with Ray in it, again if Ray was too slow."""
    for _ in range(STARTS - 1):
        try:
            return start()
        except CommandError as error:
            if RAY_WAS_SLOW not in str(error):
                raise
    return start()


@functools.cache
def locked() -> dict[str, str]:
    """The versions that the lock names for the image's platform."""
    found = python("import json, packaging.markers as m; print(json.dumps(m.default_environment()))")
    platform = json.loads(found.splitlines()[-1])
    versions = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if line and not line.startswith((" ", "#")):
            requirement = Requirement(line.rstrip(" \\"))
            if requirement.marker is None or requirement.marker.evaluate(platform):
                versions[requirement.name] = str(requirement.specifier).removeprefix("==")
    return versions


@pytest.fixture
def trial() -> Iterator[str]:
    """A name for an image that a test builds; the image goes with the test."""
    yield TRIAL
    engine_run("rmi", TRIAL, check=False)


@pytest.mark.seconds(25)
def test_the_demo_needs_no_network_no_disk_and_no_privilege() -> None:
    command = ("run", "--rm", "--network=none", *CONFINED, job_image(), "demo")
    printed = patiently(lambda: engine_run(*command, timeout=900))
    assert "SUCCEEDED: 20 of 20 images accounted for, 15 predictions and 5 errors" in printed


def test_container_is_started_again_only_if_ray_was_slow() -> None:
    ends: list[Exception] = [CommandError(f"FAILED: {RAY_WAS_SLOW}: …"), CommandError("FAILED: another reason")]

    def start() -> str:
        if ends:
            raise ends.pop(0)
        return "started"

    with pytest.raises(CommandError, match="another reason"):
        patiently(start)
    assert not ends
    ends += [CommandError(RAY_WAS_SLOW)] * (STARTS - 1)
    assert patiently(start) == "started"
    ends += [CommandError(RAY_WAS_SLOW)] * STARTS
    with pytest.raises(CommandError, match=RAY_WAS_SLOW):
        patiently(start)


@pytest.mark.seconds(5)
def test_programs_that_kuberay_starts_are_in_the_image() -> None:
    printed = in_image("/bin/bash", "-c", "--", "id -u; id -g; command -v ray batch-inference wget; ray --version")
    bin_folder = "/opt/venv/bin"
    paths = [f"{bin_folder}/ray", f"{bin_folder}/batch-inference", "/usr/bin/wget"]
    assert printed.split("\n")[:5] == ["1000", "1000", *paths]
    assert f"version {locked()['ray']}" in printed


def test_ray_is_found_by_a_login_shell() -> None:
    assert in_image("/bin/bash", "-lc", "command -v ray").strip() == "/opt/venv/bin/ray"


@pytest.mark.seconds(20)
def test_sigterm_reaches_the_program_as_process_one() -> None:
    # In pods there is no init process that would pass it on.
    name = f"batch-inference-sigterm-{os.getpid()}"

    def start() -> None:
        engine_run("rm", "--force", name, check=False)
        engine_run("run", "--detach", "--name", name, "--network=none", job_image(), "demo")
        until = time.monotonic() + 600
        while "starting Ray and the model" not in (log := engine_run("logs", name)):
            if RAY_WAS_SLOW in log:
                raise CommandError(log)
            assert time.monotonic() < until, log
            time.sleep(0.5)

    try:
        patiently(start)
        engine_run("kill", "--signal", "TERM", name)
        assert engine_run("wait", name, timeout=600).strip() == "130"
    finally:
        engine_run("rm", "--force", name, check=False)


@pytest.mark.seconds(3)
def test_versions_are_those_of_the_lock() -> None:
    code = """
import importlib.metadata, json
print(json.dumps({d.name.lower().replace("_", "-").replace(".", "-"): d.version for d in importlib.metadata.distributions()}))
"""
    installed = json.loads(python(code).splitlines()[-1])
    assert installed.pop("ray-batch-inference")
    assert installed == locked()


@pytest.mark.seconds(10)
def test_byte_code_is_there_and_does_not_depend_on_times() -> None:
    code = """
import importlib.util, pathlib
lacking, dated = [], []
for path in pathlib.Path("/opt/venv/lib").rglob("*.py"):
    code = pathlib.Path(importlib.util.cache_from_source(path))
    if not code.exists():
        try:
            compile(path.read_bytes(), path, "exec", dont_inherit=True)
        except SyntaxError:
            continue
        lacking.append(str(path))
    elif code.read_bytes()[4:8] != b"\\3\\0\\0\\0":
        dated.append(str(path))
print(lacking[:5], dated[:5])
"""
    assert python(code).splitlines()[-1] == "[] []"


@pytest.mark.seconds(4)
def test_image_has_no_leftovers_of_the_build() -> None:
    printed = in_image("bash", "-c", "command -v uv pip gcc; ls /opt /run/secrets /var/lib/apt/lists /opt/models 2>&1")
    assert "bin/" not in printed
    assert "tools" not in printed
    # The certificates are Debian's, whatever the build was given.
    certificates = (
        "cd /usr/share/ca-certificates && cat $(grep -v -e '^#' -e '^!' /etc/ca-certificates.conf) | sha256sum"
    )
    assert in_image("bash", "-c", certificates) == in_image(
        "bash", "-c", "sha256sum </etc/ssl/certs/ca-certificates.crt"
    )


def test_labels() -> None:
    labels = json.loads(engine_run("image", "inspect", "--format", "{{json .Config.Labels}}", job_image()))
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}title"] == "ray-batch-inference"
    assert labels[f"{prefix}version"] == version[1]
    assert labels[f"{prefix}licenses"] == "Apache-2.0"
    assert {f"{prefix}{key}" for key in ("description", "revision", "created", "source")} <= labels.keys()


@pytest.mark.seconds(8)
def test_sbom_is_valid_and_complete() -> None:
    text = in_image("cat", SBOM)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    purls = [component.get("purl", "") for component in json.loads(text)["components"]]
    assert {f"pkg:pypi/{name}@{version}" for name, version in locked().items()} <= set(purls)
    packages = in_image("dpkg-query", "--show", "--showformat", "${Package}\n").split()
    debian = [unquote(p).split("/")[2].split("@")[0] for p in purls if p.startswith("pkg:deb/")]
    assert sorted(debian) == sorted(packages)


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    assert run(hadolint, ROOT / "docker/Dockerfile", timeout=300) == ""


def test_uv_is_the_one_of_the_makefile() -> None:
    pins = {
        *re.findall(r"^UV_VERSION := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE),
        *re.findall(r"^uv==(\S+)", (ROOT / "docker/tools.in").read_text(), re.MULTILINE),
        *re.findall(r"^uv==(\S+)", (ROOT / "docker/tools.lock").read_text(), re.MULTILINE),
    }
    assert len(pins) == 1


@pytest.mark.seconds(3)
def test_a_wrong_variant_is_refused_at_the_start(trial: str) -> None:
    with pytest.raises(CommandError, match="VARIANT is 'rocm'; it can be cuda or cpu"):
        build_image(trial, {"VARIANT": "rocm"})


@pytest.mark.seconds(40)
def test_extra_packages_are_added(trial: str) -> None:
    job_image()
    build_image(trial, {"EXTRA_PACKAGES": "humanize>=4,<5 numpy"}, target="image")
    code = "import humanize, numpy; print(humanize.intcomma(10**6), numpy.__version__)"
    printed = engine_run("run", "--rm", "--network=none", trial, "/opt/venv/bin/python", "-c", code)
    assert printed.split() == ["1,000,000", locked()["numpy"]]


@pytest.mark.seconds(8)
def test_extra_packages_cannot_change_what_is_locked(trial: str) -> None:
    job_image()
    # Where the lock has versions for several Pythons, the resolver names the one that it means behind the package's name.
    pinned = rf"numpy(\{{[^}}]*\}})?=={re.escape(locked()['numpy'])}, .*unsatisfiable"
    with pytest.raises(CommandError, match=pinned):
        build_image(trial, {"EXTRA_PACKAGES": "numpy<2"}, target="image")


@pytest.mark.seconds(15)
def test_a_model_is_baked_in_if_it_is_the_right_one(trial: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"weights")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{weights.name}?version={digest(str(tmp_path))}"
        with pytest.raises(CommandError, match="MODEL_URL is given, so MODEL_SHA256 must be, too"):
            build_image(trial, {"MODEL_URL": url}, target="model")
        with pytest.raises(CommandError, match="FAILED"):
            build_image(trial, {"MODEL_URL": url, "MODEL_SHA256": hashlib.sha256(b"other").hexdigest()}, target="model")
        expected = hashlib.sha256(b"weights").hexdigest()
        build_image(trial, {"MODEL_URL": url, "MODEL_SHA256": expected}, target="model")
        server.shutdown()
    printed = engine_run("run", "--rm", "--network=none", trial, "sha256sum", f"/opt/models/{weights.name}")
    assert printed.split()[0] == expected
