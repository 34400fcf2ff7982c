"""The connection of an attempt to Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import TracebackType

import structlog

from batch_inference.config import JobConfig
from batch_inference.driver.progress import Progress
from batch_inference.driver.signals import interruptible
from batch_inference.driver.startup import starts_ray
from batch_inference.pipeline.cluster import connected

log = structlog.get_logger()


class RayConnection:
    """A connection to Ray that is opened when it is needed, and closed at the end of this context.

    Args:
        address: Ray cluster to use; None starts one on this machine.
        dashboard_host: Address that a started cluster's dashboard listens on; None for no dashboard.
        progress: Gets the dashboard's URL.
    """

    def __init__(self, address: str | None, dashboard_host: str | None, progress: Progress) -> None:
        self.starts_ray = starts_ray(address)
        """Whether connecting starts a Ray of this process's own."""
        self.is_open = False
        self._address = address
        self._dashboard_host = dashboard_host
        self._progress = progress
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RayConnection:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(error_type, exc, trace)

    def open(self, config: JobConfig) -> None:
        """Connect; what ``config`` asks for must fit."""
        self._stack.enter_context(self._connected(config))
        self.is_open = True

    def before_close(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` before the connection that is open now is closed; where none is, at the end."""
        self._stack.callback(callback)

    def close(self) -> None:
        """Close the connection, and end the Ray that was started for it."""
        self._stack.close()
        self.is_open = False

    @contextlib.contextmanager
    def _connected(self, config: JobConfig) -> Iterator[None]:
        with connected(config, self._address, self._dashboard_host) as dashboard, interruptible():
            self._progress.dashboard = dashboard
            if dashboard:
                log.info("Ray's dashboard", url=dashboard)
            yield
