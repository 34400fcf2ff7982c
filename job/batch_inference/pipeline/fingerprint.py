"""The fingerprint of a job: the configuration, model and code that its rows belong to."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

from batch_inference.config import JobConfig
from batch_inference.errors import UserError
from batch_inference.images.pixels import EXACT_PATH, FAST_PATH, GPU_PATH
from batch_inference.inputs.manifest_files import manifest_digest
from batch_inference.output.records import JobRecord
from batch_inference.pipeline.engine import Engine
from batch_inference.storage.store import Store
from batch_inference.storage.uris import canonical_uri, display_uri, is_local, local_path
from batch_inference.text import describe_skipped

# Version of the columns that this program adds to every output.
_OUTPUT_SCHEMA = "1"


def fingerprint_parts(config: JobConfig, engine: Engine, manifest_source: str) -> dict[str, str]:
    """Return the parts of the fingerprint, except the frozen manifest's digest, which is known once that is written.

    Args:
        config: The configuration.
        engine: Model or predictor class.
        manifest_source: SHA-256 of the manifest file that names the inputs, "" if they are listed.
    """
    inputs, preprocess = config.input, config.preprocess
    parts = {
        "output.schema": _OUTPUT_SCHEMA,
        "shard_size": str(config.shard_size),
        "input.limit": str(inputs.limit),
        "preprocess.decoder": preprocess.decoder,
        "preprocess.pixels": {"fast": FAST_PATH, "exact": EXACT_PATH, "gpu": GPU_PATH}[preprocess.decoder],
        "preprocess.damaged": preprocess.damaged,
        "preprocess.exif_orientation": str(preprocess.exif_orientation),
        "preprocess.max_pixels": str(preprocess.max_pixels),
        "preprocess.max_bytes": str(preprocess.max_bytes),
    }
    if inputs.sample is not None:
        parts["input.sample"] = f"{inputs.sample} by seed {inputs.sample_seed}"
    if inputs.manifest:
        parts["input.manifest"] = canonical_uri(inputs.manifest)
        parts["input.uri_column"] = inputs.uri_column
        parts["input.manifest_sha256"] = manifest_source
        if inputs.allowed_prefixes is not None:
            parts["input.allowed_prefixes"] = " ".join(inputs.allowed_prefixes)
    else:
        parts["input.uris"] = ", ".join(sorted(canonical_uri(u) for u in inputs.uris))
        parts["input.extensions"] = " ".join(sorted(inputs.extensions))
        parts["input.recursive"] = str(inputs.recursive)
        if inputs.passthrough_columns:
            parts["input.passthrough_columns"] = ", ".join(inputs.passthrough_columns)
    if inputs.image_column:
        parts["input.image_column"] = inputs.image_column
    return {**parts, **engine.fingerprint_parts}


def differences(config: JobConfig, engine: Engine, job: JobRecord) -> list[str]:
    """Return the parts in which a configuration differs from the job in the output, one line for each; empty if none does.

    Raises:
        UserError: If the manifest file can't be read any more.
    """
    source = ""
    if config.input.manifest:
        # A resume reads the frozen copy of the manifest; a changed file would be another job.
        source = manifest_digest(config)
    parts = fingerprint_parts(config, engine, source)
    frozen = {key: value for key, value in job.identity.items() if key != "manifest.sha256"}
    return [
        f"{key}: {_short(frozen.get(key))} there, {_short(parts.get(key))} now"
        for key in sorted(parts.keys() | frozen.keys())
        if parts.get(key) != frozen.get(key)
    ]


def check_same_job(config: JobConfig, engine: Engine, job: JobRecord, store: Store) -> None:
    """Refuse to mix the rows of different jobs in one output.

    Raises:
        UserError: If the jobs differ; with the differences, and the commands to go on with.
    """
    changed = differences(config, engine, job)
    if not changed:
        return
    raise UserError(
        f"{display_uri(store.uri)} belongs to another job (fingerprint {job.fingerprint[:12]}); what differs:"
        + "".join(f"\n  - {line}" for line in changed),
        f"To start this job, {other_output(config)}. Or go back to the configuration that the output was made with.",
    )


def other_output(config: JobConfig) -> str:
    """Return the remedy for an output that is another job's: write to another output, or delete this one's rows."""
    uri = canonical_uri(config.output.uri).rstrip("/")
    target = shlex.quote(display_uri(uri))
    suggestion = f"write --output {shlex.quote(display_uri(_unused_name(uri)))}"
    # Never print a command that also deletes the images.
    if any((canonical_uri(input_uri) + "/").startswith(uri + "/") for input_uri in _input_uris(config)):
        return suggestion
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    delete = {
        "file": f"rm -r {target}",
        "s3": f"aws s3 rm --recursive {target}",
        "gs": f"gcloud storage rm --recursive {target}",
        "az": f"az storage blob delete-batch --source {shlex.quote(bucket)} --pattern {shlex.quote(key + '/*')}",
    }[scheme]
    return f"{suggestion}, or delete the other job's rows with: {delete}"


def _input_uris(config: JobConfig) -> list[str]:
    return [*config.input.uris, *([config.input.manifest] if config.input.manifest else [])]


def _unused_name(uri: str) -> str:
    """Return the first unused name of the form ``uri-2``, ``uri-3``, …; only local folders are checked."""
    names = (f"{uri}-{number}" for number in itertools.count(2))
    return next(name for name in names if not is_local(name) or not Path(local_path(name)).exists())


def _short(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) <= 60 else value[:57] + "..."


def check_columns(config: JobConfig, names: list[str]) -> None:
    """Refuse passthrough columns with the name of a column of the predictions, as far as these are known.

    Raises:
        UserError: If two columns have the same name.
    """
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


def input_notes(job: JobRecord) -> list[str]:
    """Return what a user should know about the inputs before the job starts."""
    notes = []
    if job.skipped:
        extensions = ", ".join(describe_skipped(job.skipped)[:5])
        notes.append(
            f"left out {sum(job.skipped.values()):,} files that are no images by their names or kinds: {extensions} (input.extensions)"
        )
    if job.duplicates:
        notes.append(f"{job.duplicates:,} inputs were listed more than once; each is done once")
    if job.repeated:
        notes.append(f"{job.repeated:,} manifest lines repeat a URI; each line gets a row of its own")
    return notes
