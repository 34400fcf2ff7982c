"""Refuse an output that is a file, a pipe, or mixed up with the inputs."""

from __future__ import annotations

import os
import posixpath
import shlex
from collections.abc import Iterator
from pathlib import Path

from batch_inference.config import JobConfig
from batch_inference.errors import UserError
from batch_inference.storage.store import Store
from batch_inference.storage.uris import WILDCARDS, canonical_uri, display_uri, is_local, local_path

# Endings of files that people write results into; folders hardly ever have one of them.
_FILE_ENDINGS = frozenset(
    [
        ".csv",
        ".tsv",
        ".txt",
        ".json",
        ".jsonl",
        ".ndjson",
        ".parquet",
        ".arrow",
        ".feather",
        ".xlsx",
        ".xls",
        ".db",
        ".sqlite",
        ".html",
        ".pkl",
        ".npy",
        ".npz",
        ".h5",
        ".hdf5",
        ".zip",
        ".tar",
        ".gz",
        ".tgz",
        ".lance",
        ".jpg",
        ".jpeg",
        ".png",
    ]
)


def check_output(config: JobConfig) -> list[str]:
    """Refuse an output that cannot be one, or whose files would be mixed up with the inputs.

    Returns:
        Warnings about an output that is allowed.

    Raises:
        UserError: If the output is refused, with what to write instead.
    """
    given = config.output.uri
    if not given:
        return []
    if given == "-" or given.startswith(("/dev/", "/proc/")):
        raise UserError(
            f"--output {given} is a pipe or a device, and an output is a folder",
            "Write --output out; print the rows with: python -c \"import pandas; print(pandas.read_parquet('out/predictions').to_csv())\"",
        )
    uri = canonical_uri(given).rstrip("/")
    ending = posixpath.splitext(uri)[1].lower()
    if ending in _FILE_ENDINGS and not _is_folder_or_job(uri, config):
        raise UserError(
            f"--output {given} is the name of a file, and an output is a folder", _instead_of_file(uri, ending)
        )
    return list(_check_inputs(config, _resolve_links(uri)))


def _instead_of_file(uri: str, ending: str) -> str:
    folder = display_uri(uri[: -len(ending)])
    remedy = f"Write --output {shlex.quote(folder)}"
    method = {
        ".csv": "to_csv",
        ".json": "to_json",
        ".jsonl": "to_json",
        ".parquet": "to_parquet",
        ".xlsx": "to_excel",
    }.get(ending)
    if method is None:
        return f"{remedy}."
    rows = "pandas.read_parquet('" + folder + "/predictions')"
    return f"{remedy}; afterwards: python -c \"import pandas; {rows}.{method}('{display_uri(uri)}')\""


def _is_folder_or_job(uri: str, config: JobConfig) -> bool:
    """Return whether there is a local folder of this name; in a bucket, whether it holds a job."""
    if is_local(uri):
        return Path(local_path(uri)).is_dir()
    return Store(uri, config.storage).size("_job.json") is not None


def _resolve_links(uri: str) -> str:
    """Return the URI that symbolic links lead to."""
    return "file://" + os.path.realpath(local_path(uri)) if is_local(uri) else uri


def _check_inputs(config: JobConfig, output: str) -> Iterator[str]:
    """Compare the output with every input; yield warnings, raise UserError."""
    inputs = config.input
    for given in (*inputs.uris, *([inputs.manifest] if inputs.manifest else [])):
        try:
            uri = canonical_uri(given).rstrip("/")
        except UserError:
            continue  # refused when the inputs are listed
        exists = is_local(uri) and Path(local_path(uri)).exists()
        wildcard = None if exists else WILDCARDS.search(uri)
        folder = _resolve_links(uri[: wildcard.start()].rpartition("/")[0] if wildcard else uri)
        inside = _path_below(folder, output)
        shown = display_uri(output)
        if folder == output and given != inputs.manifest:
            if not wildcard and not _is_job(output, config):
                raise UserError(
                    f"the output {shown} is the input folder itself: the job's files and the images would be mixed",
                    f"Write --output {shlex.quote(shown + '-predictions')}.",
                )
            yield f"the output {shown} is the folder of the input {given}; a job over all of that folder lists the output's files, too"
        elif inside.split("/")[0] in ("predictions", "errors"):
            raise UserError(
                f"the input {given} lies in {shown}/{inside.split('/')[0]}, where a job deletes what is not its own",
                f"Write --output {shlex.quote(shown + '-2')}.",
            )
        elif inside and given != inputs.manifest:
            yield f"the input {given} lies in the output {shown}: deleting the output deletes the images as well"
        elif _path_below(output, folder) and given != inputs.manifest and inputs.recursive and not wildcard:
            yield f"the output {shown} lies in the input folder {display_uri(folder)}: a later job over it finds the output's files"


def _is_job(output: str, config: JobConfig) -> bool:
    if is_local(output):
        return Path(local_path(output), "_job.json").is_file()
    return Store(output, config.storage).size("_job.json") is not None


def _path_below(uri: str, folder: str) -> str:
    """Return the path of a URI below a folder, "" if it is not below it."""
    return uri[len(folder) + 1 :] if uri.startswith(folder.rstrip("/") + "/") else ""
