"""The guide, and each recipe, as a reader follows them: files are written, programs run, in order, in one folder.

What the reader has and the tests have not: published weights (the network's own, at random, lie where torchvision looks for
downloads), a registry, a cluster of Kubernetes. Commands for the last two are left out here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.support import spark
from tests.support.documents import Block, blocks, commands, headings
from tests.support.jobs import environment
from tests.support.limits import HANG_S
from tests.support.servers import BIN, ray_cluster

GUIDE, RECIPES = "docs/guide.md", "docs/recipes.md"
ELSEWHERE = {"docker", "helm", "kubectl"}
# Ray, torch and a network, several times over, on cores that others use, too.
BLOCK_S = HANG_S


class Reader:
    """Somebody with a folder of photos who does what a document says."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder = folder
        path = os.pathsep.join([str(BIN), os.environ["PATH"]])
        # Which Ray is used does not show in the documents; one that is running already starts faster.
        self.env = environment({"PATH": path, "RAY_ADDRESS": address})

    def follow(self, block: Block) -> str:
        """Does what a block says; returns what was printed."""
        if block.file:
            (self.folder / block.file).write_text(block.text)
            return ""
        if block.language == "sh":
            if any(words[0] in ELSEWHERE for words in commands(block.text)):
                return ""
            return self.call(block, ["bash", "-euo", "pipefail", "-c", block.text])
        assert block.language == "python", f"{block}: a reader of {block.language} does not know what to do"
        (self.folder / "cell.py").write_text(block.text)
        return self.call(block, [sys.executable, "cell.py"])

    def call(self, block: Block, command: list[str], **env: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.env | env, capture_output=True, text=True, timeout=BLOCK_S, check=False
        )
        assert done.returncode == 0, f"{block} ended with {done.returncode}:\n{done.stdout}\n{done.stderr[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def cluster_with_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Ray cluster whose processes find weights of torchvision's as if they had been downloaded."""
    import torch
    from torchvision.models import get_model, get_model_weights

    home = tmp_path_factory.mktemp("torch")
    (home / "hub" / "checkpoints").mkdir(parents=True)
    for name in ("resnet18", "mobilenet_v3_small"):
        torch.manual_seed(0)
        file = get_model_weights(name)["DEFAULT"].url.rpartition("/")[2]
        torch.save(get_model(name).state_dict(), home / "hub" / "checkpoints" / file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        with ray_cluster(4, tmp_path_factory.mktemp("ray")) as addresses:
            yield addresses["address"]


@pytest.fixture
def reader(tmp_path: Path, cluster_with_weights: str, photos: Callable[..., Path]) -> Reader:
    photos(11)
    (tmp_path / "photos" / "z-broken.jpg").write_bytes(b"no image")
    return Reader(tmp_path, cluster_with_weights)


def test_guide(reader: Reader) -> None:
    printed: dict[str, list[str]] = {}
    for block in blocks(GUIDE):
        printed.setdefault(block.section[:1], []).append(reader.follow(block))
    said = {step: "\n".join(texts) for step, texts in printed.items()}
    assert len(re.findall(r"^image-\d+\.jpg: .+ \(\d+\.\d%\)$", said["1"], re.MULTILINE)) == 2
    assert len(re.findall(r"^file://\S+ .+ \(\d+\.\d%\)$", said["2"], re.MULTILINE)) == 11
    assert "z-broken.jpg decode UNKNOWN_FORMAT" in said["2"]
    assert "11 predictions and 1 error," in said["3"] and "OK: all 12 inputs are there exactly once" in said["3"]
    assert "this job was done already" in said["3"]
    # In the image, the class is found by PYTHONPATH.
    (reader.folder / "elsewhere").mkdir()
    (reader.folder / "predictor.py").rename(reader.folder / "elsewhere" / "predictor.py")
    words = ["run", "photos/", "--output", "image/", "--config", "job.yaml"]
    words += ["--set", "inference.actors=1", "--set", "inference.gpus_per_actor=0"]
    values = yaml.safe_load((reader.folder / "values.yaml").read_text())
    (reader.folder / "job.yaml").write_text(yaml.safe_dump(values["job"]))
    reader.call(blocks(GUIDE)[-1], ["batch-inference", *words], PYTHONPATH=str(reader.folder / "elsewhere"))


@pytest.mark.parametrize(
    "section", [text for text in headings(RECIPES) if any(b.section == text for b in blocks(RECIPES))]
)
def test_recipe(reader: Reader, section: str) -> None:
    mine = [block for block in blocks(RECIPES) if block.section == section]
    if any("source: file" in block.text for block in mine):
        # A relative path of a weights file is meant where actors are, too: in a Ray that starts in this folder.
        del reader.env["RAY_ADDRESS"]
    for block in mine:
        if "pyspark" in block.text:
            reader.env |= spark.variables()
        reader.follow(block)
