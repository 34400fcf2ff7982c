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

#: Keys of earlier versions, with the names that they have now.
RENAMED_KEYS = {
    "input.bytes_column": "input.image_column",
    "preprocess.exact": "preprocess.decoder",
    "preprocess.gpu_jpeg": "preprocess.decoder",
    "errors.min_sample": "errors.min_rows",
    "preflight.golden": "preflight.golden_manifest",
}
# Keys of earlier versions that were true or false: the decoder that true meant.
_DECODERS = {"exact": "exact", "gpu_jpeg": "gpu"}

_CREDENTIALS = "the URL has credentials in it"
# The chart reads the port from it as well, so that there is no query and no escape.
_PORT = r"[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
_REMOTE = re.compile(r"(?P<scheme>s3|gs|az)://")
_ENDPOINT = re.compile(rf"^https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:({_PORT}))?(/[A-Za-z0-9._~/@:+=,-]*)?$")

PositiveInt = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class InputConfig(_Section):
    """The images: folders, globs and single objects, or a manifest that lists them."""

    uris: tuple[Annotated[str, WithJsonSchema({"type": "string", "pattern": r"\S"})], ...] = Field(
        (),
        description="Folders, globs (`*`, `**`, `?`), single images, tar files of images (`.tar`, also in folders) or Parquet files "
        "of images (if named, or with `image_column`); local paths, `s3://`, `gs://`, `az://`.",
    )
    manifest: str | None = Field(
        None,
        description="A list of images instead of `uris`: Parquet, CSV, JSON Lines or text (one URI a line), a file or a folder of Parquet.",
    )
    uri_column: str = Field(
        "uri",
        min_length=1,
        description="Column of the manifest that holds the URI; the other columns pass through to the output.",
    )
    allowed_prefixes: tuple[str, ...] | None = Field(
        None,
        description="Locations that a manifest may reference: folders, objects, or whole schemes (`s3://`); other lines become failed "
        "rows, NOT_ALLOWED. Null: any location, but no local files if the manifest is on an object store.",
    )
    image_column: str | None = Field(
        None,
        min_length=1,
        description="Column of Parquet files in `uris` that holds encoded images: bytes, or a struct with `bytes`. "
        "Null: the only such column, and Parquet files in folders are left out.",
    )
    passthrough_columns: tuple[str, ...] = Field(
        (),
        description="Columns of Parquet files in `uris` that pass through to the output; read when the job is planned.",
    )
    extensions: tuple[str, ...] = Field(
        DEFAULT_EXTENSIONS,
        description="File name endings that count as images in folders and tar files; case does not matter. Empty: every file.",
    )
    recursive: bool = Field(True, description="Descend into sub-folders.")
    limit: PositiveInt | None = Field(None, description="Use only the first N inputs; null: all.")
    sample: PositiveInt | None = Field(
        None, description="Use only N inputs, chosen at random and kept in order; null: all. Applied before `limit`."
    )
    sample_seed: int = Field(0, ge=0, description="Seed of the sample; the same seed and inputs give the same sample.")

    @field_validator("uris")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        # A shell variable that is not set would mean the current directory with all its files.
        if not all(uri.strip() for uri in value):
            raise ValueError(
                "an input is empty, as from a shell variable that is not set; for the current directory write ."
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
    """The output folder."""

    uri: str = Field("", description="Output folder, one for each job: local path, `s3://`, `gs://`, `az://`.")
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = Field("zstd", description="Parquet compression.")


class StorageConfig(_Section):
    """Access to object stores. Credentials come from the environment, never from here."""

    endpoint_url: Annotated[str, WithJsonSchema({"type": "string", "pattern": _ENDPOINT.pattern})] | None = Field(
        None,
        description="URL of a store that is not the provider's own, such as `https://minio.example:9000`, for all buckets of the "
        "job. Null: from the environment (`AWS_ENDPOINT_URL`, `GOOGLE_BASE_URL`, `AZURE_STORAGE_ENDPOINT`), or the provider's.",
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
    timeout_s: float = Field(60.0, gt=0, description="Timeout of one request, in seconds.")
    max_retries: int = Field(
        5,
        ge=0,
        le=100,
        description="Retries of a request that failed in transit or with 5xx, with exponential backoff and jitter.",
    )
    retry_timeout_s: float = Field(
        120.0,
        gt=0,
        description="Timeout of a request with all its retries, in seconds; if the store asks to slow down (503, 429), the request is "
        "retried until then.",
    )
    fetch_concurrency: int = Field(
        16,
        ge=1,
        le=1024,
        description="Maximum of concurrent requests of one task; fewer while the store asks to slow down.",
    )


class TransformConfig(_Section):
    """Resizing, cropping and normalization; needed only if the weights do not bring their own."""

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
    """The network and its weights."""

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
        description="torchvision: member of the weights enum. timm: pretrained tag, DEFAULT for timm's own. file: path or URI. "
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
        None, description="Null: the transform that comes with the weights, else ImageNet's usual 256, 224."
    )


class PredictorConfig(_Section):
    """Your own predictor class, used instead of `model`."""

    path: str = Field(
        description="`module:Class`, or a function; the module is searched in the current directory, then among installed packages."
    )
    args: tuple[Any, ...] = Field((), description="Positional arguments of the constructor.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the constructor.")
    depends_on_batch: bool = Field(
        False,
        description="Whether rows depend on the other images of their batch on purpose, as batch statistics do. False: a few images are "
        "predicted alone, in a batch and in another order, and the job ends (exit code 2) if that changes their rows.",
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
    """Return what to write in place of a path to a class, as far as that is clear."""
    location, _, name = value.partition(":")
    folder, _, file = location.rpartition("/")
    if folder and file.endswith(".py") and name:
        return f"such as {file.removesuffix('.py')}:{name}, with PYTHONPATH={folder} before the command"
    if not name and "." in value and re.fullmatch(r"[\w.]+", value):
        return f"such as {':'.join(value.removesuffix('.py').rsplit('.', 1))}"
    return "such as my_module:MyPredictor"


class InferenceConfig(_Section):
    """The actor pool, and how an actor predicts."""

    actors: PositiveInt = Field(4, description="Number of actors; each holds the model once.")
    gpus_per_actor: float = Field(1, ge=0, description="GPUs of one actor; 0.5 lets two share one, 0 runs on the CPU.")
    cpus_per_actor: float = Field(
        1, gt=0, description="CPUs of one actor; on the CPU also the number of threads of the network."
    )
    device: Literal["auto", "cpu"] = Field(
        "auto",
        description="Device of the network; `auto` is the GPU if actors have one, and the job is refused if the node has none; "
        "`cpu` leaves the actors' GPUs idle, to try a GPU job on nodes without GPUs.",
    )
    batch_size: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Images in a forward pass; `auto`: 16 on a CPU, on a GPU the result of a doubling search, recorded in the output. "
        "A predictor class gets 32 images at once, or this many. No batch has more than 256 MiB of pixels.",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Arithmetic of the network; `auto` is bfloat16 if the device is fast at it and at least 99.5 % of the labels of the "
        "job's first 512 images are the same, else float32.",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Use torch.compile, which takes up to a minute; `auto` tries it on long jobs and keeps the faster of both.",
    )
    top_k: int = Field(5, ge=1, le=1000, description="Number of classes listed for each image, best first.")
    embedding_dtype: Literal["float16", "float32"] = Field(
        "float32", description="Type of the values that `task: embed` writes."
    )

    @field_validator("gpus_per_actor")
    @classmethod
    def _whole_or_fraction(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(
                f"{value:g} is neither a fraction of one GPU nor a whole number of GPUs; Ray schedules only those"
            )
        return value


class PreprocessConfig(_Section):
    """Decoding, and limits on images."""

    cpus_per_task: float = Field(1, gt=0, description="CPUs of one fetch-and-decode task.")
    decoder: Literal["fast", "exact", "gpu"] = Field(
        "fast",
        description="`fast`: pixels may differ from those of the weights' own transform by rounding and scaled decoding. `exact`: they "
        "are the same bit for bit. `gpu`: JPEG files are decoded on the actors' GPUs, for nodes with few CPU cores a GPU; "
        "other files, and what the GPU does not take, are decoded in the tasks as with `fast`.",
    )
    damaged: Literal["error", "accept"] = Field(
        "error",
        description="`error`: damaged and truncated images become error rows. `accept`: damaged JPEG and PNG files that can be decoded "
        "in part are predicted, and the column `damaged` of the predictions says what is wrong with them, null for intact images.",
    )
    exif_orientation: bool = Field(True, description="Turn images as their EXIF orientation says.")
    max_pixels: PositiveInt = Field(
        178956970, description="Images with more pixels (width times height) become error rows before they are decoded."
    )
    decode_timeout_s: float = Field(
        120,
        gt=0,
        description="An image whose decoding takes more seconds of CPU time becomes an error row; a decoder that hangs without using "
        "the CPU is ended after 10 times as many seconds.",
    )
    decode_memory_mib: PositiveInt = Field(
        4096,
        description="Memory for decoding one image alone, as is done after a task has died; images that need more become error rows.",
    )
    max_bytes: PositiveInt = Field(
        268435456, description="Files with more bytes become error rows before they are read."
    )


class ErrorsConfig(_Section):
    """Limits on failed rows."""

    max_count: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Stop when more rows than this have failed; null: no limit."
    )
    max_percent: Annotated[float, Field(ge=0, le=100)] | None = Field(
        5.0, description="Stop when more than this percentage of the rows has failed; null: no limit."
    )
    min_rows: PositiveInt = Field(1000, description="`max_percent` is enforced once this many rows are done.")


class ReportConfig(_Section):
    """The report for people, `_report/report.html`."""

    enabled: bool = Field(
        True, description="Write the report when the job ends; `batch-inference report` writes it at any time."
    )
    thumbnails: int = Field(
        18,
        ge=0,
        le=60,
        description="Images shown of the most confident, the least confident and the failed; they are read again. 0: no image is read.",
    )
    gpu_hour_price: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Price of one GPU for an hour, for the cost in the report; null: no cost is shown."
    )
    currency: str = Field(
        "USD", min_length=1, max_length=8, description="Currency of `gpu_hour_price`, as the report writes it."
    )


class PreflightConfig(_Section):
    """A trial of the job on one actor, before the others start."""

    enabled: bool = Field(
        False,
        description="Begin the job with a preflight on one actor of its cluster: a failed check ends the job (exit code 2) before the "
        "other actors load the model. A job that resumes has none. `batch-inference preflight` does one at any time.",
    )
    samples: int = Field(
        64, ge=1, le=10_000, description="Images to fetch, decode and predict, spread evenly over the inputs."
    )
    golden_manifest: str | None = Field(
        None,
        description="Manifest of images with their expected predictions, such as a file of an earlier output's `predictions/`; the "
        "first 64 lines are predicted and compared.",
    )
    golden_tolerance: float = Field(
        0.02, ge=0, description="Absolute tolerance for floating-point columns; all other columns must match exactly."
    )


class JobConfig(_Section):
    """The whole configuration of a job.

    >>> JobConfig(input={"uris": ["photos/"]}, output={"uri": "out/"}).inference.actors
    4
    """

    input: InputConfig = Field(default_factory=InputConfig)
    output: OutputConfig = Field(default_factory=OutputConfig)
    storage: StorageConfig = Field(default_factory=StorageConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    predictor: PredictorConfig | None = Field(
        None, description='`"module:Class"`, or an object with its arguments; null: the classifier of `model`.'
    )
    task: Literal["classify", "embed"] = Field(
        "classify",
        description="`classify` writes the best classes of `model`, `embed` the features that its last layer classifies.",
    )
    inference: InferenceConfig = Field(default_factory=InferenceConfig)
    preprocess: PreprocessConfig = Field(default_factory=PreprocessConfig)
    errors: ErrorsConfig = Field(default_factory=ErrorsConfig)
    preflight: PreflightConfig = Field(default_factory=PreflightConfig)
    report: ReportConfig = Field(default_factory=ReportConfig)
    shard_size: int = Field(1000, ge=1, le=1_000_000, description="Inputs in a shard, which is committed as a whole.")

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
        if self.preprocess.decoder == "gpu":
            problems = [
                problem
                for problem, there in (
                    ("a predictor takes images at their own size: decode them in the predictor", self.predictor),
                    ("inference.gpus_per_actor is 0, so there is no GPU to do it", self.inference.gpus_per_actor == 0),
                )
                if there
            ]
            if problems:
                raise ValueError(f"preprocess.decoder is gpu, but {'; and '.join(problems)}; set it to fast")
        return self

    def to_yaml(self) -> str:
        """Return the configuration as YAML, which :func:`load_config` reads back to an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(
    source: str | dict[str, Any] | None = None,
    overrides: dict[str, Any] | None = None,
    settings: tuple[str, ...] | list[str] = (),
) -> JobConfig:
    """Read a YAML file and lay overrides over it.

    Args:
        source: YAML file, ``env:NAME`` for the text of an environment variable, or a dictionary read from one; None starts
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
    """Validate a nested dictionary.

    Raises:
        UserError: All problems at once.
    """
    try:
        return JobConfig.model_validate(data)
    except ValidationError as exc:
        lines = [_explain(error, data) for error in exc.errors()]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in the configuration"
        raise UserError(
            "\n  - ".join([count + ":", *lines]), "Fix the keys named; `batch-inference schema` lists all keys."
        ) from None


def with_new_names(stored: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that an earlier version wrote, with the keys renamed since.

    >>> with_new_names({"errors": {"min_sample": 7}, "preprocess": {"exact": True, "gpu_jpeg": False}})
    {'errors': {'min_rows': 7}, 'preprocess': {'decoder': 'exact'}}
    """
    config = copy.deepcopy(stored)
    for old, new in RENAMED_KEYS.items():
        section, _, key = old.partition(".")
        if key in config.get(section, {}):
            decoder = (_decoders(stored[section]) or ["fast"])[0]
            value = config[section].pop(key)
            config[section][new.partition(".")[2]] = decoder if key in _DECODERS else value
    return config


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the configuration, which ``job`` in the chart's values has as well."""
    schema = JobConfig.model_json_schema()
    # The shorthand `predictor: module:Class` is accepted before validation, so that pydantic's schema does not have it.
    predictor = schema["properties"]["predictor"]
    predictor["anyOf"].insert(0, {"type": "string", "pattern": MODULE_PATH.pattern})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def read_yaml(path: str, option: str = "--config", first: str = "input:") -> dict[str, Any]:
    """Read a YAML file of keys and values.

    Args:
        path: The file, or ``env:NAME``.
        option: Option that named the file, for messages.
        first: A key of such a file, for messages.

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
        raise UserError(f"{path} is not valid YAML: {' '.join(str(exc).split())}", "Fix the line named.") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}, not keys and values", f"Begin it with `{first}`.")
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
            # Anything else in the file is a mistake; validation names it.
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


def _explain(error: Any, data: dict[str, Any]) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path) or "the file"
    if error["type"] == "extra_forbidden":
        if key in RENAMED_KEYS:
            return f"{key}: {_new_name(key, data)}"
        known = _keys_at(path[:-1])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{key}: there is no such key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    short = isinstance(value, (str, int, float, bool, list)) and len(repr(value)) < 80
    shown = f" (given: {value!r})" if short and _CREDENTIALS not in message else ""
    return f"{key}: {message[0].lower() + message[1:]}{shown}"


def _new_name(key: str, data: dict[str, Any]) -> str:
    """Return what to write in place of a key of an earlier version."""
    section, _, name = key.partition(".")
    new = RENAMED_KEYS[key]
    if new.partition(".")[2] in data[section]:
        return f"this key is now {new}, which is given too; remove {key}"
    values = [data[section][name]]
    if name in _DECODERS:
        values = _decoders(data[section]) or ["fast"]
    return f"this key has a new name; write {' or '.join(f'{new}: {_yaml(value)}' for value in values)}"


def _decoders(section: dict[str, Any]) -> list[str]:
    """Return the decoders that the keys of earlier versions ask for; the default is none of them."""
    return [
        decoder for key, decoder in _DECODERS.items() if str(section.get(key)).lower() in ("true", "yes", "on", "1")
    ]


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n").strip()


def _keys_at(path: list[str]) -> list[str]:
    model: Any = JobConfig
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return list(getattr(model, "model_fields", {}))
