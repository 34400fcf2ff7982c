"""Where an output may lie: in a folder of its own, apart from the inputs."""

from __future__ import annotations

import os
import posixpath
import shlex
from collections.abc import Iterator
from pathlib import Path

from batch_inference.config import JobConfig
from batch_inference.errors import UserError
from batch_inference.storage import WILDCARDS, Store, canonical_uri, display, is_local, local_path

# Endings of what people write results into; a folder hardly ever has one of them.
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
    """Refuse an output that can't be one, or in which the job and its inputs would take each other's files for their own.

    Returns:
        What is allowed and still worth a warning.

    Raises:
        UserError: With what to write instead.
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
    return list(_notes(config, _real(uri)))


def _instead_of_file(uri: str, ending: str) -> str:
    folder = display(uri[: -len(ending)])
    write = f"Write --output {shlex.quote(folder)}"
    turn = {
        ".csv": "to_csv",
        ".json": "to_json",
        ".jsonl": "to_json",
        ".parquet": "to_parquet",
        ".xlsx": "to_excel",
    }.get(ending)
    if turn is None:
        return f"{write}."
    rows = "pandas.read_parquet('" + folder + "/predictions')"
    return f"{write}; afterwards: python -c \"import pandas; {rows}.{turn}('{display(uri)}')\""


def _is_folder_or_job(uri: str, config: JobConfig) -> bool:
    """Whether there is a folder of this name; in a store, whether a job is in it."""
    if is_local(uri):
        return Path(local_path(uri)).is_dir()
    return Store(uri, config.storage).size("_job.json") is not None


def _real(uri: str) -> str:
    """The URI of what links lead to."""
    return "file://" + os.path.realpath(local_path(uri)) if is_local(uri) else uri


def _notes(config: JobConfig, output: str) -> Iterator[str]:
    section = config.input
    for given in (*section.uris, *([section.manifest] if section.manifest else [])):
        try:
            place = canonical_uri(given).rstrip("/")
        except UserError:
            continue  # refused where the inputs are listed
        wildcard = WILDCARDS.search(place) if not (is_local(place) and Path(local_path(place)).exists()) else None
        folder = _real(place[: wildcard.start()].rpartition("/")[0] if wildcard else place)
        where = display(output)
        if folder == output and given != section.manifest:
            if not wildcard and not _is_job(output, config):
                raise UserError(
                    f"the output {where} is the input folder itself: a job's files and its images would be mixed",
                    f"Write --output {shlex.quote(where + '-predictions')}.",
                )
            yield f"the output {where} is the folder of the input {given}; a job over all of that folder lists the output's files, too"
        elif _below(folder, output) and _below(folder, output).split("/")[0] in ("predictions", "errors"):
            raise UserError(
                f"the input {given} lies in {where}/{_below(folder, output).split('/')[0]}, where a job deletes what is not its own",
                f"Write --output {shlex.quote(where + '-2')}.",
            )
        elif _below(folder, output) and given != section.manifest:
            yield f"the input {given} lies in the output {where}: deleting the output deletes the images as well"
        elif _below(output, folder) and given != section.manifest and section.recursive and not wildcard:
            yield f"the output {where} lies in the input folder {display(folder)}: a later job over it finds the output's files"


def _is_job(output: str, config: JobConfig) -> bool:
    if is_local(output):
        return Path(local_path(output), "_job.json").is_file()
    return Store(output, config.storage).size("_job.json") is not None


def _below(place: str, folder: str) -> str:
    """The path of a place below a folder, "" where it is not."""
    return place[len(folder) + 1 :] if place.startswith(folder.rstrip("/") + "/") else ""
