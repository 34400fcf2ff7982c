"""Git repositories and charts in the cluster, for Argo CD to read."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.cluster import Cluster
from tests.e2e.cluster.process import run
from tests.e2e.cluster.programs import REPOSITORY, tool
from tests.e2e.world import forwarded
from tests.platform import components

NAMESPACE = "forge"
CHARTS = "forge.forge:5000/charts"
MANIFESTS = Path(__file__).with_name("forge.yaml")


@dataclass(frozen=True)
class Repository:
    """A Git repository that Argo CD reaches by its URL."""

    cluster: Cluster
    name: str

    @property
    def url(self) -> str:
        """Where the cluster reads it."""
        return f"git://forge.forge/{self.name}.git"

    def create(self) -> Repository:
        """Create the repository from scratch, with no commits."""
        folder = f"/data/git/{self.name}.git"
        self._inside("rm", "-rf", folder)
        self._inside("git", "init", "--quiet", "--bare", "--initial-branch=main", folder)
        return self

    def commit(self, files: Mapping[str, str | None]) -> str:
        """Writes files, or removes those that are None, on top of main; returns the commit."""
        parent = self._git("for-each-ref", "--format=%(objectname)", "refs/heads/main").strip()
        lines = [
            f"commit refs/heads/main\ncommitter Team <team@example.com> {int(time.time())} +0000\n{_data('Change')}"
        ]
        if parent:
            lines.append(f"from {parent}\n")
        for path, text in files.items():
            lines.append(f"D {path}\n" if text is None else f"M 100644 inline {path}\n{_data(text)}")
        self._git("fast-import", "--quiet", stdin="".join(lines) + "\n")
        return self._git("rev-parse", "main").strip()

    def _git(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        return self._inside("git", "-C", f"/data/git/{self.name}.git", *arguments, stdin=stdin, check=check)

    def _inside(self, *command: str, stdin: str | None = None, check: bool = True) -> str:
        where = (f"--namespace={NAMESPACE}", "deployment/forge", "--container=git")
        interactive = ("--stdin",) if stdin is not None else ()
        return self.cluster.kubectl("exec", *interactive, *where, "--", *command, stdin=stdin, check=check)


def _data(text: str) -> str:
    return f"data {len(text.encode())}\n{text}\n"


def install(cluster: Cluster) -> None:
    """Start the server and publish the rayjob chart of the checkout as an OCI artifact."""
    components.apply(cluster, MANIFESTS, forge=components.image("forge"))
    components.rolled_out(cluster, NAMESPACE, "deployment/forge")
    helm = tool("helm", from_path=False)
    with tempfile.TemporaryDirectory() as folder, forwarded(cluster, NAMESPACE, "service/forge", 5000) as port:
        run(helm, "package", REPOSITORY / "helm" / "rayjob", "--destination", folder)
        (package,) = Path(folder).iterdir()
        run(helm, "push", package, f"oci://127.0.0.1:{port}/charts", "--plain-http")


def example(file: str, repository: Repository) -> str:
    """Return one of the project's examples for Argo CD, with only its addresses replaced."""
    text = (REPOSITORY / "k8s" / "argocd" / file).read_text()
    for theirs, ours in {
        "ghcr.io/ORGANIZATION/charts": CHARTS,
        "https://github.com/ORGANIZATION/batch-jobs.git": repository.url,
    }.items():
        assert theirs in text, (file, theirs)
        text = text.replace(theirs, ours)
    assert "ORGANIZATION" not in text
    return text
