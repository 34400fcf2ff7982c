"""List local files, folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator

from batch_inference.errors import UserError
from batch_inference.inputs.listed import (
    OUTPUT_FILES,
    OUTPUT_NAMES,
    SPECIAL_FILES,
    ListedObject,
    OutputFolders,
    count_skipped,
)
from batch_inference.storage.fetcher import special_file_type
from batch_inference.storage.store import file_uri
from batch_inference.storage.uris import WILDCARDS, display_uri, local_path
from batch_inference.text import format_count


def list_local(uri: str, recursive: bool, skipped: dict[str, int]) -> Iterator[ListedObject]:
    """Yield the files that a local location names.

    Raises:
        UserError: If there is no such file or folder, or a folder can't be listed.
    """
    path = local_path(uri)
    if os.path.isfile(path):
        yield ListedObject(file_uri(path), True, None)
    elif os.path.isdir(path):
        for file in _walk(path, recursive, OutputFolders(_read_job), skipped):
            yield ListedObject(file_uri(file), False, None)
    elif os.path.exists(path):  # noqa: PTH110
        mode = os.stat(path).st_mode  # noqa: PTH116
        raise UserError(
            f"{display_uri(uri)} is {special_file_type(mode)}, not a regular file",
            "Name the file or folder of the images.",
        )
    elif wildcard := WILDCARDS.search(path):
        start = path.rfind("/", 0, wildcard.start()) + 1
        yield from _list_glob(uri, path, start, skipped)
    else:
        longer = next(glob.iglob(glob.escape(path) + "*"), None)  # noqa: PTH207
        raise UserError(
            f"there is no file or folder {display_uri(uri)}",
            f"Names begin so; write {display_uri(uri)}* for them."
            if longer and not path.endswith("/")
            else "Check the path; relative ones start at the current directory.",
        )


def _list_glob(uri: str, path: str, start: int, skipped: dict[str, int]) -> Iterator[ListedObject]:
    """Yield the files that a glob matches; its first wildcard is in the part of the path behind ``start``."""
    outputs = OutputFolders(_read_job)
    folders = files = 0
    for match in glob.iglob(path, recursive=True):  # noqa: PTH207 - a Path would collapse the `**` that the user wrote
        if os.path.isdir(match):
            folders += 1
        elif outputs.contain(match, start):
            count_skipped(skipped, OUTPUT_FILES)
        elif os.path.exists(match) and not os.path.isfile(match):  # noqa: PTH110
            count_skipped(skipped, SPECIAL_FILES)
        else:
            files += 1
            yield ListedObject(file_uri(match), False, None)
    if folders and not files:
        raise UserError(
            f"{display_uri(uri)} matches {format_count(folders, 'folder')} and no file",
            f"Write {display_uri(uri)}/** for what is in them.",
        )


def _walk(folder: str, recursive: bool, outputs: OutputFolders, skipped: dict[str, int]) -> Iterator[str]:
    """Yield files below a folder, and links that lead nowhere, which fail as inputs."""
    folders = [folder.rstrip("/") or "/"]
    while folders:
        root = folders.pop()
        try:
            with os.scandir(root) as entries:
                for entry in entries:
                    name = entry.name
                    # Hidden files and folders are tools' own (.git, .DS_Store), as in every lister.
                    if name.startswith("."):
                        continue
                    if name in OUTPUT_NAMES and outputs.is_output(root.rstrip("/") + "/"):
                        count_skipped(skipped, OUTPUT_FILES, _count_files(entry.path))
                    elif _leads_to(entry.is_file):
                        yield entry.path
                    elif _leads_to(entry.is_dir):
                        if recursive and not _leads_back(root, name):
                            folders.append(entry.path)
                    elif os.path.exists(entry.path):  # noqa: PTH110
                        count_skipped(skipped, SPECIAL_FILES)
                    else:
                        yield entry.path
        except OSError as exc:
            location = display_uri(file_uri(root))
            raise UserError(
                f"cannot list the folder {location}: {exc.strerror}", "Make it readable, or leave it out."
            ) from None


def _leads_to(is_type: Callable[[], bool]) -> bool:
    """Return whether a directory entry is of a type; False for a link that goes round in circles."""
    try:
        return is_type()
    except OSError:
        return False


def _leads_back(root: str, folder: str) -> bool:
    """Return whether a link to a folder would send the walk round in circles."""
    path = os.path.join(root, folder)  # noqa: PTH118
    if not os.path.islink(path):  # noqa: PTH114
        return False
    return (os.path.realpath(root) + "/").startswith(os.path.realpath(path) + "/")


def _count_files(path: str) -> int:
    return sum(len(files) for _, _, files in os.walk(path)) if os.path.isdir(path) else 1


def _read_job(folder: str) -> bytes | None:
    try:
        path = folder + "_job.json"
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return None
