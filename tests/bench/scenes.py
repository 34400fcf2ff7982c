"""Scenes of the benchmark: image sets, models, contenders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.bench.images import LARGE, SMALL, ImageSet


@dataclass(frozen=True)
class Contender:
    """A way of doing the job.

    Attributes:
        name: As it stands in tables.
        module: In ``tests.bench.contenders``.
        options: Of its command line.
        own_python: Whether it needs the packages that only the benchmark has.
        says: One line for the report.
    """

    name: str
    module: str
    options: tuple[str, ...] = ()
    own_python: bool = False
    says: str = ""


@dataclass(frozen=True)
class Scene:
    """Images and a model, and who competes.

    Attributes:
        name: As it stands in tables.
        images: The set.
        count: Images of it.
        model: torchvision's name.
        contenders: Their names.
        options: For the command line of all of them.
    """

    name: str
    images: ImageSet
    count: int
    model: str
    contenders: tuple[str, ...]
    options: tuple[str, ...] = ()


_CORES = len(os.sched_getaffinity(0))
_TWO = ("--actors", str(_CORES))


def _ours(precision: str) -> Contender:
    options = ("--precision", precision, *_TWO)
    return Contender(f"ours-{precision}", "ours", options, says=f"(e) this project in {precision}, an actor a core")


CONTENDERS = (
    Contender("article", "article", says="(a) the article's pipeline, one actor"),
    Contender("article-2", "article", _TWO, says="(a) with an actor a core"),
    Contender("ray-benchmark", "ray_benchmark", _TWO, says="(b) Ray's image classification benchmark, an actor a core"),
    Contender("dataloader", "dataloader", says="(c) a PyTorch DataLoader, a worker a core"),
    Contender("daft", "daft", own_python=True, says="(d) Daft on its native runner"),
    _ours("float32"),
    _ours("auto"),
    _ours("bfloat16"),
    Contender("bound-float32", "bound", ("--precision", "float32"), says="(f) the bound in float32"),
    Contender("bound-bfloat16", "bound", ("--precision", "bfloat16"), says="(f) the bound with bfloat16 weights"),
)
_ALL = tuple(c.name for c in CONTENDERS)

SCENES = (
    Scene("mobilenet_v3_small", SMALL, 2000, "mobilenet_v3_small", _ALL),
    Scene("resnet18", SMALL, 1000, "resnet18", _ALL),
    # With the published batches of 32 and 100 there would be too few of them to take a rate from.
    Scene(
        "mobilenet_v3_small, 12 MP", LARGE, 200, "mobilenet_v3_small",
        ("article", "article-2", "ray-benchmark", "ours-float32", "bound-float32"), ("--batch-size", "8"),
    ),
)  # fmt: skip


def shortened(scenes: Sequence[Scene]) -> tuple[Scene, ...]:
    """Return the scenes with a few images: they show that everything works, and measure nothing."""
    return tuple(replace(scene, count=8 if scene.images is LARGE else 48) for scene in scenes)
