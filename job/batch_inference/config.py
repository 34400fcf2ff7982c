"""The configuration of a job: one frozen model, one YAML file, the same on a laptop and in a cluster."""

from __future__ import annotations

import copy
import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator, model_validator

from batch_inference.errors import UserError

DEFAULT_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MODULE_PATH = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")

PositiveInt = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class InputConfig(_Section):
    """Which images: folders, globs and single objects, or a manifest that lists them."""

    uris: tuple[Annotated[str, WithJsonSchema({"type": "string", "pattern": r"\S"})], ...] = Field(
        (),
        description="Folders, globs (`*`, `**`, `?`), single images, tar files of images (`.tar`, also in folders) or Parquet files "
        "of images (where named, or with `bytes_column`); local paths, `s3://`, `gs://`, `az://`.",
    )
    manifest: str | None = Field(
        None,
        description="A list of images instead of `uris`: Parquet, CSV, JSON Lines or text (one URI a line), a file or a folder of Parquet.",
    )
    uri_column: str = Field(
        "uri",
        min_length=1,
        description="The manifest's column that holds the URI; its other columns pass through to the output.",
    )
    allowed_prefixes: tuple[str, ...] | None = Field(
        None,
        description="Where inputs of the manifest may lie: folders, objects, or schemes alone (`s3://`); other lines become failed "
        "rows, NOT_ALLOWED. Null: anywhere, but no local files where the manifest is on an object store.",
    )
    bytes_column: str | None = Field(
        None,
        min_length=1,
        description="Column of Parquet files in `uris` that holds encoded images: bytes, or a struct with `bytes`. "
        "Null: the only one there is, and Parquet files in folders are left out.",
    )
    passthrough_columns: tuple[str, ...] = Field(
        (),
        description="Columns of Parquet files in `uris` that pass through to the output; they are read when the job is planned.",
    )
    extensions: tuple[str, ...] = Field(
        DEFAULT_EXTENSIONS,
        description="File name endings that count as images in folders and tar files; case does not matter. Empty: every file.",
    )
    recursive: bool = Field(True, description="Descend into sub-folders.")
    limit: PositiveInt | None = Field(None, description="Use only the first N inputs; null: all.")
    sample: PositiveInt | None = Field(
        None, description="Use only N inputs, chosen at random and kept in order; null: all. Goes before `limit`."
    )
    sample_seed: int = Field(0, ge=0, description="Chooses the sample: the same seed and inputs give the same one.")

    @field_validator("uris")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        # A shell variable that is not set would mean the current directory with all that is in it.
        if not all(uri.strip() for uri in value):
            raise ValueError(
                "an input is empty, as a shell variable that is not set; for the current directory write ."
            )
        return value

    @field_validator("extensions")
    @classmethod
    def _with_dot(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple("." + ext.lower().lstrip(".") for ext in value)

    @model_validator(mode="after")
    def _one_source(self) -> InputConfig:
        if self.uris and self.manifest:
            raise ValueError("both uris and manifest are given; keep the one that lists your images")
        return self


class OutputConfig(_Section):
    """Where the rows go."""

    uri: str = Field("", description="Folder of the output; one job each. Local path, `s3://`, `gs://`, `az://`.")
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = Field("zstd", description="Parquet compression.")


_CREDENTIALS = "the URL has credentials in it"
# What the chart can take a port from, too: no query, no escapes.
_PORT = r"[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
_REMOTE = re.compile(r"(?P<scheme>s3|gs|az)://")
_ENDPOINT = re.compile(rf"^https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:({_PORT}))?(/[A-Za-z0-9._~/@:+=,-]*)?$")


class StorageConfig(_Section):
    """How object stores are reached. Credentials come from the environment, never from here."""

    endpoint_url: Annotated[str, WithJsonSchema({"type": "string", "pattern": _ENDPOINT.pattern})] | None = Field(
        None,
        description="URL of the store where it is not the provider's own, such as `https://minio.example:9000`; for all of the job's "
        "buckets. Null: from the environment (`AWS_ENDPOINT_URL`, `GOOGLE_BASE_URL`, `AZURE_STORAGE_ENDPOINT`), or the provider's.",
    )

    @field_validator("endpoint_url")
    @classmethod
    def _an_endpoint(cls, value: str | None) -> str | None:
        # A value with credentials must not be in the message: it would be in the log.
        if value is not None and "@" in value.partition("://")[2].partition("/")[0]:
            raise ValueError(
                f"{_CREDENTIALS}, which would be stored with the job; give them in the environment "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
            )
        if value is not None and not _ENDPOINT.fullmatch(value):
            raise ValueError("an endpoint is a URL such as `https://minio.example:9000`, without query and escapes")
        return value

    region: str | None = Field(None, description="Region of the bucket; null: from the environment (`AWS_REGION`).")
    anonymous: bool = Field(False, description="Send unsigned requests, for public buckets.")
    timeout_s: float = Field(60.0, gt=0, description="Longest time for one request, in seconds.")
    max_retries: int = Field(
        5,
        ge=0,
        le=100,
        description="Retries of a request that failed in transit or with 5xx, with exponential backoff and jitter.",
    )
    retry_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Longest time for a request with all of its retries, in seconds; an input that the store asks to slow down for "
        "(503, 429) is tried until then.",
    )
    fetch_concurrency: int = Field(
        16,
        ge=1,
        le=1024,
        description="Requests that one task has under way at the most; fewer while the store asks to slow down.",
    )


class TransformConfig(_Section):
    """Resize, crop and normalise; needed only where the weights do not bring their own."""

    resize: PositiveInt = Field(256, description="Length of the shorter side after resizing, in pixels.")
    crop: PositiveInt = Field(224, description="Side of the central square that the model sees, in pixels.")
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="Mean of each RGB channel on a scale of 0 to 1."
    )
    std: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = Field(
        (0.229, 0.224, 0.225), description="Standard deviation of each RGB channel on a scale of 0 to 1."
    )
    interpolation: Literal["bilinear", "bicubic"] = Field("bilinear", description="Resampling filter, antialiased.")


class ModelConfig(_Section):
    """Which network, and where its weights are."""

    source: Literal["torchvision", "timm", "file", "package"] = Field(
        "torchvision",
        description="`torchvision` or `timm`: architecture and published weights by name; `file`: a state dict "
        "(`.safetensors`, `.pt`, `.pth`) or an exported program (`.pt2`); `package`: a Python package that builds the model.",
    )
    name: str = Field(
        "resnet152",
        description="torchvision or timm: the architecture. file: the architecture of the state dict (`timm/NAME` for one of timm's); "
        "unused for `.pt2`. package: `module:callable` that returns the model.",
    )
    weights: str | None = Field(
        "DEFAULT",
        description="torchvision: name of the weights enum's member. timm: pretrained tag, DEFAULT for its own. file: path or URI. "
        "package: `module:callable` that returns the path of a state dict, or a path or URI, or null if the model comes with its weights.",
    )
    args: tuple[Any, ...] = Field((), description="Arguments of a package's callable.")
    sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="Expected SHA-256 of the weights file in hexadecimal; any other content is refused.",
    )
    labels: str | tuple[str, ...] | None = Field(
        None,
        description="Class names: a list, a text file's path or URI (one a line), or `imagenet-1k`; null: from the weights, else none.",
    )
    transform: TransformConfig | None = Field(
        None, description="Null: what the weights bring, else ImageNet's usual 256, 224."
    )


class PredictorConfig(_Section):
    """A predictor class of one's own, used instead of `model`."""

    path: str = Field(
        description="`module:Class`, or a function; the module is looked for in the current directory, then among installed packages."
    )
    args: tuple[Any, ...] = Field((), description="Positional arguments of the constructor.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the constructor.")
    depends_on_batch: bool = Field(
        False,
        description="Whether rows depend on the other images of their batch on purpose, as batch statistics do. False: a few images are "
        "predicted alone, in a batch and in another order, and the job ends (exit code 2) where that changes their rows.",
    )

    @field_validator("path")
    @classmethod
    def _module_and_class(cls, value: str) -> str:
        module, _, name = value.partition(":")
        # A file in the current directory is the module of that name.
        value = f"{module.removesuffix('.py')}:{name}" if name and "/" not in module else value
        if not MODULE_PATH.match(value):
            raise ValueError(f"{value!r} is not of the form module:Class, {_as_module_path(value)}")
        return value


def _as_module_path(value: str) -> str:
    """What to write in place of a path to a class, as far as that is clear."""
    location, _, name = value.partition(":")
    folder, _, file = location.rpartition("/")
    if folder and file.endswith(".py") and name:
        return f"such as {file.removesuffix('.py')}:{name}, with PYTHONPATH={folder} before the command"
    if not name and "." in value and re.fullmatch(r"[\w.]+", value):
        return f"such as {':'.join(value.removesuffix('.py').rsplit('.', 1))}"
    return "such as my_module:MyPredictor"


class InferenceConfig(_Section):
    """The actor pool and what each actor does."""

    actors: PositiveInt = Field(4, description="Number of actors; each holds the model once.")
    gpus_per_actor: float = Field(1, ge=0, description="GPUs of one actor; 0.5 lets two share one, 0 runs on the CPU.")
    cpus_per_actor: float = Field(
        1, gt=0, description="CPUs of one actor; on the CPU also the number of threads of the network."
    )
    device: Literal["auto", "cpu"] = Field(
        "auto",
        description="Where the network runs; `auto` is the GPU if actors have one, and the job is refused where there is none; "
        "`cpu` leaves the actors' GPUs idle, to try a GPU job without any.",
    )
    batch_size: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Images in a forward pass; `auto`: 16 on a CPU, on a GPU what a doubling search finds, remembered in the job. "
        "A predictor class gets 32 at once, or this many; no batch has more than 256 MiB of pixels.",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Arithmetic of the network; `auto` is bfloat16 where the device is fast at it and at least 99.5 % of the labels of the "
        "job's first 512 images are the same, else float32.",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Use torch.compile, which takes up to a minute; `auto` tries it on long jobs and keeps what is faster.",
    )
    top_k: int = Field(5, ge=1, le=1000, description="Classes listed for each image, best first.")
    embedding_dtype: Literal["float16", "float32"] = Field("float32", description="Type of what `task: embed` writes.")

    @field_validator("gpus_per_actor")
    @classmethod
    def _whole_or_fraction(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(
                f"{value:g} is neither a fraction of one GPU nor a whole number of GPUs; Ray schedules only those"
            )
        return value


class PreprocessConfig(_Section):
    """From bytes to pixels."""

    cpus_per_task: float = Field(1, gt=0, description="CPUs of one fetch-and-decode task.")
    exact: bool = Field(
        False, description="Only decode and resize in ways that give bit for bit what the weights' own transform gives."
    )
    gpu_jpeg: bool = Field(
        False,
        description="Decode JPEG files on the actors' GPUs, for nodes with few CPU cores a GPU; other files, and what the GPU does "
        "not take, are decoded in the tasks as ever.",
    )
    damaged: Literal["error", "accept"] = Field(
        "error",
        description="`error`: damaged and truncated images become error rows. `accept`: those of JPEG and PNG of which a part can be "
        "decoded are predicted, and the column `damaged` of the predictions says what is wrong with them, null for whole images.",
    )
    exif_orientation: bool = Field(True, description="Turn images as their EXIF orientation says.")
    max_pixels: PositiveInt = Field(
        178956970, description="Images of more pixels (width times height) become error rows, before they are decoded."
    )
    decode_timeout_s: float = Field(
        120,
        gt=0,
        description="An image whose decoding takes more seconds of CPU time becomes an error row; a decoder that hangs without using "
        "the CPU ends after 10 times as many seconds.",
    )
    decode_memory_mib: PositiveInt = Field(
        4096,
        description="Memory for decoding one image alone, which is done where a task has died: images that need more become error rows.",
    )
    max_bytes: PositiveInt = Field(
        268435456, description="Files of more bytes become error rows, before they are read."
    )


class ErrorsConfig(_Section):
    """How many failed rows are too many."""

    max_count: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Stop when more rows than this have failed; null: no limit."
    )
    max_percent: Annotated[float, Field(ge=0, le=100)] | None = Field(
        5.0, description="Stop when more than this percentage of the rows has failed; null: no limit."
    )
    min_sample: PositiveInt = Field(1000, description="Rows to have seen before `max_percent` counts.")


class ReportConfig(_Section):
    """The report for people, `_report/report.html`."""

    enabled: bool = Field(
        True, description="Make the report when the job ends; `batch-inference report` makes it at any time."
    )
    thumbnails: int = Field(
        18,
        ge=0,
        le=60,
        description="Images shown from each end of the confidences, and of failed ones; they are read again. 0: no image is read.",
    )
    gpu_hour_price: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Price of one GPU for an hour, for the cost in the report; null: no cost is shown."
    )
    currency: str = Field(
        "USD", min_length=1, max_length=8, description="Currency of `gpu_hour_price`, as the report writes it."
    )


class PreflightConfig(_Section):
    """What is tried on one actor before all of them start."""

    enabled: bool = Field(
        False,
        description="Begin a job with a preflight, on one actor of its cluster: what fails there ends it (exit code 2) before the others "
        "load the model. A job that resumes goes without. `batch-inference preflight` does it at any time.",
    )
    samples: int = Field(
        64, ge=1, le=10_000, description="Images to fetch, decode and predict, spread over the inputs."
    )
    golden: str | None = Field(
        None,
        description="Manifest of images with the predictions that are expected, such as a file of an earlier output's `predictions/`; "
        "the first 64 lines are predicted and compared.",
    )
    golden_tolerance: float = Field(
        0.02, ge=0, description="How far numbers with fractions may be off; everything else has to be equal."
    )


class JobConfig(_Section):
    """Everything that one job is.

    >>> JobConfig(input={"uris": ["photos/"]}, output={"uri": "out/"}).inference.actors
    4
    """

    input: InputConfig = Field(default_factory=InputConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    predictor: PredictorConfig | None = Field(
        None, description='`"module:Class"`, or the same with arguments; null: the classifier of `model`.'
    )
    task: Literal["classify", "embed"] = Field(
        "classify",
        description="What `model` is for: `classify` writes the best classes, `embed` the features that its last layer classifies by.",
    )
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    preprocess: PreprocessConfig = Field(default_factory=PreprocessConfig)
    errors: ErrorsConfig = Field(default_factory=ErrorsConfig)
    preflight: PreflightConfig = Field(default_factory=PreflightConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)
    shard_size: int = Field(1000, ge=1, le=1_000_000, description="Inputs of one shard, which is committed as a whole.")

    @field_validator("predictor", mode="before")
    @classmethod
    def _predictor_from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _embeds_with_the_model(self) -> JobConfig:
        if self.task == "embed" and self.predictor is not None:
            raise ValueError(
                "task is embed, but a predictor is given; embeddings are made with model: remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _one_store_for_the_endpoint(self) -> JobConfig:
        given = (*self.input.uris, self.input.manifest or "", self.output.uri)
        schemes = sorted({m["scheme"] for uri in given if (m := _REMOTE.match(uri))})
        if self.storage.endpoint_url and len(schemes) > 1:
            names = " and ".join(f"{scheme}://" for scheme in schemes)
            raise ValueError(
                f"storage.endpoint_url is one store's, but the job names {names}: remove it, and set AWS_ENDPOINT_URL, "
                "GOOGLE_BASE_URL or AZURE_STORAGE_ENDPOINT in the environment for the store that is not the provider's own"
            )
        return self

    @model_validator(mode="after")
    def _jpeg_on_gpus(self) -> JobConfig:
        if self.preprocess.gpu_jpeg:
            problems = [
                problem
                for problem, there in (
                    ("a predictor takes images at their own size: decode them in the predictor", self.predictor),
                    ("preprocess.exact asks for the bits of another decoder", self.preprocess.exact),
                    ("inference.gpus_per_actor is 0, so there is no GPU to do it", self.inference.gpus_per_actor == 0),
                )
                if there
            ]
            if problems:
                raise ValueError(f"preprocess.gpu_jpeg is true, but {'; and '.join(problems)}; set it to false")
        return self

    def to_yaml(self) -> str:
        """The configuration as YAML that :func:`load_config` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(
    source: str | dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    settings: tuple[str, ...] | list[str] = (),
) -> JobConfig:
    """Reads a YAML file and lays overrides over it.

    Args:
        source: YAML file, or ``env:NAME`` for the text of an environment variable, or what was read from one, or None to start
            from the defaults.
        overrides: Nested dictionary that wins over the file; None values are skipped.
        settings: ``a.b=c`` texts that win over both; the value is read as YAML.

    Raises:
        UserError: All problems at once, each with the key, the value and what is allowed.
    """
    data = read_yaml(source) if isinstance(source, str) else copy.deepcopy(source or {})
    _merge(data, overrides or {})
    for setting in settings:
        _apply_setting(data, setting)
    return parse_config(data)


def parse_config(data: dict[str, Any]) -> JobConfig:
    """Validates a nested dictionary.

    Raises:
        UserError: All problems at once.
    """
    try:
        return JobConfig.model_validate(data)
    except ValidationError as exc:
        lines = [_explain(error) for error in exc.errors()]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in the configuration"
        raise UserError(
            "\n  - ".join([count + ":", *lines]), "Mend the keys named; `batch-inference schema` lists all of them."
        ) from None


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of the configuration; ``job`` in the chart's values has the same."""
    schema = JobConfig.model_json_schema()
    # The shorthand `predictor: module:Class` is accepted before validation, so pydantic does not know of it.
    predictor = schema["properties"]["predictor"]
    predictor["anyOf"].insert(0, {"type": "string", "pattern": MODULE_PATH.pattern})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def read_yaml(path: str, option: str = "--config", first: str = "input:") -> dict[str, Any]:
    """Reads a YAML file of keys and values.

    Args:
        path: The file, or ``env:NAME``.
        option: How its name was given, for messages.
        first: A key that such a file has, for messages.

    Raises:
        UserError: If it can't be read, or is something else.
    """
    try:
        data = yaml.safe_load(_read_text(path))
    except FileNotFoundError:
        raise UserError(f"no configuration file at {path}", f"Check the path given with {option}.") from None
    except (OSError, UnicodeDecodeError) as exc:
        raise UserError(f"cannot read {path}: {exc}", f"Give a readable UTF-8 text file with {option}.") from None
    except yaml.YAMLError as exc:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(exc).split())}", "Mend the line named.") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not keys and values", f"Start it with `{first}`.")
    return data


def _read_text(path: str) -> str:
    if not path.startswith("env:"):
        return Path(path).read_text(encoding="utf-8")
    name = path.removeprefix("env:")
    if name not in os.environ:
        raise UserError(
            f"there is no environment variable {name}", "Set it to the YAML text, or give a file with --config."
        )
    return os.environ[name]


def _merge(base: dict[str, Any], top: dict[str, Any]) -> None:
    for key, value in top.items():
        if isinstance(value, dict):
            below = base.get(key)
            if below is None:
                below = {}
                _merge(below, value)
                if below:
                    base[key] = below
            elif isinstance(below, dict):
                _merge(below, value)
            # Anything else in the file is a mistake that the validation names.
        elif value is not None:
            base[key] = value


def _apply_setting(data: dict[str, Any], setting: str) -> None:
    key, sign, text = setting.partition("=")
    if not sign or not key:
        raise UserError(f"--set {setting} is not of the form key=value", "Write it like --set inference.actors=2.")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    target = data
    *parents, last = key.split(".")
    for parent in parents:
        below = target.get(parent)
        if isinstance(below, str) and key.startswith("predictor."):
            below = {"path": below}
        if not isinstance(below, dict):
            below = {}
        target[parent] = below
        target = below
    target[last] = value


def _explain(error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path) or "the file"
    if error["type"] == "extra_forbidden":
        known = _keys_at(path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{key}: there is no such key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    short = isinstance(value, (str, int, float, bool, list)) and len(repr(value)) < 80
    shown = f" (given: {value!r})" if short and _CREDENTIALS not in message else ""
    return f"{key}: {message[0].lower() + message[1:]}{shown}"


def _keys_at(path: list[str]) -> list[str]:
    model: Any = JobConfig
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return list(getattr(model, "model_fields", {}))
