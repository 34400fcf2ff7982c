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
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from batch_inference import logs, supervision
from batch_inference.config import JobConfig, json_schema, load_config
from batch_inference.errors import (
    EXIT_COUNTS,
    EXIT_INTERRUPTED,
    EXIT_SYSTEM,
    EXIT_THRESHOLD,
    EXIT_USER,
    BatchInferenceError,
    Interrupted,
    NoPrediction,
    SystemFault,
    UserError,
)
from batch_inference.terminal import legible_output, plain
from batch_inference.wording import count_of

if TYPE_CHECKING:
    from batch_inference.planner import Plan


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """Runs a command.

        Typer takes any broken pipe for that of our output, and ends with 1 and without a word: right where nobody reads
        on, but not where a process or a socket of Ray's went away.
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

Inputs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[INPUT]...", help="Folders, globs or images; local, s3://, gs:// or az://."),
]
Output = Annotated[
    str | None, typer.Option("--output", "-o", metavar="URI", help="Folder of the output; one job each.")
]
Manifest = Annotated[
    str | None, typer.Option(metavar="URI", help="A list of images instead of INPUT: .parquet, .csv, .jsonl, .txt.")
]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="Architecture, such as resnet152.")]
Weights = Annotated[
    str | None, typer.Option(metavar="W", help="Weights of the model, such as DEFAULT or IMAGENET1K_V2.")
]
ConfigFile = Annotated[
    str | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="YAML file with the whole configuration; env:NAME reads that variable."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One key, such as inference.actors=2; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and the verdict.")]
LogFormat = Annotated[Literal["text", "json"], typer.Option(help="How log lines look.")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help="Ray cluster to use: ray://host:10001, host:6379 or auto; default: this machine."
    ),
]
DashboardHost = Annotated[
    str,
    typer.Option(
        metavar="HOST", help="Address that Ray's dashboard listens on; 0.0.0.0 for all, none for no dashboard."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N inputs (input.limit).")]
Sample = Annotated[int | None, typer.Option(min=1, metavar="N", help="Only N inputs chosen at random (input.sample).")]
Seed = Annotated[int | None, typer.Option(min=0, metavar="SEED", help="Chooses the sample (input.sample_seed).")]
OutputArgument = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder of the output.")]


def _version(wanted: bool) -> None:
    if wanted:
        from batch_inference.identity import versions

        typer.echo(", ".join(f"{name} {value}" for name, value in versions().items()))
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    inputs: Inputs = None,
    output: Output = None,
    manifest: Manifest = None,
    model: Model = None,
    weights: Weights = None,
    config: ConfigFile = None,
    settings: Settings = None,
    address: Address = None,
    dashboard_host: DashboardHost = "127.0.0.1",
    limit: Limit = None,
    sample: Sample = None,
    seed: Seed = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would run, as plan does; write and run nothing.")
    ] = False,
    force_retry: Annotated[
        bool,
        typer.Option(
            "--force-retry",
            help="Go on where an earlier attempt of this Kubernetes run failed of what a retry can't mend.",
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
    few = _few(limit, sample, seed)
    job = _config(inputs, output, manifest, model, weights, config, [*(settings or []), *few])
    if dry_run:
        _show(job, None, None, as_json=as_json)
        raise typer.Exit
    raise typer.Exit(
        run_job(
            job,
            address,
            None if dashboard_host == "none" else dashboard_host,
            quiet=quiet,
            as_json=as_json,
            force_retry=force_retry,
        )
    )


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
    """Runs a job with display and verdict, ``before_verdict`` between the two; returns the exit code."""
    from batch_inference import driver
    from batch_inference.display import Display, print_verdict, verdict_of, verdict_of_failure
    from batch_inference.progress import Snapshot

    last = Snapshot()

    def follow(snapshot: Snapshot) -> None:
        nonlocal last
        last = snapshot
        display.update(snapshot)

    try:
        with Display(quiet=quiet) as display, logs.stdout_as_lines():
            result = driver.run(
                config,
                address=address,
                dashboard_host=dashboard_host,
                on_progress=follow,
                force_retry=force_retry,
            )
    except KeyboardInterrupt:
        failure: BatchInferenceError = Interrupted("stopped by SIGINT", "Run the same command again: it resumes.")
    except BatchInferenceError as exc:
        failure = exc
    else:
        if as_json:
            typer.echo(
                json.dumps({"state": "SUCCEEDED", "exit_code": 0, "verdict": verdict_of(result)[0], **vars(result)})
            )
        else:
            if before_verdict:
                before_verdict()
            print_verdict(verdict_of(result))
        return 0
    if as_json:
        typer.echo(json.dumps(_failure_json(failure)))
    else:
        if "\n" in failure.message:
            typer.echo(plain(failure.message), err=True)
        print_verdict(verdict_of_failure(failure, config.output.uri, last))
    return failure.exit_code


@app.command()
def plan(
    inputs: Inputs = None,
    output: Output = None,
    manifest: Manifest = None,
    model: Model = None,
    weights: Weights = None,
    config: ConfigFile = None,
    settings: Settings = None,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--values", "-f", metavar="FILE", help="Values of the rayjob chart, with the job in them; may be repeated."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Values for the GPU nodes of a platform, before those of --values: gke, eks-spot, …"
        ),
    ] = None,
    gpu_hour_price: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="PRICE",
            help="Price of a GPU for an hour, to show what the job costs (report.gpu_hour_price). Where a preset shares GPUs out "
            "(mig, time-slicing), that of a share.",
        ),
    ] = None,
    images_per_s: Annotated[
        float | None,
        typer.Option(
            min=1e-9,
            metavar="RATE",
            help="Images a second of one actor, as preflight shows it, to show hours and cost.",
        ),
    ] = None,
    limit: Limit = None,
    sample: Sample = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """List the inputs, count, and show what would run and what does not fit; writes and runs nothing.

    With --values or --preset it shows the pods that the chart would make, and exits 2 where the chart would refuse.

    Example: batch-inference plan photos/ --model resnet18 --preset gke-spot --gpu-hour-price 0.70
    """
    from batch_inference import planner

    files = [*([planner.preset(preset)] if preset else []), *(values or [])]
    given = planner.read_values(files) if files else None
    if values and config:
        raise UserError(
            f"both --config {config} and --values are given", "Keep --values: its `job` is the configuration."
        )
    base = given["job"] if given and "job" in given else config
    few = _few(limit, sample, seed)
    job = _config(inputs, output, manifest, model, weights, base, [*(settings or []), *few])
    price = job.report.gpu_hour_price if gpu_hour_price is None else gpu_hour_price
    if images_per_s is not None and price is None:
        raise UserError(f"--images-per-s {images_per_s:g} is given without a price", "Add --gpu-hour-price.")
    found = _show(job, given, None if price is None else (price, images_per_s), as_json=as_json)
    if given is not None and found.kubernetes and found.kubernetes.problems:
        raise typer.Exit(EXIT_USER)


def _show(
    job: JobConfig, values: dict[str, Any] | None, price: tuple[float, float | None] | None, *, as_json: bool
) -> Plan:
    """Prints the plan of a job."""
    from batch_inference import planner
    from batch_inference.display import print_plan

    found = planner.plan(job, values)
    cost = planner.Cost.of(found, *price) if price else None
    if as_json:
        typer.echo(json.dumps(found.to_dict() | ({"cost": asdict(cost)} if cost else {})))
    else:
        print_plan(found, for_chart=values is not None, cost=cost)
    return found


def _few(limit: int | None, sample: int | None, seed: int | None) -> list[str]:
    """Settings for a job over some of its inputs."""
    if seed is not None and sample is None:
        raise UserError(f"--seed {seed} is given without a sample", "Add --sample N.")
    return _given({"input.limit": limit, "input.sample": sample, "input.sample_seed": seed})


def _given(options: dict[str, Any]) -> list[str]:
    """Options that stand for keys, as settings."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items() if value is not None]


@app.command()
def preflight(
    inputs: Inputs = None,
    output: Output = None,
    manifest: Manifest = None,
    model: Model = None,
    weights: Weights = None,
    config: ConfigFile = None,
    settings: Settings = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Ray cluster to try it on: host:6379 or auto; default: this machine."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Images to decode and predict (preflight.samples).", show_default="64"),
    ] = None,
    golden: Annotated[
        str | None,
        typer.Option(
            metavar="MANIFEST",
            help="Images with the predictions that are expected, such as a file of an earlier output's predictions/ "
            "(preflight.golden).",
        ),
    ] = None,
    golden_tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="How far numbers with fractions may be off (preflight.golden_tolerance).",
            show_default="0.02",
        ),
    ] = None,
    one_actor: Annotated[
        bool,
        typer.Option(
            "--one-actor",
            help="This is no place for the whole job: leave out whether it has room here, and how long it takes.",
        ),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Try a job on a few images and one actor: credentials, model, decoding, forward pass, speed; exits 2 where something fails.

    Nothing that it writes stays. It says how long the job will take, and how many CPU cores each GPU needs.

    Example: batch-inference preflight photos/ --output out/ --model resnet18 --set inference.gpus_per_actor=0
    """
    from batch_inference.display import print_preflight
    from batch_inference.preflight import preflight as try_job

    logs.configure("text", quiet=True)
    options = _given(
        {"preflight.samples": samples, "preflight.golden": golden, "preflight.golden_tolerance": golden_tolerance}
    )
    checked = _config(inputs, output, manifest, model, weights, config, [*options, *(settings or [])])
    with logs.stdout_as_lines():
        found = try_job(checked, address=address, one_actor=one_actor)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        print_preflight(found, quiet=quiet)
    if not found.ok:
        raise typer.Exit(EXIT_USER)


@app.command()
def status(
    output: OutputArgument,
    watch: Annotated[
        bool,
        typer.Option("--watch", "-w", help="Show it again and again until the job has ended; Ctrl-C stops watching."),
    ] = False,
    every: Annotated[float, typer.Option(min=0.5, metavar="SECONDS", help="How often, with --watch.")] = 5.0,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Show how far a job is, from its ledger alone.

    Example: batch-inference status s3://bucket/predictions/ --watch
    """
    if watch and as_json:
        raise UserError("both --watch and --json are given", "Keep --json, and ask again as often as you like.")
    from batch_inference.display import print_status, watch_status
    from batch_inference.status import status as read_status

    storage = _storage(settings)
    if as_json:
        typer.echo(json.dumps(read_status(output, storage).to_dict()))
    elif watch:
        watch_status(lambda: read_status(output, storage), every)
    else:
        print_status(read_status(output, storage))


@app.command()
def verify(output: OutputArgument, settings: Settings = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Recount a job from its files: every manifest row exactly once; exits 4 where something is missing or double.

    Example: batch-inference verify out/
    """
    from batch_inference.verifier import verify as recount

    found = recount(output, _storage(settings))
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        raise typer.Exit(0 if found.ok else EXIT_COUNTS)
    done = found.predictions + found.errors
    for problem in found.problems:
        typer.echo(f"  - {plain(problem)}")
    if not found.ok:
        typer.echo(
            f"WRONG: {len(found.problems)} problems; {done:,} of {found.rows:,} inputs found "
            f"({found.predictions:,} predictions, {found.errors:,} errors)"
        )
        typer.echo(
            "remedy: run the job again: it deletes files that no commit names; for anything else delete first _SUCCESS and the "
            "_commits/ files of the shards named, and they will be done anew"
        )
        raise typer.Exit(EXIT_COUNTS)
    if quiet:
        return
    if found.finished:
        typer.echo(
            f"OK: all {found.rows:,} inputs are there exactly once: {found.predictions:,} predictions, {found.errors:,} errors, "
            f"{count_of(found.shards, 'shard')}"
        )
    elif found.rows and found.errors == found.rows:
        typer.echo(
            f"OK: all {found.rows:,} inputs are there exactly once, and every one is an error: there is no prediction at all"
        )
    else:
        typer.echo(
            f"OK so far: {done:,} of {found.rows:,} inputs are there exactly once, {found.shards_done:,} of {found.shards:,} shards "
            f"are committed; the job is not finished ({len(found.uncommitted)} files belong to no commit yet)"
        )


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
        typer.Option(min=0, max=100, metavar="PERCENT", help="Exit 3 where more predictions than this have changed."),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare two outputs, such as those of two models over the same images: which predictions changed.

    Example: batch-inference diff predictions-v1/ predictions-v2/ --to changed.parquet
    """
    from batch_inference.comparison import compare
    from batch_inference.display import print_comparison

    found = compare(before, after, column, _storage(settings), to)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        print_comparison(found, quiet=quiet)
    if fail_above is not None and found.changed_percent > fail_above:
        raise typer.Exit(EXIT_THRESHOLD)


@app.command()
def report(
    output: OutputArgument,
    gpu_hour_price: Annotated[
        float | None, typer.Option(min=0, metavar="PRICE", help="Price of one GPU for an hour; adds the cost.")
    ] = None,
    thumbnails: Annotated[
        int | None,
        typer.Option(min=0, max=60, metavar="N", help="Images shown from each end of the confidences; 0 reads none."),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Make the report for people again, OUTPUT/_report/report.html; of any job, also one that failed or is under way.

    It reads every prediction, and a few images.

    Example: batch-inference report out/ --gpu-hour-price 2.5
    """
    from batch_inference.ledger import Ledger
    from batch_inference.report import make
    from batch_inference.storage import Store

    ledger = Ledger(Store(output, _storage(settings), must_exist=True))
    given = {"gpu_hour_price": gpu_hour_price, "thumbnails": thumbnails}
    stored = ledger.require_job().config
    found = make(output, load_config(stored, {"output": {"uri": output}, "report": given}, settings or []))
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    for note in found.notes:
        typer.echo(plain(f"  - {note}"))
    done = found.predictions + found.errors
    typer.echo(
        plain(
            f"{found.state}: {done:,} of {found.rows:,} images, {found.predictions:,} predictions and {found.errors:,} errors"
        )
    )
    typer.echo(plain(f"report: {found.uri}"))


@app.command()
def retry(
    output: OutputArgument,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE", help="Rows that failed there: fetch, decode, ...; may be repeated, or have commas."
        ),
    ] = None,
    error_type: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE", help="Rows of this error_type, such as TIMEOUT; may be repeated, or have commas."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All failed rows.")] = False,
    settings: Settings = None,
    address: Address = None,
    dashboard_host: DashboardHost = "127.0.0.1",
    as_json: Json = False,
    quiet: Quiet = False,
    log_format: LogFormat = "text",
) -> None:
    """Run failed rows again: those of a stage, of a type, or (with neither) those that are marked retryable.

    The job's configuration comes from the output; --set may change what has no say in the rows, such as inference.actors.

    Example: batch-inference retry out/ --stage fetch
    """
    from uuid import uuid4

    from batch_inference.cluster import is_client_address
    from batch_inference.generations import begin, describe, nothing_meant
    from batch_inference.identity import check_same_job
    from batch_inference.ledger import Ledger
    from batch_inference.startup import EngineAhead
    from batch_inference.status import status
    from batch_inference.storage import Store

    logs.configure(log_format, quiet=quiet)
    ledger = Ledger(Store(output, _storage(settings), must_exist=True))
    config = load_config(ledger.require_job().config, {"output": {"uri": output}}, settings or [])
    ledger = Ledger(Store(output, config.storage))
    stages, types = (
        [word for value in given or [] for word in value.replace(",", " ").split()] for given in (stage, error_type)
    )
    if everything and (stages or types):
        raise UserError("--all is given beside --stage or --error-type", "Keep one of them.")
    marked = not (everything or stages or types)
    if config.predictor is not None or not is_client_address(address or os.environ.get("RAY_ADDRESS")):
        # Before the output says that rows are to be done again, which then only a run that works puts right. A model's files
        # are where the driver runs; a predictor is here.
        with logs.stdout_as_lines(), EngineAhead(config) as ahead:
            check_same_job(config, ahead.result(), ledger.require_job(), ledger.store)
    begun = begin(ledger, stages=stages, error_types=types, retryable=marked, attempt=uuid4().hex[:8])
    if begun is None:
        done = status(output, config.storage)
        if done.state == "failed" and done.rows and done.errors == done.rows:
            # A retry of nothing makes no success of it.
            raise NoPrediction(
                done.verdict,
                f"No failed row is meant. To do all of them again: batch-inference retry {shlex.quote(output)} --all",
            )
        failed = nothing_meant(ledger)
        typer.echo(
            json.dumps({"state": "NOTHING_TO_RETRY", "exit_code": 0, "failed": failed})
            if as_json
            else plain(f"nothing to retry: no failed row is meant; failed rows: {failed}")
        )
        return
    if not quiet and not as_json:
        typer.echo(f"retry {begun.generation}: {begun.rows:,} failed rows again ({describe(begun)})", err=True)
    host = None if dashboard_host == "none" else dashboard_host
    raise typer.Exit(run_job(config, address, host, quiet=quiet, as_json=as_json))


@app.command()
def submit(
    config: Annotated[
        str, typer.Option("--config", "-c", metavar="FILE", help="The configuration file, as the Ray head sees it.")
    ],
    inline: Annotated[
        bool, typer.Option("--inline", help="Send the file's text along, for a cluster that does not have the file.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", envvar="RAY_DASHBOARD_ADDRESS", help="The Ray dashboard, host:port or its URL."),
    ] = None,
    submission_id: Annotated[
        str | None,
        typer.Option(metavar="ID", envvar="RAY_JOB_SUBMISSION_ID", help="The same ID is the same job: it is followed."),
    ] = None,
    start_s: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long the dashboard may take to take the job.")
    ] = 300.0,
    lost_s: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long it may be away afterwards.")
    ] = 600.0,
    silent_s: Annotated[
        float,
        typer.Option(
            min=1, metavar="SECONDS", help="After how long without a line the log is read over a new connection."
        ),
    ] = 60.0,
    log_format: LogFormat = "json",
) -> None:
    """Submit a job to a Ray cluster, once, and follow its log; exits 0 when the job has ended, well or not.

    Example: batch-inference submit --config job.yaml --inline --address http://head:8265 --submission-id photos-1
    """
    import structlog

    from batch_inference import jobserver, submitter

    logs.configure(log_format)
    patience = submitter.Patience(start_s=start_s, lost_s=lost_s, silent_s=silent_s)
    try:
        token = jobserver.token_from_environment()
        submitter.submit(config, address, submission_id, inline=inline, token=token, patience=patience)
    except BatchInferenceError as exc:
        # As a log line like all others: this program's output is a pod's log.
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
        str, typer.Option("--output", "-o", metavar="FOLDER", help="Where photos and predictions go.")
    ] = "demo-output",
    quiet: Quiet = False,
) -> None:
    """Classify real photos, some broken on purpose, with a real network; offline, on the CPU.

    Example: batch-inference demo
    """
    from pathlib import Path

    from batch_inference.demo import demo_config, make_photos
    from batch_inference.display import print_rows

    logs.configure("text", quiet=quiet)
    photos = Path(output, "photos")
    if not photos.is_dir():
        make_photos(photos)
    config = demo_config(photos, Path(output, "predictions"))
    code = run_job(config, "local", None, quiet=quiet, before_verdict=lambda: print_rows(config.output.uri))
    raise typer.Exit(code)


def _config(
    inputs: list[str] | None,
    output: str | None,
    manifest: str | None,
    model: str | None,
    weights: str | None,
    config: str | dict[str, Any] | None,
    settings: list[str] | None,
) -> JobConfig:
    from batch_inference.manifest import looks_like_manifest
    from batch_inference.names import is_text
    from batch_inference.storage import canonical_uri

    for given in inputs or []:
        if looks_like_manifest(given):
            images = f" If it holds the images themselves: --set 'input.uris=[{given}]'." * given.lower().endswith(
                ".parquet"
            )
            raise UserError(f"{given} looks like a manifest, not like an image", f"Write --manifest {given}.{images}")
    if inputs and manifest:
        raise UserError(f"both INPUT and --manifest {manifest} are given", "Keep the one that lists your images.")
    # Arguments are bytes; a configuration is text, which names what is not UTF-8 by an escape.
    inputs = [one if is_text(one) else canonical_uri(one) for one in inputs or []]
    output, manifest, weights = (
        one if one is None or is_text(one) else canonical_uri(one) for one in (output, manifest, weights)
    )
    overrides: dict[str, Any] = {"output": {"uri": output}, "model": {"name": model, "weights": weights}}
    # One source replaces the other that the file may name.
    if inputs:
        overrides["input"] = {"uris": inputs}
        settings = ["input.manifest=null", *(settings or [])]
    elif manifest:
        overrides["input"] = {"manifest": manifest}
        settings = ["input.uris=[]", *(settings or [])]
    return load_config(config, overrides, settings or [])


def _storage(settings: list[str] | None) -> Any:
    return load_config(None, None, settings or []).storage


def _failure_json(exc: BatchInferenceError) -> dict[str, Any]:
    state = "INTERRUPTED" if exc.exit_code == EXIT_INTERRUPTED else "FAILED"
    return {"state": state, "exit_code": exc.exit_code, "verdict": exc.message, "remedy": exc.remedy}


def main(argv: list[str] | None = None) -> None:
    """Entry point: turns every exception into its exit code and a message without a traceback."""
    legible_output()
    # Only where this process is the program, whose descendants end with it.
    if argv is None and supervision.is_needed(sys.argv[1:], os.environ):
        supervision.supervised(_driver_is_gone)
    try:
        _main_of(argv)
    except SystemExit as exc:
        # What the verdict says has to be out before the parent hears that there is one.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        supervision.tell(exit_code=exc.code if isinstance(exc.code, int) else int(exc.code is not None))
        raise


def _driver_is_gone(ending: supervision.Ending) -> int:
    """Give the verdict in place of a driver that could not, and return the exit code."""
    cause = (
        "as the system ends a process where memory runs out"
        if ending.code == -signal.SIGKILL
        else "as Ray's native code ends it where one of Ray's own processes on this machine, the raylet or the GCS, was killed"
    )
    failure = SystemFault(
        f"the driver's process {ending.how} and without a verdict, {cause}",
        "Look for what was killed (dmesg, the container's memory limit, Ray's logs in /tmp/ray); then start the same command "
        "again, it resumes.",
    )
    if "output" in ending.told:
        # This process has been up as long as the job: its modules may have been replaced meanwhile.
        with contextlib.suppress(Exception):
            return _fail(failure, ending.told)
    return _refuse(failure)


def _fail(failure: BatchInferenceError, told: dict[str, Any]) -> int:
    from batch_inference.display import print_verdict, show_cursor, verdict_of_failure
    from batch_inference.driver import close_for_lost_driver

    show_cursor()
    logs.configure("text", quiet=True)
    last = close_for_lost_driver(told, failure)
    if "--json" in sys.argv:
        typer.echo(json.dumps(_failure_json(failure)))
    else:
        print_verdict(verdict_of_failure(failure, told["output"], last))
    return failure.exit_code


def _refuse(exc: BatchInferenceError, argv: list[str] | None = None) -> int:
    if (argv is not None and "--json" in argv) or "--json" in sys.argv:
        typer.echo(json.dumps(_failure_json(exc)))
    else:
        typer.echo(plain(f"error: {exc.message}\nremedy: {exc.remedy}"), err=True)
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
        typer.echo("this is a defect of batch-inference; the lines above say where", err=True)
        raise SystemExit(EXIT_SYSTEM) from None
