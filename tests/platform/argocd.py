"""Applications of Argo CD, with their states over time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import yaml

from tests.charts.render import Values, merged
from tests.e2e.runs import RUN_SECONDS, Kubernetes, Run
from tests.e2e.world import World, kind_values, until
from tests.platform import forge
from tests.support.limits import HANG_S

NAMESPACE = "argocd"
# Argo CD looks for commits every few minutes; it is told of them here.
SEEN_SECONDS = HANG_S


@dataclass(frozen=True)
class Application:
    """The current state of an application."""

    object: dict[str, Any]

    @property
    def status(self) -> dict[str, Any]:
        """Its status; empty before the controller has seen it."""
        return dict(self.object.get("status") or {})

    @property
    def health(self) -> str:
        """Its health, which is that of the worst of its objects."""
        return str(self.status.get("health", {}).get("status", ""))

    @property
    def sync(self) -> str:
        """Whether the cluster has what Git has."""
        return str(self.status.get("sync", {}).get("status", ""))

    @property
    def commits(self) -> list[str]:
        """The revisions of its sources that it was last compared with."""
        return list(self.status.get("sync", {}).get("revisions") or [])

    @property
    def operation(self) -> dict[str, Any]:
        """The last sync that has begun, as `operationState` has it."""
        return dict(self.status.get("operationState") or {})

    @property
    def synced_commits(self) -> list[str]:
        """The revisions of its sources that the last sync is about."""
        return list(self.operation.get("syncResult", {}).get("revisions") or [])

    @property
    def hooks(self) -> dict[str, tuple[str, str]]:
        """The last sync's hooks that are Jobs, by name: when they run, and what became of them."""
        return {
            item["name"]: (item["hookType"], item.get("hookPhase", ""))
            for item in self.operation.get("syncResult", {}).get("resources") or []
            if item["kind"] == "Job" and item.get("hookType")
        }

    @property
    def runs(self) -> dict[str, dict[str, str]]:
        """The health of its RayJobs, by name: status and message."""
        return {
            item["name"]: item.get("health", {})
            for item in self.status.get("resources", [])
            if item["kind"] == "RayJob"
        }


@dataclass
class Timeline:
    """The states of an application, each once, with the second at which it was first seen."""

    begun: float = field(default_factory=time.monotonic)
    said: list[tuple[float, str, str, str]] = field(default_factory=list)

    def add(self, application: Application) -> None:
        """Takes note."""
        for name, health in application.runs.items():
            now = (name, health.get("status", ""), health.get("message", ""))
            if all(entry[1:] != now for entry in self.said[-3:]):
                self.said.append((time.monotonic() - self.begun, *now))

    def of(self, run: str) -> list[str]:
        """The statuses of a run that is there, in order, without repetitions."""
        found = [status for _, name, status, _ in self.said if name == run and status not in ("", "Missing")]
        return [status for i, status in enumerate(found) if i == 0 or found[i - 1] != status]

    def print(self) -> None:
        """For a person."""
        for second, name, status, message in self.said:
            print(f"  {second:5.0f} s  {name}  {status}: {message.splitlines()[-1] if message else ''}")


class Argo:
    """The Argo CD of the cluster."""

    def __init__(self, world: World, kubernetes: Kubernetes) -> None:
        self._cluster = world.cluster
        self._kubernetes = kubernetes
        self._image = world.image

    def values(self, output: str, more: Values | None = None) -> str:
        """A file of values as a team would commit it."""
        repository, _, tag = self._image.rpartition(":")
        base = {
            "job": {"output": {"uri": output}, "inference": {"actors": 1}},
            "run": {"backoffLimit": 0},
            "image": {"repository": repository, "tag": tag},
        }
        return yaml.safe_dump(merged(merged(kind_values(), base), more or {}))

    def repository(self, name: str) -> forge.Repository:
        """A new Git repository."""
        return forge.Repository(self._cluster, name).create()

    def example(self, file: str, repository: forge.Repository) -> None:
        """Has one of the project's examples in the cluster, until `clear`."""
        self._cluster.kubectl("apply", "--filename=-", stdin=forge.example(file, repository))

    def clear(self) -> None:
        """Removes applications and what they have made."""
        where = (f"--namespace={NAMESPACE}", f"--timeout={HANG_S}s")
        self._cluster.kubectl("delete", "applicationsets", "--all", *where, timeout=HANG_S)
        # Without this, applications leave behind what they have made.
        patch = '{"metadata": {"finalizers": ["resources-finalizer.argocd.argoproj.io"]}}'
        for name, application in self.applications().items():
            if not application.object["metadata"].get("deletionTimestamp"):
                one = ("application", name, f"--namespace={NAMESPACE}", "--type=merge", "--patch", patch)
                self._cluster.kubectl("patch", *one)
        self._cluster.kubectl("delete", "applications", "--all", *where, timeout=HANG_S)
        until("all runs go", lambda: not self._kubernetes.ray("rayjobs"), 180)

    def applications(self) -> dict[str, Application]:
        """All applications, by name."""
        found = self._kubernetes.custom.list_namespaced_custom_object(
            "argoproj.io", "v1alpha1", NAMESPACE, "applications"
        )
        return {item["metadata"]["name"]: Application(item) for item in found["items"]}

    def application(self, name: str) -> Application:
        """One application."""
        return self.applications()[name]

    def look(self, kind: str, name: str) -> None:
        """Tells Argo CD to look at Git now."""
        refresh = {"application": "refresh=normal", "applicationset": "application-set-refresh=true"}[kind]
        where = (f"--namespace={NAMESPACE}", "--overwrite")
        self._cluster.kubectl("annotate", kind, name, f"argocd.argoproj.io/{refresh}", *where)

    def until_synced(self, name: str, commit: str, timeline: Timeline | None = None) -> Application:
        """Waits until the cluster has what a commit says."""
        self.look("application", name)

        def synced() -> Application | None:
            now = self.application(name)
            if timeline:
                timeline.add(now)
            return now if commit in now.commits and now.sync == "Synced" else None

        return until(f"{name} has {commit[:8]}", synced, SEEN_SECONDS)

    def until_sync_ended(self, phase: str, name: str, commit: str) -> Application:
        """Waits until a commit's sync has ended as it should."""
        self.look("application", name)

        def ended() -> Application | None:
            now = self.application(name)
            return now if commit in now.synced_commits and now.operation.get("phase") == phase else None

        return until(f"the sync of {commit[:8]} is {phase}", ended, RUN_SECONDS)

    def until_healthy_is(self, status: str, name: str, timeline: Timeline | None = None) -> Application:
        """Waits for a health of an application."""

        def there() -> Application | None:
            now = self.application(name)
            if timeline:
                timeline.add(now)
            return now if now.health == status else None

        return until(f"{name} is {status}", there, RUN_SECONDS)

    def run(self, name: str) -> Run:
        """A run by its name."""
        return Run(name, self._kubernetes)

    def only_run(self) -> Run:
        """The one run that there is, and is not on its way out."""

        def only() -> str | None:
            there = self._kubernetes.ray("rayjobs")
            return there[0]["metadata"]["name"] if len(there) == 1 else None

        return self.run(until("one run and no other", only, 180))
