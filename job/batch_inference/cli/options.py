"""The options and arguments of the commands, and how they become a configuration.

Options that several commands share, or that belong together, are fields of a frozen dataclass. A command takes the dataclass as
one parameter and is decorated with :func:`expand_options`.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal

import typer

from batch_inference.config import JobConfig, StorageConfig, load_config
from batch_inference.errors import UserError

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="One key, such as inference.actors=2; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and the verdict.")]
LogFormat = Annotated[Literal["text", "json"], typer.Option(help="Format of the log lines.")]
OutputArgument = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder of the output.")]
GpuHourPrice = Annotated[
    float | None, typer.Option(min=0, metavar="PRICE", help="Price of one GPU for an hour; adds the cost.")
]


@dataclass(frozen=True)
class JobOptions:
    """The options that describe a job."""

    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[INPUT]...", help="Folders, globs or images; local, s3://, gs:// or az://."),
    ] = None
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="URI", help="Folder of the output; one job each.")
    ] = None
    manifest: Annotated[
        str | None,
        typer.Option(metavar="URI", help="A list of images instead of INPUT: .parquet, .csv, .jsonl, .txt."),
    ] = None
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Architecture, such as resnet152.")] = None
    weights: Annotated[
        str | None, typer.Option(metavar="W", help="Weights of the model, such as DEFAULT or IMAGENET1K_V2.")
    ] = None
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            "-c",
            metavar="FILE",
            help="YAML file with the whole configuration; env:NAME reads the variable NAME.",
        ),
    ] = None
    settings: Settings = None

    def resolve(
        self, config: dict[str, Any] | None = None, *, before: Sequence[str] = (), after: Sequence[str] = ()
    ) -> JobConfig:
        """Return the configuration that arguments, options, file and settings make together.

        Args:
            config: Configuration to use instead of the file's.
            before: Settings that --set overrides.
            after: Settings that override --set.

        Raises:
            UserError: With every problem at once.
        """
        from batch_inference.storage.names import is_utf8
        from batch_inference.storage.uris import canonical_uri

        self._check_sources()
        # Arguments are bytes; a configuration is text, in which an escape stands for each byte that is not UTF-8.
        inputs = [uri if is_utf8(uri) else canonical_uri(uri) for uri in self.inputs or []]
        output, manifest, weights = (
            uri if uri is None or is_utf8(uri) else canonical_uri(uri)
            for uri in (self.output, self.manifest, self.weights)
        )
        overrides: dict[str, Any] = {"output": {"uri": output}, "model": {"name": self.model, "weights": weights}}
        settings = [*before, *(self.settings or []), *after]
        # A source of images replaces the other one that the file may name.
        if inputs:
            overrides["input"] = {"uris": inputs}
            settings = ["input.manifest=null", *settings]
        elif manifest:
            overrides["input"] = {"manifest": manifest}
            settings = ["input.uris=[]", *settings]
        return load_config(self.config if config is None else config, overrides, settings)

    def _check_sources(self) -> None:
        from batch_inference.inputs.manifest_files import looks_like_manifest

        for uri in self.inputs or []:
            if looks_like_manifest(uri):
                images = f" If it holds the images themselves: --set 'input.uris=[{uri}]'."
                raise UserError(
                    f"{uri} looks like a manifest, not like an image",
                    f"Write --manifest {uri}.{images if uri.lower().endswith('.parquet') else ''}",
                )
        if self.inputs and self.manifest:
            raise UserError(
                f"both INPUT and --manifest {self.manifest} are given", "Keep the one that lists your images."
            )


@dataclass(frozen=True)
class SubsetOptions:
    """The options that restrict a job to some of its inputs."""

    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N inputs (input.limit).")] = None
    sample: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only N inputs chosen at random (input.sample).")
    ] = None
    seed: Annotated[
        int | None, typer.Option(min=0, metavar="SEED", help="Seed of the random choice (input.sample_seed).")
    ] = None

    def to_settings(self) -> list[str]:
        """Return the options as settings."""
        if self.seed is not None and self.sample is None:
            raise UserError(f"--seed {self.seed} is given without a sample", "Add --sample N.")
        return _settings_of({"input.limit": self.limit, "input.sample": self.sample, "input.sample_seed": self.seed})


@dataclass(frozen=True)
class ClusterOptions:
    """The options that choose the Ray cluster."""

    address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Ray cluster to use: ray://host:10001, host:6379 or auto; default: this machine."
        ),
    ] = None
    dashboard_host: Annotated[
        str,
        typer.Option(
            metavar="HOST", help="Address that Ray's dashboard listens on; 0.0.0.0 for all, none for no dashboard."
        ),
    ] = "127.0.0.1"

    @property
    def dashboard(self) -> str | None:
        """Address that the dashboard listens on, None for no dashboard."""
        return None if self.dashboard_host == "none" else self.dashboard_host


@dataclass(frozen=True)
class ChartOptions:
    """The options that say which values of the rayjob chart a plan is for."""

    values: Annotated[
        list[str] | None,
        typer.Option(
            "--values", "-f", metavar="FILE", help="Values of the rayjob chart, with the job in them; may be repeated."
        ),
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Values for the GPU nodes of a platform, before those of --values: gke, eks-spot, …"
        ),
    ] = None


@dataclass(frozen=True)
class CostOptions:
    """The options that a plan computes the cost from."""

    gpu_hour_price: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="PRICE",
            help="Price of a GPU for an hour, to show the job's cost (report.gpu_hour_price). If a preset shares GPUs (mig, "
            "time-slicing): price of a share.",
        ),
    ] = None
    images_per_s: Annotated[
        float | None,
        typer.Option(
            min=1e-9,
            metavar="RATE",
            help="Images per second of one actor, as preflight shows it, to show hours and cost.",
        ),
    ] = None


@dataclass(frozen=True)
class PreflightOptions:
    """The options that say what a preflight tries."""

    address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Ray cluster to try it on: host:6379 or auto; default: this machine."),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Images to decode and predict (preflight.samples).", show_default="64"),
    ] = None
    golden: Annotated[
        str | None,
        typer.Option(
            metavar="MANIFEST",
            help="Images with their expected predictions, such as a file of an earlier output's predictions/ "
            "(preflight.golden_manifest).",
        ),
    ] = None
    golden_tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="Absolute tolerance for floating-point columns; all others must match exactly (preflight.golden_tolerance).",
            show_default="0.02",
        ),
    ] = None
    one_actor: Annotated[
        bool,
        typer.Option(
            "--one-actor",
            help="For a machine or cluster that is smaller than the job's: skip the check for room, and the forecast.",
        ),
    ] = False

    def to_settings(self) -> list[str]:
        """Return the options that stand for keys as settings."""
        return _settings_of(
            {
                "preflight.samples": self.samples,
                "preflight.golden_manifest": self.golden,
                "preflight.golden_tolerance": self.golden_tolerance,
            }
        )


@dataclass(frozen=True)
class FailedRowsOptions:
    """The options that select failed rows."""

    stage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE", help="Rows that failed in this stage: fetch, decode, …; may be repeated, or have commas."
        ),
    ] = None
    error_type: Annotated[
        list[str] | None,
        typer.Option(metavar="TYPE", help="Rows of this error_type, such as TIMEOUT; may be repeated, or have commas."),
    ] = None
    everything: Annotated[bool, typer.Option("--all", help="All failed rows.")] = False

    @property
    def stages(self) -> list[str]:
        """Stages that --stage names."""
        return _split(self.stage)

    @property
    def error_types(self) -> list[str]:
        """Types that --error-type names."""
        return _split(self.error_type)

    @property
    def only_retryable(self) -> bool:
        """Whether no option selects rows, so that those that are marked retryable are meant."""
        return not (self.everything or self.stages or self.error_types)

    def check(self) -> None:
        """Raise UserError if the options contradict each other."""
        if self.everything and (self.stages or self.error_types):
            raise UserError("--all is given beside --stage or --error-type", "Keep one of them.")


@dataclass(frozen=True)
class SubmitOptions:
    """The options of a submission."""

    config: Annotated[
        str,
        typer.Option("--config", "-c", metavar="FILE", help="Path of the configuration file on the Ray head."),
    ]
    inline: Annotated[
        bool,
        typer.Option("--inline", help="Send the text of a local file instead, for a cluster that does not have it."),
    ] = False
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", envvar="RAY_DASHBOARD_ADDRESS", help="The Ray dashboard, host:port or its URL."),
    ] = None
    submission_id: Annotated[
        str | None,
        typer.Option(
            metavar="ID", envvar="RAY_JOB_SUBMISSION_ID", help="Name of the job; a job that exists is followed."
        ),
    ] = None
    start_s: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Time for the dashboard to accept the job.")
    ] = 300.0
    lost_s: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Time for the dashboard to come back afterwards.")
    ] = 600.0
    silent_s: Annotated[
        float,
        typer.Option(
            min=1,
            metavar="SECONDS",
            help="Time without new log lines after which the log is read over a new connection.",
        ),
    ] = 60.0


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command that takes dataclasses of options into one that typer can read: each field becomes an option."""
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if isinstance(group, type) and is_dataclass(group):
            groups[parameter.name] = group
            parameters += inspect.signature(group, eval_str=True).parameters.values()
        else:
            parameters.append(parameter)

    @functools.wraps(command)
    def call(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    call.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in keyword_only}
    return call


def storage_config(settings: list[str] | None) -> StorageConfig:
    """Return the storage configuration that settings alone make."""
    return load_config(None, None, settings or []).storage


def _settings_of(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None]


def _split(given: list[str] | None) -> list[str]:
    return [word for value in given or [] for word in value.replace(",", " ").split()]
