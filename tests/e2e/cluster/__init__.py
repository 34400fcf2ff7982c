"""A real cluster for the end-to-end tests: kind with KubeRay, from upstream images or built from source."""

from tests.e2e.cluster.cluster import Cluster, build, tools
from tests.e2e.cluster.engines import engine
from tests.e2e.cluster.images import base_image
from tests.e2e.cluster.process import CommandError

__all__ = ["Cluster", "CommandError", "base_image", "build", "engine", "tools"]
