"""A real cluster for the end-to-end tests: kind with KubeRay, from upstream images or built from source."""

from .cluster import Cluster, build, tools
from .engines import engine
from .images import base_image
from .process import CommandError

__all__ = ["Cluster", "CommandError", "base_image", "build", "engine", "tools"]
