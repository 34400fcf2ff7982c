"""The command line."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from batch_inference.cli.options import (
    ChartOptions,
    ClusterOptions,
    CostOptions,
    FailedRowsOptions,
    GpuHourPrice,
    JobOptions,
    Json,
    LogFormat,
    OutputArgument,
    PreflightOptions,
    Quiet,
    Settings,
    SubmitOptions,
    SubsetOptions,
    expand_options,
    storage_config,
)
from batch_inference.config import JobConfig, json_schema, load_config
from batch_inference.driver import supervision
from batch_inference.errors import (
    EXIT_ACCOUNTING,
    EXIT_INTERRUPTED,
    EXIT_SYSTEM,
    EXIT_THRESHOLD,
    EXIT_USER,
    BatchInferenceError,
    InfrastructureError,
    JobInterruptedError,
    NoPredictionError,
    UserError,
)
from batch_inference.telemetry import logs
from batch_inference.text import escape_unencodable_output, printable

if TYPE_CHECKING:
    from batch_inference.driver.planner import Plan
    from batch_inference.output.records import Retry


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Run a command.

        Typer takes every broken pipe for that of our output and exits with 1 and no message. That is right if nobody reads our
        output any more, but not if a process or a socket of Ray's went away.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError as exc:
            if _reader_is_gone():
                raise
            raise RuntimeError("a process that the program was talking to went away") from exc


def _reader_is_gone() -> bool:
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


app = typer.Typer(
    cls=_Commands,
    name="batch-inference",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a PyTorch image model over any number of images; each ends as exactly one row, a prediction or an error.\n\n"
    "Example: batch-inference demo",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from batch_inference.version import version_info

        typer.echo(", ".join(f"{name} {value}" for name, value in version_info().items()))
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print versions.")
    ] = False,
) -> None:
    pass


@app.command()
@expand_options
def run(
    job: JobOptions,
    cluster: ClusterOptions,
    subset: SubsetOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run, as plan does; write and run nothing.")
    ] = False,
    force_retry: Annotated[
        bool,
        typer.Option(
            "--force-retry",
            help="Retry even if an earlier attempt of this Kubernetes run failed with an error that a retry cannot fix.",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    log_format: LogFormat = "text",
) -> None:
    """Run a job; the same command again resumes it.

    Example: batch-inference run photos/ --output out/ --model resnet18 --set inference.gpus_per_actor=0 --set inference.actors=1
    """
    logs.configure(log_format, quiet=quiet)
    config = job.resolve(after=subset.to_settings())
    if dry_run:
        _show_plan(config, None, None, as_json=as_json)
        raise typer.Exit
    code = run_job(config, cluster.address, cluster.dashboard, quiet=quiet, as_json=as_json, force_retry=force_retry)
    raise typer.Exit(code)


def run_job(
    config: JobConfig,
    address: str | None,
    dashboard_host: str | None,
    *,
    quiet: bool = False,
    as_json: bool = False,
    before_verdict: Callable[[], None] | None = None,
    force_retry: bool = False,
) -> int:
    """Run a job with display and verdict, call ``before_verdict`` between the two, and return the exit code."""
    from batch_inference.cli.live import LiveDisplay
    from batch_inference.cli.verdict import print_verdict, verdict_of, verdict_of_failure
    from batch_inference.driver import run as driver_run
    from batch_inference.driver.progress import Progress

    last = Progress()

    def follow(progress: Progress) -> None:
        nonlocal last
        last = progress
        display.update(progress)

    try:
        with LiveDisplay(quiet=quiet) as display, logs.stdout_as_log_lines():
            result = driver_run.run(
                config,
                address=address,
                dashboard_host=dashboard_host,
                on_progress=follow,
                force_retry=force_retry,
            )
    except KeyboardInterrupt:
        failure: BatchInferenceError = JobInterruptedError(
            "stopped by SIGINT", "Run the same command again: it resumes."
        )
    except BatchInferenceError as exc:
        failure = exc
    else:
        if as_json:
            facts = {"state": "SUCCEEDED", "exit_code": 0, "verdict": verdict_of(result)[0]}
            typer.echo(json.dumps(facts | vars(result)))
        else:
            if before_verdict:
                before_verdict()
            print_verdict(verdict_of(result))
        return 0
    if as_json:
        typer.echo(json.dumps(_failure_json(failure)))
    else:
        if "\n" in failure.message:
            typer.echo(printable(failure.message), err=True)
        print_verdict(verdict_of_failure(failure, config.output.uri, last))
    return failure.exit_code


@app.command()
@expand_options
def plan(job: JobOptions, chart: ChartOptions, cost: CostOptions, subset: SubsetOptions, as_json: Json = False) -> None:
    """List the inputs, count, and show what would run and what does not fit; writes and runs nothing.

    With --values or --preset it shows the pods that the chart would make, and exits 2 if the chart would refuse.

    Example: batch-inference plan photos/ --model resnet18 --preset gke-spot --gpu-hour-price 0.70
    """
    from batch_inference.driver import planner

    files = [*([planner.preset(chart.preset)] if chart.preset else []), *(chart.values or [])]
    values = planner.read_values(files) if files else None
    if chart.values and job.config:
        raise UserError(
            f"both --config {job.config} and --values are given", "Keep --values: its `job` is the configuration."
        )
    base = values["job"] if values and "job" in values else None
    config = job.resolve(base, after=subset.to_settings())
    price = config.report.gpu_hour_price if cost.gpu_hour_price is None else cost.gpu_hour_price
    if cost.images_per_s is not None and price is None:
        raise UserError(f"--images-per-s {cost.images_per_s:g} is given without a price", "Add --gpu-hour-price.")
    shown = _show_plan(config, values, None if price is None else (price, cost.images_per_s), as_json=as_json)
    if values is not None and shown.kubernetes and shown.kubernetes.problems:
        raise typer.Exit(EXIT_USER)


def _show_plan(
    config: JobConfig, values: dict[str, Any] | None, price: tuple[float, float | None] | None, *, as_json: bool
) -> Plan:
    """Print the plan of a job and return it."""
    from batch_inference.cli.tables import print_plan
    from batch_inference.driver import planner

    plan = planner.plan(config, values)
    cost = planner.Cost.of(plan, *price) if price else None
    if as_json:
        typer.echo(json.dumps(plan.to_dict() | ({"cost": asdict(cost)} if cost else {})))
    else:
        print_plan(plan, for_chart=values is not None, cost=cost)
    return plan


@app.command()
@expand_options
def preflight(job: JobOptions, trial: PreflightOptions, as_json: Json = False, quiet: Quiet = False) -> None:
    """Try a job on a few images and one actor: credentials, model, decoding, forward pass, speed; exits 2 if a check fails.

    It keeps nothing that it writes. It shows how long the job will take, and how many CPU cores each GPU needs.

    Example: batch-inference preflight photos/ --output out/ --model resnet18 --set inference.gpus_per_actor=0
    """
    from batch_inference.cli.tables import print_preflight
    from batch_inference.preflight.preflight import preflight as run_preflight

    logs.configure("text", quiet=True)
    config = job.resolve(before=trial.to_settings())
    with logs.stdout_as_log_lines():
        result = run_preflight(config, address=trial.address, one_actor=trial.one_actor)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        print_preflight(result, quiet=quiet)
    if not result.ok:
        raise typer.Exit(EXIT_USER)


@app.command()
def status(
    output: OutputArgument,
    watch: Annotated[
        bool,
        typer.Option("--watch", "-w", help="Show it again and again until the job has ended; Ctrl-C stops watching."),
    ] = False,
    every: Annotated[float, typer.Option(min=0.5, metavar="SECONDS", help="Interval of --watch.")] = 5.0,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Show the progress of a job, from its ledger alone.

    Example: batch-inference status s3://bucket/predictions/ --watch
    """
    if watch and as_json:
        raise UserError(
            "both --watch and --json are given", "Keep --json, and repeat the command as often as you like."
        )
    from batch_inference.cli.tables import print_status, watch_status
    from batch_inference.output.status import status as read_status

    storage = storage_config(settings)
    if as_json:
        typer.echo(json.dumps(read_status(output, storage).to_dict()))
    elif watch:
        watch_status(lambda: read_status(output, storage), every)
    else:
        print_status(read_status(output, storage))


@app.command()
def verify(output: OutputArgument, settings: Settings = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Recount a job from its files: every manifest row exactly once; exits 4 if rows are missing or duplicated.

    Example: batch-inference verify out/
    """
    from batch_inference.cli.tables import print_verification
    from batch_inference.output.verify import verify as recount

    verification = recount(output, storage_config(settings))
    if as_json:
        typer.echo(json.dumps(verification.to_dict()))
    else:
        print_verification(verification, quiet=quiet)
    if not verification.ok:
        raise typer.Exit(EXIT_ACCOUNTING)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(metavar="OUTPUT1", help="Folder of an output.")],
    after: Annotated[str, typer.Argument(metavar="OUTPUT2", help="Folder of another output.")],
    column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Column to compare; default: label, else predicted_class_idx."),
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="FILE", help="Parquet file for all that changed: uri, before, after.")
    ] = None,
    fail_above: Annotated[
        float | None,
        typer.Option(min=0, max=100, metavar="PERCENT", help="Exit 3 if more predictions than this have changed."),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two outputs, such as those of two models over the same images: which predictions changed.

    Example: batch-inference diff predictions-v1/ predictions-v2/ --to changed.parquet
    """
    from batch_inference.cli.tables import print_comparison
    from batch_inference.output.diff import diff_outputs

    comparison = diff_outputs(before, after, column, storage_config(settings), to)
    if as_json:
        typer.echo(json.dumps(comparison.to_dict()))
    else:
        print_comparison(comparison, quiet=quiet)
    if fail_above is not None and comparison.changed_percent > fail_above:
        raise typer.Exit(EXIT_THRESHOLD)


@app.command()
def report(
    output: OutputArgument,
    gpu_hour_price: GpuHourPrice = None,
    thumbnails: Annotated[
        int | None,
        typer.Option(min=0, max=60, metavar="N", help="Images shown from each end of the confidences; 0 reads none."),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Make the report for people again, OUTPUT/_report/report.html; of any job, even one that failed or still runs.

    It reads every prediction, and a few images.

    Example: batch-inference report out/ --gpu-hour-price 2.5
    """
    from batch_inference.cli.tables import print_report
    from batch_inference.output.ledger import Ledger
    from batch_inference.report.build import make_report
    from batch_inference.storage.store import Store

    ledger = Ledger(Store(output, storage_config(settings), must_exist=True))
    overrides = {
        "output": {"uri": output},
        "report": {"gpu_hour_price": gpu_hour_price, "thumbnails": thumbnails},
    }
    made = make_report(output, load_config(ledger.require_job().config, overrides, settings or []))
    if as_json:
        typer.echo(json.dumps(asdict(made)))
    else:
        print_report(made)


@app.command()
@expand_options
def retry(
    output: OutputArgument,
    failed_rows: FailedRowsOptions,
    *,
    settings: Settings = None,
    cluster: ClusterOptions,
    as_json: Json = False,
    quiet: Quiet = False,
    log_format: LogFormat = "text",
) -> None:
    """Run failed rows again: those of a stage, of a type, or (with neither) those that are marked retryable.

    The job's configuration comes from the output; --set may change keys that have no influence on rows, such as inference.actors.

    Example: batch-inference retry out/ --stage fetch
    """
    logs.configure(log_format, quiet=quiet)
    failed_rows.check()
    config, new_retry = _begin_retry(output, failed_rows, cluster.address, settings or [])
    if new_retry is None:
        _refuse_empty_retry(output, config, as_json=as_json)
        return
    if not quiet and not as_json:
        from batch_inference.output.retries import describe_retry

        typer.echo(
            f"retry {new_retry.generation}: {new_retry.rows:,} failed rows again ({describe_retry(new_retry)})",
            err=True,
        )
    raise typer.Exit(run_job(config, cluster.address, cluster.dashboard, quiet=quiet, as_json=as_json))


def _begin_retry(
    output: str, failed_rows: FailedRowsOptions, address: str | None, settings: list[str]
) -> tuple[JobConfig, Retry | None]:
    """Record a retry in the output, and return its configuration and the retry, None if no failed row is selected."""
    from uuid import uuid4

    from batch_inference.driver.startup import EngineResolver
    from batch_inference.output.ledger import Ledger
    from batch_inference.output.retries import start_retry
    from batch_inference.pipeline.cluster import is_client_address
    from batch_inference.pipeline.fingerprint import check_same_job
    from batch_inference.storage.store import Store

    ledger = Ledger(Store(output, storage_config(settings), must_exist=True))
    config = load_config(ledger.require_job().config, {"output": {"uri": output}}, settings)
    ledger = Ledger(Store(output, config.storage))
    if config.predictor is not None or not is_client_address(address or os.environ.get("RAY_ADDRESS")):
        # Checked before the output records a retry, which only a run that works can complete. A model's files are where the
        # driver runs; a predictor is here.
        with logs.stdout_as_log_lines(), EngineResolver(config) as resolver:
            check_same_job(config, resolver.result(), ledger.require_job(), ledger.store)
    new_retry = start_retry(
        ledger,
        stages=failed_rows.stages,
        error_types=failed_rows.error_types,
        retryable=failed_rows.only_retryable,
        attempt=uuid4().hex[:8],
    )
    return config, new_retry


def _refuse_empty_retry(output: str, config: JobConfig, *, as_json: bool) -> None:
    """Say that there is nothing to retry.

    Raises:
        NoPredictionError: If the job has no prediction at all: retrying nothing does not make it a success.
    """
    from batch_inference.output.ledger import Ledger
    from batch_inference.output.retries import describe_failed_rows
    from batch_inference.output.status import status as read_status
    from batch_inference.storage.store import Store

    done = read_status(output, config.storage)
    if done.state == "failed" and done.rows and done.errors == done.rows:
        raise NoPredictionError(
            done.verdict,
            f"No failed row is selected. To retry all of them: batch-inference retry {shlex.quote(output)} --all",
        )
    failed = describe_failed_rows(Ledger(Store(output, config.storage)))
    typer.echo(
        json.dumps({"state": "NOTHING_TO_RETRY", "exit_code": 0, "failed": failed})
        if as_json
        else printable(f"nothing to retry: no failed row is selected; failed rows: {failed}")
    )


@app.command()
@expand_options
def submit(submission: SubmitOptions, log_format: LogFormat = "json") -> None:
    """Submit a job to a Ray cluster, once, and follow its log; exits 0 when the job has ended, even if it failed.

    Example: batch-inference submit --config job.yaml --inline --address http://head:8265 --submission-id photos-1
    """
    import structlog

    from batch_inference.kubernetes import ray_jobs, submitter

    logs.configure(log_format)
    timeouts = submitter.SubmitTimeouts(
        start_s=submission.start_s, lost_s=submission.lost_s, silent_s=submission.silent_s
    )
    try:
        submitter.submit(
            submission.config,
            submission.address,
            submission.submission_id,
            inline=submission.inline,
            token=ray_jobs.token_from_environment(),
            timeouts=timeouts,
        )
    except BatchInferenceError as exc:
        # A log line like all others, since this program's output is a pod's log.
        structlog.get_logger().error(exc.message, remedy=exc.remedy)
        raise typer.Exit(exc.exit_code) from None


@app.command()
def schema() -> None:
    """Print the JSON Schema of the configuration.

    Example: batch-inference schema > job.schema.json
    """
    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def demo(
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for photos and predictions.")
    ] = "demo-output",
    quiet: Quiet = False,
) -> None:
    """Classify real photos, some broken on purpose, with a real network; offline, on the CPU.

    Example: batch-inference demo
    """
    from pathlib import Path

    from batch_inference.cli.demo import demo_config, make_photos
    from batch_inference.cli.tables import print_rows

    logs.configure("text", quiet=quiet)
    photos = Path(output, "photos")
    if not photos.is_dir():
        make_photos(photos)
    config = demo_config(photos, Path(output, "predictions"))
    code = run_job(config, "local", None, quiet=quiet, before_verdict=lambda: print_rows(config.output.uri))
    raise typer.Exit(code)


def _failure_json(exc: BatchInferenceError) -> dict[str, Any]:
    state = "INTERRUPTED" if exc.exit_code == EXIT_INTERRUPTED else "FAILED"
    return {"state": state, "exit_code": exc.exit_code, "verdict": exc.message, "remedy": exc.remedy}


def main(argv: list[str] | None = None) -> None:
    """Run a command; turn every exception into its exit code and a message without a traceback."""
    escape_unencodable_output()
    # Only if this process is the program, and not a caller of this function: its descendants end with it.
    if argv is None and supervision.is_needed(sys.argv[1:], os.environ):
        supervision.supervised(_driver_is_gone)
    try:
        _main_of(argv)
    except SystemExit as exc:
        # The verdict has to be out before the parent learns that there is one.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        supervision.tell_parent(exit_code=exc.code if isinstance(exc.code, int) else int(exc.code is not None))
        raise


def _driver_is_gone(ending: supervision.Ending) -> int:
    """Print the verdict in place of a driver that could not, and return the exit code."""
    cause = (
        "as the system ends a process when memory runs out"
        if ending.code == -signal.SIGKILL
        else "as Ray's native code ends it when one of Ray's own processes on this machine, the raylet or the GCS, was killed"
    )
    failure = InfrastructureError(
        f"the driver's process {ending.how} and without a verdict, {cause}",
        "Find out what was killed (dmesg, the container's memory limit, Ray's logs in /tmp/ray); then start the same command "
        "again, it resumes.",
    )
    if "output" in ending.facts:
        # This process has been up as long as the job: its modules may have been replaced meanwhile.
        with contextlib.suppress(Exception):
            return _fail(failure, ending.facts)
    return _refuse(failure)


def _fail(failure: BatchInferenceError, told: dict[str, Any]) -> int:
    from batch_inference.cli.tables import show_cursor
    from batch_inference.cli.verdict import print_verdict, verdict_of_failure
    from batch_inference.driver.lost import record_lost_driver

    show_cursor()
    logs.configure("text", quiet=True)
    last = record_lost_driver(told, failure)
    if "--json" in sys.argv:
        typer.echo(json.dumps(_failure_json(failure)))
    else:
        print_verdict(verdict_of_failure(failure, told["output"], last))
    return failure.exit_code


def _refuse(exc: BatchInferenceError, argv: list[str] | None = None) -> int:
    if (argv is not None and "--json" in argv) or "--json" in sys.argv:
        typer.echo(json.dumps(_failure_json(exc)))
    else:
        typer.echo(printable(f"error: {exc.message}\nremedy: {exc.remedy}"), err=True)
    return exc.exit_code


def _main_of(argv: list[str] | None) -> None:
    try:
        app(argv)
    except BatchInferenceError as exc:
        raise SystemExit(_refuse(exc, argv)) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except Exception:
        traceback.print_exc()
        typer.echo("internal error: please report it to the project with the traceback above", err=True)
        raise SystemExit(EXIT_SYSTEM) from None
