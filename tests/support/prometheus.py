"""Prometheus and promtool, as Debian packages them, and a server for a test."""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.cluster.cache import digest, product
from tests.e2e.cluster.process import kill
from tests.support import debian
from tests.support.limits import HANG_S
from tests.support.servers import free_ports

PACKAGE = "prometheus"


@functools.cache
def package() -> Path:
    """The folder with `prometheus` and `promtool`: Debian's package, unpacked into the cache."""

    def make(partial: Path) -> None:
        debian.unpack(partial, PACKAGE, dependencies=False)

    return product(PACKAGE, digest(PACKAGE, platform.machine()), make) / "usr" / "bin"


@functools.cache
def program(name: str) -> Path:
    """`prometheus` or `promtool`: on PATH, or Debian's."""
    if found := shutil.which(name):
        return Path(found)
    return package() / name


@dataclass(frozen=True)
class Prometheus:
    """A running server.

    Attributes:
        url: Where it answers.
    """

    url: str

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the value of an expression now: `metric` and `value` of each series.

        Raises:
            ValueError: If it is none.
        """
        return list(self._get("query", query=expression)["result"])

    def value(self, expression: str) -> float | None:
        """The one value of an expression, None where it gives nothing."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else None

    def alerts(self) -> dict[str, str]:
        """Alerts that are pending or firing."""
        return {alert["labels"]["alertname"]: alert["state"] for alert in self._get("alerts")["alerts"]}

    def targets(self) -> list[dict[str, Any]]:
        """Return the targets that it scrapes."""
        return list(self._get("targets")["activeTargets"])

    def rules(self) -> list[dict[str, Any]]:
        """The rules, each with its `health` and `lastError`."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=HANG_S) as reply:  # noqa: S310
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{parameters}: {error.read().decode()}") from None


@contextlib.contextmanager
def server(folder: Path, config: dict[str, Any], rules: dict[str, Any] | None = None) -> Iterator[Prometheus]:
    """Runs Prometheus.

    Args:
        folder: For its configuration, its log, and its data.
        config: As in prometheus.yml.
        rules: Groups of rules, as in a file of rules.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    if rules is not None:
        (folder / "rules.yml").write_text(yaml.safe_dump(rules))
        config = {**config, "rule_files": ["rules.yml"]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + HANG_S
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Prometheus did not come up:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        yield Prometheus(url)
    finally:
        kill(process)


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as reply:  # noqa: S310
            return bool(reply.status == 200)
    except OSError:
        return False


# --- dashboards ---


def dashboard_queries(dashboard: dict[str, Any], variables: dict[str, str]) -> list[tuple[str, str]]:
    """Titles and expressions of all panels of a Grafana dashboard, with its variables filled in."""
    found = []
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in {**variables, "__rate_interval": "1m", "__range": "10m"}.items():
                expression = re.sub(rf"\$(?:{name}\b|{{{name}}})", lambda match, value=value: value, expression)
            assert "$" not in expression, expression
            found.append((panel["title"], expression))
    return found


def compared(expression: str) -> str:
    """Return the part of an alert's expression that is compared with thresholds."""
    return re.sub(r" (==|>=|<=|>|<) [0-9.]+", "", expression)


def unanswered(prometheus: Prometheus, queries: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those queries that give no data now; of alerts, also where one of the series that they look at is not there."""
    left = []
    for title, query in queries:
        parts = [compared(query)]
        if "\n" in query:
            # Either of KubeRay's will do: they say the same of two ways to scrape.
            parts += [one for one in re.findall(r"\bray_\w+\{[^}]*\}(?:\[\w+\])?", query) if not one.endswith("]")]
        if not all(prometheus.query(part) for part in parts):
            left.append((title, query))
    return left
