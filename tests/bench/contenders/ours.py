"""(e) This project: ``batch-inference run``, the command as a user types it.

The only thing added is an observer of the progress that the program shows anyway: it notes when rows have come back to the driver.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from batch_inference.cli import app
from batch_inference.driver import run as driver_run
from batch_inference.driver.progress import Progress
from tests.bench.contenders.common import Task, mark, task


def command(job: Task) -> list[str]:
    """The command line; ``inference.*`` is what the README advises on a machine without a GPU."""
    batch = ["--set", f"inference.batch_size={job.batch_size}"] if job.batch_size else []
    return [
        "batch-inference", "run", str(job.images), "--output", str(job.output),
        "--set", "model.source=file", "--model", job.model, "--weights", str(job.weights),
        "--set", f"inference.precision={job.precision}",
        "--set", "inference.gpus_per_actor=0",
        "--set", f"inference.actors={job.actors}",
        *batch,
    ]  # fmt: skip


def observe() -> None:
    """Makes the driver note how many rows have come back, beside whatever display it has."""
    run = driver_run.run
    seen = 0

    def observed(*args: Any, on_progress: Callable[[Progress], None], **options: Any) -> Any:
        def follow(snapshot: Progress) -> None:
            nonlocal seen
            if snapshot.tally.seen > seen:
                mark(snapshot.tally.seen - seen)
                seen = snapshot.tally.seen
            on_progress(snapshot)

        return run(*args, on_progress=follow, **options)

    driver_run.run = observed


def main() -> None:
    sys.argv = command(task())
    print(" ".join(sys.argv), flush=True)
    observe()
    app.main()


if __name__ == "__main__":
    main()
