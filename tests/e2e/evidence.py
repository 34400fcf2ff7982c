"""Evidence from a cluster in which a test has failed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.cluster import Cluster
from tests.e2e.cluster.process import CommandError, say


def keep(item: pytest.Item, report: pytest.TestReport, cluster: Cluster, folder: Path, *kinds: str) -> None:
    """Writes evidence while what failed is still there, before fixtures remove it.

    Args:
        item: The test.
        report: How it went.
        cluster: Where.
        folder: What is written goes into a folder of the test's name in it.
        kinds: Kinds of objects that the cluster has beside KubeRay's.
    """
    if not report.failed or "world" not in getattr(item, "fixturenames", ()) or not cluster.kubeconfig.is_file():
        return
    own = folder / re.sub(r"\W+", "-", item.name)
    try:
        cluster.evidence(own)
        for kind in kinds:
            found = cluster.kubectl("get", kind, "--all-namespaces", "--output=yaml", check=False)
            (own / f"{kind}.yaml").write_text(found)
        report.sections.append(("evidence", f"is in {own}"))
    except (CommandError, OSError) as error:
        say(f"no evidence: {error}")
