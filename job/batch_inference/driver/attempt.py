"""One attempt at a job, from its plan to its verdict."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

from batch_inference.config import JobConfig
from batch_inference.driver.connection import RayConnection
from batch_inference.driver.events import AttemptInfo, Events, ProgressCallback
from batch_inference.driver.execute import Execution
from batch_inference.driver.finish import already_done, finish, name_errors_folder
from batch_inference.driver.job import Planned, open_ledger, plan_job
from batch_inference.driver.progress import Phase, Progress
from batch_inference.driver.recorder import Recorder
from batch_inference.driver.result import RunResult
from batch_inference.driver.resume import resume
from batch_inference.driver.startup import EngineResolver
from batch_inference.environment import RUN_VARIABLE
from batch_inference.errors import BatchInferenceError
from batch_inference.pipeline.engine import Engine
from batch_inference.telemetry import logs


class Attempt:
    """One start of the program on a job.

    Args:
        config: The job.
        on_progress: Called at every change of phase and with every block of rows.
        engine: What runs on the images, where it is resolved already.
        force_retry: Go on even if an earlier attempt of this run failed with an error that a retry cannot fix.
    """

    def __init__(
        self,
        config: JobConfig,
        on_progress: Callable[[Progress], None],
        engine: Engine | None = None,
        *,
        force_retry: bool = False,
    ) -> None:
        self._config = config
        self._engine = engine
        self._force_retry = force_retry
        self._stopping = threading.Event()
        self._info = AttemptInfo(os.environ.get(RUN_VARIABLE, ""))
        self._events = Events(self._info.started, ProgressCallback(on_progress))
        logs.bind(attempt=self._info.id, **({"run": self._info.run_name} if self._info.run_name else {}))

    def stop(self) -> None:
        """End the work as SIGTERM does, when rows come back next; for a thread that no signal reaches."""
        self._stopping.set()

    def run(self, address: str | None, dashboard_host: str | None) -> RunResult:
        """Plan or resume, work, and finish; :func:`~batch_inference.driver.run.run` says what it raises."""
        config, info, events = self._config, self._info, self._events
        events.phase_changed(Phase.PLAN)
        ledger = open_ledger(config, info)
        with (
            RayConnection(address, dashboard_host, events.progress) as connection,
            EngineResolver(config, self._engine) as resolver,
        ):
            planned = plan_job(config, info, ledger, resolver, connection, force_retry=self._force_retry)
            if planned.success is not None:
                return already_done(config, info, planned, events)
            recorder = Recorder(config, ledger.store, planned.job, info)
            todo = resume(planned, events)
            events.subscribe(recorder)
            with self._failures_told(planned):
                events.progress.tally.check(config.errors)
                limit = None
                if todo:
                    limit = Execution(config, info, planned, todo, events, recorder, self._stopping).run(connection)
                connection.close()
                return finish(config, info, planned, events, recorder, limit)

    @contextlib.contextmanager
    def _failures_told(self, planned: Planned) -> Iterator[None]:
        """Tell the listeners of an exception that ends the attempt, so that its verdict is recorded."""
        try:
            yield
        except BatchInferenceError as exc:
            # The takeover is the cause, whatever error it led to.
            taken_over = planned.taken_over()
            if taken_over is not None:
                raise taken_over from exc
            name_errors_folder(exc, planned.ledger.store)
            self._events.failed(exc)
            self._events.phase_changed(self._events.progress.phase)  # once more, with the report
            raise
        except KeyboardInterrupt as exc:
            # interruptible() makes an exit code of it further out, where nothing is written any more.
            self._events.failed(exc)
            raise
