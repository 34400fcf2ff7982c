"""The engine that makes a job's rows: a model or a predictor class, with its parts of the fingerprint."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from batch_inference.config import JobConfig, PredictorConfig
from batch_inference.errors import UserError
from batch_inference.images.transform import Transform
from batch_inference.storage.uris import canonical_uri
from batch_inference.telemetry.tracebacks import (
    PREDICTOR_EXCEPTIONS,
    describe_exception,
    format_traceback,
    with_traceback,
)


@dataclass(frozen=True)
class Engine:
    """The model or predictor class that the actors run.

    Attributes:
        factory: Makes the predict function in an actor.
        transform: Resize and crop before the actor; None for predictor classes, which get images at their own size.
        fingerprint_parts: Parts of the job's fingerprint that say exactly which model or class this is.
        custom: Whether its columns are wide or unknown (predictor classes, embeddings), so that writer actors take them.
        decoder: Makes the decoder of an actor; None if the tasks decode everything.
    """

    factory: Any
    transform: Transform | None
    fingerprint_parts: dict[str, str]
    custom: bool
    decoder: Any = None

    def with_passthrough(self, columns: Iterable[str]) -> Engine:
        """Return the engine for an output that also has these columns of the input."""
        return (
            replace(self, factory=replace(self.factory, passthrough=tuple(columns))) if self.transform is None else self
        )

    def for_images(self, images: int) -> Engine:
        """Return the engine for about this many images on each actor; some optimizations only pay on long jobs."""
        return replace(self, factory=replace(self.factory, images=images)) if self.transform is not None else self


def without_output(engine: Engine, config: JobConfig) -> Engine:
    """Return the engine with actors that neither read nor write an output's decisions.

    A job's decisions hold for all of its rows, so a trial must not make any.
    """
    if engine.transform is None:
        return engine
    detached = config.model_copy(update={"output": config.output.model_copy(update={"uri": ""})})
    return replace(engine, factory=replace(engine.factory, config=detached))


def resolve_engine(config: JobConfig) -> Engine:
    """Find the model or predictor class and check all that can be checked without loading it.

    Raises:
        UserError: If it does not exist.
    """
    from batch_inference.pipeline.factories import ClassifierFactory, CustomFactory, EmbedderFactory

    if config.predictor is not None:
        cls = _load_class(config.predictor)
        parts = {"predictor.path": config.predictor.path, **_source_digest(cls)}
        if config.predictor.args:
            parts["predictor.args"] = repr(config.predictor.args)
        if config.predictor.kwargs:
            parts["predictor.kwargs"] = repr(sorted(config.predictor.kwargs.items()))
        return Engine(CustomFactory(cls, config.predictor), None, parts, True)
    from batch_inference.models.info import describe_model

    info = describe_model(config.model, config.storage)
    decoder = None
    if config.preprocess.decoder == "gpu":
        from batch_inference.pipeline.gpu_jpeg import GpuJpegFactory

        decoder = GpuJpegFactory(config.inference, config.preprocess, info.transform)
    if config.model.source == "file":
        # An absolute path, since an actor has another current directory.
        model = config.model.model_copy(update={"weights": canonical_uri(str(config.model.weights))})
        config = config.model_copy(update={"model": model})
    parts = {f"model.{key.removeprefix('model.')}": value for key, value in info.identity.items()}
    parts |= {f"transform.{key}": str(value) for key, value in asdict(info.transform).items()}
    parts["inference.precision"] = config.inference.precision
    if config.task == "embed":
        parts |= {"task": "embed", "inference.embedding_dtype": config.inference.embedding_dtype}
        return Engine(EmbedderFactory(config, info.transform), info.transform, parts, True, decoder)
    parts["inference.top_k"] = str(config.inference.top_k)
    labels = hashlib.sha256("\n".join(info.labels or ()).encode()).hexdigest()[:16] if info.labels else "none"
    parts["model.labels"] = labels
    factory = ClassifierFactory(config, info.transform, info.labels)
    return Engine(factory, info.transform, parts, False, decoder)


def _load_class(spec: PredictorConfig) -> Any:
    """Import the class or function of ``predictor.path``.

    Raises:
        UserError: If there is no such class, or its module fails.
    """
    module_name, _, attribute = spec.path.partition(":")
    module = _import_module(spec.path, module_name)
    predictor: Any = module
    for part in attribute.split("."):
        predictor = getattr(predictor, part, None)
        if predictor is None:
            names = [n for n, v in vars(module).items() if inspect.isclass(v) and v.__module__ == module.__name__]
            raise UserError(
                f"predictor {spec.path}: {module_name} has no {attribute!r}; its classes: {', '.join(names) or 'none'}",
                "Name one of them after the colon.",
            )
    if inspect.isclass(predictor) and not _has_call(predictor):
        from batch_inference.pipeline.factories import not_callable_error

        raise not_callable_error(spec.path, predictor)
    if inspect.ismodule(predictor) or not callable(predictor):
        raise UserError(
            f"predictor {spec.path} is one {type(predictor).__name__}, neither a class nor a function",
            "Name one of these after the colon.",
        )
    if not _is_installed(module):
        # Workers on other machines do not have the file, so the class is pickled with its code.
        import ray.cloudpickle as cloudpickle

        cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    return predictor


def _import_module(path: str, module_name: str) -> ModuleType:
    """Import the module of a predictor, which may lie in the current directory.

    Args:
        path: ``predictor.path``, for messages.
        module_name: Its part before the colon.

    Raises:
        UserError: If there is no such module, or it fails.
    """
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        missing = exc.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise UserError(
                f"predictor {path}: there is no module {missing!r}",
                f"Put {module_name}.py into {folder}, or install the package it is in.",
            ) from None
        raise UserError(
            with_traceback(
                f"predictor {path}: {module_name} imports {missing!r}, which is not installed",
                format_traceback(exc),
            ),
            f"Install the package that has {missing.split('.')[0]}, such as by `pip install {missing.split('.')[0]}`, or put "
            f"{missing.split('.')[0]}.py into {folder}.",
        ) from None
    except PREDICTOR_EXCEPTIONS as exc:
        # SystemExit too: a module that calls sys.exit, such as a script that parses arguments, must not end this program silently.
        raise UserError(
            with_traceback(
                f"predictor {path}: importing {module_name} failed: {describe_exception(exc)}",
                format_traceback(exc),
            ),
            'Put what the module does as a script below `if __name__ == "__main__":`.'
            if isinstance(exc, SystemExit)
            else "Fix the module.",
        ) from None


def _has_call(cls: type) -> bool:
    """Return whether instances may be callable: with ``__new__`` or ``__getattr__`` a class may make anything."""
    return any({"__call__", "__getattr__"} & vars(base).keys() for base in cls.__mro__) or "__new__" in vars(cls)


def _is_installed(module: Any) -> bool:
    file = getattr(module, "__file__", None)
    return file is None or any(part in ("site-packages", "dist-packages") for part in Path(file).parts)


def _source_digest(cls: Any) -> dict[str, str]:
    """Return the digest of the file that defines the predictor, as a part of the fingerprint: a changed predictor is another job."""
    try:
        file = inspect.getsourcefile(cls)
        return {"predictor.sha256": hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()} if file else {}
    except (TypeError, OSError):
        return {}
