"""Every code block of every document is of a known language, and what it says exists: options, targets, keys, files.

Whole documents whose blocks are run, too: tests/job/test_documents.py. Charts that are installed: tests/charts/test_documents.py.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from batch_inference.cli.app import app
from batch_inference.config import JobConfig, load_config, parse_config
from tests.support.documents import REPOSITORY, Block, blocks, commands, documents, helm_values

# Programs that only the reader has, or that everyone has.
_OTHERS = {
    "az",
    "cosign",
    "gh",
    "xargs",
    "mkdir",
    "tee",
    "jq",
    "git",
    "cat",
    "ls",
    "cd",
    "nice",
    "aws",
    "pip",
    "eval",
    "ray",
}
# Folders of values that a command before has written.
_WRITTEN = ("build/",)


def _chart(name: str = "rayjob") -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema and the values of a chart."""
    folder = REPOSITORY / "helm" / name
    return json.loads((folder / "values.schema.json").read_text()), yaml.safe_load((folder / "values.yaml").read_text())


def _check_values(values: dict[str, Any], chart: str = "rayjob") -> None:
    """Values for a chart are such that its schema takes them, on top of its own."""
    schema, given = _chart(chart)

    def over(base: Any, top: Any) -> Any:
        if not isinstance(base, dict) or not isinstance(top, dict):
            return top
        return base | {key: over(base.get(key), value) for key, value in top.items()}

    jsonschema.Draft7Validator(schema).validate(over(given, values))


def _python(block: Block) -> None:
    compile(block.text, str(block), "exec")


def _yaml(block: Block) -> None:
    for data in yaml.safe_load_all(block.text):
        if "apiVersion" in data:
            assert {"kind", "metadata"} <= set(data)
        elif set(data) <= set(JobConfig.model_fields):
            parse_config(data)
        else:
            _check_values(data)


def _dockerfile(block: Block) -> None:
    program = shutil.which("hadolint") or str(Path(sys.executable).parent / "hadolint")
    done = subprocess.run([program, "-"], input=block.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def _drawing(block: Block) -> None:
    """Pictures, and what a program prints."""


def _sh(block: Block) -> None:
    for words in commands(block.text):
        name = words[0].rpartition("/")[2]
        check = _COMMANDS.get(name)
        assert check or name in _OTHERS, f"{block}: nothing is known of {name}"
        if check:
            try:
                check(words[1:])
            except Exception as exc:
                raise AssertionError(f"{block}: {' '.join(words)}: {exc}") from exc


def _batch_inference(words: list[str]) -> None:
    command = typer.main.get_command(app)
    context = command.make_context("batch-inference", list(words), resilient_parsing="--help" in words)
    if not words or words[0].startswith("-"):
        return
    name, inner, rest = command.resolve_command(context, words)  # type: ignore[attr-defined]
    parsed = inner.make_context(name, rest, parent=context).params
    settings = parsed.get("settings") or []
    needs_class = any(text.startswith("predictor.") for text in settings)
    load_config({"predictor": "module:Class"} if needs_class else None, settings=settings)


def _make(words: list[str]) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in words if "=" not in word and not word.startswith("-")} <= targets


def _helm(words: list[str]) -> None:
    assert words[0] in ("install", "upgrade", "template", "test", "uninstall", "rollback", "package", "list", "get")
    for option, file in itertools.pairwise(words):
        if option in ("--values", "-f"):
            assert "/" not in file or file.startswith(_WRITTEN) or (REPOSITORY / file).exists(), f"no {file}"
    if words[0] in ("install", "upgrade", "template"):
        path = next(word for word in words[2:] if "/" in word)
        # A package of a release, or a chart of others.
        if path.startswith("oci://") or "--repo" in words:
            return
        assert (REPOSITORY / path / "Chart.yaml").exists(), f"there is no chart {path}"
        _check_values(helm_values(words), path.rpartition("/")[2])


def _files_exist(*options: str) -> Callable[[list[str]], None]:
    def check(words: list[str]) -> None:
        for option, file in itertools.pairwise(words):
            if file.startswith("https://"):
                (version,) = re.findall(r"/(v\d+\.\d+\.\d+)/", file)
                tested = "".join(mod.read_text() for mod in (REPOSITORY / "docker/kind/modules").glob("*/go.mod"))
                assert f" {version}" in tested, f"{version} is not the version that is tested"
            elif option in options and file != "-":
                assert (REPOSITORY / file).exists(), f"there is no {file}"

    return check


def _python_program(words: list[str]) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), f"there is no module {words[1]}"
    elif words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif "/" in words[0]:
        assert (REPOSITORY / words[0]).exists(), f"there is no {words[0]}"


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "batch-inference": _batch_inference,
    "make": _make,
    "helm": _helm,
    "kubectl": _files_exist("--filename", "-f", "--patch-file", "--kustomize"),
    "docker": _files_exist("--file"),
    "python": _python_program,
    "pytest": _files_exist(),
}
_LANGUAGES: dict[str, Callable[[Block], None]] = {
    "python": _python,
    "yaml": _yaml,
    "sh": _sh,
    "dockerfile": _dockerfile,
    "": _drawing,
}


@pytest.mark.parametrize("block", [block for name in documents() for block in blocks(name)], ids=str)
def test_block(block: Block) -> None:
    assert block.language in _LANGUAGES, f"{block}: nothing is known of the language {block.language}"
    _LANGUAGES[block.language](block)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("sh", "batch-inference run photos/ --outptu out/"),
        ("sh", "batch-inference run photos/ --set inference.actor=1"),
        ("sh", "make no-such-target"),
        ("sh", "helm install a helm/rayjob --set job.inference.actor=1"),
        ("sh", "helm install a helm/rayjob --set-json job.inference.actors=0.5"),
        ("sh", "kubectl apply --filename k8s/no-such-file.yaml"),
        ("sh", "nobody-knows-this"),
        ("python", "def f(:"),
        ("yaml", "job: {inference: {actor: 1}}"),
        ("yaml", "inference: {actors: none}"),
        ("dockerfile", "FORM debian"),
        ("brainfuck", "+"),
    ],
)
def test_mistake_in_a_block_is_found(language: str, text: str) -> None:
    with pytest.raises(Exception):  # noqa: B017 - of whatever kind
        test_block(Block("none.md", 1, "", language, text + "\n"))
