"""`helm template` as a service: Helm's own code, without starting Helm for every rendering."""

from __future__ import annotations

import functools
from pathlib import Path

from tests.charts.service import Service
from tests.e2e.cluster.cache import digest, product
from tests.e2e.cluster.process import run
from tests.e2e.cluster.programs import COMPILE_SECONDS, PROGRAMS, SOURCES, flags_of, go

SOURCE = Path(__file__).with_name("main.go")


def program() -> Path:
    """The renderer's program, compiled from the modules of the Helm that the tests use."""
    module = SOURCES / "modules" / PROGRAMS["helm"].module
    target = run(go(), "env", "GOVERSION", "GOOS", "GOARCH")
    flags = flags_of("helm")

    def make(partial: Path) -> None:
        command = (go(), "build", "-trimpath", "-mod=readonly", "-ldflags", flags, "-o", partial / "renderer", SOURCE)
        run(*command, cwd=module, env={"CGO_ENABLED": "0"}, timeout=COMPILE_SECONDS)

    return product("renderer", digest(flags, target, SOURCE, module), make) / "renderer"


@functools.cache
def service() -> Service:
    """The renderer, started."""
    return Service(program())
