"""What a job's start does at the same time: Ray's processes come up while the model is looked at."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from typing import Any

from batch_inference.config import JobConfig
from batch_inference.errors import BatchInferenceError, SystemFault
from batch_inference.identity import Engine, resolve_engine

# For weights of many gigabytes over a slow line.
_MOST_S = 3600.0


class EngineAhead:
    """The engine, being resolved; a context manager.

    A model is looked at in a process of its own: importing its libraries takes seconds, in which threads of the driver would wait
    for each other, and the driver needs none of them. A user's predictor is imported here and now, since it may need the
    main thread and travels to the actors from here.

    Args:
        config: The job.
        engine: The engine, where it is there already.

    Raises:
        UserError: If there is no such predictor.
    """

    def __init__(self, config: JobConfig, engine: Engine | None = None) -> None:
        self._engine = engine or (resolve_engine(config) if config.predictor is not None else None)
        self._process: subprocess.Popen[bytes] | None = None
        if self._engine is None:
            command = [sys.executable, "-c", "from batch_inference import startup; startup.answer()"]
            self._process = subprocess.Popen(  # noqa: S603 - this program itself
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            self._question = pickle.dumps((sys.path, config))

    def __enter__(self) -> EngineAhead:
        if self._process is not None and self._process.stdin is not None:
            try:
                self._process.stdin.write(self._question)
                self._process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended, and `result` says why
        return self

    def __exit__(self, *args: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def result(self) -> Engine:
        """The engine, as soon as it is there.

        Raises:
            BatchInferenceError: What :func:`~batch_inference.identity.resolve_engine` raised.
            SystemFault: If the process ended without an answer.
        """
        if self._engine is None:
            assert self._process is not None  # noqa: S101
            try:
                out, said = self._process.communicate(timeout=_MOST_S)
            except subprocess.TimeoutExpired:
                raise SystemFault(
                    f"the model could not be looked at within {_MOST_S:,.0f} s",
                    "Look for a download that stands still, or a model's own code that waits for something.",
                ) from None
            if self._process.returncode:
                last = said.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
                raise SystemFault(
                    f"the model could not be looked at: the process ended with code {self._process.returncode}: {last[0][:300]}",
                    "Look for too little memory; importing torch and the model alone should show the same.",
                )
            outcome = pickle.loads(out)  # noqa: S301 - our own process wrote it
            if isinstance(outcome, BatchInferenceError):
                raise outcome
            self._engine = outcome
        return self._engine


def answer() -> None:
    """The other side: reads the job from standard input, writes the engine, or why there is none, to standard output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a model's module prints
    path, config = pickle.load(sys.stdin.buffer)  # noqa: S301 - the driver wrote it
    sys.path[:] = path
    outcome: Any
    try:
        outcome = resolve_engine(config)
    except BatchInferenceError as exc:
        outcome = exc
    with answers:
        pickle.dump(outcome, answers)


def starts_ray(address: str | None) -> bool:
    """Whether a job at ``address`` starts a Ray of its own, rather than joining one or using this process's."""
    if address not in (None, "local"):
        return False
    ray = sys.modules.get("ray")
    return ray is None or not ray.is_initialized()
