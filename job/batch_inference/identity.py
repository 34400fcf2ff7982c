"""What makes a job's rows comparable, and the engine that makes them: the parts of the fingerprint."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import itertools
import re
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from batch_inference import manifest
from batch_inference.config import JobConfig, PredictorConfig
from batch_inference.decoding import EXACT_PATH, FAST_PATH, GPU_PATH
from batch_inference.errors import UserError
from batch_inference.ledger import Job
from batch_inference.storage import Store, canonical_uri, display, is_local, local_path
from batch_inference.tracebacks import FAULTS, named, told, with_place
from batch_inference.transform import Transform
from batch_inference.wording import describe_skipped

_OUTPUT_SCHEMA = "1"


@dataclass(frozen=True)
class Engine:
    """What the actors run.

    Attributes:
        factory: Makes the predict function in an actor.
        transform: Resize and crop before the actor; None for custom predictors, which get images as they are.
        identity: Flat texts that say exactly what this is.
        custom: Whether its columns are wide or unknown, so that writer actors take them: predictors of the user's, embeddings.
        decoder: Makes what decodes in an actor; None where the tasks decode everything.
    """

    factory: Any
    transform: Transform | None
    identity: dict[str, str]
    custom: bool
    decoder: Any = None

    def beside(self, columns: Iterable[str]) -> Engine:
        """Return the same engine, told which columns of the input the output has beside its own."""
        return (
            replace(self, factory=replace(self.factory, passthrough=tuple(columns))) if self.transform is None else self
        )

    def for_images(self, images: int) -> Engine:
        """The same, told about how many images each actor will get; what pays on long jobs only depends on it."""
        return replace(self, factory=replace(self.factory, images=images)) if self.transform is not None else self


def without_output(engine: Engine, config: JobConfig) -> Engine:
    """The same, whose actors keep what they decide to themselves: a job's are the same for all of its rows, and so are its own."""
    if engine.transform is None:
        return engine
    alone = config.model_copy(update={"output": config.output.model_copy(update={"uri": ""})})
    return replace(engine, factory=replace(engine.factory, config=alone))


def resolve_engine(config: JobConfig) -> Engine:
    """Finds model or predictor and checks all that can be checked without loading it.

    Raises:
        UserError: If it does not exist.
    """
    from batch_inference.factories import ClassifierFactory, CustomFactory, EmbedderFactory

    if config.predictor is not None:
        cls = _load_class(config.predictor)
        identity = {"predictor.path": config.predictor.path, **_source_digest(cls)}
        if config.predictor.args:
            identity["predictor.args"] = repr(config.predictor.args)
        if config.predictor.kwargs:
            identity["predictor.kwargs"] = repr(sorted(config.predictor.kwargs.items()))
        return Engine(CustomFactory(cls, config.predictor), None, identity, True)
    from batch_inference.models import describe_model

    info = describe_model(config.model, config.storage)
    decoder = None
    if config.preprocess.gpu_jpeg:
        from batch_inference.gpu_jpeg import GpuJpegFactory

        decoder = GpuJpegFactory(config.inference, config.preprocess, info.transform)
    if config.model.source == "file":
        # An actor has a current directory of its own.
        model = config.model.model_copy(update={"weights": canonical_uri(str(config.model.weights))})
        config = config.model_copy(update={"model": model})
    identity = {f"model.{key.removeprefix('model.')}": value for key, value in info.identity.items()}
    identity |= {f"transform.{key}": str(value) for key, value in asdict(info.transform).items()}
    identity["inference.precision"] = config.inference.precision
    if config.task == "embed":
        identity |= {"task": "embed", "inference.embedding_dtype": config.inference.embedding_dtype}
        return Engine(EmbedderFactory(config, info.transform), info.transform, identity, True, decoder)
    identity["inference.top_k"] = str(config.inference.top_k)
    labels = hashlib.sha256("\n".join(info.labels or ()).encode()).hexdigest()[:16] if info.labels else "none"
    identity["model.labels"] = labels
    factory = ClassifierFactory(config, info.transform, info.labels)
    return Engine(factory, info.transform, identity, False, decoder)


def job_identity(config: JobConfig, engine: Engine, manifest_source: str) -> dict[str, str]:
    """All parts of the fingerprint but the manifest's digest, which is known once it is written.

    Args:
        config: The configuration.
        engine: Model or predictor.
        manifest_source: Digest of the manifest file the inputs come from, "" if they are listed.
    """
    section, pre = config.input, config.preprocess
    identity = {
        "output.schema": _OUTPUT_SCHEMA,
        "shard_size": str(config.shard_size),
        "input.limit": str(section.limit),
        "preprocess.exact": str(pre.exact),
        "preprocess.pixels": EXACT_PATH if pre.exact else GPU_PATH if pre.gpu_jpeg else FAST_PATH,
        "preprocess.damaged": pre.damaged,
        "preprocess.exif_orientation": str(pre.exif_orientation),
        "preprocess.max_pixels": str(pre.max_pixels),
        "preprocess.max_bytes": str(pre.max_bytes),
    }
    if section.sample is not None:
        identity["input.sample"] = f"{section.sample} by seed {section.sample_seed}"
    if section.manifest:
        identity["input.manifest"] = canonical_uri(section.manifest)
        identity["input.uri_column"] = section.uri_column
        identity["input.manifest_sha256"] = manifest_source
        if section.allowed_prefixes is not None:
            identity["input.allowed_prefixes"] = " ".join(section.allowed_prefixes)
    else:
        identity["input.uris"] = ", ".join(sorted(canonical_uri(u) for u in section.uris))
        identity["input.extensions"] = " ".join(sorted(section.extensions))
        identity["input.recursive"] = str(section.recursive)
        if section.passthrough_columns:
            identity["input.passthrough_columns"] = ", ".join(section.passthrough_columns)
    if section.bytes_column:
        identity["input.bytes_column"] = section.bytes_column
    return {**identity, **engine.identity}


def versions() -> dict[str, str]:
    """Versions of what has a say in the result."""
    from batch_inference import __version__

    out = {"batch-inference": __version__, "python": sys.version.split()[0]}
    for package in ("ray", "torch", "torchvision", "pillow", "pyarrow", "timm"):
        try:
            out[package] = version(package)
        except PackageNotFoundError:
            continue
    if cuda := _cuda():
        out["cuda"] = cuda
    return out


def _cuda() -> str | None:
    """The version of CUDA that torch was built for, without the seconds that importing torch takes."""
    spec = importlib.util.find_spec("torch")
    text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    found = re.search(r"^cuda\b.*= '([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else None


def _load_class(spec: PredictorConfig) -> Any:
    module_name, _, attribute = spec.path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        missing = exc.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise UserError(
                f"predictor {spec.path}: there is no module {missing!r}",
                f"Put {module_name}.py into {here}, or install the package it is in.",
            ) from None
        raise UserError(
            with_place(f"predictor {spec.path}: {module_name} imports {missing!r}, which is not installed", told(exc)),
            f"Install the package that has {missing.split('.')[0]}, such as by `pip install {missing.split('.')[0]}`, or put "
            f"{missing.split('.')[0]}.py into {here}.",
        ) from None
    except FAULTS as exc:
        # A module that calls sys.exit, such as a script that parses its arguments, would end this program without a word.
        raise UserError(
            with_place(f"predictor {spec.path}: importing {module_name} failed: {named(exc)}", told(exc)),
            'Put what the module does as a script below `if __name__ == "__main__":`.'
            if isinstance(exc, SystemExit)
            else "Fix the module.",
        ) from None
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
        if found is None:
            names = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__]
            raise UserError(
                f"predictor {spec.path}: {module_name} has no {attribute!r}; its classes: {', '.join(names) or 'none'}",
                "Name one of them after the colon.",
            )
    if inspect.isclass(found) and not _has_call(found):
        from batch_inference.factories import not_callable

        raise not_callable(spec.path, found)
    if inspect.ismodule(found) or not callable(found):
        raise UserError(
            f"predictor {spec.path} is one {type(found).__name__}, neither a class nor a function",
            "Name one of these after the colon.",
        )
    if not _is_installed(module):
        # Workers on other machines do not have the file, so the class travels whole.
        import ray.cloudpickle as cloudpickle

        cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    return found


def _has_call(cls: type) -> bool:
    """Whether instances can be called, as far as the class says; __new__ and __getattr__ may give anything."""
    return any({"__call__", "__getattr__"} & vars(one).keys() for one in cls.__mro__) or "__new__" in vars(cls)


def _is_installed(module: Any) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or any(part in ("site-packages", "dist-packages") for part in Path(file).parts)


def _source_digest(cls: Any) -> dict[str, str]:
    """Digest of the file that the predictor is defined in; a changed predictor is another job."""
    try:
        file = inspect.getsourcefile(cls)
        return {"predictor.sha256": hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()} if file else {}
    except (TypeError, OSError):
        return {}


def differences(config: JobConfig, engine: Engine, job: Job) -> list[str]:
    """Return what tells a configuration's job from the one in the output, one line for each key; empty if it is the same.

    Raises:
        UserError: If the manifest file can't be read any more.
    """
    source = ""
    if config.input.manifest:
        # A manifest that is gone or changed would be another job; the frozen copy is what a resume reads.
        source = manifest.source_digest(config)
    identity = job_identity(config, engine, source)
    frozen = {key: value for key, value in job.identity.items() if key != "manifest.sha256"}
    return [
        f"{key}: {_short(frozen.get(key))} there, {_short(identity.get(key))} now"
        for key in sorted(identity.keys() | frozen.keys())
        if identity.get(key) != frozen.get(key)
    ]


def check_same_job(config: JobConfig, engine: Engine, job: Job, store: Store) -> None:
    """Refuse to mix rows of different kinds in one output.

    Raises:
        UserError: With what differs, and the commands that lead on.
    """
    changed = differences(config, engine, job)
    if not changed:
        return
    raise UserError(
        f"{display(store.uri)} belongs to another job (fingerprint {job.fingerprint[:12]}); what differs:"
        + "".join(f"\n  - {line}" for line in changed),
        f"To start this job, {other_output(config)}. Or go back to the configuration that the output was made with.",
    )


def other_output(config: JobConfig) -> str:
    """Return what to type where an output is another job's: another output, or how to delete this one."""
    uri = canonical_uri(config.output.uri).rstrip("/")
    where = shlex.quote(display(uri))
    say = f"write --output {shlex.quote(display(_free(uri)))}"
    # A command that deletes the images as well is not one to print.
    if any((canonical_uri(given) + "/").startswith(uri + "/") for given in _inputs(config)):
        return say
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    delete = {
        "file": f"rm -r {where}",
        "s3": f"aws s3 rm --recursive {where}",
        "gs": f"gcloud storage rm --recursive {where}",
        "az": f"az storage blob delete-batch --source {shlex.quote(bucket)} --pattern {shlex.quote(key + '/*')}",
    }[scheme]
    return f"{say}, or delete the other job's rows with: {delete}"


def _inputs(config: JobConfig) -> list[str]:
    return [*config.input.uris, *([config.input.manifest] if config.input.manifest else [])]


def _free(uri: str) -> str:
    """A name for another output beside one."""
    names = (f"{uri}-{number}" for number in itertools.count(2))
    return next(name for name in names if not is_local(name) or not Path(local_path(name)).exists())


def _short(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) <= 60 else value[:57] + "..."


def check_columns(config: JobConfig, names: list[str]) -> None:
    """Refuses passthrough columns that the predictions have of their own, as far as these are known."""
    if config.preprocess.damaged == "accept" and "damaged" in names:
        raise UserError(
            "the manifest has a column 'damaged', which preprocess.damaged: accept adds to the predictions",
            "Rename it in the manifest, or set preprocess.damaged=error.",
        )
    if config.predictor is not None:
        return
    own = ("embedding",) if config.task == "embed" else ("predicted_class_idx", "label", "confidence", "top_k")
    clashes = [name for name in names if name in own]
    if clashes:
        raise UserError(
            f"the manifest has columns that the predictions have of their own: {', '.join(clashes)}",
            "Rename them in the manifest, for example to true_label.",
        )


def input_notes(job: Job) -> list[str]:
    """What a user should know about the inputs before the work begins."""
    notes = []
    if job.skipped:
        most = ", ".join(describe_skipped(job.skipped)[:5])
        notes.append(
            f"left out {sum(job.skipped.values()):,} files that are no images by their names or kinds: {most} (input.extensions)"
        )
    if job.duplicates:
        notes.append(f"{job.duplicates:,} inputs were listed more than once; each is done once")
    if job.repeated:
        notes.append(f"{job.repeated:,} manifest lines repeat a URI; each line gets a row of its own")
    return notes
