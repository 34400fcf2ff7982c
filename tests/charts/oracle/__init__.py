"""KubeRay's own validation, compiled from the operator's module, asked about rendered manifests."""

from __future__ import annotations

import functools
from pathlib import Path

from tests.charts.service import Service
from tests.e2e.cluster.cache import digest, product
from tests.e2e.cluster.process import run
from tests.e2e.cluster.programs import COMPILE_SECONDS, go

SOURCE = Path(__file__).parent


def program() -> Path:
    """The oracle's program, from the cache where it has been compiled before."""
    files = [SOURCE / name for name in ("main.go", "go.mod", "go.sum")]
    target = run(go(), "env", "GOVERSION", "GOOS", "GOARCH")

    def make(partial: Path) -> None:
        command = (go(), "build", "-trimpath", "-mod=readonly", "-ldflags", "-s -w", "-o", partial / "oracle", ".")
        run(*command, cwd=SOURCE, env={"CGO_ENABLED": "0"}, timeout=COMPILE_SECONDS)

    return product("oracle", digest(target, *files), make) / "oracle"


@functools.cache
def service() -> Service:
    """The oracle, started."""
    return Service(program())


def ask(manifests: str) -> tuple[list[str], list[str]]:
    """What the operator says of manifests: the objects that it has looked at, and its complaints."""
    verdict = service().ask(manifests)
    return verdict["checked"], verdict["errors"]
