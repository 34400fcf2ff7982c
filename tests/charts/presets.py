"""The presets, and values for use with each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

PRESETS = sorted((Path(__file__).parents[2] / "k8s" / "presets").glob("*.yaml"))


def values(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text())
    return found
